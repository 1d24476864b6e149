"""What a host has to offer to its ranks: CPUs, cards, addresses, ports."""

from __future__ import annotations

import contextlib
import os
import random
import socket
from pathlib import Path

from gaudi_lm.runtime import UserError, simulated_cards


def ordered_cpus(cpus: set[int], map_by: str, root: str = "/sys/devices/system/cpu") -> list[int]:
    """CPU numbers by socket, then core (``socket``), or by number (``slot``).

    By socket, neighbouring ranks share a socket, and a rank gets whole cores with their hardware threads.
    """

    def place(cpu: int) -> tuple[int, int, int]:
        values = []
        for name in ("physical_package_id", "core_id"):
            try:
                with open(f"{root}/cpu{cpu}/topology/{name}") as file:
                    values.append(int(file.read()))
            except (OSError, ValueError):
                values.append(0)
        return values[0], values[1], cpu

    return sorted(cpus, key=place if map_by == "socket" else None)


def cpu_quota(root: str = "/sys/fs/cgroup", membership: str = "/proc/self/cgroup") -> float | None:
    """CPUs' worth of time that the cgroups (v2, v1) of this process grant; None without a limit."""
    folders = [root, f"{root}/cpu"]
    with contextlib.suppress(OSError), open(membership) as file:
        for line in file:
            _, controllers, path = line.rstrip("\n").split(":", 2)
            base = root if not controllers else f"{root}/cpu" if "cpu" in controllers.split(",") else None
            parts = [part for part in path.split("/") if part]
            if base:
                folders += ["/".join([base, *parts[: end + 1]]) for end in range(len(parts))]
    granted = []
    for folder in folders:
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            if os.path.exists(f"{folder}/cpu.max"):
                with open(f"{folder}/cpu.max") as file:
                    quota, period = map(int, file.read().split())  # "max" is no number: no limit
            else:
                with open(f"{folder}/cpu.cfs_quota_us") as file:
                    quota = int(file.read())
                with open(f"{folder}/cpu.cfs_period_us") as file:
                    period = int(file.read())
            if quota > 0:
                granted.append(quota / period)
    return min(granted, default=None)


def share(cpus: list[int], ranks: int, rank: int) -> list[int]:
    """The CPUs of local rank ``rank`` of ``ranks``: an even part, or all where there are too few."""
    if ranks > len(cpus):
        return cpus
    return cpus[rank * len(cpus) // ranks : (rank + 1) * len(cpus) // ranks]


def threads_per_rank(cpus: int, ranks: int, quota: float | None) -> int:
    """``OMP_NUM_THREADS`` for each of ``ranks`` that share ``cpus`` CPUs and, with a quota, that many CPUs' time."""
    return max(1, int(min(cpus, quota or cpus)) // ranks)


def probe_port(address: str, port: int) -> None:
    """Raise OSError where rank 0 could not listen on ``port`` of this host."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise OSError(
                f"--master_port {port} cannot be used on {socket.gethostname()}: {error.strerror}"
            ) from error


def place_of_rank(environ: dict) -> tuple[int, int, int, int]:
    """(rank, local rank, world size, ranks on this host) as the engine has put them into the environment."""
    mpi = [f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "LOCAL_RANK", "SIZE", "LOCAL_SIZE")]
    torch = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"]
    if "LOCAL_WORLD_SIZE" not in environ:
        torch[3] = "LOCAL_SIZE"  # DeepSpeed's name
    return tuple(int(environ[name]) for name in (mpi if mpi[0] in environ else torch))


def prepare(environ: dict, place: tuple[int, int, int, int], map_by: str, threads: bool) -> dict:
    """Pin this process to its share of the CPUs; the environment of the script."""
    rank, local_rank, world_size, ranks = place
    environ = dict(environ)
    for name, value in zip(("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"), place, strict=True):
        environ[name] = str(value)
    allowed = os.sched_getaffinity(0)
    if threads:
        environ["OMP_NUM_THREADS"] = str(threads_per_rank(len(allowed), ranks, cpu_quota()))
    if map_by != "none":
        os.sched_setaffinity(0, share(ordered_cpus(allowed, map_by), ranks, local_rank))
    return environ


def count_cards(environ: dict, root: str = "/") -> int:
    """Cards on this host: simulated ones, else those under /dev/accel or /sys/class/accel that may be used."""
    if simulated := simulated_cards():
        return simulated
    for folder in ("dev/accel", "sys/class/accel"):
        found = list(Path(root, folder).glob("accel[0-9]*"))  # not accel_controlD*
        if found:
            allowed = [word for word in environ.get("HABANA_VISIBLE_MODULES", "").split(",") if word]
            return min(len(found), len(allowed)) if allowed else len(found)
    return 0


def check_cards(cards: int, ranks: int, arguments: list[str]) -> None:
    """Refuse more ranks than cards on this host, unless the script runs on the CPU.

    Raises:
        UserError: too few cards, or none for ``--use_habana``.
    """
    if "--use_cpu" in arguments or (cards == 0 and "--use_habana" not in arguments):
        return
    if ranks > cards:
        raise UserError(
            f"{ranks} ranks on this host but {cards} cards: lower --world_size, rehearse on simulated cards with "
            f"GAUDI_SIMULATOR={ranks} in the environment, or append --use_cpu to the script's flags"
        )


def is_local(name: str) -> bool:
    """Whether a host of this name is the one that this process runs on."""
    if name in ("localhost", socket.gethostname()):
        return True
    try:
        family, _, _, _, address = socket.getaddrinfo(name, 0, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind(address)  # only an address of this host can be bound
    except OSError:
        return False
    return True


def address_towards(name: str) -> str:
    """This host's address on the way to another host, which need not answer."""
    try:
        family, _, _, _, address = socket.getaddrinfo(name, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # UDP: no packet is sent
            return probe.getsockname()[0]
    except OSError:
        return socket.gethostname()


def choose_port(wanted: int | None, address: str, here: bool) -> tuple[int, contextlib.ExitStack]:
    """The port where the ranks meet, and a claim that keeps other launches on this host off it until it is closed.

    Raises:
        UserError: the port asked for is taken on this host.
    """
    claim = contextlib.ExitStack()
    if wanted is not None:
        try:
            if here:
                probe_port(address, wanted)
        except OSError as error:
            raise UserError(f"{error}; without --master_port a free port is taken") from error
        return wanted, claim
    while True:
        # Below the range from which the kernel serves outgoing connections.
        port = random.SystemRandom().randrange(20000, 32000)
        name = claim.enter_context(socket.socket(socket.AF_UNIX))
        with contextlib.suppress(OSError):
            name.bind(f"\0gaudi_spawn/{port}")  # an abstract name: free again as soon as this process ends
            if here:
                probe_port(address, port)
            return port, claim


def this_host() -> str:
    """The name of this host."""
    return socket.gethostname()
