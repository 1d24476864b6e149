"""One tiny model of each supported architecture, with random weights, for tests that run over all of them."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

VOCABULARY = 211
_LLAMA_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_MULTI_HEAD = {name: value for name, value in _LLAMA_LIKE.items() if name != "num_key_value_heads"}
_GPT2_LIKE = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 128}
_BERT_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 130,
}

CAUSAL = {
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "codegen": {**_GPT2_LIKE, "rotary_dim": 4},
    "cohere": _LLAMA_LIKE,
    "cohere2": {**_LLAMA_LIKE, "head_dim": 8},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128},
    "gemma": {**_LLAMA_LIKE, "head_dim": 8},
    "gemma2": {**_LLAMA_LIKE, "head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0},
    "gemma3_text": {**_LLAMA_LIKE, "head_dim": 8, "final_logit_softcapping": 2.0},
    "gpt2": _GPT2_LIKE,
    "gpt_bigcode": _GPT2_LIKE,
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "max_position_embeddings": 128,
    },
    "gpt_neox": _MULTI_HEAD,
    "gptj": {**_GPT2_LIKE, "rotary_dim": 4},
    "granite": {**_LLAMA_LIKE, "logits_scaling": 4.0},
    "llama": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE,
    "mixtral": {**_LLAMA_LIKE, "num_local_experts": 2, "output_router_logits": True},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128},
    "olmo": _LLAMA_LIKE,
    "olmo2": _LLAMA_LIKE,
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 16,
        "max_position_embeddings": 128,
    },
    "persimmon": _MULTI_HEAD,
    "phi": _LLAMA_LIKE,
    "phi3": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,
    "qwen2_moe": {
        **_LLAMA_LIKE,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    "qwen3": {**_LLAMA_LIKE, "head_dim": 8},
    "smollm3": _LLAMA_LIKE,
    "stablelm": _LLAMA_LIKE,
    "starcoder2": _LLAMA_LIKE,
}

MASKED = {
    "albert": {**_BERT_LIKE, "embedding_size": 16},
    "bert": _BERT_LIKE,
    "camembert": _BERT_LIKE,
    "deberta": {**_BERT_LIKE, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": {**_BERT_LIKE, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 130},
    "electra": {**_BERT_LIKE, "embedding_size": 16},
    "modernbert": {**_BERT_LIKE, "reference_compile": False, "local_attention": 32},
    "mpnet": _BERT_LIKE,
    "roberta": _BERT_LIKE,
    "roberta-prelayernorm": _BERT_LIKE,
    "xlm-roberta": _BERT_LIKE,
    "xlm-roberta-xl": _BERT_LIKE,
}


def tiny_model(model_type: str, seed: int = 0, **overrides) -> torch.nn.Module:
    """A model of `model_type`, two layers, 32 wide, without dropout, in training mode; the same weights for a seed.

    The weights are drawn wide enough that logits differ and gradients are no rounding noise.
    """
    causal = model_type in CAUSAL
    settings = {"vocab_size": VOCABULARY, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    settings |= CAUSAL[model_type] if causal else MASKED[model_type]
    dropouts = [
        "attn_pdrop",
        "embd_pdrop",
        "resid_pdrop",
        "attention_dropout",
        "hidden_dropout",
        "dropout",
        "attention_probs_dropout_prob",
        "hidden_dropout_prob",
        "embed_dropout",
        "embedding_dropout",
        "classifier_dropout_prob",
        "layerdrop",
    ]
    config = AutoConfig.for_model(model_type, **settings | overrides)
    for name in dropouts:
        if isinstance(getattr(config, name, None), float):
            setattr(config, name, 0.0)
    torch.manual_seed(seed)
    model = (AutoModelForCausalLM if causal else AutoModelForMaskedLM).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.train()


def objective_of(model_type: str) -> str:
    return "causal" if model_type in CAUSAL else "masked"


def make_batch(objective: str, rows: int = 3, length: int = 21, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random ids, some padding, and labels of which some (causal) or most (masked) are ignored."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, length - 4 :] = 0
    ignored = torch.rand(rows, length, generator=generator) < (0.3 if objective == "causal" else 0.8)
    ignored[:, 0] = True
    labels = input_ids.masked_fill(ignored | (attention_mask == 0), -100)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The gradients that there are, by the name of the parameter."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The Euclidean distance."""
    return (a.double() - b.double()).norm().item()
