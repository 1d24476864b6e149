"""Stand-in of gaudi-lm for hosts without SynapseAI; see the package `gaudi_simulator`."""
