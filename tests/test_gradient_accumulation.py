"""However the rows of an optimizer step are shared between batches and ranks, the step is the same.

optimum-habana 1.21.2 multiplies loss and gradients by the number of accumulated batches for models whose `forward`
takes no keyword arguments: BERT, RoBERTa, ALBERT and DistilBERT among those here.
"""

import subprocess
import sys

import pytest
import torch
from running import ROOT, environment, log_history, run

FAMILIES = ["bert", "roberta", "albert", "distilbert", "gpt2", "gptj", "gpt_neox", "llama"]
ADDED = {  # what is added to the loss, by family
    "mixtral": "aux_loss", "mixtral+lora": "aux_loss", "llama+adalora": "orthogonality_loss",
}  # fmt: skip


@pytest.fixture(scope="module")
def steps(tmp_path_factory) -> dict[tuple[str, str, int], dict]:
    """Losses, gradient norms and weights by family, ROWSxSTEPS and number of ranks; 8 rows are a step throughout."""
    found = {}
    for ranks, shares in ((1, ["8x1", "2x4"]), (2, ["4x1", "1x4"]), (3, ["3x1"])):
        output = tmp_path_factory.mktemp("accumulation") / "found.pt"
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--standalone",
             str(ROOT / "tests" / "accumulation_runs.py"), str(output), *shares,
             "--", *(FAMILIES if ranks < 3 else ["gpt2"]), *ADDED],
            capture_output=True, text=True, env=environment(), timeout=1100, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[:3000]
        found |= {(*key, ranks): value for key, value in torch.load(output).items()}
    return found


@pytest.mark.slow
@pytest.mark.xdist_group("accumulation")
@pytest.mark.parametrize(("share", "ranks"), [("2x4", 1), ("4x1", 2), ("1x4", 2)])
@pytest.mark.parametrize("family", [*FAMILIES, *ADDED])
def test_a_step_is_the_same_however_it_is_shared(steps, family, share, ranks):
    whole, shared = steps[family, "8x1", 1], steps[family, share, ranks]
    # 20 rows: two steps of 8 rows and one of 4 in each of the two epochs.
    assert len(whole["loss"]) == 6 and len(set(whole["loss"])) == 6
    for figure in ("loss", "grad_norm", *filter(None, [ADDED.get(family)])):
        assert shared[figure] == pytest.approx(whole[figure], rel=1e-5), figure
    for name, weight in whole["weights"].items():
        torch.testing.assert_close(shared["weights"][name], weight, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.xdist_group("accumulation")
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("family", ["gpt2", *ADDED])
def test_the_loss_of_a_run_is_of_all_steps_and_ranks(steps, family, ranks):
    """Whatever was logged: all steps, some, or none; the last step of an epoch has fewer rows than the others."""
    logged = steps[family, {1: "8x1", 2: "4x1", 3: "3x1"}[ranks], ranks]
    mean = sum(logged["loss"]) / len(logged["loss"])
    for when in (logged, steps[family, "rare", ranks], steps[family, "never", ranks]):
        assert when["metrics"]["train_loss"] == pytest.approx(mean, rel=1e-6)
        assert when["training_loss"] == when["metrics"]["train_loss"]
    assert len(steps[family, "rare", ranks]["loss"]) == 1 and "loss" not in steps[family, "never", ranks]


@pytest.mark.slow
@pytest.mark.xdist_group("accumulation")
def test_what_adalora_drops_is_dropped_on_all_ranks(steps):
    runs = [steps["llama+adalora", share, ranks] for share, ranks in (("8x1", 1), ("2x4", 1), ("4x1", 2), ("1x4", 2))]
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
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, "run_mlm.py", *map(str, [*flags, *two])],
        capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=1100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    alone, shared = log_history(tmp_path / "one"), log_history(tmp_path / "two")
    for name in ("loss", "grad_norm", "eval_loss", "eval_accuracy", "eval_tokens"):
        figures = [row[name] for row in alone if name in row]
        assert len(figures) == (12 if name in ("loss", "grad_norm") else 1)
        assert [row[name] for row in shared if name in row] == pytest.approx(figures, rel=1e-4), name
