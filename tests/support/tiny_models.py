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
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
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
    "gpt_oss": {**_LLAMA_LIKE, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gptj": {**_GPT2_LIKE, "rotary_dim": 4},
    "granite": {**_LLAMA_LIKE, "logits_scaling": 4.0},
    "granitemoe": {**_LLAMA_LIKE, "num_local_experts": 4, "logits_scaling": 4.0},
    "llama": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE,
    "mixtral": {**_LLAMA_LIKE, "num_local_experts": 2},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128},
    "olmo": _LLAMA_LIKE,
    "olmo2": _LLAMA_LIKE,
    "olmoe": {**_LLAMA_LIKE, "num_experts": 4, "num_experts_per_tok": 2},
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 16,
        "max_position_embeddings": 128,
    },
    "persimmon": _MULTI_HEAD,
    "phi": _MULTI_HEAD,
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
    "qwen3_moe": {**_LLAMA_LIKE, **_EXPERTS, "head_dim": 8, "num_experts": 4},
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

_SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
OTHERS = {
    "data2vec-text": _SMALL,
    "esm": {**_SMALL, "mask_token_id": 4, "position_embedding_type": "absolute"},
    "ibert": _SMALL,
    "longformer": {**_SMALL, "attention_window": 8},
    "luke": {**_SMALL, "entity_vocab_size": 8, "entity_emb_size": 8},
    "xmod": {**_SMALL, "languages": ["en_XX"], "default_language": "en_XX"},
}

EXPERTS = ["gpt_oss", "granitemoe", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"]
# Fields in which the configurations of released models differ from those of their class, or that few of them have.
ODD = {
    "cohere": {"use_qk_norm": True, "logit_scale": 0.5, "attention_bias": True},
    "cohere2": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False, "tie_word_embeddings": False},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 8, "attn_logit_softcapping": 2.0},
    "gemma3_text": {"query_pre_attn_scalar": 12, "sliding_window": 8},
    "gpt_neo": {"window_size": 8},
    "gpt_neox": {"use_parallel_residual": False, "rotary_pct": 0.5, "tie_word_embeddings": True},
    "gpt_oss": {"sliding_window": 8},
    "granite": {"embedding_multiplier": 12.0, "residual_multiplier": 0.2, "attention_multiplier": 0.1},
    "llama": {"head_dim": 16, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "mistral": {"head_dim": 16, "sliding_window": 8},
    "mixtral": {"sliding_window": 8},
    "olmo": {"clip_qkv": 0.5},
    "olmoe": {"clip_qkv": 0.5, "norm_topk_prob": True},
    "opt": {"do_layer_norm_before": False},
    "phi": {"num_key_value_heads": 2, "qk_layernorm": True},
    "phi3": {"partial_rotary_factor": 0.75, "sliding_window": 8, "tie_word_embeddings": True},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen2_moe": {"decoder_sparse_step": 2, "norm_topk_prob": True, "tie_word_embeddings": True},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
    "qwen3_moe": {"head_dim": 16, "mlp_only_layers": [0], "norm_topk_prob": True},
    "smollm3": {"no_rope_layers": [1, 0]},
    "stablelm": {"use_parallel_residual": True, "use_qkv_bias": True},
    "starcoder2": {"sliding_window": 8, "tie_word_embeddings": False, "use_bias": False},
}


def tiny_model(model_type: str, seed: int = 0, **overrides) -> torch.nn.Module:
    """A model of `model_type`, two layers, 32 wide, in training mode; the same weights for a seed.

    It drops what `overrides` say alone.

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
        if name not in overrides and isinstance(getattr(config, name, None), float):
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
