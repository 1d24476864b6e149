"""What is typed for large models, on small ones of the same architecture: FP8, ZeRO, experts, against one card.

The documented commands themselves are executed in test_large_commands.py.
"""

import json
from pathlib import Path

import pytest
from cards import card_environment
from running import ROOT, log_history, losses, run, run_ranks
from transformers import AutoTokenizer, FalconConfig, FalconForCausalLM, MixtralConfig, MixtralForCausalLM

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("two cards")]

LAZY = {"PT_HPU_LAZY_MODE": "1"}
TARGETS = {"llama": ["q_proj", "v_proj"], "falcon": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def lora(
    instructions, output: Path, *flags, model: Path | None = None, targets: str = "llama", steps: int = 4
) -> list:
    """run_lora_clm.py and its flags."""
    return [
        *(ROOT / "run_lora_clm.py", "--model_name_or_path", model or instructions.llama),
        *("--lora_target_modules", *TARGETS[targets]),
        *("--train_file", instructions.train, "--validation_file", instructions.validation, "--dataset_concatenation"),
        *("--max_seq_length", 64, "--per_device_train_batch_size", 2, "--max_steps", steps, "--logging_steps", 1),
        *("--max_eval_samples", 4, "--do_train", "--do_eval", "--save_strategy", "no", "--lora_dropout", 0),
        *("--learning_rate", 3e-2, "--lr_scheduler_type", "constant", "--use_habana", "--output_dir", output, *flags),
    ]


def zero(folder: Path, stage: int, **settings) -> list:
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": stage == 3}
    path = folder / f"zero_{stage}.json"
    path.write_text(json.dumps({**dict.fromkeys(auto, "auto"), "zero_optimization": zero, **settings}))
    return ["--deepspeed", path]


def test_fp8_is_close_to_bf16(assets, instructions, tmp_path):
    """All weights, 50 steps; and what checkpointing computes again is what was computed first."""
    again = ["--fp8", "--gradient_checkpointing", "--use_cache", "False", "--minimize_memory"]
    found = {}
    again += ["--save_strategy", "steps", "--save_steps", 10]
    resumed = [*again, "--resume_from_checkpoint", tmp_path / "again" / "checkpoint-10"]
    cases = {"bf16": ([], 50), "fp8": (["--fp8", "True"], 50), "again": (again, 20), "resumed": (resumed, 20)}
    for name, (flags, steps) in cases.items():
        log = run(
            *(
                ROOT / "run_clm.py",
                "--model_name_or_path",
                instructions.llama,
                "--train_file",
                assets.train,
                "--do_train",
            ),
            *(
                "--max_steps",
                steps,
                "--block_size",
                64,
                "--logging_steps",
                1,
                "--learning_rate",
                3e-3,
                "--bf16",
                "True",
            ),
            # A constant rate: one that decays would depend on the number of steps.
            *("--lr_scheduler_type", "constant", "--save_strategy", "no", "--use_habana"),
            *("--output_dir", tmp_path / name, *flags),
            env=card_environment(2, **LAZY),
        ).stderr
        assert ("--fp8: its scales are not in a checkpoint" in log) == (name == "resumed")
        found[name] = losses(tmp_path / name)
    gpt2 = ["--model_type", "gpt2", "--tokenizer_name", assets.tokenizer]
    more = ["--config_overrides", "n_embd=16,n_layer=1,n_head=2"]
    more += ["--train_file", assets.train, "--do_train", "--fp8", "--use_habana", "--output_dir", tmp_path / "gpt2"]
    refused = run("run_clm.py", *gpt2, *more, env=card_environment(2, **LAZY), code=2).stderr
    assert "error: --fp8: it is for layers of torch.nn.Linear, and those of gpt2 are Conv1D" in refused
    assert not (tmp_path / "gpt2").exists()
    assert found["fp8"][-1] < found["fp8"][0] - 0.5
    assert found["fp8"] == pytest.approx(found["bf16"], rel=0.02)
    assert found["fp8"] != pytest.approx(found["bf16"], rel=1e-4), "FP8 leaves its trace"
    assert found["again"] == found["fp8"][:20]
    assert found["resumed"][:10] == found["fp8"][:10]
    assert found["resumed"] == pytest.approx(found["fp8"][:20], rel=0.01)


def test_fp8_zero_3(instructions, tmp_path):
    flags = (
        "--bf16 True --fp8 True --gradient_checkpointing --attn_softmax_bf16 True --pipelining_fwd_bwd "
        "--eval_strategy steps --eval_steps 2 --eval_delay 2 --use_zero3_leaf_promotion True --use_lazy_mode"
    )
    command = lora(instructions, tmp_path / "out", *flags.split(), *zero(tmp_path, 3, bf16={"enabled": True}))
    run_ranks(2, *command, env=card_environment(2, **LAZY))
    run(*lora(instructions, tmp_path / "one", "--bf16", "True", "--per_device_train_batch_size", 4),
        env=card_environment(2, **LAZY))  # fmt: skip
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "one"), rel=0.02)


