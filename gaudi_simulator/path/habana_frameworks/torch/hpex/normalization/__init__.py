"""`FusedRMSNorm` and `FusedClipNorm` in plain PyTorch."""

from collections.abc import Iterable

import torch


class FusedRMSNorm(torch.autograd.Function):
    """Root-mean-square normalisation over the last dimension.

    Until backward it keeps what Gaudi's bridge keeps (`hpex/normalization/FusedRMSNorm.py`,
    github.com/HabanaAI/gaudi-pytorch-bridge): its inputs and a number for each row.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, eps: float, *unused) -> torch.Tensor:
        """x / sqrt(mean(x^2) + eps) * weight, the statistics in float32. x [..., width], weight [width]."""
        wide = x.float()
        inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, inverse)
        ctx.others = 1 + len(unused)
        return weight * (wide * inverse).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        x, weight, inverse = ctx.saved_tensors
        normalised = x.float() * inverse
        rows = list(range(x.dim() - 1))
        of_weight = (gradient * normalised.to(x.dtype)).sum(rows) if ctx.needs_input_grad[1] else None
        scaled = (gradient * weight).float()
        of_x = inverse * (scaled - normalised * (scaled * normalised).mean(-1, keepdim=True))
        return of_x.to(x.dtype), of_weight, *[None] * ctx.others


class FusedClipNorm:
    """Gradient clipping by total norm."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], max_norm: float):
        self.max_norm = max_norm

    def clip_norm(self, parameters: Iterable[torch.nn.Parameter] | torch.Tensor) -> torch.Tensor:
        """Scale the gradients in place to a total norm of at most `max_norm`; the norm before, on the card."""
        return torch.nn.utils.clip_grad_norm_(parameters, self.max_norm)
