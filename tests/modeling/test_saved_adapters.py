"""Saved adapters, also by peft alone: embeddings, vocabularies, prefixes of a network, and the flags beside them."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from tiny_models import VOCABULARY, tiny_model

from gaudi_lm.arguments.adapters import SETTINGS, AdapterArguments
from gaudi_lm.arguments.parsing import parse
from gaudi_lm.errors import UserError
from gaudi_lm.modeling.adapters import adapter_config, load_adapter

LORA = LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
TOKENS = torch.arange(20)[None]


def save(folder: Path, config=LORA, embeddings: bool | str = False, **changes) -> torch.Tensor:
    """A trained adapter with embeddings of its own, without a base model's name to look for; returns its logits."""
    model = tiny_model("llama", **changes)
    adapted = get_peft_model(model, config).eval()
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn_like(weight)
    adapted.save_pretrained(folder, save_embedding_layers=config is LORA or embeddings)
    with torch.no_grad():
        return adapted(TOKENS).logits


@pytest.mark.parametrize("trainable", [False, True])
def test_an_adapter_saved_with_the_embeddings_loads(tmp_path, trainable):
    """They were taken for tensors of another model."""
    expected = save(tmp_path)
    model = load_adapter(tiny_model("llama"), str(tmp_path), trainable).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, expected)


def test_an_adapter_of_the_head_saved_without_the_head_loads(tmp_path):
    """It was said to be made for another model."""
    expected = save(tmp_path, LoraConfig(target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        torch.testing.assert_close(
            load_adapter(tiny_model("llama"), str(tmp_path), True).eval()(TOKENS).logits, expected
        )


def test_other_embeddings_are_evaluated_and_not_trained_further(tmp_path):
    """They would be missing from what is saved after training."""
    expected = save(tmp_path)
    other = tiny_model("llama")
    with torch.no_grad():
        other.get_input_embeddings().weight += 1
        model = load_adapter(other, str(tmp_path), trainable=False).eval()
        torch.testing.assert_close(model(TOKENS).logits, expected)
        other = tiny_model("llama")
        other.get_input_embeddings().weight += 1
    with pytest.raises(UserError, match=r"embeddings of its own .*; merge it first \(--do_eval --merge_adapter"):
        load_adapter(other, str(tmp_path), trainable=True)


@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_a_larger_vocabulary_names_the_tokenizer(tmp_path, with_tokenizer):
    save(tmp_path, vocab_size=VOCABULARY + 2)
    if with_tokenizer:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({}))
    said = tmp_path if with_tokenizer else "TOKENIZER, the one that it was trained with"
    with pytest.raises(UserError, match=f"{VOCABULARY + 2} tokens, .* {VOCABULARY}; give --tokenizer_name {said}$"):
        load_adapter(tiny_model("llama"), str(tmp_path), trainable=False)


@pytest.mark.parametrize("kind", ["tokens", "head"])
def test_what_looks_at_whole_weights_while_loading_is_refused_with_zero_3(tmp_path, monkeypatch, kind):
    """A part of one was a traceback, or said to be made for another model."""
    settings = {
        "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 2]}},
        "head": {"target_modules": ["q_proj", "lm_head"]},
    }
    save(tmp_path, LoraConfig(task_type="CAUSAL_LM", **settings[kind]), "auto")
    model = tiny_model("llama")
    monkeypatch.setattr("gaudi_lm.modeling.adapters.is_deepspeed_zero3_enabled", lambda: True)
    for weight in model.parameters():
        weight.ds_shape, weight.data = weight.shape, torch.empty(0)
    with pytest.raises(UserError, match=r"not for a model that ZeRO-3 divides \(.*\); use ZeRO-1 or 2$"):
        load_adapter(model, str(tmp_path), trainable=True)


def test_a_prefix_that_a_network_made_is_not_trained_further(tmp_path):
    config = PrefixTuningConfig(
        num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=16, task_type="CAUSAL_LM"
    )
    save(tmp_path, config)
    assert isinstance(load_adapter(tiny_model("llama"), str(tmp_path), trainable=False), PeftModel)
    with pytest.raises(UserError, match=r"^--adapter_name_or_path .*a network made its prefix \(prefix_projection\)"):
        load_adapter(tiny_model("llama"), str(tmp_path), trainable=True)


REFUSED = {
    "lora_rank": {"lora_rank": 4},
    "lora_dropout": {"lora_dropout": 0.5},
    "lora_target_modules": {"lora_target_modules": ["k_proj"]},
    "peft_type": {"peft_type": "ia3"},
    "prompt_tuning_init_text": {"prompt_tuning_init_text": "A"},  # of another kind
    "num_virtual_tokens": {"num_virtual_tokens": 3},
}


@pytest.mark.parametrize("flag", REFUSED)
def test_a_flag_that_a_saved_adapter_would_override_is_refused(tmp_path, flag):
    """Somebody who continued with dropout trained without it."""
    save(tmp_path)
    with pytest.raises(UserError, match=f"^--{flag}: --adapter_name_or_path {tmp_path} has settings of its own"):
        adapter_config(AdapterArguments(**REFUSED[flag]), str(tmp_path))


def test_flags_that_a_saved_adapter_was_trained_with_are_taken(tmp_path):
    for args in (
        AdapterArguments(lora_rank=4, lora_dropout=0.5, lora_target_modules=["k_proj", "q_proj"]),
        AdapterArguments(peft_type="vera", lora_dropout=0.5, vera_target_modules=["q_proj"]),
        AdapterArguments(peft_type="p_tuning", num_virtual_tokens=5, encoder_hidden_size=16),
    ):
        config = adapter_config(args)
        config.save_pretrained(tmp_path)
        assert adapter_config(args, str(tmp_path)).peft_type == config.peft_type
        assert adapter_config(AdapterArguments(), str(tmp_path)).peft_type == config.peft_type
    args = AdapterArguments(lora_target_modules=["all-linear"])
    save(tmp_path, adapter_config(args))  # peft saves the names of the layers
    assert adapter_config(args, str(tmp_path)).target_modules != "all-linear"


@pytest.mark.parametrize("flag", ["--lora_rank", "--num_virtual_tokens"])
def test_a_setting_of_another_kind_of_adapter_is_refused(flag):
    with pytest.raises(UserError, match=f"^{flag}: only with --peft_type .* and not with ia3$"):
        parse(["--peft_type", "ia3", flag, "4"], AdapterArguments)
    assert parse(["--peft_type", "ia3", flag, str(getattr(AdapterArguments, flag[2:]))], AdapterArguments)


def test_every_flag_of_an_adapter_has_its_kinds():
    assert {*SETTINGS, "peft_type"} == {setting.name for setting in fields(AdapterArguments)}
