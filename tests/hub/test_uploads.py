"""--push_to_hub: nothing is lost where the hub fails, and the next start uploads."""

import os
import shutil
import signal
import time
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import requests
import urllib3
from huggingface_hub import ModelCard, configure_http_backend, constants
from running import results, run, run_interrupted
from short_runs import scratch

from gaudi_lm.arguments.definitions import LMTrainingArguments
from gaudi_lm.training import hub
from hub.uploads import UploadHub


@pytest.fixture
def uploads():
    with UploadHub() as hub:
        yield hub


def start(assets, output, hub: UploadHub, *flags) -> str:
    more = ["--do_train", "--do_eval", "--max_steps", 2, "--max_eval_samples", 4, "--push_to_hub", *flags]
    log = run("run_clm.py", *scratch(assets, output, *more), env=hub.environment).stderr
    assert "Traceback" not in log and "hf_writer" not in log
    return log


@pytest.mark.slow
def test_what_fails_is_one_line_and_the_next_start_uploads(assets, tmp_path, uploads):
    output = tmp_path / "tiny"
    for fault, reason in (("down", "("), ("denied", "401"), ("cut", "(")):
        uploads.fault = fault
        log = start(assets, output, uploads)
        (line,) = [line for line in log.splitlines() if "--push_to_hub" in line]
        assert "WARNING --push_to_hub: tiny was not uploaded" in line and reason in line
        assert f"`hf upload tiny {output} --exclude 'checkpoint-*' 'unused-checkpoint-*'`" in line
        assert log.index("Outputs saved to") < log.index("was not uploaded")
        assert {"model.safetensors", "README.md", "loss_curve.png"} <= {path.name for path in output.iterdir()}
        assert not uploads.files["me/tiny", "main"]
    uploads.fault = None
    shutil.copytree(output / "checkpoint-2", output / "unused-checkpoint-3")
    assert "/me/tiny\n" in start(assets, output, uploads, "--hub_private_repo")
    files = uploads.files["me/tiny", "main"]
    assert {"config.json", "tokenizer.json", "loss_curve.png", "README.md", "all_results.json"} <= files.keys()
    assert files["model.safetensors"] == (output / "model.safetensors").read_bytes()
    assert not any(name.startswith(("checkpoint", "unused", "optimizer")) for name in files)
    assert uploads.created["me/tiny"]["private"] is True
    card = ModelCard(files["README.md"].decode())
    found = {one.metric_type: one.metric_value for one in card.data.eval_results}
    figures = results(output)
    assert found == {name: figures[f"eval_{name}"] for name in ("loss", "perplexity", "accuracy")}
    assert card.data.model_name == "tiny" and card.data.pipeline_tag == "text-generation"


@pytest.mark.slow
def test_checkpoints_while_training(assets, tmp_path, uploads):
    flags = ["--hub_model_id", "team/named", "--hub_strategy", "checkpoint", "--hub_revision", "trial"]
    start(assets, tmp_path / "x", uploads, *flags, "--save_steps", 1, "--hub_always_push")
    files = uploads.files["team/named", "trial"]
    assert {"last-checkpoint/optimizer.pt", "last-checkpoint/trainer_state.json", "model.safetensors"} <= files.keys()
    assert "optimizer.pt" not in files and uploads.created["team/named"]["organization"] == "team"
    steps = [message for message in uploads.commits if "step" in message]
    wanted = [f"Training in progress, step {step}" for step in (1, 2)]
    assert steps == [words for step in wanted for words in (step, f"{step}, checkpoint")]
    assert uploads.commits[-1] == "End of training"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["every_save", "all_checkpoints"])
def test_a_checkpoint_stays_while_it_is_uploaded(assets, tmp_path, uploads, strategy):
    """An upload takes longer than several steps, and --save_total_limit keeps one checkpoint."""
    uploads.delay = 2
    log = start(
        assets, tmp_path / "x", uploads, "--hub_strategy", strategy, "--save_steps", 1, "--save_total_limit", 1,
        "--max_steps", 6,
    )  # fmt: skip
    assert "was not uploaded" not in log
    assert "Training in progress, step 1" in uploads.commits and uploads.commits[-1] == "End of training"
    files = uploads.files["me/x", "main"]
    assert ("checkpoint-1/optimizer.pt" in files) == (strategy == "all_checkpoints")
    assert [path.name for path in (tmp_path / "x").glob("checkpoint-*")] == ["checkpoint-6"]


