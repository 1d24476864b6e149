"""The cards are there before anything else asks PyTorch which devices it has."""

import habana_frameworks.torch  # noqa: F401
