"""From the launcher's options to what is started where, with which environment. Nothing here starts a rank."""

from __future__ import annotations

import base64
import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from itertools import accumulate

from gaudi_lm.errors import SAID_VARIABLE
from gaudi_lm.host import BACKENDS, threads_per_rank
from gaudi_lm.launcher import processes
from gaudi_lm.launcher.hostfile import Host
from gaudi_lm.launcher.supervise import over_ssh
from gaudi_lm.variables import hide, is_secret
from gaudi_simulator import STAND_IN

# On another host: what is missing there for a job.
CHECK = 'cd "$1" || exit 3; shift; for file; do test -e "$file" || { echo "$file: no such file"; exit 3; }; done'


@dataclass(frozen=True)
class Plan:
    """A job: ``local`` says for each host whether it is this one, ``environ`` is what all ranks get."""

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
        root = ["--allow-run-as-root"] * (os.geteuid() == 0)
        words = [self.mpirun, *root, "--leave-session-attached", "-n", str(sum(host.slots for host in self.hosts))]
        # More ranks than cores is the user's decision.
        words += ["--bind-to", bind if bind == "none" else f"{bind}:overload-allowed"]
        words += ["--map-by", f"{by}:oversubscribe"] if new else ["--map-by", by, "--oversubscribe"]
        if self.log_dir:
            words += ["--output", f"dir={self.log_dir},merge"] if new else ["--output-filename", self.log_dir]
        where = ["--host", f"localhost:{slots}"] if all(self.local) else ["--hostfile", f"{folder}/hostfile"]
        return [*words, *where, *program]

    def orders(self, folder: str, program: list[str]) -> tuple[dict, dict[str, dict]]:
        """For :class:`supervise.Host`: the order of this host, and those of the others by name."""
        meet = {"MASTER_ADDR": self.address, "MASTER_PORT": str(self.port)}
        job = {"script": self.script, "logs": f"; logs: {self.log_dir}" * bool(self.log_dir), "slots": 0}
        order: dict = {"folder": folder, "cwd": os.getcwd(), "grace": self.grace, "backend": BACKENDS[self.backend]}
        order["wait"] = 0.5 * (len(self.hosts) > 1)  # s until other hosts have told what was before a failure
        order |= {"commands": [], "job": {**job, "world_size": sum(host.slots for host in self.hosts), "environ": {}}}
        here, others, first_rank = dict(order), dict[str, dict](), 0
        for index, host in enumerate(self.hosts):
            environ = {**self.environ, **meet, SAID_VARIABLE: folder * (not self.log_dir)}
            slots = {"host": host.name, "first_rank": first_rank, "slots": host.slots, "environ": environ}
            # The stand-in is for the ranks: DeepSpeed's launcher would look for its cards.
            paths = {"PYTHONPATH": environ.get("PYTHONPATH", "").removesuffix(STAND_IN).rstrip(os.pathsep)}
            one = {**order, "login": host.login, "job": order["job"] | slots, "environ": environ | paths}
            one["commands"] = [self.command(index, folder, program)] * (self.backend != "mpi")
            here, others = (one, others) if self.local[index] else (here, {**others, host.name: one})
            first_rank += host.slots
        here["environ"] = meet  # the rest is there already
        if self.backend != "mpi":
            here["commands"] += [processes.python("supervise.connect", folder, name) for name in others]
            return here, others
        here["commands"] = [self.command(0, folder, program)]
        # A killed mpirun leaves /tmp/ompi.PID, on other hosts /tmp/prted.PID; a later one with its id does not start.
        for base, ssh in (("PRTE_MCA_prte", "PRTE_MCA_plm_ssh"), ("OMPI_MCA_orte", "OMPI_MCA_plm_rsh")):
            here["environ"] |= {f"{base}_{where}_tmpdir_base": folder for where in ("local", "remote")}
            here["environ"][f"{ssh}_no_tree_spawn"] = "1"
            here["environ"][f"{ssh}_agent"] = f'sh -c .${{IFS}}"${processes.JOB_VARIABLE}/ssh"'  # split at blanks
        return here, others

    def check_hosts(self) -> str | None:
        """Log in to the other hosts, all at once; what is wrong with the first one that cannot take part."""
        command = ["sh", "-c", CHECK, "sh", os.getcwd(), sys.executable, processes.__file__, self.script[0]]
        how: dict = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        others = [host for host, here in zip(self.hosts, self.local, strict=True) if not here]
        checks = [(one, subprocess.Popen(over_ssh(one.login, command), errors="replace", **how)) for one in others]
        answers = [(one.name, ssh.communicate()[0].strip().split("\n")[-1], ssh.returncode) for one, ssh in checks]
        return next((f"host {name}: {line or f'ssh ended with {code}'}" for name, line, code in answers if code), None)

    def describe(self, cards: int) -> str:
        """The plan as text, one fact a line, with secrets hidden; the commands are those without this launcher."""
        here, others = self.orders("FOLDER", [sys.executable, "-u", *hide(self.script)])
        lines, ends = [f"backend: {BACKENDS[self.backend]}"], accumulate(host.slots for host in self.hosts)
        lines += [f"host: {h.login} ranks {end - h.slots}-{end - 1}" for h, end in zip(self.hosts, ends, strict=True)]
        lines += [f"cards on this host: {cards}", f"master: {self.address} port {self.port}"]
        if "OMP_NUM_THREADS" not in self.environ:
            lines.append(f"OMP_NUM_THREADS: {threads_per_rank(here['job']['slots'])} per rank here, as it is unset")
        for name, value in sorted(self.environ.items()):
            lines.append(f"environment: {name}={shlex.quote('***' if is_secret(name) else value)}")
        for order in (here, *others.values()):
            start = "command: " if order is here else f"command on {order['job']['host']}: "
            lines += [start + shlex.join(w for w in c if w != "--log_dir=FOLDER") for c in order["commands"]]
        return "\n".join(lines)
