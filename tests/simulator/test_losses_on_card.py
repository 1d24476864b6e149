"""The loss without full logits, packed rows and windows, on a simulated card."""

import pytest
from cards import card_environment
from cards import test_on_card as run_on_card
from running import losses, run
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
