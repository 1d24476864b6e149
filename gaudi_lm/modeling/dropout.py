"""Dropout on a CPU, alone and within attention: faster than PyTorch's own, with a fraction of its memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

BLOCK_ROWS = 128  # with 12 heads and 512 keys, a block of attention weights is 3 MiB: it stays in the cache

_stock_attention, _stock_dropout = functional.scaled_dot_product_attention, functional.dropout


def install_dropout(ours: bool = True) -> None:
    """Let two functions of `torch.nn.functional` go through this module, in this process, where they drop on a CPU.

    PyTorch's fused attention of a CPU knows no dropout: with it, each layer keeps its weights before and after dropout
    and the noise, and computes what a causal mask removes. And its generator takes longer for a number than the rest
    of the dropout. Every model is served, also where gradient checkpointing runs a part again. Everything else still
    goes to PyTorch's own. What is dropped here can be differentiated once.

    Args:
        ours: False puts PyTorch's own back.
    """
    functional.scaled_dot_product_attention = scaled_dot_product_attention if ours else _stock_attention
    functional.dropout = dropout if ours else _stock_dropout


def _can_drop(probability: float, tensor: Tensor) -> bool:
    return (
        2**-16 <= float(probability) <= 1 - 2**-16
        and tensor.device.type == "cpu"
        and tensor.dtype in (torch.float32, torch.float64)
        and tensor.numel() > 0
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """PyTorch's function of this name, with the same distribution from other random draws."""
    if not training or inplace or not _can_drop(p, input):
        return _stock_dropout(input, p, training, inplace)
    return _Dropout.apply(input, p)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, probability):
        noise_of = _Noise(probability)
        noise = noise_of(input.shape)
        ctx.save_for_backward(noise)
        ctx.gain = noise_of.gain
        return torch.mul(input, noise).mul_(ctx.gain)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (noise,) = ctx.saved_tensors
        return torch.mul(grad, noise).mul_(ctx.gain), None


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """PyTorch's function of this name; with dropout, the same distribution from other random draws."""
    ours = (
        _can_drop(dropout_p, query)
        and query.dim() == 4
        and query.shape[:2] == key.shape[:2] == value.shape[:2]
        and key.shape[2] == value.shape[2] > 0
        and query.dtype == key.dtype == value.dtype
        and not torch.is_autocast_enabled("cpu")
        and not (is_causal and (attn_mask is not None or query.shape[2] != key.shape[2]))
        and (attn_mask is None or attn_mask.dtype in (torch.bool, query.dtype) and not attn_mask.requires_grad)
    )
    if not ours:
        options = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal}
        return _stock_attention(query, key, value, **options, scale=scale, enable_gqa=enable_gqa)
    if is_causal:
        attn_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device="cpu").tril_()
    if attn_mask is not None:  # to (batch or 1, heads or 1, rows, keys)
        attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())].expand(-1, -1, query.shape[2], key.shape[2])
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    # Laid out as the models lay out the heads' outputs next: (batch, rows, heads, width).
    return _DropoutAttention.apply(query, key, value, attn_mask, dropout_p, scale).transpose(1, 2)


