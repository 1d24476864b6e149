"""Checkpoints are whole or not there, checked before they are used, and run nothing that lies in them."""

import contextlib
import errno
import json
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from resuming import CARD, CPU, script_flags, start, zero

from gaudi_lm.errors import UserError
from gaudi_lm.training import checkpoints, saving
from gaudi_lm.training.fsdp import check_kind, state_dict_type
from gaudi_lm.training.resume import clear_the_way, find_checkpoint
from gaudi_lm.training.resumed_state import Resumption
from gaudi_lm.training.saving import ResumableTrainer, SavingSteps
from gaudi_lm.training.write_errors import WriteError, reason_of

FILES = [
    "config.json", "gaudi_config.json", "generation_config.json", "model.safetensors", "optimizer.pt", "rng_state.pth",
    "scheduler.pt", "tokenizer.json", "tokenizer_config.json", "trainer_state.json", "training_args.bin",
    "manifest.json",
]  # fmt: skip
DAMAGES = ["deleted", "emptied", "halved", "zeroed", "tail zeroed"]
STEPS = (3, 6)


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    tail = max(1, len(data) // 8)
    if how == "deleted":
        path.unlink()
    else:
        path.write_bytes(
            {
                "emptied": b"",
                "halved": data[: len(data) // 2],
                "zeroed": bytes(len(data)),
                "tail zeroed": data[:-tail] + bytes(tail),
            }[how]
        )


@pytest.fixture(scope="module")
def trained(assets, masked_assets, instructions, tmp_path_factory) -> Path:
    """The folder of a run that has saved ``checkpoint-3``, ``-6`` and ``-8``."""
    output = tmp_path_factory.mktemp("trained") / "out"
    start("run_clm.py", 1, output, *script_flags("run_clm.py", assets, masked_assets, instructions), *CPU)
    return output


@pytest.fixture
def output(trained, tmp_path) -> Path:
    """An output directory as a kill leaves it: two checkpoints, and what was being written when it came."""
    folder = tmp_path / "out"
    for step in STEPS:
        shutil.copytree(trained / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    shutil.copytree(trained / "checkpoint-8", folder / "incomplete-checkpoint-8")
    (folder / "incomplete-checkpoint-8" / "optimizer.pt").unlink()
    return folder


def arguments(folder: Path, **changes) -> SimpleNamespace:
    values = {"do_train": True, "process_index": 0, "resume_from_checkpoint": None, "overwrite_output_dir": False}
    return SimpleNamespace(fsdp=[], output_dir=str(folder), world_size=1, **{"dry_run": False, **values, **changes})


def test_the_last_complete_checkpoint_is_taken(output, caplog):
    (output / "incomplete-notes").mkdir()  # not of this suite
    assert find_checkpoint(arguments(output)) == str(output / "checkpoint-6")
    assert sorted(path.name for path in output.iterdir()) == ["checkpoint-3", "checkpoint-6", "incomplete-notes"]
    assert "incomplete-checkpoint-8" in caplog.text and "no manifest.json" not in caplog.text
    assert checkpoints.faults(output / "checkpoint-6") == []


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_taken(output, caplog, name, how):
    damage(output / "checkpoint-6" / name, how)
    taken = find_checkpoint(arguments(output))
    if (name, how) == ("manifest.json", "deleted"):
        # As another tool would have left it: everything is there, but nothing vouches for it.
        assert taken == str(output / "checkpoint-6") and "no manifest.json" in caplog.text
        return
    assert taken == str(output / "checkpoint-3")
    (line,) = (record.getMessage() for record in caplog.records if "cannot be resumed from" in record.getMessage())
    assert str(output / "checkpoint-6") in line and name in line
    for wanted in (output / "checkpoint-6", output):
        shutil.rmtree(output / "checkpoint-3", ignore_errors=True)
        named = {"resume_from_checkpoint": str(wanted)} if wanted != output else {}
        with pytest.raises(UserError) as refused:
            find_checkpoint(arguments(output, **named))
        assert name in str(refused.value) and ("--resume_from_checkpoint" if named else "--output_dir") in str(
            refused.value
        )


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json"]
)
def test_without_a_manifest_what_can_be_seen_is_seen(output, caplog, name, how):
    (output / "checkpoint-6" / "manifest.json").unlink()
    damage(output / "checkpoint-6" / name, how)
    taken = find_checkpoint(arguments(output))
    if (name, how) == ("model.safetensors", "tail zeroed"):  # any numbers may be weights
        assert "whether its weights are as they were written" in caplog.text
    else:
        assert taken == str(output / "checkpoint-3")
        assert any(name in record.getMessage() for record in caplog.records)


class Payload:
    """Executed by whoever unpickles it."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def poison(path: Path, mark: Path, form: str) -> None:
    """Replace a file by one that holds the same and makes a folder when it is unpickled without care."""
    if form == "bare":
        path.write_bytes(pickle.dumps(Payload(mark)))
        return
    content = torch.load(path, map_location="cpu", weights_only=False)
    content = {**content, "more": Payload(mark)} if isinstance(content, dict) else Payload(mark)
    torch.save(content, path, _use_new_zipfile_serialization=form == "zip")


def seal_again(folder: Path) -> None:
    """A manifest that vouches for what is there: whoever can write one file can write the other."""
    run = json.loads((folder / "manifest.json").read_text())["run"]
    checkpoints.seal(folder, run)


@pytest.mark.parametrize(
    "text",
    [
        "[]", '{"files": {}}', '{"files": {}, "run": {}}', '{"files": {"trainer_state.json": 3}, "run": {}}',
        '{"files": {"trainer_state.json": {"size": 1, "sha256": ""}}}', '{"files": ["trainer_state.json"], "run": {}}',
        '{"files": {"trainer_state.json": {"size": 1, "sha256": ""}, "config.json": {"size": 1}}, "run": {}}',
    ],
)  # fmt: skip
def test_a_manifest_that_says_nothing_vouches_for_nothing(output, caplog, text):
    (output / "checkpoint-6" / "manifest.json").write_text(text)
    assert find_checkpoint(arguments(output)) == str(output / "checkpoint-3")
    assert "manifest.json is damaged" in caplog.text


def test_a_checkpoint_under_the_name_of_another_step(output, caplog):
    for name in ("checkpoint-best", "notes-7"):  # names of no step
        (output / name).mkdir()
        assert checkpoints.checkpoint_step(output / name) is None
    (output / "checkpoint-7").touch()
    assert checkpoints.checkpoints_in(output) == [output / "checkpoint-6", output / "checkpoint-3"]
    (output / "checkpoint-6").rename(output / "checkpoint-99")
    assert find_checkpoint(arguments(output)) == str(output / "checkpoint-3")
    assert "trainer_state.json is of step 6" in caplog.text


@pytest.mark.parametrize("sealed", [True, False], ids=["manifest", "no manifest"])
@pytest.mark.parametrize("form", ["zip", "legacy", "bare"])
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_pickle_is_not_executed(output, tmp_path, name, form, sealed):
    poison(output / "checkpoint-6" / name, tmp_path / "executed", form)
    if sealed:
        seal_again(output / "checkpoint-6")
    else:
        (output / "checkpoint-6" / "manifest.json").unlink()
    assert find_checkpoint(arguments(output)) == str(output / "checkpoint-3")
    with pytest.raises(UserError, match=f"{name} is refused"):
        find_checkpoint(arguments(output, resume_from_checkpoint=str(output / "checkpoint-6")))
    assert not (tmp_path / "executed").exists()


@pytest.mark.slow
def test_a_pickle_of_arguments_is_never_read(output, assets, masked_assets, instructions, tmp_path):
    poison(output / "checkpoint-6" / "training_args.bin", tmp_path / "executed", "bare")
    seal_again(output / "checkpoint-6")
    start("run_clm.py", 1, output, *script_flags("run_clm.py", assets, masked_assets, instructions), *CPU)
    assert (output / "checkpoint-8").is_dir() and not (tmp_path / "executed").exists()


def test_a_folder_is_begun_in_that_holds_no_more_than_what_an_interrupted_run_leaves(output):
    for step in STEPS:
        shutil.rmtree(output / f"checkpoint-{step}")
    (output / "runs").mkdir()
    (output / "train_results.json").write_text("{")
    assert find_checkpoint(arguments(output)) is None
    assert not (output / "incomplete-checkpoint-8").exists()
    (output / "model.safetensors").touch()
    with pytest.raises(UserError, match="not empty and holds no checkpoint"):
        find_checkpoint(arguments(output))


@pytest.mark.parametrize("adapter", [False, True])
def test_weights_alone_are_no_damage(output, adapter):
    """As --save_only_model leaves them; the advice was to train from the start, which removes them."""
    for step in STEPS:
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "manifest.json"):
            (output / f"checkpoint-{step}" / name).unlink()
        if adapter:
            (output / f"checkpoint-{step}" / "adapter_config.json").write_text("{}")
    flag = "--adapter_name_or_path" if adapter else "--model_name_or_path"
    newest = output / "checkpoint-6"
    with pytest.raises(UserError, match=f"has the weights alone, as with --save_only_model, .* by {flag} {newest} "):
        find_checkpoint(arguments(output))
    with pytest.raises(UserError, match=f"begin anew from its weights by {flag}$"):
        find_checkpoint(arguments(output, resume_from_checkpoint=str(newest)))


STATES = ["optimizer.pt", "scheduler.pt", "rng_state.pth"]
MODEL_STATES = ["latest", "rng_state_0.pth", "global_step6/mp_rank_00_model_states.pt"]
PARTS = [f"global_step6/bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1)]
NEEDED = {
    "whole": ["model.safetensors", *STATES],
    "adapter": ["adapter_model.bin", *STATES],
    "FSDP": ["pytorch_model_fsdp_0/.metadata", "optimizer_0/.metadata", *STATES[1:]],
    "ZeRO-2": [*MODEL_STATES, "rng_state_1.pth", *PARTS],
    "stage 0": MODEL_STATES,
}


@pytest.mark.parametrize("kind", NEEDED)
def test_what_a_checkpoint_needs(kind, tmp_path):
    """Nothing is missing where it is all there, and something without any one file."""

    def missing(without: str | None = None, latest: str = "global_step6") -> list[str]:
        shutil.rmtree(tmp_path / "checkpoint-6", ignore_errors=True)
        for name in ["trainer_state.json", *NEEDED[kind]]:
            path = tmp_path / "checkpoint-6" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if name != without:
                path.write_text(f"{latest}\n" if name == "latest" else "")
        if kind == "stage 0":
            checkpoints.seal(tmp_path / "checkpoint-6", {"zero_stage": 0})
        return [fault for fault in checkpoints.faults(tmp_path / "checkpoint-6") if "missing" in fault]

    assert not missing()
    assert all(missing(name) for name in NEEDED[kind])
    assert bool(missing(latest="global_step5")) == ("latest" in NEEDED[kind])


@pytest.mark.parametrize("wanted", [None, "FULL_STATE_DICT", "SHARDED_STATE_DICT"])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.safetensors", None), ("pytorch_model_fsdp.bin", "FULL_STATE_DICT"),
        ("pytorch_model_fsdp_0", "SHARDED_STATE_DICT"),
    ],
)  # fmt: skip
def test_what_fsdp_divides_in_another_way_is_refused(name, kind, wanted, tmp_path, monkeypatch):
    (tmp_path / name).touch()
    said = [f"with --fsdp and {one}" if one else "without --fsdp" for one in (kind, wanted)]
    args = SimpleNamespace(fsdp=["full_shard"] if wanted else [], fsdp_config={"state_dict_type": wanted})
    for _ in range(2):
        with (
            contextlib.nullcontext()
            if kind == wanted
            else pytest.raises(UserError, match=f"it was saved {said[0]}, this run is {said[1]}; go on with")
        ):
            check_kind(tmp_path, args)
        args.fsdp_config = {}
        monkeypatch.setenv("FSDP_STATE_DICT_TYPE", str(wanted))
    monkeypatch.delenv("FSDP_STATE_DICT_TYPE")
    assert state_dict_type(args) == (wanted and "FULL_STATE_DICT")


def test_the_state_of_another_transformers(output, caplog):
    """With a value that this one does not know; the run ended in a traceback."""
    (output / "checkpoint-6" / "manifest.json").unlink()
    state = output / "checkpoint-6" / "trainer_state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "newer": 1}))
    assert find_checkpoint(arguments(output)) == str(output / "checkpoint-3")
    assert "trainer_state.json is damaged" in caplog.text and "'newer'" in caplog.text
    named = (output / "checkpoint-6").rename(output / "best")  # no step in its name
    (named / "trainer_state.json").write_text('{"global_step": "6"}')
    assert checkpoints.faults(named) == ["trainer_state.json is damaged (global_step is no number)"]


def test_a_byte_of_a_tensor_is_missed_without_a_manifest(output):
    checkpoint = output / "checkpoint-6"
    (checkpoint / "manifest.json").unlink()
    data = bytearray((checkpoint / "optimizer.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (checkpoint / "optimizer.pt").write_bytes(data)
    (fault,) = checkpoints.faults(checkpoint)
    assert fault.startswith("optimizer.pt is damaged") and "checksum" in fault


@pytest.fixture
def done(monkeypatch) -> list:
    """What is flushed to the disk, and what is renamed to what, in this order."""
    done: list = []
    flush, rename = os.fsync, os.rename
    monkeypatch.setattr(
        os, "fsync", lambda number: (done.append(os.readlink(f"/proc/self/fd/{number}")), flush(number))
    )
    monkeypatch.setattr(os, "rename", lambda *names: (done.append(names), rename(*names)))
    return done


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, done):
    """The second time it takes the place of another one; a machine that loses its power forgets what is not there."""
    folder = tmp_path / "checkpoint-1"
    staging = checkpoints.incomplete(folder)
    for content in ("first", "second"):
        done.clear()
        (staging / "inner").mkdir(parents=True)
        (staging / "inner" / "model.safetensors").write_text(content)
        checkpoints.seal(staging, {})
        written = {str(path) for path in (staging, *staging.rglob("*"))}
        checkpoints.publish(folder)
        assert written <= {*done[: done.index((staging, folder))]} and done[-1] == str(tmp_path)
        assert (folder / "inner" / "model.safetensors").read_text() == content
        assert list(tmp_path.iterdir()) == [folder]


def chained(error: Exception, before: Exception, cause: bool) -> Exception:
    """An error that was raised from another one, or while it was dealt with."""
    error.__cause__, error.__context__ = (before, None) if cause else (None, before)
    return error


FULL = OSError(errno.ENOSPC, "any words")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (FULL, "No space left on device"),
        (Exception("Error while serializing: I/O error: File too large (os error 27)"), "File too large"),
        (RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos"), "a file of torch was cut short"),
        (RuntimeError("basic_ios::clear: iostream error"), "a file of torch was cut short"),
        (chained(RuntimeError("unexpected pos"), FULL, cause=True), "No space left on device"),
        (chained(RuntimeError("unexpected pos"), FULL, cause=False), "No space left on device"),
        (RuntimeError("a shape is wrong"), None),
        (ValueError("iostream"), None),
        (OSError("of a library, without a number"), None),
    ],
)
def test_why_a_file_could_not_be_written(error, reason):
    assert reason_of(error) == reason


@pytest.mark.parametrize("rank", [0, 1])
def test_a_folder_that_cannot_be_made_ends_all_ranks(rank, tmp_path, monkeypatch):
    """The disk was mounted anew, read-only: ranks then waited for one another in different places, without end."""
    said = []
    trainer = SimpleNamespace(
        args=SimpleNamespace(should_save=rank == 0), _write_error=lambda *args: WriteError("full")
    )
    monkeypatch.setattr(saving, "gather", lambda value: said.append(value) or [said[0] or WriteError("full"), None])
    monkeypatch.setattr(Path, "mkdir", Mock(side_effect=OSError(errno.EROFS, "read-only")))
    with (
        pytest.raises(WriteError, match="full"),
        ResumableTrainer._written_whole(trainer, tmp_path / "checkpoint-1", pytest.fail),
    ):
        pytest.fail("it wrote")
    assert len(said) == 1 and isinstance(said[0], WriteError) == (rank == 0)


def test_what_a_kill_has_left_is_not_written_with_what_follows(tmp_path):
    """An evaluation alone looks for nothing that is half-written."""
    staging = checkpoints.incomplete(tmp_path / "files")
    staging.mkdir()
    (staging / "model.safetensors").touch()
    trainer, found = SimpleNamespace(args=SimpleNamespace(should_save=True)), []

    def publish(folder: Path) -> None:
        found.extend(path.name for path in folder.iterdir())

    with ResumableTrainer._written_whole(trainer, tmp_path / "files", publish) as folder:
        (folder / "eval_results.json").touch()
    assert found == ["eval_results.json"]


def test_the_last_step_of_an_epoch_is_saved_after_its_evaluation():
    """Three steps an epoch, seven in all; what is to be saved is asked for after each second one and the last."""
    steps = SavingSteps(SimpleNamespace(steps_per_epoch=3))
    saved = {"step": [], "epoch": []}
    for step in range(1, 8):
        control = SimpleNamespace(should_save=step % 2 == 0 or step == 7)
        state = SimpleNamespace(global_step=step, max_steps=7)
        steps.on_step_end(None, state, control)
        saved["step"] += [step] * control.should_save
        if step in (3, 6, 7):
            control.should_save = False
            steps.on_epoch_end(None, state, control)
            saved["epoch"] += [step] * control.should_save
    assert saved == {"step": [2, 4], "epoch": [6, 7]}


def test_results_are_on_the_disk_before_they_are_moved_and_where_they_are_moved_to(tmp_path, done, monkeypatch):
    monkeypatch.setattr(shutil, "rmtree", lambda folder: done.append(folder))
    staging = tmp_path / "incomplete-files"
    (staging / "merged").mkdir(parents=True)
    (staging / "merged" / "model.safetensors").touch()
    written = {str(path) for path in (staging, *staging.rglob("*"))}
    checkpoints.publish_files(staging, tmp_path)
    moved, removed = done.index((staging, tmp_path / "complete-files")), done.index(tmp_path / "complete-files")
    assert written <= {*done[:moved]} and {str(tmp_path), str(tmp_path / "merged")} <= {*done[moved:removed]}


def test_results_that_were_being_moved_are_moved(output):
    """Killed between two renames, the folder holds all of the results or gets them at the next start."""
    staging = output / "incomplete-files"
    (staging / "merged").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "merged/config.json"):
        (staging / name).write_text(name)
    os.rename(staging, output / "complete-files")
    os.replace(output / "complete-files" / "config.json", output / "config.json")
    assert find_checkpoint(arguments(output)) == str(output / "checkpoint-6")
    for name in ("config.json", "model.safetensors", "merged/config.json"):
        assert (output / name).read_text() == name
    assert not (output / "complete-files").exists()


def test_results_that_were_being_moved_are_not_lost_to_later_ones(tmp_path):
    """Those of an evaluation alone, which looks for no checkpoint, took the place of a trained model's."""
    for name in ("complete-files/model.safetensors", "incomplete-files/eval_results.json"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(name)
    checkpoints.publish_files(tmp_path / "incomplete-files", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "eval_results.json"}


def test_overwriting_removes_what_a_kill_has_left(output):
    """The next start would put it in its place, and resume from the checkpoint of the run that was overwritten."""
    (output / "checkpoint-6").rename(output / "incomplete-replaced-checkpoint-6")
    (output / "complete-files").mkdir()
    (output / "complete-files" / "model.safetensors").touch()
    clear_the_way(output, Resumption(), remove=True)
    assert not list(output.iterdir())


def test_overwriting_removes_links_to_folders_on_another_disk(output, tmp_path):
    """And nothing on that disk; it ended in a traceback, with the model at the top already removed."""
    disk = shutil.move(output / "checkpoint-6", tmp_path / "disk")
    (disk / "config.json").touch()
    for name in ("checkpoint-6", "merged"):
        (output / name).symlink_to(disk)
    before = sorted(disk.iterdir())
    clear_the_way(output, Resumption(), remove=True)
    assert not list(output.iterdir()) and sorted(disk.iterdir()) == before


@pytest.mark.parametrize("remove", [False, True])
def test_what_is_not_on_the_way_to_the_checkpoint_is_set_aside(output, remove):
    """Not removed, even where overwriting is asked for: a named checkpoint may be among them."""
    clear_the_way(output, Resumption(str(output / "checkpoint-6")), remove)
    assert {path.name for path in output.iterdir()} == {"checkpoint-3", "checkpoint-6", "incomplete-checkpoint-8"}
    other = output / "checkpoint-3" / "trainer_state.json"
    rows = [{"step": 2, "loss": 99.0}, {"step": 3, "loss": float("nan")}]
    other.write_text(json.dumps({**json.loads(other.read_text()), "log_history": rows}))
    clear_the_way(output, Resumption(str(output / "checkpoint-3")), remove)
    assert (output / "checkpoint-3").is_dir() and (output / "unused-checkpoint-6").is_dir()
    (output / "unused-checkpoint-6").rename(output / "checkpoint-6")
    clear_the_way(output, Resumption(str(output / "checkpoint-6")), remove)
    assert (output / "checkpoint-6").is_dir() and (output / "unused-checkpoint-3").is_dir()


def test_a_checkpoint_that_was_being_replaced_is_there(output):
    """Killed between two renames: neither the old one nor the new one had its name, and both were removed."""
    shutil.copytree(output / "checkpoint-6", output / "incomplete-checkpoint-6")
    (output / "checkpoint-6").rename(output / "incomplete-replaced-checkpoint-6")
    assert find_checkpoint(arguments(output)) == str(output / "checkpoint-6")
    assert not list(output.glob("incomplete-*"))


def test_what_the_flag_asks_for(output):
    named = str(output / "checkpoint-3")
    assert find_checkpoint(arguments(output, resume_from_checkpoint=named)) == named
    assert find_checkpoint(arguments(output, resume_from_checkpoint="True")) == str(output / "checkpoint-6")
    assert find_checkpoint(arguments(output, overwrite_output_dir=True)) is None
    assert find_checkpoint(arguments(output, do_train=False)) is None
    for wanted in ("False", str(output / "checkpoint-4"), str(output)):
        with pytest.raises(UserError, match="--resume_from_checkpoint"):
            find_checkpoint(arguments(output, resume_from_checkpoint=wanted))
    with pytest.raises(UserError, match=f"Name another one, such as {output / 'checkpoint-6'}$"):
        find_checkpoint(arguments(output, resume_from_checkpoint=str(output)))
    with pytest.raises(UserError, match="holds no checkpoint"):
        find_checkpoint(arguments(output.parent / "nowhere", resume_from_checkpoint="True"))
    assert find_checkpoint(arguments(output.parent / "nowhere", resume_from_checkpoint="False")) is None


@pytest.mark.parametrize("looks", [{"process_index": 1}, {"dry_run": True}, {"overwrite_output_dir": True}])
def test_what_a_kill_has_left_is_removed_by_the_main_rank_where_it_resumes(output, looks):
    assert find_checkpoint(arguments(output, **looks)) is None
    assert (output / "incomplete-checkpoint-8").is_dir()


def test_a_restart_after_an_interruption_finds_its_folder(output, trained, tmp_path):
    """Of a run from a checkpoint elsewhere: what it had set aside or half-written is its own, as is what is named."""
    named, folder = str(trained / "checkpoint-3"), tmp_path / "new"
    for name in ("unused-checkpoint-8/x", "incomplete-checkpoint-6/x", "slurm-1.out"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    assert find_checkpoint(arguments(folder, resume_from_checkpoint=named)) == named
    (output / "checkpoint-6").rename(folder / "best")
    inside = str(folder / "best")
    assert find_checkpoint(arguments(folder, resume_from_checkpoint=inside)) == inside
    with pytest.raises(UserError, match="is not empty and holds no checkpoint"):
        find_checkpoint(arguments(folder, resume_from_checkpoint=named))
    assert find_checkpoint(arguments(folder, resume_from_checkpoint=named, dry_run=True)) == named
    shutil.copytree(folder / "best", folder / "checkpoint-6")  # of another run, and is set aside
    assert find_checkpoint(arguments(folder, resume_from_checkpoint=named)) == named


@pytest.mark.parametrize("flag", ("model_name_or_path", "adapter_name_or_path"))
def test_what_a_run_begins_from_is_not_overwritten(output, flag, monkeypatch):
    for place in (output, output / "checkpoint-3"):
        inputs = arguments(output, overwrite_output_dir=True, flags={flag: str(place)})
        planned = arguments(output, overwrite_output_dir=True, flags={flag: str(place)}, dry_run=True)
        assert find_checkpoint(planned) is None
        with pytest.raises(UserError, match=f"--overwrite_output_dir: --{flag} {place} is in --output_dir"):
            find_checkpoint(inputs)
    assert find_checkpoint(arguments(output, overwrite_output_dir=True, flags={flag: str(output.parent)})) is None
    assert find_checkpoint(arguments(output, flags={flag: str(output)})) == str(output / "checkpoint-6")
    monkeypatch.chdir(output)  # where neither no name nor that of a repository is a place
    for name in (None, "org/name"):
        assert find_checkpoint(arguments(output, overwrite_output_dir=True, flags={flag: name})) is None


def test_whoever_may_read_the_folder_may_read_its_files(trained):
    files = [path for path in trained.rglob("*") if path.is_file()]
    assert any(path.suffix == ".safetensors" for path in files)
    assert {path.stat().st_mode & 0o666 for path in files} == {trained.stat().st_mode & 0o666}


def test_a_manifest_lists_every_file_and_keeps_no_secret(trained):
    manifest = json.loads((trained / "checkpoint-8" / "manifest.json").read_text())
    there = {path.name for path in (trained / "checkpoint-8").iterdir()} - {"manifest.json"}
    assert set(manifest["files"]) == there >= set(FILES) - {"manifest.json"}
    assert not [name for name in manifest["run"]["flags"] if name.endswith("token")]


def test_no_loader_can_ask_for_more_than_data(tmp_path):
    """DeepSpeed asks for ``weights_only=False``."""
    torch.save({"more": Payload(tmp_path / "executed")}, tmp_path / "file.pt")
    with checkpoints.data_only():
        with checkpoints.data_only():
            pass
        with pytest.raises(pickle.UnpicklingError):
            torch.load(tmp_path / "file.pt", weights_only=False)
    assert not (tmp_path / "executed").exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


@pytest.fixture(scope="module")
def divided(assets, masked_assets, instructions, tmp_path_factory) -> Path:
    """The folder of a ZeRO-2 run on two simulated cards."""
    output = tmp_path_factory.mktemp("divided") / "out"
    flags = script_flags("run_clm.py", assets, masked_assets, instructions)
    start("run_clm.py", 2, output, *flags, *CARD, *zero(2))
    return output


OPTIMIZER, MODEL = (
    "global_step6/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt",
    "global_step6/mp_rank_00_model_states.pt",
)


@pytest.mark.slow
def test_a_checkpoint_of_deepspeed(divided, tmp_path):
    assert checkpoints.faults(divided / "checkpoint-6") == []
    for name in (OPTIMIZER, MODEL, "latest", "rng_state_1.pth"):
        for how in DAMAGES:
            for sealed in (True, False):
                folder = tmp_path / "checkpoint-6"
                shutil.copytree(divided / "checkpoint-6", folder)
                damage(folder / name, how)
                if not sealed:
                    (folder / "manifest.json").unlink()
                found = checkpoints.faults(folder)
                assert found, (name, how, sealed)
                assert name in str(found) or "missing" in str(found), (name, how, sealed)
                shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["zip", "legacy", "bare"])
@pytest.mark.parametrize("name", [OPTIMIZER, MODEL])
def test_a_pickle_in_a_checkpoint_of_deepspeed_is_not_executed(divided, tmp_path, name, form):
    folder = tmp_path / "checkpoint-6"
    shutil.copytree(divided / "checkpoint-6", folder)
    poison(folder / name, tmp_path / "executed", form)
    for vouched in (True, False):
        seal_again(folder) if vouched else (folder / "manifest.json").unlink()
        with pytest.raises(UserError, match=f"{name} is refused"):
            find_checkpoint(arguments(tmp_path, resume_from_checkpoint=str(folder)))
    assert not (tmp_path / "executed").exists()
