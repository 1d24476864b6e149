"""Gaudi's fused attention for BERT, RoBERTa and what is built like them."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gaudi_lm.errors import UserError


class FusedSelfAttention(torch.nn.Module):
    """The self-attention of an encoder, by the function that optimum-habana registers as ``gaudi_fused_sdpa``."""

    query: torch.nn.Linear
    key: torch.nn.Linear
    value: torch.nn.Linear
    dropout: torch.nn.Dropout
    attention_head_size: int

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *_, **__) -> tuple[Tensor, None]:
        """hidden_states and result [batch, length, width]; attention_mask [batch, 1, 1 or length, length] is added."""
        heads = (*hidden_states.shape[:-1], -1, self.attention_head_size)
        query, key, value = (
            layer(hidden_states).view(heads).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        if attention_mask is not None:
            # The least float32 is no number in bf16, and rounds to -inf.
            attention_mask = attention_mask.clamp(min=torch.finfo(query.dtype).min).to(query.dtype)
        rate = self.dropout.p if self.training else 0.0
        attend = ALL_ATTENTION_FUNCTIONS["gaudi_fused_sdpa"]
        result, _ = attend(self, query, key, value, attention_mask, dropout=rate, is_causal=False)
        return result.flatten(2), None


def fuse_self_attention(model: PreTrainedModel) -> None:
    """Let a model of BERT's kind that was loaded with ``sdpa`` compute its attention by the fused kernel.

    optimum-habana 1.21 has its own forward passes for the ``sdpa`` of BERT, which drops nothing in training, and of
    XLM-RoBERTa, which fails with transformers 4.55.

    Raises:
        UserError: positions that are not absolute, which only eager attention knows.
    """
    kind = getattr(model.config, "position_embedding_type", "absolute")
    if kind != "absolute":
        raise UserError(
            f"--attn_implementation: {model.config.model_type} has position_embedding_type {kind}, which only eager "
            "attention knows; leave the flag out, or choose eager"
        )
    # For sdpa, transformers looks in each pass whether any mask is needed, and the host waits for the answer.
    model.base_model.attn_implementation = "eager"
    for module in model.modules():
        own = type(module)
        if own.__name__.endswith("SdpaSelfAttention"):
            module.__class__ = type(f"Fused{own.__name__}", (FusedSelfAttention, own), {})
