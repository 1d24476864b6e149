"""Saved adapters, also by peft alone: with embeddings, of another vocabulary, with a prefix that a network made."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from tiny_models import VOCABULARY, tiny_model

from gaudi_lm.errors import UserError
from gaudi_lm.modeling.adapters import load_adapter

LORA = LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
TOKENS = torch.arange(20)[None]


def save(folder: Path, config=LORA, **changes) -> torch.Tensor:
    """A trained adapter with embeddings of its own, without a base model's name to look for; returns its logits."""
    model = tiny_model("llama", **changes)
    adapted = get_peft_model(model, config).eval()
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn_like(weight)
    adapted.save_pretrained(folder, save_embedding_layers=config is LORA)
    with torch.no_grad():
        return adapted(TOKENS).logits


@pytest.mark.parametrize("trainable", [False, True])
def test_an_adapter_saved_with_the_embeddings_loads(tmp_path, trainable):
    """They were taken for tensors of another model."""
    expected = save(tmp_path)
    model = load_adapter(tiny_model("llama"), str(tmp_path), trainable).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, expected)


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
    with pytest.raises(UserError, match=r"it has embeddings of its own .*; merge it first \(--merge_adapter"):
        load_adapter(other, str(tmp_path), trainable=True)


@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_a_larger_vocabulary_names_the_tokenizer(tmp_path, with_tokenizer):
    save(tmp_path, vocab_size=VOCABULARY + 2)
    if with_tokenizer:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({}))
    said = tmp_path if with_tokenizer else "TOKENIZER, the one that it was trained with"
    with pytest.raises(UserError, match=f"{VOCABULARY + 2} tokens, .* {VOCABULARY}; give --tokenizer_name {said}$"):
        load_adapter(tiny_model("llama"), str(tmp_path), trainable=False)


def test_a_prefix_that_a_network_made_is_not_trained_further(tmp_path):
    config = PrefixTuningConfig(
        num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=16, task_type="CAUSAL_LM"
    )
    save(tmp_path, config)
    assert isinstance(load_adapter(tiny_model("llama"), str(tmp_path), trainable=False), PeftModel)
    with pytest.raises(UserError, match=r"^--adapter_name_or_path .*a network made its prefix \(prefix_projection\)"):
        load_adapter(tiny_model("llama"), str(tmp_path), trainable=True)
