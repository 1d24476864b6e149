"""What all ranks of a job must have alike in their environment, whoever has started them."""

from __future__ import annotations

import hashlib
import os
import socket
import sys

from gaudi_lm.errors import UserError
from gaudi_lm.training.agreement import gather

SETTINGS = ("PT_", "HCCL_", "HABANA_")
# The few among them that differ between cards or hosts by nature.
OWN = ("HABANA_VISIBLE_", "HABANA_LOGS", "HCCL_SOCKET_IFNAME")


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
        if os.environ.get("RANK", "0") == "0":
            raise UserError(problem)
        sys.exit(2)
