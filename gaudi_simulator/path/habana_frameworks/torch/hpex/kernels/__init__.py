"""Fused kernels of Gaudi's bridge, written in plain PyTorch: the same results, none of the fusion.

Until backward they keep the tensors that the bridge keeps (`hpex/kernels`, github.com/HabanaAI/gaudi-pytorch-bridge),
so that the memory of a step is counted as on a card.
"""

from collections.abc import Callable

import torch

from habana_frameworks.torch.hpu import recompute_sdp_enabled


class FusedSDPA:
    """Scaled dot-product attention."""

    @staticmethod
    def apply(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        softmax_mode: str = "None",
        recompute_mode: bool | None = None,
        valid_sequence_lengths: torch.Tensor | None = None,
        padding_side: str = "left",
        *_unused,
    ) -> torch.Tensor:
        """softmax(scale * query key^T + mask) value.

        Kept until backward are query, key, value, the result, and the probabilities; with recomputation, in place of
        the probabilities, the mask and a number for each row.

        query [batch, heads, rows, width]; key, value [batch, kv_heads, columns, width], heads a multiple of kv_heads;
        attn_mask broadcastable to [batch, heads, rows, columns], added when floating, True = attend when boolean;
        recompute_mode: None is what `habana_frameworks.torch.hpu.sdp_kernel` was told;
        valid_sequence_lengths [batch]: columns beyond it (before it, with padding_side "left") are not attended.
        """
        if torch.is_autocast_enabled("hpu"):
            query, key, value = (each.to(torch.get_autocast_dtype("hpu")) for each in (query, key, value))
        rows, columns = query.shape[-2], key.shape[-2]
        if valid_sequence_lengths is not None:
            position = torch.arange(columns, device=query.device)
            lengths = valid_sequence_lengths.to(query.device).reshape(-1, 1, 1, 1)
            valid = position < lengths if padding_side == "right" else position >= columns - lengths
            attn_mask = _both(attn_mask, valid)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        recompute = recompute_sdp_enabled() if recompute_mode is None else recompute_mode
        if recompute and softmax_mode.lower() == "fast" and not is_causal and query.requires_grad:
            raise AssertionError("in training, softmax_mode fast with recomputation is for is_causal alone")
        flash = recompute and not dropout_p and value.shape[-1] == query.shape[-1]
        if is_causal and rows != columns:
            raise NotImplementedError(f"is_causal with {rows} queries and {columns} keys: not known of a Gaudi")
        if is_causal and (attn_mask is not None or not flash):
            causal = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril()
            attn_mask = _both(attn_mask, causal)
            is_causal = False
        least = torch.finfo(query.dtype).min
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, least)
        elif attn_mask is not None:
            attn_mask = attn_mask.to(query.dtype)
        with torch.autocast("hpu", enabled=False):
            if not flash:
                return _Attention.apply(query, key, value, attn_mask, dropout_p, scale, recompute)
            kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            return kernel(query, key, value, 0.0, bool(is_causal), attn_mask=attn_mask, scale=scale)[0]


def _both(mask: torch.Tensor | None, allowed: torch.Tensor) -> torch.Tensor:
    if mask is None:
        return allowed
    if mask.dtype == torch.bool:
        return mask & allowed
    return mask.masked_fill(~allowed, torch.finfo(mask.dtype).min)


