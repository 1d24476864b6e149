"""However the rows of an optimizer step are shared between batches and ranks, the step is the same.

optimum-habana 1.21.2 multiplies loss and gradients by the number of accumulated batches for models whose `forward`
takes no keyword arguments: BERT, RoBERTa, ALBERT and DistilBERT among those here.
"""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from running import ROOT, log_history, run, run_ranks

FAMILIES = ["bert", "roberta", "albert", "distilbert", "gpt2", "gptj", "gpt_neox", "llama"]
ADDED = {  # what is added to the loss, by family
    "mixtral": "aux_loss", "mixtral+lora": "aux_loss", "llama+adalora": "orthogonality_loss",
}  # fmt: skip
LOGGED = ["gpt2", *ADDED]  # of these, runs that log now and then as well, and three ranks
SHARES = {1: ["8x1", "2x4"], 2: ["4x1", "1x4"], 3: ["3x1"]}


@pytest.fixture(scope="module")
def steps(tmp_path_factory) -> Callable[[str, int], dict[str, dict]]:
    """Figures and weights of a family's runs by ROWSxSTEPS, for a number of ranks; 8 rows are a step, of 3 ranks 9."""

    @cache
    def train(family: str, ranks: int) -> dict[str, dict]:
        output = tmp_path_factory.mktemp("accumulation") / "found.pt"
        run_ranks(ranks, ROOT / "tests/support/accumulation_runs.py", output, *SHARES[ranks], "--", family)
        return torch.load(output)

    return train


@pytest.mark.slow
@pytest.mark.xdist_group("accumulation")
@pytest.mark.parametrize(("share", "ranks"), [("2x4", 1), ("4x1", 2), ("1x4", 2)])
@pytest.mark.parametrize("family", [*FAMILIES, *ADDED])
def test_a_step_is_the_same_however_it_is_shared(steps, family, share, ranks):
    whole, shared = steps(family, 1)["8x1"], steps(family, ranks)[share]
    # 20 rows: two steps of 8 rows and one of 4 in each of the two epochs.
    assert len(whole["loss"]) == 6 and len(set(whole["loss"])) == 6
    for figure in ("loss", "grad_norm", *filter(None, [ADDED.get(family)])):
        assert shared[figure] == pytest.approx(whole[figure], rel=1e-5), figure
    for name, weight in whole["weights"].items():
        torch.testing.assert_close(shared["weights"][name], weight, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.xdist_group("accumulation")
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("family", LOGGED)
def test_the_loss_of_a_run_is_of_all_steps_and_ranks(steps, family, ranks):
    """Whatever was logged: all steps, some, or none; the last step of an epoch has fewer rows than the others."""
    runs = steps(family, ranks)
    logged = runs[SHARES[ranks][0]]
    mean = sum(logged["loss"]) / len(logged["loss"])
    for one in (logged, runs["rare"], runs["never"]):
        assert one["metrics"]["train_loss"] == pytest.approx(mean, rel=1e-6)
        assert one["training_loss"] == one["metrics"]["train_loss"]
    assert len(runs["rare"]["loss"]) == 1 and "loss" not in runs["never"]


@pytest.mark.slow
@pytest.mark.xdist_group("accumulation")
def test_what_adalora_drops_is_dropped_on_all_ranks(steps):
    runs = [steps("llama+adalora", ranks)[share] for ranks in (1, 2) for share in SHARES[ranks]]
    dropped = [
        {name: (value == 0).view(-1).tolist() for name, value in run["weights"].items() if "lora_E" in name}
        for run in runs
    ]
    assert all(found == dropped[0] for found in dropped)
    kept = sum(not zero for values in dropped[0].values() for zero in values)
    assert kept == 2 * len(dropped[0]) and 0 < kept < sum(map(len, dropped[0].values()))


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
