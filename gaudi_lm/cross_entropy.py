"""Cross-entropy and accuracy of target tokens without the full matrix of logits.

For a batch of N target rows and a vocabulary of V the stock models hold N x V logits, their softmax and their
gradient. Here the vocabulary projection and the loss run over a few rows at a time, and the gradients of hidden
states, weight and bias are made in the forward pass, while the rows' logits are still there (the idea of Liger Kernel
and of Cut Cross-Entropy). A frozen head (LoRA) gets no weight gradient at all.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from gaudi_lm.predictions import IGNORE_INDEX


def full_cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The two figures of `chunked_cross_entropy` from logits (batch, length, V) and aligned labels (batch, length)."""
    logits, labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    correct = ((logits.detach().argmax(dim=1) == labels) & (labels != IGNORE_INDEX)).sum()
    loss_sum = functional.cross_entropy(logits.float(), labels, ignore_index=IGNORE_INDEX, reduction="sum")
    return loss_sum, correct


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy of `softcap(scale * (hidden @ weight.T + bias))` against labels, a few rows at a time.

    Args:
        hidden: (..., d) float; weight: (V, d); bias: (V,) or None; labels: (...) int64, -100 is ignored.
        scale, softcap: the logits become `softcap * tanh(scale * logits / softcap)`.
        chunk_rows: rows at a time; by default what keeps a chunk of logits in the processor's cache or, on a card,
            in a small share of its memory.

    Returns: (sum of the losses, 0-dim float32, differentiable once; number of correct argmaxes, 0-dim int64).
    """
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    if chunk_rows is None:
        elements = 2**23 if hidden.device.type == "cpu" else 2**26
        chunk_rows = 2 ** max(4, int(math.log2(elements / weight.shape[0])))
    return _ChunkedCrossEntropy.apply(
        hidden, weight, bias, labels, scale, softcap, chunk_rows, torch.is_grad_enabled()
    )


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, scale, softcap, chunk_rows, grad_enabled):
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        need_hidden, need_weight, need_bias = (grad_enabled and need for need in ctx.needs_input_grad[:3])
        cast_weight = weight.to(dtype)
        cast_bias = None if bias is None else bias.to(dtype)
        loss_sum = torch.zeros((), dtype=torch.float32, device=hidden.device)
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=hidden.device) if need_weight else None
        grad_bias = torch.zeros(bias.shape, dtype=torch.float32, device=hidden.device) if need_bias else None

        with torch.autocast(device, enabled=False):
            for start in range(0, hidden.shape[0], chunk_rows):
                rows = slice(start, start + chunk_rows)
                valid = labels[rows] != IGNORE_INDEX
                target = labels[rows].clamp(min=0).unsqueeze(1)
                chunk = hidden[rows].to(dtype)
                logits = functional.linear(chunk, cast_weight, cast_bias).float()
                if scale != 1.0:
                    logits = logits.mul_(scale)
                if softcap is not None:
                    logits = logits.div_(softcap).tanh_().mul_(softcap)
                correct += ((logits.argmax(dim=1) == target.squeeze(1)) & valid).sum()
                log_probs = functional.log_softmax(logits, dim=1)
                loss_sum -= torch.where(valid, log_probs.gather(1, target).squeeze(1), 0.0).sum()
                if not (need_hidden or need_weight or need_bias):
                    continue
                grad = log_probs.exp_()
                grad.scatter_add_(1, target, torch.full_like(target, -1, dtype=grad.dtype))
                if softcap is not None:
                    grad.mul_(1 - (logits / softcap) ** 2)
                del logits, log_probs
                grad = grad.to(dtype)
                # Ignored rows and the scale act on the narrow factor of each product: a pass over V columns less.
                factor = (valid * scale).unsqueeze(1).to(dtype)
                if need_hidden:
                    grad_hidden[rows] = torch.mm(grad, cast_weight) * factor
                if need_weight and dtype is torch.float32:
                    grad_weight.addmm_(grad.t(), chunk * factor)
                elif need_weight:
                    grad_weight += torch.mm(grad.t(), chunk * factor)
                if need_bias:
                    grad_bias += torch.mv(grad.t(), factor.squeeze(1))

        ctx.gradients = (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
        )
        ctx.mark_non_differentiable(correct)
        return loss_sum, correct

    @staticmethod
    def backward(ctx, grad_loss, _):
        if ctx.gradients is None:
            raise RuntimeError("the gradients of this loss were already handed out: it can be differentiated once")
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place, to spare a second copy of the weight's
        scaled = [None if gradient is None else gradient.mul_(grad_loss) for gradient in gradients]
        return *scaled, None, None, None, None, None
