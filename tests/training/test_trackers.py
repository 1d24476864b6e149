"""--report_to with the real packages, offline: what was reported is read back from where they keep it."""

import json
import re
import struct
from types import SimpleNamespace

import pytest
from running import ROOT, log_history, run, run_ranks
from short_runs import scratch
from transformers import TrainerCallback

from gaudi_lm.errors import UserError
from gaudi_lm.training.trackers import Trackers

WAY_OUT = "; fix that, or give --report_to none"
SERIES = {"loss", "learning_rate", "grad_norm", "tokens_per_second", "padding_share"}


def wandb_records(folder):
    """All records of the only run that was written below a folder: a log as LevelDB writes it, in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.rglob("offline-run-*/run-*.wandb")
    data, place, parts = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)  # behind a checksum
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


@pytest.mark.slow
def test_what_a_run_reports_is_there(assets, tmp_path, monkeypatch):
    from mlflow import MlflowClient
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = ["--do_train", "--do_eval", "--max_steps", 4, "--max_eval_samples", 4, "--report_to", "tensorboard"]
    flags += ["wandb", "mlflow", "--logging_dir", tmp_path / "board", "--run_name", "mine", "--hub_token", "hf_secret"]
    folders = {"WANDB_DIR": str(tmp_path), "MLFLOW_TRACKING_URI": (tmp_path / "mlflow").as_uri()}
    environment = {**folders, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # for the run, and for reading it back
    output = tmp_path / "out"
    run("run_clm.py", *scratch(assets, output, *flags), env=environment)
    history = log_history(output)
    losses = {row["step"]: row["loss"] for row in history if "loss" in row}
    (evaluation,) = [row for row in history if "eval_loss" in row]

    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    assert {f"train/{name}" for name in SERIES} | {"eval/loss", "eval/accuracy"} <= set(board.Tags()["scalars"])
    assert {event.step: event.value for event in board.Scalars("train/loss")} == pytest.approx(losses)
    assert board.Scalars("eval/loss")[0].value == pytest.approx(evaluation["eval_loss"])
    (text,) = board.Tensors("args/text_summary")
    arguments = json.loads(text.tensor_proto.string_val[0])
    assert arguments["block_size"] == 64 and arguments["max_steps"] == 4 and arguments["hub_token"] == "<HUB_TOKEN>"

    rows, config = [], {}
    for record in wandb_records(tmp_path):
        items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
        rows += [{name: json.loads(value) for name, value in items.items()}] if items else []
        for update in [*record.run.config.update, *record.config.update]:
            config[update.key or "/".join(update.nested_key)] = json.loads(update.value_json)
    found = {row["train/global_step"]: row["train/loss"] for row in rows if "train/loss" in row}
    assert found == pytest.approx(losses)
    assert any({f"train/{name}" for name in SERIES} <= row.keys() for row in rows)
    assert [row["eval/loss"] for row in rows if "eval/loss" in row] == [pytest.approx(evaluation["eval_loss"])]
    assert config["block_size"] == 64 and "hf_secret" not in json.dumps(config)
    (whole,) = tmp_path.rglob("offline-run-*/run-*.wandb")  # the command, too
    assert b"--hub_token" in whole.read_bytes() and b"hf_secret" not in whole.read_bytes()

    client = MlflowClient(folders["MLFLOW_TRACKING_URI"])
    (one,) = client.search_runs([client.get_experiment_by_name("Default").experiment_id])
    assert one.info.run_name == "mine" and one.info.status == "FINISHED", "one run, evaluation included"
    assert {*SERIES, "eval_loss", "train_loss"} <= one.data.metrics.keys()
    points = client.get_metric_history(one.info.run_id, "loss")
    assert {point.step: point.value for point in points} == pytest.approx(losses)
    assert one.data.params["block_size"] == "64"


@pytest.mark.slow
def test_a_tracker_without_a_server(assets, tmp_path):
    flags = scratch(assets, tmp_path / "out", "--do_train", "--max_steps", 2, "--report_to", "mlflow")
    nowhere = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    line = rf"^error: --report_to mlflow: .*127.0.0.1.*{WAY_OUT}$"
    assert re.search(line, run("run_clm.py", *flags, env=nowhere, code=2).stderr, re.M)
    (earlier := tmp_path / "out" / "checkpoint-9").mkdir(parents=True, exist_ok=True)
    with pytest.raises(AssertionError) as ended:  # two ranks, of which one has the tracker
        run_ranks(2, "run_clm.py", *flags, "--overwrite_output_dir", env=nowhere)
    assert len(re.findall(line, str(ended.value), re.M)) == 2 and "Traceback" not in str(ended.value)
    assert earlier.is_dir(), "no run has begun that could overwrite it"


@pytest.mark.slow
def test_a_tracker_without_an_account(assets, tmp_path):
    flags = scratch(assets, tmp_path / "out", "--do_train", "--max_steps", 2, "--report_to", "wandb")
    stranger = {"HOME": str(tmp_path), "WANDB_DIR": str(tmp_path), "NETRC": str(tmp_path / "netrc")}
    result = run("run_clm.py", *flags, env=stranger, code=2)
    assert re.search(rf"^error: --report_to wandb: .*wandb login.*{WAY_OUT}$", result.stderr, re.M)


class Tracker(TrainerCallback):
    """One whose server fails at what is in ``fails``."""

    def __init__(self, *fails: str):
        self.fails, self.seen = fails, []

    def serve(self, event: str) -> None:
        self.seen.append(event)
        if event in self.fails:
            raise OSError("the server\ndoes not answer")

    def on_train_begin(self, args, state, control, **kwargs):
        self.serve("begin")

    def on_log(self, args, state, control, **kwargs):
        self.serve("log")

    def on_train_end(self, args, state, control, **kwargs):
        self.serve(f"end with {' and '.join(kwargs)}" if kwargs else "end")


def test_a_tracker_ends_with_the_run_and_the_run_not_with_it(monkeypatch, caplog):
    def run_with(*callbacks: TrainerCallback) -> None:
        trainer = SimpleNamespace(args=SimpleNamespace(report_to=["mine"]), state=None, control=None, model=None)
        trainer.processing_class, trainer.callback_handler = None, SimpleNamespace(callbacks=callbacks)
        trackers = Trackers(trainer)
        for event in ("train_begin", "log", "log", "train_end", "log"):
            for callback in callbacks:
                getattr(callback, f"on_{event}")(None, None, None)
        trackers.close()
        assert not any(vars(callback) for callback in callbacks if not isinstance(callback, Tracker))

    monkeypatch.setattr("gaudi_lm.training.trackers.get_reporting_integration_callbacks", lambda names: [Tracker])
    other, failing = TrainerCallback(), Tracker("log", "end with model and processing_class")
    run_with(other, failing)
    assert failing.seen == ["begin", "log", "log", "log", "end with model and processing_class"]
    line = "--report_to mine: the server does not answer; the run goes on, and figures may be missing there"
    assert caplog.messages == [line], "once"
    with pytest.raises(UserError, match=f"^--report_to mine: the server does not answer{WAY_OUT}$"):
        run_with(Tracker("begin"))
    monkeypatch.setattr("gaudi_lm.training.trackers.from_main", lambda problem: "it fails on the main rank")
    with pytest.raises(UserError, match=f"^it fails on the main rank{WAY_OUT}$"):
        run_with(Tracker())


TRACKIO = """
import json, os
config = {}
def note(*what):
    with open(os.environ["NOTES"], "a") as file:
        print(json.dumps(what, default=str), file=file)
