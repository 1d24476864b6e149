"""The state of the simulated cards: their number, and the library that is the device."""

CARDS = 0
"""Number of simulated cards; 0 without `GAUDI_SIMULATOR`: no device, plain CPU tensors."""
