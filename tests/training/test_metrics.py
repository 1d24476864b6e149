"""Figures against their definitions."""

import json
import math
import subprocess
import sys
import sysconfig
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from running import ROOT

from gaudi_lm.data.sampling import FILLER_SAMPLE, count_tokens, ignore_filler_samples
from gaudi_lm.training import metrics, outputs
from gaudi_lm.training.metrics import Throughput, save_loss_curve, token_metrics
from gaudi_lm.training.sums import TokenSums, TrainingLoss


@given(
    seed=st.integers(0, 1000),
    ranks=st.integers(1, 3),
    batches=st.integers(1, 70),
    ignored=st.floats(0, 0.9),
)
def test_sums_equal_the_full_logits(seed, ranks, batches, ignored):
    """Loss, perplexity and accuracy from sums over batches and ranks, against all logits at once."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(ranks, batches, 6, 11, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 11, (ranks, batches, 6), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < ignored] = -100
    labels[0, 0, 0] = 3
    parts = []
    for rank in range(ranks):
        sums = TokenSums()
        for batch in range(batches):
            own, target = logits[rank, batch], labels[rank, batch]
            loss = torch.nn.functional.cross_entropy(own, target, reduction="sum", ignore_index=-100)
            sums.add(loss, (own.argmax(-1) == target).sum(), (target != -100).sum())
        parts.append(sums.over_ranks())
    rows = {name: [part[name][0] for part in parts] for name in parts[0]}
    result = token_metrics(**rows)
    flat, targets = logits.reshape(-1, 11), labels.reshape(-1)
    loss = torch.nn.functional.cross_entropy(flat, targets, ignore_index=-100).item()
    kept = targets != -100
    assert result["loss"] == pytest.approx(loss, rel=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert result["accuracy"] == pytest.approx((flat.argmax(-1) == targets)[kept].double().mean().item())
    assert sum(rows["count"]) == int(kept.sum())


def test_counts_beyond_float32_are_exact():
    """Two batches of 2**24 + 1 tokens, where float32 counts by twos."""
    sums, many = TokenSums(), torch.tensor(2**24 + 1)
    for _ in range(2):
        sums.add(torch.tensor(1.0), many, many)
    assert sums.over_ranks() == {"loss_sum": [2.0], "correct": [2**25 + 2], "count": [2**25 + 2]}


def test_sums_leave_the_card_every_32_batches():
    sums, one, left = TokenSums(), torch.tensor(1), []
    for _ in range(64):
        sums.add(one.float(), one, one)
        left.append(sums.count)
    assert left == [0] * 31 + [32] * 32 + [64]
    assert sums.over_ranks() == {"loss_sum": [64.0], "correct": [64], "count": [64]}


def add_steps(loss: TrainingLoss, *steps: list[float]) -> TrainingLoss:
    """Steps of some batches each, whose losses are parts of their step's."""
    for batches in steps:
        for batch in batches:
            loss.add(torch.tensor(batch))
        loss.on_step_end(None, None, None)
    return loss


def test_the_training_loss_is_the_mean_over_steps():
    loss = add_steps(TrainingLoss(), [1.0, 2.0], [3.0])
    assert loss.take() == {"loss": 3.0} and loss.take() == {} and loss.steps == 0
    loss.add(torch.tensor(1.0))
    loss.correct(torch.tensor(5.0))  # what a compute_loss of one's own made of it
    loss.on_step_end(None, None, None)
    assert loss.result() == {"train_loss": 11 / 3}
    assert TrainingLoss().result() == {}
    loss.add(torch.tensor(1.0))
    assert loss.take() == {}, "a step of which only a part is over"


