"""Checkpoint folders: written whole or not at all, and checked before anything in them is used.

A checkpoint is written as ``incomplete-checkpoint-N``, listed in a manifest, flushed to the disk, and then renamed to
``checkpoint-N``. So a folder of that name is complete, whenever the process was killed. The manifest holds the size
and the SHA-256 of each file: what it lists must be there as it was written.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import pickle
import re
import shutil
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import TrainerState
from transformers.trainer import safe_globals as numpy_globals
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

MANIFEST = "manifest.json"
STATE = "trainer_state.json"
INCOMPLETE, COMPLETE = "incomplete-", "complete-files"
REPLACED = f"{INCOMPLETE}replaced-"
_CHUNK = 1 << 22
WEIGHTS = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
    "adapter_model.safetensors", "adapter_model.bin", "pytorch_model_fsdp_0/.metadata",
)  # fmt: skip
DEEPSPEED_GLOBALS = (
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
    ("deepspeed.utils.tensor_fragment", "fragment_address"),
)
"""The classes of DeepSpeed's own that lie in its checkpoints; they hold numbers."""


def checkpoint_step(folder: Path) -> int | None:
    """The optimizer step in the name of a checkpoint folder; None for any other name."""
    prefix, _, step = folder.name.partition("-")
    return int(step) if prefix == PREFIX_CHECKPOINT_DIR and step.isdecimal() else None


def checkpoints_in(folder: Path) -> list[Path]:
    """Checkpoint folders, the newest first."""
    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if checkpoint_step(path) is not None]
    return sorted((path for path in found if path.is_dir()), key=lambda path: checkpoint_step(path) or 0, reverse=True)


def incomplete(folder: Path) -> Path:
    """The name under which a folder is written until it is complete."""
    return folder.with_name(INCOMPLETE + folder.name)


