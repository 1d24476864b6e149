"""What all ranks of a job must have alike, whoever has started them: settings, and the folder that they write to."""

from __future__ import annotations

import hashlib
import os
import socket
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from gaudi_lm.errors import UserError
from gaudi_lm.training.agreement import from_main, gather
from gaudi_lm.training.checkpoints import incomplete

SETTINGS = ("PT_", "HCCL_", "HABANA_")
# The few among them that differ between cards or hosts by nature.
OWN = ("HABANA_VISIBLE_", "HABANA_LOGS", "HCCL_SOCKET_IFNAME")
SECONDS = 60.0  # until a host sees what another one writes: NFS caches the entries of a folder that long


def digests(environ: dict[str, str]) -> dict[str, str]:
    """Digests of the variables that decide how a card is used, by name; their values need not travel."""
    return {
        name: hashlib.sha256(value.encode(errors="surrogateescape")).hexdigest()
        for name, value in environ.items()
        if name.startswith(SETTINGS) and not name.startswith(OWN)
    }


def disagreement(ranks: list[tuple[str, dict[str, str]]]) -> str | None:
    """The first rank whose settings differ from those of rank 0, in words; ``ranks`` are (host, digests) by rank."""
    first = ranks[0][1]
    for rank, (host, own) in enumerate(ranks):
        names = sorted(name for name in first.keys() | own.keys() if first.get(name) != own.get(name))
        if names:
            way = f"set it alike on all hosts, as gaudi_spawn.py does with --env {names[0]}=VALUE"
            return f"{', '.join(names)}: rank {rank} on host {host} has another value than rank 0; {way}"
    return None


def check_settings() -> None:
    """Compare the environment of all ranks; all of them end with exit code 2 where it differs.

    Raises:
        UserError: on rank 0, naming variable, rank and host.
    """
    ranks = gather((socket.gethostname(), digests(dict(os.environ))))
    if problem := disagreement(ranks):
        _end(problem)


def check_output_folder(args) -> None:
    """See that all hosts write to one ``--output_dir``, or each host to its own with ``--save_on_each_node``.

    Each rank writes a part of a checkpoint: with a folder on each host it would be without those of all other hosts.

    Args:
        args: :class:`gaudi_lm.arguments.definitions.LMTrainingArguments`.

    Raises:
        UserError: on rank 0, naming rank and host.
    """
    if args.world_size == 1 or not (args.save_strategy != "no" or args.save_on_signal):
        return
    folder = Path(args.output_dir)
    # By its name, the next start removes what a kill leaves.
    mark = incomplete(folder / f"{PREFIX_CHECKPOINT_DIR}-{from_main(uuid.uuid4().int)}")
    new, failure = list[Path](), None
    if args.process_index == 0:
        new = [one for one in (folder, *folder.parents) if not one.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            mark.mkdir()
        except OSError as error:
            failure = f"--output_dir {folder}: {error.strerror}"
    failure = from_main(failure)
    deadline = time.monotonic() + SECONDS * (not args.save_on_each_node)
    while not (failure or (seen := mark.exists())) and time.monotonic() < deadline:
        time.sleep(0.1)
    ranks = gather((socket.gethostname(), args.should_save, not failure and seen))
    if args.process_index == 0:
        with suppress(OSError):
            for one in (mark, *new):
                one.rmdir()
    each = "" if args.fsdp else ", or --save_on_each_node"
    for rank, (host, saves, seen) in enumerate(ranks):
        if not args.save_on_each_node and not seen:
            failure = failure or (
                f"--output_dir {folder}: rank {rank} on host {host} does not see what rank 0 writes there: its part "
                f"of checkpoints would be lost; give a folder that all hosts share{each}"
            )
        elif args.save_on_each_node and rank and saves and seen:
            failure = failure or (
                f"--save_on_each_node: host {host} would write the files of rank 0 in --output_dir {folder} as well; "
                "leave the flag out where all hosts share that folder"
            )
    if failure:
        _end(failure)


def _end(problem: str) -> None:
    """One line of rank 0, and the same exit code on all ranks."""
    if os.environ.get("RANK", "0") == "0":
        raise UserError(problem)
    sys.exit(2)
