"""Empty: text models need nothing of it, but `optimum.habana` imports the name."""

__version__ = "0.0.0"
