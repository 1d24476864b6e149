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

from gaudi_lm.data.masked_token_budget import IGNORE_INDEX


def full_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """The two figures of `chunked_cross_entropy` from logits (batch, length, V) and aligned labels (batch, length)."""
    logits, labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    correct = ((logits.detach().argmax(dim=1) == labels) & (labels != IGNORE_INDEX)).sum()
    loss_sum = functional.cross_entropy(
        logits.float(), labels, ignore_index=IGNORE_INDEX, reduction="sum", label_smoothing=smoothing
    )
    return loss_sum, correct


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    smoothing: float = 0.0,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy of `softcap(scale * (hidden @ weight.T + bias))` against labels, a few rows at a time.

    Args:
        hidden: (..., d) float; weight: (V, d); bias: (V,) or None; labels: (...) int64, -100 is ignored.
        scale, softcap: the logits become `softcap * tanh(scale * logits / softcap)`.
        smoothing: share of a target's weight that is spread evenly over the vocabulary.
        chunk_rows: rows at a time; by default what keeps a chunk of logits in the processor's cache or, on a card,
            smaller than the weight and than 2^26 elements.

    Returns: (sum of the losses, 0-dim float32, differentiable once; number of correct argmaxes, 0-dim int64).
    """
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    if hidden.device.type == "cpu":
        hidden, labels = _targets_alone(hidden, labels)
    if chunk_rows is None:
        elements = 2**23 if hidden.device.type == "cpu" else min(weight.numel(), 2**26)
        chunk_rows = 2 ** max(4, int(math.log2(elements / weight.shape[0])))
    return _ChunkedCrossEntropy.apply(
        hidden, weight, bias, labels, scale, softcap, smoothing, chunk_rows, torch.is_grad_enabled()
    )


def _targets_alone(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Without the rows of prompts and padding, where that saves more than the copy costs.

    Not for a card, where it would make the shapes depend on the data.
    """
    targets = (labels != IGNORE_INDEX).nonzero().squeeze(1)
    if 8 * len(targets) > 7 * len(labels):
        return hidden, labels
    return hidden.index_select(0, targets), labels.index_select(0, targets)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, scale, softcap, smoothing, chunk_rows, grad_enabled):
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        need_hidden, need_weight, need_bias = (grad_enabled and need for need in ctx.needs_input_grad[:3])
        differentiate = need_hidden or need_weight or need_bias
        cast_weight = weight.to(dtype)
        loss_sum = torch.zeros((), dtype=torch.float32, device=hidden.device)
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=hidden.device) if need_weight else None
        grad_bias = torch.zeros(bias.shape, dtype=torch.float32, device=hidden.device) if need_bias else None

        # The classes come first on a CPU: the narrow factor of the product is then the one that is packed anew for
        # each chunk, which makes it a quarter faster.
        classes = 0 if device == "cpu" else 1
        with torch.autocast(device, enabled=False):
            for start in range(0, hidden.shape[0], chunk_rows):
                rows = slice(start, start + chunk_rows)
                logits = grad = None  # those of the rows before, else both are there at once
                valid = labels[rows] != IGNORE_INDEX
                target = labels[rows].clamp(min=0)
                index = target.unsqueeze(classes)
                chunk = hidden[rows].to(dtype)
                if classes == 0:
                    logits = torch.mm(cast_weight, chunk.t()).float()
                else:
                    logits = functional.linear(chunk, cast_weight).float()
                if bias is not None:
                    logits += bias.float().unsqueeze(1 - classes)
                if scale != 1.0:
                    logits *= scale
                if softcap is not None:
                    logits = logits.div_(softcap).tanh_().mul_(softcap)
                highest, best = _highest(logits, classes)
                correct += ((best == target) & valid).sum()
                losses = highest - logits.gather(classes, index).squeeze(classes)
                if smoothing:
                    losses = torch.lerp(losses, highest - logits.mean(classes), smoothing)
                slope = 1 if softcap is None or not differentiate else 1 - (logits / softcap) ** 2
                # In place and by hand: PyTorch's log_softmax over the first dimension takes three times as long.
                grad = logits.sub_(highest.unsqueeze(classes)).exp_()
                total = grad.sum(classes)
                loss_sum += torch.where(valid, losses + total.log(), 0.0).sum()
                if not differentiate:
                    continue
                grad.div_(total.unsqueeze(classes))
                if smoothing:
                    grad.sub_(smoothing / weight.shape[0])
                grad.scatter_add_(classes, index, torch.full_like(index, smoothing - 1, dtype=grad.dtype))
                if softcap is not None:
                    grad.mul_(slope)
                grad = grad.to(dtype)
                by_row, by_class = (grad.t(), grad) if classes == 0 else (grad, grad.t())
                # Ignored rows and the scale act on the narrow factor of each product: a pass over V columns less.
                factor = (valid * scale).unsqueeze(1).to(dtype)
                if grad_hidden is not None:
                    grad_hidden[rows] = torch.mm(by_row, cast_weight) * factor
                if grad_weight is not None and dtype is torch.float32:
                    grad_weight.addmm_(by_class, chunk * factor)
                elif need_weight:
                    grad_weight += torch.mm(by_class, chunk * factor)
                if need_bias:
                    grad_bias += torch.mv(by_class, factor.squeeze(1))

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
        return *scaled, None, None, None, None, None, None


def _highest(logits: Tensor, dim: int, group: int = 256) -> tuple[Tensor, Tensor]:
    """`logits.max(dim)`; over a first dimension, which PyTorch does not vectorise, in two stages."""
    whole = logits.shape[0] // group * group
    if dim != 0 or whole == 0:
        return logits.max(dim)
    groups = logits[:whole].view(whole // group, group, -1)
    best_group = groups.amax(1).argmax(0)
    highest, in_group = groups.gather(0, best_group.expand(1, group, -1)).squeeze(0).max(0)
    index = best_group * group + in_group
    if whole == logits.shape[0]:
        return highest, index
    highest_of_rest, index_in_rest = logits[whole:].max(0)
    index = torch.where(highest_of_rest > highest, index_in_rest + whole, index)
    return torch.maximum(highest, highest_of_rest), index
