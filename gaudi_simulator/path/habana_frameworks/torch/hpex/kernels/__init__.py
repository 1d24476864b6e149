"""Fused kernels of Habana's bridge, written in plain PyTorch: the same results, none of the fusion."""

import torch
import torch.nn.functional as F


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

        query [batch, heads, rows, width]; key, value [batch, kv_heads, columns, width], heads a multiple of kv_heads;
        attn_mask broadcastable to [batch, heads, rows, columns], added when floating, True = attend when boolean;
        valid_sequence_lengths [batch]: columns beyond it (before it, with padding_side "left") are not attended.
        """
        rows, columns = query.shape[-2], key.shape[-2]
        if is_causal and (attn_mask is not None or valid_sequence_lengths is not None):
            causal = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril(columns - rows)
            attn_mask = causal if attn_mask is None else _both(attn_mask, causal)
            is_causal = False
        if valid_sequence_lengths is not None:
            position = torch.arange(columns, device=query.device)
            lengths = valid_sequence_lengths.to(query.device).reshape(-1, 1, 1, 1)
            valid = position < lengths if padding_side == "right" else position >= columns - lengths
            attn_mask = valid if attn_mask is None else _both(attn_mask, valid)
        if attn_mask is not None and attn_mask.dtype not in (torch.bool, query.dtype):
            attn_mask = attn_mask.to(query.dtype)
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, bool(is_causal), scale=scale, enable_gqa=grouped
        )


def _both(mask: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    if mask.dtype == torch.bool:
        return mask & allowed
    return mask.masked_fill(~allowed, torch.finfo(mask.dtype).min)


def _rotate_half(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def _rotate_pairs(x: torch.Tensor) -> torch.Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def _at_positions(table: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor:
    """[1, 1, positions, width] or [positions, width] -> [batch, 1, sequence, width]."""
    if position_ids is None:
        return table
    return table.reshape(table.shape[-2], table.shape[-1])[position_ids].unsqueeze(1)


class RotaryPosEmbeddingHelperV1:
    """Rotary embedding of consecutive positions from `offset` on."""

    @staticmethod
    def apply(p: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, offset: int = 0, *_unused) -> torch.Tensor:
        """p [..., sequence, width]; cos, sin [positions, width]."""
        rows = slice(offset, offset + p.shape[-2])
        return p * cos[..., rows, :] + _rotate_half(p) * sin[..., rows, :]


class RotaryPosEmbeddingHelperV2:
    """Rotary embedding, the halves of a head rotated against one another."""

    @staticmethod
    def apply(
        p: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        *_unused,
    ) -> torch.Tensor:
        """p [batch, heads, sequence, width]; cos, sin [1, 1, positions, width]; position_ids [batch, sequence]."""
        return p * _at_positions(cos, position_ids) + _rotate_half(p) * _at_positions(sin, position_ids)


class RotaryPosEmbeddingHelperV3:
    """Rotary embedding, neighbouring elements rotated against one another."""

    @staticmethod
    def apply(
        p: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        *_unused,
    ) -> torch.Tensor:
        """Shapes as `RotaryPosEmbeddingHelperV2`."""
        return p * _at_positions(cos, position_ids) + _rotate_pairs(p) * _at_positions(sin, position_ids)