def remove_incomplete(folder: Path) -> list[str]:
    """Remove what an interrupted run was writing; the names of what is gone."""
    for older in folder.glob(f"{REPLACED}*"):
        if not (folder / (name := older.name.removeprefix(REPLACED))).exists():
            os.rename(older, folder / name)  # killed between the two renames of :func:`publish`
    own = re.compile(rf"{INCOMPLETE}(replaced-)?({PREFIX_CHECKPOINT_DIR}-\d+|files)")
    names = sorted(path.name for path in folder.glob(f"{INCOMPLETE}*") if own.fullmatch(path.name))
    for name in names:
        shutil.rmtree(folder / name)
    return names


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in _files(folder))


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """To the disk; whoever may read a file's folder may read the file: safetensors writes for the owner alone."""
    if path.is_file():
        with contextlib.suppress(OSError):  # of a file system without such modes
            path.chmod(path.parent.stat().st_mode & 0o666)
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _flush_all(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _flush(path)


def seal(folder: Path, run: dict) -> None:
    """Write the manifest of an incomplete folder and flush everything in it to the disk.

    Args:
        run: what decides how training goes on, as JSON values; :func:`read_manifest` gives it back.
    """
    files = {str(path.relative_to(folder)): path for path in _files(folder) if path.name != MANIFEST}
    listed = {name: {"size": path.stat().st_size, "sha256": _digest(path)} for name, path in files.items()}
    (folder / MANIFEST).write_text(json.dumps({"files": listed, "run": run}, indent=1) + "\n")
    _flush_all(folder)


def publish(folder: Path) -> None:
    """Give a sealed folder its own name, in place of one that has it already."""
    older = folder.with_name(f"{REPLACED}{folder.name}")
    if folder.exists():
        os.rename(folder, older)
    os.rename(incomplete(folder), folder)
    if older.exists():
        shutil.rmtree(older)
    _flush(folder.parent)


def publish_files(staging: Path, folder: Path) -> None:
    """Move what was written into ``staging`` to the same places below ``folder``, every file as a whole.

    From the first rename on, all of it is on the disk: :func:`finish_moving` makes up for a kill in between.
    """
    _flush_all(staging)
    finish_moving(folder)  # where a kill was in between, and no training has begun since
    os.rename(staging, folder / COMPLETE)
    finish_moving(folder)


def finish_moving(folder: Path) -> bool:
    """Move the files that :func:`publish_files` has not come to move; whether there were any."""
    complete = folder / COMPLETE
    if not complete.is_dir():
        return False
    for path in list(_files(complete)):
        target = folder / path.relative_to(complete)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    for place in {folder, *(folder / path.relative_to(complete) for path in complete.rglob("*"))}:
        _flush(place)
    shutil.rmtree(complete)
    return True


def read_manifest(folder: Path) -> dict | None:
    """The manifest, or None where there is none.

    Raises:
        ValueError: it cannot be read.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    manifest = json.loads(path.read_text())
    if not isinstance(manifest, dict) or not isinstance(manifest.get("run"), dict):
        raise ValueError("nothing about the run")
    files = manifest.get("files")
    if not isinstance(files, dict) or STATE not in files:
        raise ValueError("no list of files")
    if not all(isinstance(entry, dict) and {"size", "sha256"} <= entry.keys() for entry in files.values()):
        raise ValueError("a file without size or checksum")
    return manifest


def faults(folder: Path) -> list[str]:
    """What makes a checkpoint unfit to go on from, each naming its file; nothing is loaded or executed.

    With a manifest: every file must be as it was written. Without one, as other tools write them: everything that
    training needs must be there and be readable.
    """
    if not folder.is_dir():
        return ["there is no such folder"]
    if not any(folder.iterdir()):
        return ["the folder is empty"]
    try:
        manifest = read_manifest(folder)
    except (OSError, ValueError) as error:
        return [f"{MANIFEST} is damaged ({error})"]
    found = []
    if manifest is not None:
        for name, wanted in manifest["files"].items():
            path = folder / name
            if not path.is_file():
                found.append(f"{name} is missing")
            elif path.stat().st_size != wanted["size"]:
                found.append(f"{name} has {path.stat().st_size} bytes, not {wanted['size']}")
            elif _digest(path) != wanted["sha256"]:
                found.append(f"{name} is damaged: its checksum differs")
    return found or _missing(folder, manifest) + _unreadable(folder, verified=manifest is not None) or _renamed(folder)


def _renamed(folder: Path) -> list[str]:
    """Which checkpoint is the newest, and which of them are of another course, is told by their names."""
    named, step = checkpoint_step(folder), json.loads((folder / STATE).read_text())["global_step"]
    return [] if named in (None, step) else [f"{STATE} is of step {step}, which is not that of the folder's name"]


def _missing(folder: Path, manifest: dict | None) -> list[str]:
    divided = manifest is None or manifest["run"].get("zero_stage") != 0  # else one file has the optimizer too
    names = {str(path.relative_to(folder)) for path in _files(folder)}
    deepspeed = [path for path in folder.glob("global_step*") if path.is_dir()]
    found = [] if STATE in names else [f"{STATE} is missing"]
    if not deepspeed and not names.intersection(WEIGHTS):
        found.append("the weights are missing (model.safetensors or adapter_model.safetensors)")
    if deepspeed:
        latest = (folder / "latest").read_text(errors="replace").strip() if "latest" in names else None
        if latest not in [path.name for path in deepspeed]:
            found.append("latest is missing, or names no folder that is there")
        for kind in ("model_states", *["optim_states"] * divided):
            if not any(deepspeed[-1].glob(f"*{kind}.pt")):
                found.append(f"{deepspeed[-1].name}/*_{kind}.pt is missing")
    elif not names & {"optimizer.pt", "optimizer.bin", "optimizer_0/.metadata"}:  # the latter two are of FSDP
        found.append("optimizer.pt is missing")
    if not deepspeed and "scheduler.pt" not in names:
        found.append("scheduler.pt is missing")
    if not (states := sum(name.startswith("rng_state") for name in names)):
        found.append("rng_state.pth is missing")
    elif deepspeed and divided and states != (optimizers := len(list(deepspeed[-1].glob("*optim_states.pt")))):
        found.append(f"there are {states} rng_state_*.pth and {optimizers} *_optim_states.pt: ranks are missing")
    return found


def _unreadable(folder: Path, verified: bool) -> list[str]:
    found = []
    for path in _files(folder):
        name = path.relative_to(folder)
        try:
            if path.suffix == ".json" and not verified:
                value = json.loads(path.read_text())
                if path.name == STATE:
                    TrainerState(**value)  # which a newer transformers may have written
                    if not isinstance(value["global_step"], int):
                        raise ValueError("global_step is no number")
            elif path.suffix == ".safetensors" and not verified:
                with safe_open(path, framework="pt"):
                    pass  # opening compares the sizes of its tensors with the size of the file
            elif path.suffix in (".pt", ".pth", ".bin") and path.name != "training_args.bin":  # which nothing reads
                _refuse_objects(path, verified)
        except pickle.UnpicklingError as error:
            found.append(f"{name} is refused: it is damaged, or holds objects that are no data ({str(error)[:60]})")
        except Exception as error:  # a damaged file can bring its reader to raise anything
            reason = str(error).strip().splitlines()
            found.append(f"{name} is damaged ({reason[0].split('. ')[0][:100] if reason else type(error).__name__})")
    return found


def _refuse_objects(path: Path, verified: bool) -> None:
    """Look at a file of ``torch.save`` without running anything that it says.

    Raises:
        pickle.UnpicklingError: it would make more than tensors, numbers and DeepSpeed's few classes.
        Exception: it is torn.
    """
    with data_only():
        if not zipfile.is_zipfile(path):
            torch.load(path, map_location="meta", weights_only=True)
            return
        if not verified:
            with zipfile.ZipFile(path) as archive:
                if (torn := archive.testzip()) is not None:
                    raise ValueError(f"{torn} has a wrong checksum")
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    if objects := sorted(set(unsafe).difference(".".join(name) for name in DEEPSPEED_GLOBALS)):
        raise pickle.UnpicklingError(", ".join(objects))


@contextlib.contextmanager
def data_only() -> Iterator[None]:
    """Here torch.load makes tensors, numbers and DeepSpeed's few classes only, even for a caller who wants more.

    DeepSpeed 0.19 loads with ``weights_only=False``, which would run whatever a file says.
    """
    classes = []
    if "deepspeed" in sys.modules:
        classes = [getattr(importlib.import_module(module), name) for module, name in DEEPSPEED_GLOBALS]
    variable = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        with numpy_globals(), torch.serialization.safe_globals(classes):
            yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before
