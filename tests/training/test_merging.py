"""Adapters on embeddings, on a tied head, and beside layers that are trained whole, merged into the model."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import AdaptionPromptConfig, LNTuningConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_models import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from gaudi_lm.errors import UserError
from gaudi_lm.training import merging
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
    stays_tied = tied and kind in STAYS_TIED
    assert merged.config.tie_word_embeddings == stays_tied
    names = {*load_file(tmp_path / "merged" / "model.safetensors")}
    assert names == {name for name, _ in merged.named_parameters()}, "a tied weight once, and no other's"
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


def test_what_a_model_has_beside_its_weights_is_in_the_file(tmp_path):
    """GLM and DeepSeek keep the bias that chooses experts in a buffer; without it others are chosen."""
    sizes = {"vocab_size": 50, "hidden_size": 32, "moe_intermediate_size": 16, "n_routed_experts": 4, "head_dim": 8}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("glm4_moe", **sizes, **layers))
    bias = model.model.layers[1].mlp.gate.e_score_correction_bias.uniform_()
    save_merged(trainer_of(get_peft_model(model, LoraConfig(target_modules=ATTENTION)), tmp_path))
    merged, found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(found.values()) and torch.equal(merged.model.layers[1].mlp.gate.e_score_correction_bias, bias)


def refusals():
    """What a line begins with, and all that it takes to get it."""
    mask = {"flash_attention_causal_mask": True, "use_cpu": False}
    yield "no model: ", {"model_name_or_path": None}
    yield "--merge_adapter: DeepSpeed ZeRO-3 ", {"zero_3": True, "merge_adapter": True}
    yield "--load_meta_device: DeepSpeed ZeRO-3 ", {"zero_3": True, "load_meta_device": True}
    yield "--merge_adapter: no adapter", {"merge_adapter": True, "do_train": False}
    yield "--gradient_checkpointing: prefix_tuning ", {"peft_type": "prefix_tuning", "gradient_checkpointing": True}
    yield "--flash_attention_causal_mask: .* prefix_tuning ", {"peft_type": "prefix_tuning", **mask}
    yield "--peft_type adalora: not with FSDP", {"peft_type": "adalora", "fsdp": ["auto_wrap"]}
    fp8 = {"fp8": True, "gradient_checkpointing": True}
    yield "--gradient_checkpointing: not with --fp8 and AdaLoRA", {"peft_type": "adalora", **fp8}
    yield "--peft_type ln_tuning: not with ZeRO-3", {"peft_type": "ln_tuning", "zero_3": True}
    for kind in ("prompt_tuning", "prefix_tuning", "p_tuning"):
        yield f"--context_parallel_size: {kind} ", {"peft_type": kind, "context_parallel_size": 2}
        yield f"--peft_type {kind}: not with ZeRO-3 or FSDP", {"peft_type": kind, "zero_3": True}
        yield f"--peft_type {kind}: not with ZeRO-3 or FSDP", {"peft_type": kind, "fsdp": ["full_shard"]}
        yield f"--neftune_noise_alpha: not with {kind}", {"peft_type": kind, "neftune_noise_alpha": 5.0}
        yield f"--merge_adapter: {kind} adds tokens", {"peft_type": kind, "merge_adapter": True}
    llama = AdaptionPromptConfig(adapter_len=2, adapter_layers=1)
    for kind, how in (("llama-adapter", {"peft_type": "llama-adapter"}), ("adaption_prompt", {"saved": llama})):
        yield f"--context_parallel_size: {kind} ", {**how, "context_parallel_size": 2}
        yield "--merge_adapter: a llama-adapter is a part of attention", {**how, "merge_adapter": True}
    for setting, value, refused in (
        ("modules_to_save", ["lm_head"], "fsdp"),
        ("trainable_token_indices", {"embed_tokens": [1, 2]}, "fsdp"),
        ("use_dora", True, "fsdp"),
        ("alora_invocation_tokens", [3, 4], "merge_adapter"),
        ("layer_replication", [[0, 2], [1, 2]], "merge_adapter"),
    ):
        saved = LoraConfig(target_modules=ATTENTION, task_type="CAUSAL_LM", **{setting: value})
        yield f"--{refused}: --adapter_name_or_path .* has {setting}", {"saved": saved, refused: ["auto_wrap"]}


@pytest.mark.parametrize(("said", "asked"), [pytest.param(*case, id=" ".join(case[1])) for case in refusals()])
def test_what_an_adapter_cannot_do_is_refused_before_training(said, asked, tmp_path, monkeypatch):
    """With all of it; without any one part of it, it goes on."""
    usual = {
        "model_name_or_path": "a", "adapter_name_or_path": None, "merge_adapter": False, "load_meta_device": False,
        "peft_type": "lora", "saved": None, "zero_3": False, "fsdp": "", "do_train": True, "use_cpu": True,
        "gradient_checkpointing": False, "flash_attention_causal_mask": False, "context_parallel_size": 1,
        "neftune_noise_alpha": None, "fp8": False,
    }  # fmt: skip

    def check(**flags) -> None:
        args = SimpleNamespace(**usual | flags)
        if args.saved is not None:
            args.saved.save_pretrained(tmp_path)
            args.adapter_name_or_path = str(tmp_path)
        monkeypatch.setattr(merging, "is_deepspeed_zero3_enabled", lambda: args.zero_3)
        check_base_model(args, args.peft_type, args)

    with pytest.raises(UserError, match=f"^{said}"):
        check(**asked)
    for given in asked:
        check(**{name: value for name, value in asked.items() if name != given})
    if "ln_tuning" in said:
        check(**asked, do_train=False)  # its weights are not divided where nothing trains them


def test_an_adapter_that_peft_cannot_merge_is_one_line(tmp_path):
    adapted = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=ATTENTION, lora_bias=True))
    with pytest.raises(UserError, match="^--merge_adapter: peft cannot merge this adapter .*no bias"):
        save_merged(trainer_of(adapted, tmp_path))
