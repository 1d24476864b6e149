"""`FusedRMSNorm` and `FusedClipNorm` in plain PyTorch."""

from collections.abc import Iterable

import torch


class FusedRMSNorm:
    """Root-mean-square normalisation over the last dimension."""

    @staticmethod
    def apply(x: torch.Tensor, weight: torch.Tensor, eps: float, *_unused) -> torch.Tensor:
        """x / sqrt(mean(x^2) + eps) * weight, the statistics in float32. x [..., width], weight [width]."""
        wide = x.float()
        normalised = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return weight * normalised.to(x.dtype)


class FusedClipNorm:
    """Gradient clipping by total norm."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], max_norm: float):
        self.max_norm = max_norm

    def clip_norm(self, parameters: Iterable[torch.nn.Parameter] | torch.Tensor) -> torch.Tensor:
        """Scale the gradients in place to a total norm of at most `max_norm`; the norm before, on the card."""
        return torch.nn.utils.clip_grad_norm_(parameters, self.max_norm)
