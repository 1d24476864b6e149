"""Which checkpoint a run goes on from."""

from __future__ import annotations

import logging
import os
import shutil
import socket
from pathlib import Path

from gaudi_lm.errors import UserError
from gaudi_lm.modeling.virtual_tokens import ENCODER
from gaudi_lm.training import checkpoints
from gaudi_lm.training.agreement import from_main, gather
from gaudi_lm.training.fsdp import check_kind
from gaudi_lm.training.rank_settings import check_output_folder
from gaudi_lm.training.resumed_state import Resumption

logger = logging.getLogger("gaudi_lm")

REPORTS = {"all_results.json", "train_results.json", "eval_results.json", checkpoints.STATE, "runs"}
"""What a run may write at the top of its folder before its model is there."""


WEIGHTS = ("model*.safetensors*", "pytorch_model*.bin*", "adapter_config.json", "adapter_model.*", ENCODER)
"""What a run leaves at the top of its folder and the next one may not write over, beside its figures."""

WEIGHTS_ALONE = ["optimizer.pt is missing", "scheduler.pt is missing", "rng_state.pth is missing"]
UNUSED = "unused-"  # before the names of checkpoints that a run has set aside

# Of launchers, shells, mpirun and TensorBoard.
LOGS = ("*.log", "*.out", "*.err", "rank.*/stdout", "rank.*/stderr", "events.out.tfevents.*")


def is_log(path: Path) -> bool:
    """Whether a file is a log, or a folder holds nothing but logs: both may be in ``--output_dir`` before a run."""
    if path.is_dir():
        return all(map(is_log, path.iterdir()))
    return any(map(path.match, LOGS))


def find_checkpoint(training_args) -> str | None:
    """The checkpoint to go on from: ``--resume_from_checkpoint``, or the newest intact one in ``--output_dir``.

    What an interrupted run has left half-written in ``--output_dir`` is removed. The main rank decides for all.

    Raises:
        UserError: no such checkpoint, none that is intact, one that FSDP divides otherwise, or an output folder that
            holds something else.
    """
    if not training_args.do_train:
        return None
    if not training_args.dry_run:
        check_output_folder(training_args)
    outcome: str | UserError | None = None
    if training_args.process_index == 0:
        try:
            outcome = _find(training_args)
        except UserError as error:
            outcome = error
    outcome = from_main(outcome)
    if isinstance(outcome, UserError):
        raise outcome
    there = gather((socket.gethostname(), outcome is None or Path(outcome, checkpoints.STATE).is_file()))
    if missing := [f"rank {rank} on host {host}" for rank, (host, found) in enumerate(there) if not found]:
        raise UserError(
            f"{outcome}: {missing[0]} does not see this checkpoint; copy it there, or give "
            "--resume_from_checkpoint one that all hosts have"
        )
    return outcome


def _find(training_args) -> str | None:
    wanted, folder = training_args.resume_from_checkpoint or "", Path(training_args.output_dir)
    named = wanted.lower() not in ("", "true", "false")
    here = folder.is_dir() and not training_args.overwrite_output_dir and not training_args.dry_run
    if training_args.overwrite_output_dir and not training_args.dry_run:
        _refuse_inputs(training_args, folder.resolve())
    if here:
        for name in checkpoints.remove_incomplete(folder):
            logger.warning("%s: an interrupted run was writing it; removed", folder / name)
        if checkpoints.finish_moving(folder):
            logger.warning("%s: an interrupted run had written its results, which are in their place now", folder)
    if named:
        if found := checkpoints.faults(Path(wanted)):
            inside = checkpoints.checkpoints_in(Path(wanted))
            anew = f"or begin anew from its weights by --{_flag_of(Path(wanted))}"
            other = f"such as {inside[0]}" if inside else anew
            raise UserError(f"--resume_from_checkpoint {wanted}: {'; '.join(found)}. Name another one, {other}")
        if here and not checkpoints.checkpoints_in(folder) and folder.resolve() not in Path(wanted).resolve().parents:
            _refuse_others(folder)
        return _taken(Path(wanted), training_args)
    if training_args.dry_run:
        return None  # what is in the folder stays as it is
    candidates = checkpoints.checkpoints_in(folder) if here else []
    if wanted.lower() == "false" and candidates:
        raise UserError(
            f"--resume_from_checkpoint False: {folder} holds checkpoints of another run; choose another --output_dir, "
            "or give --overwrite_output_dir to have them removed"
        )
    for candidate in candidates:
        found = checkpoints.faults(candidate)
        if not found:
            return _taken(candidate, training_args)
        logger.warning("%s cannot be resumed from: %s", candidate, "; ".join(found))
    if candidates:
        newest, found = candidates[0], checkpoints.faults(candidates[0])
        if found == WEIGHTS_ALONE:
            raise UserError(
                f"--output_dir {folder}: {newest.name} has the weights alone, as with --save_only_model, and cannot "
                f"be resumed from; begin anew from them by --{_flag_of(newest)} {newest} and another --output_dir, or "
                "give --overwrite_output_dir to train from the start there"
            )
        raise UserError(
            f"--output_dir {folder}: none of its checkpoints is intact ({newest.name}: {found[0]}); choose another "
            "folder, or give --overwrite_output_dir to train from the start there"
        )
    if wanted.lower() == "true":
        raise UserError(f"--resume_from_checkpoint: {folder} holds no checkpoint")
    if here:
        _refuse_others(folder)
    return None


