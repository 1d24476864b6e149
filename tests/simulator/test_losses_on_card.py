"""The loss without full logits, packed rows and windows, on a simulated card."""

import pytest
from cards import card_environment
from cards import test_on_card as run_on_card
from running import losses, results, run
from tiny_models import tiny_model
from transformers import AutoTokenizer


@pytest.mark.slow
def test_losses_and_packed_rows():
    run_on_card("card_losses.py")


@pytest.mark.slow
def test_a_compiled_window_is_that_of_the_cpu(assets, tmp_path):
    tiny_model("mistral", sliding_window=5, vocab_size=512).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(assets.tokenizer).save_pretrained(tmp_path / "model")
    flags = [
        "--model_name_or_path",
        tmp_path / "model",
        "--train_file",
        assets.train,
        "--block_size",
        24,
        "--do_train",
    ]
    flags += ["--max_steps", 3, "--logging_steps", 1, "--attn_implementation", "eager", "--output_dir"]
    run("run_clm.py", *flags, tmp_path / "cpu", "--use_cpu")
    card = ["--use_habana", "--use_lazy_mode", "False", "--torch_compile", "--torch_compile_backend", "hpu_backend"]
    run("run_clm.py", *flags, tmp_path / "card", *card, env=card_environment(PT_HPU_LAZY_MODE="0"))
    assert losses(tmp_path / "card") == pytest.approx(losses(tmp_path / "cpu"), abs=1e-5)


@pytest.mark.slow
def test_layers_that_are_compiled_by_themselves_train_as_others(assets, tmp_path):
    """Also without DeepSpeed: fewer graphs than in eager mode, where each operation is one."""
    flags = ["--model_name_or_path", assets.gpt2, "--train_file", assets.train, "--block_size", 24, "--do_train"]
    flags += ["--max_steps", 3, "--logging_steps", 1, "--use_habana", "--use_lazy_mode", "False", "--output_dir"]
    regions = ["--torch_compile", "--torch_compile_backend", "hpu_backend", "--use_regional_compilation"]
    for name, more in {"eager": [], "regions": regions}.items():
        run("run_clm.py", *flags, tmp_path / name, *more, env=card_environment(PT_HPU_LAZY_MODE="0"))
    assert losses(tmp_path / "regions") == pytest.approx(losses(tmp_path / "eager"), abs=1e-5)
    graphs = {name: results(tmp_path / name)["graph_compilations"] for name in ("eager", "regions")}
    assert graphs["regions"] < 0.8 * graphs["eager"], graphs
