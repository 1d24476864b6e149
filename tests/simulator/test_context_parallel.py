"""Ranks that share rows, each with a part of the tokens: evaluation, throughput, data ranks beside them, resuming.

That the losses of two cards are those of one is in test_parallel_losses.py.
"""

from pathlib import Path

import pytest
import torch
from cards import card_environment
from running import losses, results, run, run_ranks
from test_parallel_losses import CONTEXT, command, settings
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

CARDS = card_environment(4)  # of which a run may use fewer
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("two cards")]


def short(instructions, output: Path, rows: int, *flags, model: Path | None = None) -> list:
    """LoRA on padded rows, with an evaluation after training."""
    return [
        *("run_lora_clm.py", "--model_name_or_path", model or instructions.llama, "--output_dir", output),
        *("--train_file", instructions.train, "--validation_file", instructions.validation, "--max_eval_samples", 5),
        *("--max_seq_length", 256, "--per_device_train_batch_size", rows, "--per_device_eval_batch_size", 2),
        *("--lora_dropout", 0, "--lora_target_modules", "q_proj", "k_proj", "--train_on_inputs", "False"),
        *("--do_train", "--do_eval", "--max_steps", 4, "--logging_steps", 1, "--learning_rate", 3e-2, "--use_habana"),
        *("--save_strategy", "no", "--throughput_warmup_steps", 1, *flags),
    ]


def test_two_rows_of_parts_by_four_cards(instructions, tmp_path):
    """Padded rows, with many tokens that are no labels, in parts that may have none at all."""
    run_ranks(4, *short(instructions, tmp_path / "four", 2, *settings("context", tmp_path)), env=CARDS)
    run(*short(instructions, tmp_path / "one", 4, "--pad_to_max_length"), env=CARDS)
    assert losses(tmp_path / "four") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    four, one = results(tmp_path / "four"), results(tmp_path / "one")
    for name in ("eval_loss", "eval_accuracy", "eval_samples", "eval_tokens", "train_padding_share"):
        assert four[name] == pytest.approx(one[name], abs=1e-5), name
    for each in (four, one):
        assert each["train_samples_per_second"] / each["train_steps_per_second"] == pytest.approx(4, rel=0.01)


def test_qwen2(instructions, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(instructions.llama)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    flags = settings("context", tmp_path)
    run_ranks(2, *short(instructions, tmp_path / "two", 2, *flags, model=tmp_path / "model"), env=CARDS)
    run(
        *short(instructions, tmp_path / "one", 2, "--pad_to_max_length", model=tmp_path / "model"),
        env=CARDS,
    )
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    assert results(tmp_path / "two")["eval_loss"] == pytest.approx(results(tmp_path / "one")["eval_loss"], abs=1e-5)


def test_resumed_runs_are_exact(assets, instructions, tmp_path):
    flags = [*settings("context", tmp_path), "--save_strategy", "steps", "--save_steps", 5, "--max_steps"]
    plain = command("full", instructions.llama, assets, instructions, tmp_path / "whole", 2) + flags
    run_ranks(2, *plain, 10, env=CARDS)
    halves = command("full", instructions.llama, assets, instructions, tmp_path / "halves", 2) + flags
    run_ranks(2, *halves, 5, env=CARDS)
    run_ranks(2, *halves, 10, env=CARDS)
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")


REFUSED = {
    "--deepspeed": ["--context_parallel_size", 2],
    "--attn_implementation gaudi_fused_sdpa": [*CONTEXT[:2]],
    "no multiple of 4": [*CONTEXT, "--max_seq_length", 66],
    "the number of ranks, 2": [*CONTEXT, "--context_parallel_size", 3],
    "at least 1": [*CONTEXT, "--context_parallel_size", 0],
    "llama-adapter": [*CONTEXT, "--peft_type", "llama-adapter", "--adapter_layers", 2],
    "--generate": [*CONTEXT, "--generate", "A"],
    "--neftune_noise_alpha": [*CONTEXT, "--neftune_noise_alpha", 5],
}


@pytest.mark.parametrize("named", REFUSED)
def test_refusals(named, instructions, tmp_path):
    flags = REFUSED[named]
    if named != "--deepspeed":
        flags = [*settings("ZeRO-1", tmp_path), *flags]
    output = tmp_path / "out"
    command = short(instructions, output, 2, *flags)
    if named == "llama-adapter":
        first = command.index("--lora_dropout")
        del command[first : command.index("--train_on_inputs")]
    with pytest.raises(AssertionError, match=r"\[2, 2\]|rank 0: 2") as failed:
        run_ranks(2, *command, env=CARDS)
    (line,) = {line for line in str(failed.value).splitlines() if line.startswith("error: ")}
    assert named in line and "--context_parallel_size" in line
    assert not output.exists()