def _probabilities(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    scores = (_grouped(query, key) @ key.transpose(-1, -2)).reshape(*query.shape[:-1], key.shape[-2]).mul_(scale)
    return (scores if mask is None else scores.add_(mask)).softmax(-1)


class _Attention(torch.autograd.Function):
    """Attention that saves its probabilities or, to recompute them, the mask; and dropout's mask, a byte each.

    A card that recomputes draws dropout again too, and saves no mask of it.
    """

    @staticmethod
    def forward(ctx, query, key, value, mask, dropout_p: float, scale: float, recompute: bool) -> torch.Tensor:
        probabilities = _probabilities(query, key, mask, scale)
        dropout_mask, dropped = None, probabilities
        if dropout_p:
            dropout_mask = torch.empty_like(probabilities, dtype=torch.bool).bernoulli_(1 - dropout_p)
            dropped = probabilities * _scaled(dropout_mask, probabilities, dropout_p)
        result = (_grouped(dropped, key) @ value).reshape(*query.shape[:-1], value.shape[-1])
        kept = (mask, None) if recompute else (None, probabilities)
        ctx.save_for_backward(query, key, value, *kept, dropout_mask, result)
        ctx.dropout_p, ctx.scale = dropout_p, scale
        return result

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        query, key, value, mask, probabilities, dropout_mask, result = ctx.saved_tensors
        if probabilities is None:
            probabilities = _probabilities(query, key, mask, ctx.scale)
        wide = _grouped(gradient, key)
        of_probabilities = (wide @ value.transpose(-1, -2)).reshape_as(probabilities)
        dropped = probabilities
        if dropout_mask is not None:
            scaled = _scaled(dropout_mask, probabilities, ctx.dropout_p)
            dropped, of_probabilities = probabilities * scaled, of_probabilities * scaled
        of_value = _grouped(dropped, key).transpose(-1, -2) @ wide
        shared = (gradient * result).sum(-1, keepdim=True)
        of_scores = _grouped(of_probabilities.sub_(shared).mul_(probabilities).mul_(ctx.scale), key)
        of_query = (of_scores @ key).reshape_as(query)
        return of_query, of_scores.transpose(-1, -2) @ _grouped(query, key), of_value, None, None, None, None


def _scaled(dropout_mask: torch.Tensor, probabilities: torch.Tensor, dropout_p: float) -> torch.Tensor:
    return dropout_mask.to(probabilities.dtype).mul_(1 / (1 - dropout_p))


def _grouped(tensor: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """[batch, heads, rows, n] -> [batch, kv_heads, heads / kv_heads * rows, n]: the rows that share a head of keys."""
    return tensor.reshape(tensor.shape[0], key.shape[1], -1, tensor.shape[-1])


def _rotate_half(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def _rotate_pairs(x: torch.Tensor) -> torch.Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


class _Rotation(torch.autograd.Function):
    """p cos + rotated(p) sin. Only the tables are kept: the gradient is rotated back."""

    @staticmethod
    def forward(ctx, p, cos, sin, position_ids, rotate: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        ctx.save_for_backward(cos, sin, position_ids)
        ctx.rotate, ctx.dtype = rotate, p.dtype
        return p * _at_positions(cos, position_ids) + rotate(p) * _at_positions(sin, position_ids)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        cos, sin, position_ids = ctx.saved_tensors
        back = ctx.rotate(gradient * _at_positions(sin, position_ids))
        return (gradient * _at_positions(cos, position_ids) - back).to(ctx.dtype), None, None, None, None


def _at_positions(table: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor:
    """[1, 1, positions, width] or [positions, width] -> [batch, 1, sequence, width]."""
    if position_ids is None:
        return table
    return table.reshape(table.shape[-2], table.shape[-1])[position_ids].unsqueeze(1)


class RotaryPosEmbeddingHelperV1:
    """Rotary embedding of consecutive positions from `offset` on."""

    @staticmethod
    def apply(p: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, offset: int = 0) -> torch.Tensor:
        """p [..., sequence, width]; cos, sin [positions, width]."""
        rows = slice(offset, offset + p.shape[-2])
        return _Rotation.apply(p, cos[..., rows, :], sin[..., rows, :], None, _rotate_half)


class RotaryPosEmbeddingHelperV2:
    """Rotary embedding, the halves of a head rotated against one another."""

    @staticmethod
    def apply(
        p: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, position_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """p [batch, heads, sequence, width]; cos, sin [1, 1, positions, width]; position_ids [batch, sequence]."""
        return _Rotation.apply(p, cos, sin, position_ids, _rotate_half)


class RotaryPosEmbeddingHelperV3:
    """Rotary embedding of the first part of a head, neighbouring elements rotated against one another."""

    @staticmethod
    def apply(p: torch.Tensor, rope_cache: torch.Tensor) -> torch.Tensor:
        """p [sequence, batch, heads, width]; rope_cache [positions, batch or 1, rotated / 2, 2]: cos and sin."""
        cos, sin = (
            table.repeat_interleave(2, -1).unsqueeze(2).to(p.dtype) for table in rope_cache[: p.shape[0]].unbind(-1)
        )
        rotated = _Rotation.apply(p[..., : cos.shape[-1]], cos, sin, None, _rotate_pairs)
        return torch.cat((rotated, p[..., cos.shape[-1] :]), -1)