def init(project, name=None, space_id=None, resume="never", **kwargs):
    note("init", project, name)
def log(metrics, step=None):
    note("log", metrics)
    if "train/loss" in metrics:
        raise OSError("the server\\ndoes not answer")
def finish():
    note("finish", sorted(config))
class Config(dict):
    def update(self, values, allow_val_change=False):
        super().update(values)
config = Config()
"""


@pytest.mark.slow
def test_trackio_gets_all_of_a_run_before_its_end(assets, tmp_path):
    """By a stand-in for the calls that transformers makes: the package brings all of gradio, and an older pandas.
    Where its server fails, the run goes on."""
    (tmp_path / "trackio.py").write_text(TRACKIO)
    flags = ["--do_train", "--do_eval", "--max_steps", 2, "--max_eval_samples", 4, "--report_to", "trackio"]
    flags += ["--logging_steps", 1]
    places = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "NOTES": str(tmp_path / "notes"), "TRACKIO_PROJECT": "mine"}
    # A package that appears later is unknown to a process that has done its imports.
    result = run("run_clm.py", *scratch(assets, tmp_path / "out", *flags), env=places, fresh=True)
    assert result.stderr.count("--report_to trackio: the server does not answer; the run goes on") == 1
    notes = [json.loads(line) for line in (tmp_path / "notes").read_text().splitlines()]
    assert notes[0][:2] == ["init", "mine"] and [what for what, *_ in notes[1:]] == ["log"] * (len(notes) - 2) + [
        "finish"
    ]
    reported = {name for what, metrics, *_ in notes[1:-1] for name in metrics}
    assert {"train/loss", "train/tokens_per_second", "eval/loss", "eval/perplexity"} <= reported
    assert {"block_size", "learning_rate"} <= set(notes[-1][1])
