"""Adapters on embeddings, on a tied head, and beside layers that are trained whole, merged into the model."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LNTuningConfig, LoraConfig, get_peft_model
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from gaudi_lm.arguments.definitions import LMTrainingArguments
from gaudi_lm.errors import UserError
from gaudi_lm.training.merging import check_base_model, save_merged

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


def trainer_of(adapted, folder: Path) -> SimpleNamespace:
    """What `save_merged` asks of a trainer."""
    tokenizer = SimpleNamespace(save_pretrained=lambda folder: None)
    return SimpleNamespace(
        files_at_top=lambda: nullcontext(folder), whole_model=lambda: nullcontext(adapted),
        is_world_process_zero=lambda: True, processing_class=tokenizer, args=SimpleNamespace(output_dir=folder),
    )  # fmt: skip


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
    save_merged(trainer_of(adapted, tmp_path))

    merged, found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(found.values())
    assert merged.config.tie_word_embeddings == (tied and kind in STAYS_TIED)
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens).logits, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(adapted(tokens).logits, expected)  # the adapter goes on as it was
    assert adapted.get_base_model().config.tie_word_embeddings == tied
    if tied:
        assert len(pointers) == len({weight.data_ptr() for weight in adapted.parameters()})


@pytest.mark.parametrize("parameters", [["gate_up_proj"], ["gate_up_proj", "down_proj"]])
def test_experts_whose_weights_are_adapted(parameters, tmp_path):
    """The file had them by other names: the merged model was loaded with random experts."""
    targets = {"target_modules": ATTENTION, "target_parameters": [f"mlp.experts.{name}" for name in parameters]}
    adapted = get_peft_model(tiny_model("gpt_oss"), LoraConfig(**targets, init_lora_weights=False)).eval()
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        expected = adapted(tokens).logits
        save_merged(trainer_of(adapted, tmp_path))
        merged, found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
        assert not any(found.values())
        torch.testing.assert_close(merged(tokens).logits, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(adapted(tokens).logits, expected)


@pytest.mark.parametrize("setting", [{"alora_invocation_tokens": [3, 4]}, {"layer_replication": [[0, 2], [1, 2]]}])
def test_what_no_weights_can_hold_is_refused_before_training(setting, tmp_path):
    LoraConfig(target_modules=ATTENTION, task_type="CAUSAL_LM", **setting).save_pretrained(tmp_path)
    flags = {"model_name_or_path": "a", "adapter_name_or_path": str(tmp_path), "merge_adapter": True}
    args = LMTrainingArguments(output_dir=str(tmp_path), use_cpu=True, do_train=True)
    with pytest.raises(UserError, match=f"^--merge_adapter: --adapter_name_or_path .* has {next(iter(setting))}: "):
        check_base_model(SimpleNamespace(**flags, load_meta_device=False), "lora", args)


def test_an_adapter_that_peft_cannot_merge_is_one_line(tmp_path):
    adapted = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=ATTENTION, lora_bias=True))
    with pytest.raises(UserError, match="^--merge_adapter: peft cannot merge this adapter .*no bias"):
        save_merged(trainer_of(adapted, tmp_path))
