"""The arguments of a dry run: what it needs, and what it overrides."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from gaudi_lm.errors import UserError
from gaudi_lm.host import claim_port


def prepare_dry_run(args) -> None:
    """Refuse what a dry run cannot describe, and let one process stand for many.

    Args:
        args: :class:`gaudi_lm.arguments.definitions.LMTrainingArguments`, before its own defaults are resolved.

    Raises:
        UserError: see the message.
    """
    if not args.do_train:
        raise UserError("--dry_run describes a training run: give --do_train")
    ranks = int(os.environ.get("WORLD_SIZE", os.environ.get("OMPI_COMM_WORLD_SIZE", "1")))
    if args.dry_run_cards is not None and ranks > 1:
        raise UserError(
            f"--dry_run_cards {args.dry_run_cards}: a launcher has started {ranks} ranks, which are counted; leave it "
            "out, or start the script alone"
        )
    args.push_to_hub = False
    if (args.deepspeed or args.fsdp) and "WORLD_SIZE" not in os.environ:
        # What a launcher would set for one rank; ranks are asked for by the libraries as soon as they divide a model.
        claim = claim_port(None)
        port = str(claim.getsockname()[1])
        claim.detach()  # open until this process ends: another one could get the port before it is listened on
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update(alone)


@contextlib.contextmanager
def without_groups(args) -> Iterator[None]:
    """In a dry run, let optimum-habana form no groups of ranks for the parts of rows: one process stands for all.

    Args:
        args: as for :func:`prepare_dry_run`.
    """
    size = args.context_parallel_size
    args.context_parallel_size = 1 if args.dry_run else size
    try:
        yield
    finally:
        args.context_parallel_size = size
