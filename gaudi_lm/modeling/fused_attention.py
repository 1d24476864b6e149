"""What `gaudi_fused_sdpa`, the attention that optimum-habana registers with transformers, lacks there."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gaudi_lm.errors import UserError

FUSED = "gaudi_fused_sdpa"


def register_mask() -> None:
    """Let transformers' own models make the mask of eager attention for the fused kernel, by a public interface.

    transformers 4.55 makes none at all for an attention that it has no mask function of: tokens would see those after
    them, and padding. optimum-habana 1.21 registers the attention alone.
    """
    if FUSED not in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(FUSED, _mask)


def _mask(*args, **kwargs) -> Tensor:
    """The mask in numbers that autocast does not round to infinity: a row that sees nothing would become NaN."""
    return eager_mask(*args, **kwargs).clamp(min=torch.finfo(torch.bfloat16).min)


class FusedSelfAttention(torch.nn.Module):
    """The self-attention of BERT and its kin, by the fused kernel; what the kernel cannot do is left to the model."""

    query: torch.nn.Linear
    key: torch.nn.Linear
    value: torch.nn.Linear
    dropout: torch.nn.Dropout
    attention_head_size: int
    is_decoder: bool

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args, **kwargs) -> tuple:
        """hidden_states and result [batch, length, width]; attention_mask [batch, 1, 1 or length, length] is added."""
        if self.is_decoder or any(given is not None and given is not False for given in (*args, *kwargs.values())):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        heads = (*hidden_states.shape[:-1], -1, self.attention_head_size)
        query, key, value = (
            layer(hidden_states).view(heads).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        if attention_mask is not None:
            attention_mask = attention_mask.clamp(min=torch.finfo(query.dtype).min).to(query.dtype)
        rate = self.dropout.p if self.training else 0.0
        attend = ALL_ATTENTION_FUNCTIONS[FUSED]
        result, _ = attend(self, query, key, value, attention_mask, dropout=rate, is_causal=False)
        return result.flatten(2), None


def fuse_self_attention(model: PreTrainedModel, asked_for: str | None) -> None:
    """Let a model of BERT's kind that was loaded with ``sdpa`` compute its attention by the fused kernel.

    optimum-habana 1.21 has its own forward passes for the ``sdpa`` of BERT, which drops nothing in training, and of
    XLM-RoBERTa, which fails with transformers 4.55.

    Args:
        asked_for: ``--attn_implementation``.

    Raises:
        UserError: positions that are not absolute, which only eager attention knows.
    """
    kind = getattr(model.config, "position_embedding_type", "absolute")
    if kind != "absolute":
        raise UserError(
            f"--attn_implementation {asked_for}: {model.config.model_type} has position_embedding_type {kind}, which "
            "only eager attention knows; leave the flag out, or choose eager"
        )
    # For sdpa, transformers looks in each pass whether any mask is needed, and the host waits for the answer.
    model.base_model.attn_implementation = "eager"
    fused: dict[type, type] = {}
    for module in model.modules():
        own = type(module)
        if own.__name__.endswith("SdpaSelfAttention"):
            module.__class__ = fused.setdefault(own, type(f"Fused{own.__name__}", (FusedSelfAttention, own), {}))
