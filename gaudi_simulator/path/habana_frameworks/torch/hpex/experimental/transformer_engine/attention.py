"""Attention on FP8 numbers."""

from __future__ import annotations

import torch

from habana_frameworks.torch.hpex.kernels import FusedSDPA

from .distributed import quantise
from .fp8 import Scaling, Settings, is_fp8_enabled, settings, widen


class _Rounded(torch.autograd.Function):
    """What FP8 makes of a tensor, and of its gradient."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, forward: Scaling | None, backward: Scaling | None, how: Settings):
        ctx.backward_scaling, ctx.how = backward, how
        if forward is None:
            return x.view_as(x)
        return widen(*quantise(forward, x, how.recipe.fp8_format.value.forward, how), x.dtype)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        if ctx.backward_scaling is not None:
            grid = ctx.how.recipe.fp8_format.value.backward
            gradient = widen(*ctx.backward_scaling.quantise(gradient, grid, ctx.how), gradient.dtype)
        return gradient, None, None, None


class FusedAttention(torch.nn.Module):
    """`FusedSDPA` of query, key and value rounded to FP8 numbers; the gradient of its result is rounded too.

    The softmax and its product with the values are those of the ordinary kernel. Outside of `fp8_autocast`: the
    ordinary kernel alone.
    """

    def __init__(self, scale: float | None = None, attention_dropout: float = 0.0, enable_recompute: bool = False):
        super().__init__()
        self.scale, self.attention_dropout, self.enable_recompute = scale, attention_dropout, enable_recompute
        self._scalings = [Scaling() for _ in range(4)]

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
        softmax_mode: str = "None",
    ) -> torch.Tensor:
        """Shapes as `FusedSDPA`."""
        how = settings()
        operands = (query, key, value)
        if is_fp8_enabled():
            pairs = zip(operands, self._scalings, strict=False)
            operands = [_Rounded.apply(operand, scaling, None, how) for operand, scaling in pairs]
        dropout = self.attention_dropout if self.training else 0.0
        result = FusedSDPA.apply(
            *operands, attn_mask, dropout, is_causal, self.scale, softmax_mode, self.enable_recompute
        )
        return _Rounded.apply(result, None, self._scalings[3], how) if is_fp8_enabled() else result