class _DropoutAttention(torch.autograd.Function):
    """Blocks of query rows, one after the other; the backward pass computes the weights again from query and key.

    After FlashAttention (Dao et al., arXiv:2205.14135, appendix B), whose sum of output times gradient stands for the
    softmax's. What it keeps of the noise is one byte for each weight. Keys that a whole block may not see are left
    out: of a causal mask nearly half, of packed sequences most.
    """

    @staticmethod
    def forward(ctx, query, key, value, mask, probability, scale):
        batch, heads, length, _ = query.shape
        weights_of = _Weights(query, key, mask, scale)
        noise_of = _Noise(probability)
        output = query.new_empty(batch, length, heads, value.shape[-1])
        by_head, kept = output.transpose(1, 2), []
        for item, rows, keys in weights_of.blocks():
            weights = weights_of(item, rows, keys)
            kept.append(noise_of(weights.shape))
            by_head[item, :, rows] = torch.bmm(weights.mul_(kept[-1]), value[item, :, keys])
        output *= noise_of.gain
        ctx.save_for_backward(query, key, value, mask, output, *kept)
        ctx.settings = scale, noise_of.gain
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        query, key, value, mask, output, *kept = ctx.saved_tensors
        output, grad_output = output.transpose(1, 2), grad_output.transpose(1, 2)
        scale, gain = ctx.settings
        weights_of = _Weights(query, key, mask, scale)
        grad_query, grad_key, grad_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for (item, rows, keys), noise in zip(weights_of.blocks(), kept, strict=True):
            weights = weights_of(item, rows, keys)
            noise = noise.to(weights.dtype)
            grad = grad_output[item, :, rows]
            mean = (grad * output[item, :, rows]).sum(2, keepdim=True)
            grad = grad * gain
            grad_scores = torch.bmm(grad, value[item, :, keys].transpose(1, 2)).mul_(noise).sub_(mean).mul_(weights)
            grad_value[item, :, keys].baddbmm_(weights.mul_(noise).transpose(1, 2), grad)
            grad_query[item, :, rows] = torch.bmm(grad_scores, key[item, :, keys]) * scale
            grad_key[item, :, keys].baddbmm_(grad_scores.transpose(1, 2), query[item, :, rows], alpha=scale)
        return grad_query, grad_key, grad_value, None, None, None


class _Weights:
    """Attention weights before dropout, (heads, rows, keys) for one block of one item of the batch."""

    def __init__(self, query: Tensor, key: Tensor, mask: Tensor | None, scale: float):
        self.query, self.key, self.scale = query, key, scale
        self.bias = self.visible = self.blind = None
        if mask is None:
            return
        if mask.dtype == torch.bool:
            self.bias = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
            visible = mask
        else:
            self.bias = mask
            # Models write the lowest number for what is not to be seen. In a row that sees something its weight is 0.
            visible = mask > torch.finfo(mask.dtype).min / 2
            visible |= ~visible.any(3, keepdim=True)
        self.visible = visible.any(1)
        # A row that may see nothing attends to nothing, as in PyTorch.
        blind = torch.isneginf(self.bias.amax(3, keepdim=True))
        if blind.any():
            self.blind = blind

    def blocks(self) -> Iterator[tuple[int, slice, slice]]:
        """For each block its item of the batch, its query rows, and the keys that these may see."""
        batch, _, length, _ = self.query.shape
        keys = self.key.shape[2]
        for start in range(0, length, BLOCK_ROWS):
            rows = slice(start, min(start + BLOCK_ROWS, length))
            spans = [(0, keys)] * batch
            if self.visible is not None:
                seen = self.visible[:, rows].any(1).byte()
                first, behind = seen.argmax(1), keys - seen.flip(1).argmax(1)
                spans = torch.stack([first, behind], 1).expand(batch, 2).tolist()
            for item, span in enumerate(spans):
                yield item, rows, slice(*span)

    def __call__(self, item: int, rows: slice, keys: slice) -> Tensor:
        query, key = self.query[item, :, rows] * self.scale, self.key[item, :, keys].transpose(1, 2)
        if self.bias is None:
            return torch.softmax(torch.bmm(query, key), dim=2)
        item = item if self.bias.shape[0] > 1 else 0
        weights = torch.softmax(torch.baddbmm(self.bias[item, :, rows, keys], query, key), dim=2)
        return weights if self.blind is None else weights.masked_fill_(self.blind[item, :, rows], 0.0)


class _Noise:
    """What stays, as bool tensors; `gain` makes up for those that do not.

    PyTorch's generator gives the seed to a faster one, whose numbers of 16 bits round the probability to a multiple of
    1/65536, and `gain` to match.
    """

    def __init__(self, probability: float):
        self.dropped = round(probability * 2**16)
        self.gain = 2**16 / (2**16 - self.dropped)
        self.generator = np.random.SFC64(int(torch.randint(2**62, (), device="cpu")))

    def __call__(self, shape: torch.Size) -> Tensor:
        drawn = torch.from_numpy(self.generator.random_raw(-(-shape.numel() // 4)).view(np.int16))
        return drawn[: shape.numel()].view(shape) >= self.dropped - 2**15