@pytest.mark.slow
@pytest.mark.parametrize("steps", [2, 100_000], ids=["of the result", "of a checkpoint"])
def test_a_signal_does_not_wait_for_an_upload(assets, tmp_path, uploads, steps):
    """A platform that sends SIGTERM kills what is still there some seconds later."""
    uploads.answering.clear()

    def stop(processes: list[int]) -> None:
        deadline = time.monotonic() + 120
        while not uploads.created:  # the first request of an upload
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(processes[0], signal.SIGTERM)

    more = ["--do_train", "--max_steps", steps, "--save_steps", 5, "--save_total_limit", 2, "--push_to_hub"]
    flags = scratch(assets, tmp_path / "x", *more, "--hub_strategy", "end" if steps == 2 else "every_save")
    try:
        (end,) = run_interrupted(0, "run_clm.py", *flags, meanwhile=stop, env=uploads.environment)
    finally:
        uploads.answering.set()
    assert end.returncode == 128 + signal.SIGTERM and not uploads.commits, end.stderr
    words = "Outputs saved to" if steps == 2 else "SIGTERM: training ends after step"
    assert words in end.stderr


@pytest.mark.parametrize(
    ("strategy", "places"),
    [
        ("end", []),
        ("every_save", [None]),
        ("checkpoint", [None, "last-checkpoint"]),
        ("all_checkpoints", [None, "checkpoint-3"]),
    ],
)
def test_which_checkpoints_are_uploaded_and_where_to(strategy, places, tmp_path, caplog):
    """The folder's own files at the top without what is to resume from, then all of them; one upload at a time."""
    begun, jobs = [], []

    class Api:
        endpoint = "http://hub"

        def run_as_future(self, upload, *what) -> Future:
            begun.append(what)
            jobs.append(Future())
            return jobs[-1]

    flags = {"hub_model_id": None, "hub_private_repo": True, "hub_revision": "trial", "hub_always_push": False}
    args = SimpleNamespace(
        output_dir=tmp_path / "mine", hub_strategy=strategy, hub_token=None, push_to_hub=False, **flags
    )
    uploads = hub.HubUploads(args)
    uploads._api = Api()
    folder = tmp_path / "mine" / "checkpoint-3"
    uploads.checkpoint(folder, 3)
    assert [what[3] for what in begun] == places and {what[0] for what in begun} <= {folder}
    assert [what[2] for what in begun] == [hub.TO_RESUME, None][: len(places)]
    uploads.checkpoint(folder, 4)
    assert len(begun) == len(places), "while the first is under way, or never"
    for number, job in enumerate(jobs):
        assert uploads.is_uploading(f"{folder}/") and not uploads.is_uploading(str(tmp_path))
        job.set_exception(OSError("it was cut")) if number else job.set_result("me/mine")
    assert not uploads.is_uploading(str(folder))
    uploads.checkpoint(folder, 5)
    assert len(begun) == 2 * len(places)
    failed = "--push_to_hub: a checkpoint of mine was not uploaded (it was cut)"
    command = f"`hf upload mine {tmp_path / 'mine'} --private --revision trial --exclude 'checkpoint-*' "
    assert [failed in line and command in line for line in caplog.messages] == [True] * (len(places) - 1)


def test_a_last_checkpoint_that_failed_is_named_though_the_result_is_uploaded(tmp_path, caplog):
    ends = iter([OSError("it was cut"), None])

    class Api:
        endpoint = "http://hub"

        def run_as_future(self, *what) -> Future:
            job = Future()
            job.set_exception(error) if (error := next(ends)) else job.set_result("me/mine")
            return job

    flags = {"hub_model_id": None, "hub_private_repo": None, "hub_revision": None, "hub_always_push": False}
    args = SimpleNamespace(output_dir=tmp_path, hub_strategy="every_save", hub_token=None, push_to_hub=False, **flags)
    uploads = hub.HubUploads(args)
    uploads._api = Api()
    uploads.checkpoint(tmp_path / "checkpoint-3", 3)
    uploads.result("End of training")
    assert f"--push_to_hub: a checkpoint of {tmp_path.name} was not uploaded (it was cut)" in caplog.text


def test_a_hub_that_does_not_answer(tmp_path, uploads, monkeypatch, caplog):
    monkeypatch.setattr(constants, "ENDPOINT", uploads.environment["HF_ENDPOINT"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "PATIENCE", 1)
    uploads.delay = 3
    (tmp_path / "config.json").write_text("{}")
    args = LMTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, do_train=True, push_to_hub=True, hub_token="hf_writer"
    )
    try:
        hub.HubUploads(args).result("End of training")
    finally:
        configure_http_backend()
    assert f"--push_to_hub: {tmp_path.name} was not uploaded (" in caplog.text and "timed out" in caplog.text
    assert uploads.created and not uploads.commits


def test_a_slow_line_is_waited_for(monkeypatch):
    """A time for connections alone is also that in which a commit is to be sent: small files, some MB together."""
    seen = []
    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", lambda self, request, *rest: seen.append(rest[1]))
    for given in (None, 7):
        hub._Patience().send(requests.Request("POST", "http://127.0.0.1"), timeout=given)
    assert seen == [hub.PATIENCE, 7]
    assert urllib3.Timeout(hub.PATIENCE).connect_timeout >= 300
