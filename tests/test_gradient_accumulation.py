"""However the rows of an optimizer step are shared between batches and ranks, the step is the same.

optimum-habana 1.21.2 multiplies loss and gradients by the number of accumulated batches for models whose `forward`
takes no keyword arguments: BERT, RoBERTa, ALBERT and DistilBERT among those here.
"""

import pytest
import torch
from running import ROOT, log_history, run, run_ranks

FAMILIES = ["bert", "roberta", "albert", "distilbert", "gpt2", "gptj", "gpt_neox", "llama"]


@pytest.fixture(scope="module")
def steps(tmp_path_factory) -> dict[tuple[str, str, int], dict]:
    """Losses, gradient norms and weights by family, ROWSxSTEPS and number of ranks; 8 rows are a step throughout."""
    found = {}
    for ranks, shares in ((1, ["8x1", "2x4"]), (2, ["4x1", "1x4"])):
        output = tmp_path_factory.mktemp("accumulation") / "found.pt"
        run_ranks(ranks, ROOT / "tests" / "accumulation_runs.py", output, *shares, "--", *FAMILIES)
        found |= {(*key, ranks): value for key, value in torch.load(output).items()}
    return found


@pytest.mark.slow
@pytest.mark.xdist_group("accumulation")
@pytest.mark.parametrize(("share", "ranks"), [("2x4", 1), ("4x1", 2), ("1x4", 2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_is_the_same_however_it_is_shared(steps, family, share, ranks):
    whole, shared = steps[family, "8x1", 1], steps[family, share, ranks]
    # 20 rows: two steps of 8 rows and one of 4 in each of the two epochs.
    assert len(whole["loss"]) == 6 and len(set(whole["loss"])) == 6
    assert shared["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert shared["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-5)
    for name, weight in whole["weights"].items():
        torch.testing.assert_close(shared["weights"][name], weight, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.xdist_group("accumulation")
def test_masked_script_on_two_ranks(assets, masked_assets, tmp_path):
    """run_mlm.py itself: the same masks, losses and evaluation on one rank and on two that accumulate."""
    flags = [
        *masked_assets.scratch("bert"), "--train_file", assets.train, "--validation_file", assets.validation,
        "--use_cpu", "--do_train", "--do_eval", "--max_train_samples", 44, "--max_eval_samples", 13,
        "--max_seq_length", 32, "--logging_steps", 1, "--learning_rate", 1e-3, "--num_train_epochs", 2,
        "--save_strategy", "no",
    ]  # fmt: skip
    one = ["--per_device_train_batch_size", 8, "--output_dir", tmp_path / "one"]
    two = [
        "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2, "--output_dir", tmp_path / "two",
    ]  # fmt: skip
    run("run_mlm.py", *flags, *one)
    run_ranks(2, "run_mlm.py", *flags, *two)
    alone, shared = log_history(tmp_path / "one"), log_history(tmp_path / "two")
    for name in ("loss", "grad_norm", "eval_loss", "eval_accuracy", "eval_tokens"):
        figures = [row[name] for row in alone if name in row]
        assert len(figures) == (12 if name in ("loss", "grad_norm") else 1)
        assert [row[name] for row in shared if name in row] == pytest.approx(figures, rel=1e-4), name