def test_falcon_zero_3_with_the_optimizer_of_deepspeed(instructions, tmp_path):
    """DeepSpeed's fused Adam asks for step closures and for torch.ops.hpu.optimizer_adamw."""
    tokenizer = AutoTokenizer.from_pretrained(instructions.llama)
    config = FalconConfig(
        vocab_size=len(tokenizer), num_kv_heads=2, new_decoder_architecture=True, attention_dropout=0.0,
        hidden_dropout=0.0, **SIZES,
    )  # fmt: skip
    FalconForCausalLM(config).save_pretrained(tmp_path / "falcon")
    tokenizer.save_pretrained(tmp_path / "falcon")
    options = {"model": tmp_path / "falcon", "targets": "falcon"}
    common = ["--max_grad_norm", 0.3, "--ddp_bucket_cap_mb", 50, "--use_lazy_mode"]
    # That Adam adds epsilon to the root before its correction, the one of the other run after it.
    common += ["--adam_epsilon", 1e-14]
    optimizer = {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")}
    command = lora(instructions, tmp_path / "out", *common, *zero(tmp_path, 3, optimizer=optimizer), **options)
    run_ranks(2, *command, env=card_environment(2, **LAZY))
    command = lora(instructions, tmp_path / "one", *common, "--per_device_train_batch_size", 4, **options)
    run(*command, env=card_environment(2, **LAZY))
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


@pytest.mark.parametrize("stage", [0, 1])
def test_the_log_of_deepspeed_has_the_figures_of_one_card(instructions, tmp_path, stage):
    """Its engine steps the schedule with its own optimizer, and forgets the norm by which it clips without ZeRO."""
    common = ["--max_grad_norm", 0.3, "--lr_scheduler_type", "linear", "--warmup_steps", 2]
    auto = dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")
    optimizer = {"type": "AdamW", "params": {**auto, "torch_adam": True}}
    command = lora(instructions, tmp_path / "out", *common, *zero(tmp_path, stage, optimizer=optimizer))
    run_ranks(2, *command, env=card_environment(2, **LAZY))
    run(*lora(instructions, tmp_path / "one", *common, "--per_device_train_batch_size", 4),
        env=card_environment(2, **LAZY))  # fmt: skip
    for figure in ("loss", "grad_norm", "learning_rate"):
        found, wanted = (
            [row[figure] for row in log_history(tmp_path / one) if "loss" in row] for one in ("out", "one")
        )
        assert found == pytest.approx(wanted, abs=1e-5), figure


def test_in_bf16_without_zero_the_first_step_is_the_first(instructions, tmp_path):
    """DeepSpeed takes one on gradients of zero before: Adam's steps were a quarter too short, and weights decayed."""
    for stage in (0, 1):
        command = lora(instructions, tmp_path / f"{stage}", "--bf16", *zero(tmp_path, stage, bf16={"enabled": True}))
        run_ranks(2, *command, env=card_environment(2, **LAZY))
    assert losses(tmp_path / "0") == pytest.approx(losses(tmp_path / "1"), abs=1e-4)


def test_mixtral_zero_3(instructions, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(instructions.llama)
    config = MixtralConfig(
        vocab_size=len(tokenizer), num_key_value_heads=2, num_local_experts=4, intermediate_size=48, **SIZES
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path / "mixtral")
    tokenizer.save_pretrained(tmp_path / "mixtral")
    model = {"model": tmp_path / "mixtral"}
    command = lora(instructions, tmp_path / "out", "--use_lazy_mode", *zero(tmp_path, 3), **model)
    run_ranks(2, *command, env=card_environment(2, **LAZY))
    run(*lora(instructions, tmp_path / "one", "--use_lazy_mode", "--per_device_train_batch_size", 4, **model),
        env=card_environment(2, **LAZY))  # fmt: skip
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
