"""The Transformer Engine by the name under which accelerate looks for it on a Gaudi."""

from habana_frameworks.torch.hpex.experimental.transformer_engine import FusedAttention, Linear, fp8_autocast

from . import recipe

__all__ = ["FusedAttention", "Linear", "fp8_autocast", "recipe"]
