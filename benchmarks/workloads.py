"""Models and texts of the benchmarks: from configuration and from the standard library, nothing is fetched."""

import re
from pydoc_data.topics import topics

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM


def gpt2() -> torch.nn.Module:
    """GPT-2 with 124 million parameters, as on the hub (dropout included), random weights."""
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2"), attn_implementation="sdpa").train()


def roberta_base() -> torch.nn.Module:
    """RoBERTa-base, as on the hub (dropout included), random weights."""
    config = AutoConfig.for_model("roberta", vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
    return AutoModelForMaskedLM.from_config(config, attn_implementation="sdpa").train()


def llama_100m() -> torch.nn.Module:
    """A Llama of about 100 million parameters: 12 layers of width 640, a vocabulary of 32,000."""
    config = AutoConfig.for_model(
        "llama",
        hidden_size=640,
        intermediate_size=1720,
        num_hidden_layers=12,
        num_attention_heads=10,
        num_key_value_heads=10,
        vocab_size=32000,
        max_position_embeddings=2048,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()


def flop_per_token(model: torch.nn.Module, length: int, frozen: bool = False, head_share: float = 1.0) -> float:
    """FLOP of forward and backward per token: 6 N + 12 L d T, or 4 N + 12 L d T with frozen weights.

    N counts the weights of matrix products: embeddings only where they are the head, and there by `head_share`, the
    share of the tokens for which the head is needed. Lower-order work (norms, softmax, dropout, optimizer) counts for
    nothing.
    """
    config = model.config
    head = model.get_output_embeddings().weight
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)} | {id(head)}
    inner = sum(p.numel() for p in model.parameters() if p.dim() == 2 and id(p) not in tables)
    products = inner + head.numel() * head_share
    return (4 if frozen else 6) * products + 12 * config.num_hidden_layers * config.hidden_size * length


def paragraphs() -> list[str]:
    """The paragraphs of Python's own reference manual, 465,000 characters of English, in order."""
    parts = (part for text in topics.values() for part in re.split(r"\n\s*\n", text))
    return [flat for part in parts if (flat := " ".join(part.split()))]