def _flag_of(checkpoint: Path) -> str:
    """The flag that takes the weights of a checkpoint."""
    return "adapter_name_or_path" if (checkpoint / "adapter_config.json").is_file() else "model_name_or_path"


def _refuse_inputs(training_args, folder: Path) -> None:
    """Raise a UserError where overwriting the output folder would remove what the run begins from."""
    for flag in ("model_name_or_path", "adapter_name_or_path"):
        name = getattr(training_args, "flags", {}).get(flag)
        place = Path(name or "").resolve()
        if name and place.exists() and folder in (place, *place.parents):
            raise UserError(
                f"--overwrite_output_dir: --{flag} {name} is in --output_dir {training_args.output_dir}, and would be "
                "removed with what is there: choose another --output_dir"
            )


def _refuse_others(folder: Path) -> None:
    """Raise a UserError where a folder without checkpoints holds what no interrupted run has left there."""
    if not all(path.name in REPORTS or path.match(f"{UNUSED}*") or is_log(path) for path in folder.iterdir()):
        raise UserError(
            f"--output_dir {folder} is not empty and holds no checkpoint: "
            "choose another, or give --overwrite_output_dir to write into it"
        )


def _taken(checkpoint: Path, training_args) -> str:
    check_kind(checkpoint, training_args)
    logger.info("Resuming from %s", checkpoint)
    if checkpoints.read_manifest(checkpoint) is None:
        logger.warning(
            "%s has no %s, as other tools write them: whether its weights are as they were written, and whether data "
            "and flags are those it was made with, cannot be checked",
            checkpoint,
            checkpoints.MANIFEST,
        )
    return str(checkpoint)


def clear_the_way(folder: Path, resumption: Resumption, remove: bool) -> None:
    """Set aside checkpoints in ``folder`` that do not lie on the way to the one that training resumes from.

    They would be taken for this run's: kept in place of its own, resumed from after an interruption, or loaded as the
    best model, where the best one of this run has the same step.

    Args:
        remove: do so, where training begins anew, instead of giving them another name; what an earlier run has written
            at the top as well, which would be taken for the result of this one.
    """
    remove = remove and resumption.checkpoint is None
    if remove:
        checkpoints.remove_incomplete(folder)  # else the next start would put in its place what a kill has left
        checkpoints.finish_moving(folder)
        for path in (path for name in (*WEIGHTS, *REPORTS) for path in folder.glob(name)):
            if path.is_file():
                path.unlink()
        if (folder / "merged" / "config.json").is_file():  # of --merge_adapter
            _remove(folder / "merged")
    for path in checkpoints.checkpoints_in(folder):
        newer = (checkpoints.checkpoint_step(path) or 0) > resumption.step
        if remove:
            _remove(path)
            logger.warning("%s is of an earlier run; removed, for --overwrite_output_dir", path)
        elif newer or not resumption.follows(path):
            aside = path.with_name(f"{UNUSED}{path.name}")
            if newer:
                shutil.rmtree(aside, ignore_errors=True)
            while aside.exists():  # it may be what training resumes from, or its best model
                aside = aside.with_name(f"{UNUSED}{aside.name}")
            os.rename(path, aside)
            logger.warning("%s is not what training resumes from; it is now %s", path, aside.name)


def _remove(folder: Path) -> None:
    """Remove a folder; of one that is elsewhere, on a larger disk, only the link to it."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder)
