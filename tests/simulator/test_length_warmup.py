"""Unpacked texts on simulated cards: batches of several lengths, and no graph compiled after warm-up."""

import pytest
from cards import card_environment
from running import losses, results, run, run_ranks
from short_runs import common

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("heavy")]

# One row a batch: the longest lengths come late, and in every place of a step.
FLAGS = [
    "--do_train",
    "--do_eval",
    "--per_device_eval_batch_size",
    1,
    "--max_steps",
    10,
    "--per_device_train_batch_size",
    1,
    "--lora_dropout",
    0,
    "--save_strategy",
    "no",
]
ON_CARD = ["--use_habana", "--use_lazy_mode", "--throughput_warmup_steps", 3]


@pytest.mark.parametrize("accumulation", [1, 3])
def test_lengths_are_compiled_in_the_warmup(instructions, tmp_path, accumulation):
    more = [*FLAGS, "--gradient_accumulation_steps", accumulation]
    log = run(
        "run_lora_clm.py", *common(instructions, tmp_path / "card", *more, *ON_CARD), env=card_environment()
    ).stderr
    assert "batches are padded to one of the lengths" in log
    figures = results(tmp_path / "card")
    assert figures["graph_compilations_after_warmup"] == 0 and figures["host_syncs_per_step"] == 0
    run("run_lora_clm.py", *common(instructions, tmp_path / "cpu", *more, "--use_cpu"))
    assert losses(tmp_path / "card") == pytest.approx(losses(tmp_path / "cpu"), abs=1e-5)
    assert figures["eval_loss"] == pytest.approx(results(tmp_path / "cpu")["eval_loss"], abs=1e-5)


def test_on_two_cards(instructions, tmp_path):
    more = [*FLAGS, "--gradient_accumulation_steps", 2]
    run_ranks(2, "run_lora_clm.py", *common(instructions, tmp_path / "two", *more, *ON_CARD), env=card_environment(2))
    assert results(tmp_path / "two")["graph_compilations_after_warmup"] == 0
    more += ["--per_device_train_batch_size", 2, "--use_cpu"]
    run("run_lora_clm.py", *common(instructions, tmp_path / "cpu", *more))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "cpu"), abs=1e-5)


def test_lines_of_a_masked_model(masked_assets, assets, tmp_path):
    more = [*masked_assets.scratch("roberta"), "--train_file", assets.train, "--validation_file", assets.validation]
    more += ["--line_by_line", "--max_seq_length", 64, "--output_dir", tmp_path / "lines", "--max_eval_samples", 20]
    flags = FLAGS[: FLAGS.index("--lora_dropout")]
    log = run("run_mlm.py", *more, *flags, *ON_CARD, env=card_environment()).stderr
    assert "batches are padded to one of the lengths" in log
    assert results(tmp_path / "lines")["graph_compilations_after_warmup"] == 0
