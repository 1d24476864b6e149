"""Unpacked texts on simulated cards: batches of several lengths, and no graph compiled after warm-up."""

import pytest
from cards import card_environment
from running import losses, results, run, run_ranks
from short_runs import common
from transformers import AutoConfig, AutoTokenizer, OPTConfig, OPTForCausalLM, set_seed

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("cards")]

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


def test_the_random_state_is_left_as_it_was(instructions, tmp_path):
    """OPT skips layers by the host's, so a card that skips those of the CPU has its losses."""
    folder = tmp_path / "opt"
    set_seed(1)
    config = OPTConfig(
        vocab_size=AutoConfig.from_pretrained(instructions.llama).vocab_size, max_position_embeddings=256,
        hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=8, num_attention_heads=2,
        layerdrop=0.2, dropout=0.0,
    )  # fmt: skip
    OPTForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(instructions.llama).save_pretrained(folder)
    # FusedAdamW, the default of a card, counts the steps of skipped layers too.
    more = [*FLAGS, "--model_name_or_path", folder, "--optim", "sgd", "--learning_rate", 1]
    run("run_lora_clm.py", *common(instructions, tmp_path / "card", *more, *ON_CARD), env=card_environment())
    run("run_lora_clm.py", *common(instructions, tmp_path / "cpu", *more, "--use_cpu"))
    assert losses(tmp_path / "card") == pytest.approx(losses(tmp_path / "cpu"), abs=1e-5)


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