def test_what_is_added_to_the_loss_is_logged_beside_it():
    loss = TrainingLoss(adds_orthogonality=True)
    outputs = {"loss_sum": torch.tensor(6.0), "aux_loss": torch.tensor(0.5), "count": torch.tensor(2)}
    for _ in range(2):
        loss.add(torch.tensor(2.0), outputs, share=torch.tensor(0.25))
    loss.on_step_end(None, None, None)
    assert loss.take() == {"loss": 3.0, "aux_loss": 0.5, "orthogonality_loss": 0.5} and loss.batches == 2
    plain = TrainingLoss()
    plain.add(torch.tensor(2.0), {**outputs, "aux_loss": None}, share=torch.tensor(0.25))
    plain.on_step_end(None, None, None)
    assert plain.take() == {"loss": 1.5}, "nothing is added"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_batch_that_is_not_finite_counts_as_those_before_it(bad):
    assert not math.isfinite(add_steps(TrainingLoss(), [2.0], [bad]).take()["loss"])
    for steps in ([[2.0], [4.0], [bad]], [[1.0, 2.0], [1.5, bad]], [[3.0, bad]]):
        steps = [[value / len(batches) for value in batches] for batches in steps]
        known = [sum(batches) for batches in steps if math.isfinite(sum(batches))] or [3.0]
        loss = add_steps(TrainingLoss(skip_nan=True), *steps)
        assert loss.take() == {"loss": pytest.approx(sum(known) / len(known))}
    loss = add_steps(TrainingLoss(skip_nan=True), [2.0])
    loss.correct(torch.tensor(bad))
    assert loss.take() == {"loss": 2.0}
    assert add_steps(loss, [4.0], [bad]).take() == {"loss": 4.0}
    loss = add_steps(TrainingLoss(), [2.0])
    loss.correct(torch.tensor(bad))
    assert not math.isfinite(loss.take()["loss"])


@pytest.mark.parametrize(("ranks", "own"), [(2, 5.0), (3, 3.0)])
def test_the_training_loss_goes_on_from_a_checkpoint(ranks, own, monkeypatch):
    """Each rank from its own sum, or from the mean where their number is another."""
    loss = add_steps(TrainingLoss(), [7.0])
    loss.take()
    add_steps(loss, [0.5], [0.5])
    monkeypatch.setattr("gaudi_lm.training.sums.gather", lambda sums: [sums, [5.0]])
    loss.keep()
    state = SimpleNamespace(global_step=3, stateful_callbacks={"TrainingLoss": loss.state()})
    resumed = TrainingLoss(skip_nan=True)
    resumed.on_train_begin(SimpleNamespace(world_size=ranks, process_index=1, device="cpu"), state, None)
    monkeypatch.setattr("gaudi_lm.training.sums.gather", lambda sums: [sums])
    assert add_steps(resumed, [math.nan]).take() == {"loss": own / 2}, "as the two before it"
    assert resumed.result() == {"train_loss": (7.0 + own * 3 / 2) / 4}
    state.global_step = 0  # training begins anew
    resumed.on_train_begin(None, state, None)
    assert resumed.result() == {} and add_steps(resumed, [3.0]).result() == {"train_loss": 3.0}


def test_the_training_loss_after_a_checkpoint_that_has_none(caplog):
    state, loss = SimpleNamespace(global_step=4, stateful_callbacks={}), TrainingLoss()
    with caplog.at_level("INFO"):
        loss.on_train_begin(None, state, None)
    assert "train_loss will be of the steps after 4" in caplog.text
    assert state.stateful_callbacks == {"TrainingLoss": loss.state()}  # where the trainer looks for it
    assert add_steps(loss, [3.0]).result() == {"train_loss": 3.0}


def test_throughput_of_more_tokens_than_float32_counts(monkeypatch):
    throughput = Throughput(0, lambda: None)
    throughput.steps, throughput.samples, throughput.seconds = 1, 1, 1.0
    throughput.tokens = throughput.positions = 2**24 + 1
    monkeypatch.setattr(metrics, "gather", lambda own: [own, own])
    assert throughput.figures("train")["train_tokens_per_second"] == 2**25 + 2


