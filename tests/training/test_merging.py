"""Adapters on embeddings, on a tied head, and beside layers that are trained whole, merged into the model."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from peft import LNTuningConfig, LoraConfig, get_peft_model
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from gaudi_lm.training.merging import save_merged

ATTENTION = ["q_proj", "v_proj"]
ADAPTERS = {
    "whole head": LoraConfig(target_modules=ATTENTION, modules_to_save=["lm_head"]),
    "whole embeddings": LoraConfig(target_modules=ATTENTION, modules_to_save=["embed_tokens"]),
    "both whole": LoraConfig(target_modules=ATTENTION, modules_to_save=["lm_head", "embed_tokens"]),
    "whole norms": LoraConfig(target_modules=ATTENTION, modules_to_save=["norm"]),
    "norms and a whole head": LNTuningConfig(target_modules=["input_layernorm"], modules_to_save=["lm_head"]),
    "tokens": LoraConfig(target_modules=ATTENTION, trainable_token_indices=[3, 4, 5]),
    "low-rank head": LoraConfig(target_modules=[*ATTENTION, "lm_head"]),
    "low-rank embeddings": LoraConfig(target_modules=[*ATTENTION, "embed_tokens"]),
    "low-rank head and embeddings": LoraConfig(target_modules=["lm_head", "embed_tokens"]),
}
STAYS_TIED = {"whole norms", "tokens"}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_merged_model_computes_what_the_adapter_does(tmp_path, kind, tied):
    """Weights of whole layers were missing from the file; a tied weight took what was meant for one of its places."""
    torch.manual_seed(0)
    adapted = get_peft_model(tiny_model("llama", tie_word_embeddings=tied), ADAPTERS[kind]).eval()
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn_like(weight)
        expected = adapted(tokens).logits
    pointers = {weight.data_ptr() for weight in adapted.parameters()}
    tokenizer = SimpleNamespace(save_pretrained=lambda folder: None)
    trainer = SimpleNamespace(
        files_at_top=lambda: nullcontext(tmp_path), whole_model=lambda: nullcontext(adapted),
        is_world_process_zero=lambda: True, processing_class=tokenizer, args=SimpleNamespace(output_dir=tmp_path),
    )  # fmt: skip
    save_merged(trainer)

    merged, found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(found.values())
    assert merged.config.tie_word_embeddings == (tied and kind in STAYS_TIED)
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens).logits, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(adapted(tokens).logits, expected)  # the adapter goes on as it was
    assert adapted.get_base_model().config.tie_word_embeddings == tied
    if tied:
        assert len(pointers) == len({weight.data_ptr() for weight in adapted.parameters()})
