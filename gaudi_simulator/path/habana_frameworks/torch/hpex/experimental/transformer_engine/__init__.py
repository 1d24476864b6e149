"""A stand-in for Habana's Transformer Engine: layers whose operands are really rounded to FP8, with delayed scaling.

It follows the engine's interface as optimum-habana uses it, and FP8 as a Gaudi 2 has it: E4M3 up to 240, E5M2 up to
57344, scales that are powers of two. Products are those of PyTorch on the rounded numbers, summed in float32.
"""

from . import distributed, recipe
from .attention import FusedAttention
from .fp8 import fp8_autocast, is_fp8_enabled
from .linear import Linear

__all__ = ["FusedAttention", "Linear", "distributed", "fp8_autocast", "is_fp8_enabled", "recipe"]