def test_throughput_is_of_all_ranks(monkeypatch):
    """Samples and tokens of all, in the time of the slowest, by steps that they take together."""
    throughput, clock = Throughput(0, lambda: None, parts=2), iter([5.0, 15.0, 25.0, 30.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    assert Throughput(0, lambda: None).figures("train") == {}
    monkeypatch.setattr(metrics, "gather", lambda own: [own, [30, 50, 5.0]])
    throughput.begin_step()
    throughput.end_step(samples=8, tokens=60, positions=100)
    assert throughput.since_last() == {"tokens_per_second": 9.0, "padding_share": 0.4}
    throughput.end_step(samples=8, tokens=90, positions=100)
    assert throughput.since_last() == {"tokens_per_second": 12.0, "padding_share": 0.2}
    monkeypatch.setattr(metrics, "gather", lambda own: [own, (4.0, 50, 100, 50.0, 2)])
    assert throughput.figures("train") == {
        "train_samples_per_second": 0.24,
        "train_steps_per_second": 0.04,
        "train_tokens_per_second": 4.0,
        "train_padding_share": 0.3333,
    }


def test_no_label_gives_no_number():
    result = token_metrics(loss_sum=[0.0], correct=[0], count=[0])
    assert all(math.isnan(value) for value in result.values())
    assert token_metrics(loss_sum=[1000.0], correct=[0], count=[1])["perplexity"] == math.inf


def test_figures_of_data_and_time_are_no_results():
    found = {"eval_loss": 2.5, "eval_f1": 1, "eval_samples": 4, "eval_runtime": 1.0, "eval_steps_per_second": 2.0}
    found |= {"eval_padding_share": 0.1, "eval_tokens": 9, "eval_report": "good", "eval_perplexity": math.inf}
    results = ["eval_loss", "eval_f1", "eval_perplexity"]
    assert [name for name, value in found.items() if metrics.is_result(name, value)] == results


def test_the_files_of_figures_are_json(tmp_path):
    """What is no number is null, in lists and tables of a compute_metrics of one's own, too."""
    outputs._write_json(tmp_path / "a.json", {"a": math.nan, "b": [math.inf, 1.5], "c": {"d": -math.inf}, "e": 2})
    found = json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)
    assert found == {"a": None, "b": [None, 1.5], "c": {"d": None}, "e": 2}


def test_throughput_leaves_out_warm_up_and_pauses(monkeypatch):
    now, waits = [50.0], []
    monkeypatch.setattr("gaudi_lm.training.metrics.time.perf_counter", lambda: now[0])
    throughput = Throughput(2, lambda: waits.append(1))
    logged = []
    for step in range(6):
        throughput.begin_step()
        now[0] += 5
        throughput.end_step(samples=4, tokens=30, positions=40)
        if step == 3:
            throughput.pause()
            throughput.pause()  # evaluation and saving after one step: the second changes nothing
            now[0] += 100
        logged.append(throughput.since_last())
    nothing, figures = {}, {"tokens_per_second": 6.0, "padding_share": 0.25}
    assert logged == [nothing, nothing, *[figures] * 4] and throughput.since_last() == nothing
    assert throughput.figures("train")["train_steps_per_second"] == 0.2
    assert (throughput.steps, throughput.samples, throughput.tokens, throughput.positions) == (4, 16, 120, 160)
    assert throughput.seconds == 20 and len(waits) == 3


def test_all_warm_up_counts_nothing():
    throughput = Throughput(5, lambda: None)
    for _ in range(5):
        throughput.begin_step()
        throughput.end_step(1, 1, 1)
    throughput.pause()
    assert throughput.steps == 0 and throughput.seconds == 0 and throughput.steps_seen == 5


def test_tokens_of_a_batch():
    ids = torch.zeros(2, 3, dtype=torch.long)
    assert count_tokens({"input_ids": ids}) == (2, 6, 6)
    assert count_tokens({"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}) == (2, 3, 6)
    blocks = torch.stack([torch.eye(3), torch.diag(torch.tensor([1.0, 0.0, 0.0]))]).bool()
    assert count_tokens({"input_ids": ids, "attention_mask": blocks}) == (2, 4, 6)


def test_a_row_that_only_completes_a_batch_is_no_sample():
    def collate(rows: list[dict]) -> dict:
        ids = torch.tensor([row["input_ids"] for row in rows])
        return {"input_ids": ids, "labels": ids.clone()}

    batch = ignore_filler_samples(collate)([{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5, 6], FILLER_SAMPLE: True}])
    assert batch["labels"].tolist() == [[1, 2, 3], [-100] * 3]
    assert count_tokens({**batch, "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}) == (1, 2, 6)
    assert count_tokens(batch) == (1, 3, 6)
    assert set(batch) == {"input_ids", "labels"}


def test_the_loss_curve_shows_what_was_logged(tmp_path):
    from matplotlib.image import imread

    path = tmp_path / "curve.png"
    history = [{"step": step, "loss": 5 - step / 10} for step in range(1, 30)] + [{"step": 29, "eval_loss": 2.5}]
    assert save_loss_curve(history, path)
    colours = {tuple(colour) for colour in (imread(path)[..., :3] * 255).round().astype(int).reshape(-1, 3).tolist()}
    assert (31, 119, 180) in colours and (255, 127, 14) in colours, "a line for training, a mark for evaluation"
    assert not save_loss_curve([{"step": 1, "learning_rate": 1}], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_the_loss_curve_has_a_line_for_each_evaluation_set(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: drawn.append(figure.axes[0]))
    history = [
        {"step": step, f"eval_{name}_loss": 2.0 + step, f"eval_{name}_samples": 4, f"eval_{name}_own_loss": 9.0}
        for step in (5, 9, 9)  # the last one after training, of the best model
        for name in ("news", "wiki_en")
    ]
    assert save_loss_curve(history, tmp_path / "sets.png")
    lines = {line.get_label(): line.get_xdata().tolist() for line in drawn[0].lines if line.get_label()[0] != "_"}
    assert lines == {"evaluation news": [5, 9], "evaluation wiki_en": [5, 9]}
    assert save_loss_curve([{"step": 1, "loss": 3.0}], tmp_path / "one.png")
    assert drawn[1].get_xlim() == (0, 2), "no thousandths of steps"


@pytest.mark.parametrize("points", [30, 100, 3000])
def test_a_single_peak_of_the_loss_does_not_make_the_rest_flat(tmp_path, monkeypatch, points):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: drawn.append(figure.axes[0]))
    losses = [5 - 3 * step / points for step in range(points)]
    losses[points // 2] = 500.0
    save_loss_curve([{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)], tmp_path / "peak.png")
    low, high = drawn[0].get_ylim()
    assert 1 < low < 2.1 and 4.8 < high < 6


@pytest.mark.slow
def test_requirements_leave_habanas_builds_alone(tmp_path):
    """With torch, torchvision and DeepSpeed installed as SynapseAI does, requirements.txt replaces none of them."""
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    site = next((tmp_path / "venv" / "lib").glob("python3*")) / "site-packages"
    # All else is there already, so that only these three are in question.
    (site / "rest.pth").write_text(sysconfig.get_path("purelib") + "\n")
    habana = {
        "torch": "2.9.0+hpu.1.23.0",
        "torchvision": "0.24.0a0+b919bd0",
        "deepspeed": "0.18.2+hpu.synapse.v1.23.0",
    }
    for name, version in habana.items():
        folder = site / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (folder / "INSTALLER").write_text("pip\n")
        (folder / "RECORD").write_text("")
    result = subprocess.run(
        [python, "-m", "pip", "install", "--dry-run", "-r", ROOT / "requirements.txt"],
        check=True, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert "Requirement already satisfied: optimum-habana==" in result.stdout
    assert f"({habana['torch']})" in result.stdout, "the check saw another torch than Habana's"
    assert "Would install" not in result.stdout


def test_figures_that_each_rank_has_for_itself_are_the_highest(monkeypatch):
    other = {"train_runtime": 1.0, "peak_device_memory_gb": 9.5}
    monkeypatch.setattr(outputs, "gather", lambda own: [own, other])
    own = {"train_runtime": 2.0, "train_loss": 3.0, "peak_device_memory_gb": 4.0}
    assert outputs.highest_of_ranks(own) == {**other, "train_runtime": 2.0}
