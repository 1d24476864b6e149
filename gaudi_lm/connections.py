"""The launcher's ends: its terminal, the port that ranks connect to, and the engines it has started."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import secrets
import signal
import socket
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass, field
from typing import IO

from gaudi_lm import launch
from gaudi_lm.hostfile import Host
from gaudi_lm.placement import address_towards
from gaudi_lm.processes import PR_SET_PDEATHSIG, frame, prctl
from gaudi_lm.rank import TAIL_BYTES


def signal_name(number: int) -> str:
    """``SIGTERM`` for 15; the number as text where it has no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class Terminal:
    """Writes to this process's own output from a thread, so that a terminal which stands still holds up no signal."""

    def __init__(self) -> None:
        self.pieces: queue.Queue = queue.Queue()
        self.waiting = 0  # bytes
        self.broken = False

    def open(self) -> None:
        """Begin to write; after all processes are started, because a fork does not go well with threads."""
        threading.Thread(target=self._write, daemon=True).start()

    def put(self, stream: int, data: bytes) -> None:
        """Queue bytes for file descriptor ``stream``."""
        self.waiting += len(data)
        self.pieces.put((stream, data))

    def _write(self) -> None:
        while True:
            stream, data = self.pieces.get()
            length = len(data)
            try:
                while data and not self.broken:
                    data = data[os.write(stream, data) :]
            except OSError:
                self.broken = True
                os.kill(os.getpid(), signal.SIGHUP)  # nobody reads any more: as after a hang-up
            self.waiting -= length
            self.pieces.task_done()

    def say(self, text: str) -> None:
        """A line of the launcher's own, on stderr."""
        self.put(2, f"gaudi_spawn: {text}\n".encode(errors="surrogateescape"))

    def finish(self, seconds: float = 5.0) -> None:
        """Wait until everything is written, at most ``seconds``."""
        deadline = time.monotonic() + seconds
        while self.pieces.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.01)


@dataclass
class Peer:
    """A connection that is, or wants to be, a rank."""

    connection: socket.socket
    inbox: bytearray = field(default_factory=bytearray)
    rank: int | None = None
    place: tuple[int, int, int, int] | None = None  # rank, local rank, world size, ranks on its host
    settings: dict = field(default_factory=dict)
    threads: int = 0
    status: int | None = None

    def introduce(self, payload: bytes, token: str) -> bool:
        """Take what a connection says of itself; False where it does not know the token."""
        try:
            hello = json.loads(payload)
            if not secrets.compare_digest(hello["token"].encode(), token.encode()):
                return False
        except (ValueError, TypeError, KeyError, AttributeError):
            return False
        self.place, self.settings, self.threads = tuple(hello["place"]), hello["settings"], hello["threads"]
        self.rank = self.place[0]
        return True

    def send(self, kind: bytes, payload: bytes = b"") -> None:
        """Send an order; a rank that is gone has been or will be noticed when reading."""
        # Orders are small and ranks always read: the kernel's buffer takes them.
        with contextlib.suppress(OSError):
            self.connection.sendall(frame(kind, payload))


def disagreement(plan: launch.Plan, ranks: dict[int, Peer]) -> str | None:
    """What keeps ranks from being one job: places that the engine gave otherwise, settings of one host alone."""
    first = ranks[0].settings
    for rank, peer in sorted(ranks.items()):
        name = f"rank {rank} on host {plan.host_of[rank].name}"
        # DeepSpeed's launcher counts local ranks wrongly where hosts differ in slots; ours are used instead.
        if plan.engine == "mpi" and peer.place != plan.places[rank]:
            return f"mpirun made {name} local rank {peer.place[1]} of {peer.place[3]}, against the hostfile"
        names = sorted(n for n in first.keys() | peer.settings.keys() if first.get(n) != peer.settings.get(n))
        if names:
            way = f"--env {names[0]}=VALUE gives all ranks the same"
            return f"{', '.join(names)}: {name} has another value than rank 0; {way}"
    return None


@dataclass
class Engine:
    """A running engine and the last of what it printed."""

    host: Host | None
    process: subprocess.Popen
    log: str | None
    output: bytearray = field(default_factory=bytearray)  # an unfinished line
    tail: bytes = b""

    def read(self, hide: list[bytes]) -> bool | None:
        """Take a piece of its output, with secrets hidden; None for nothing at the moment, False at the end."""
        data = self.process.stdout.read(65536)
        if data is None:
            return None
        self.output += data
        lines = bytes(self.output[: self.output.rfind(b"\n") + 1] if data else self.output)
        del self.output[: len(lines)]
        for secret in hide:
            lines = lines.replace(secret, b"***")
        self.tail = (self.tail + lines)[-TAIL_BYTES:]
        if self.log and lines:
            with open(self.log, "ab") as file:
                file.write(lines)
        return bool(data)


def listen(plan: launch.Plan, token: str) -> tuple[socket.socket, str]:
    """A listening socket for the ranks, and the job as they are told it: where to connect, and the token to show."""
    if all(plan.local):
        listener, addresses = socket.create_server(("127.0.0.1", 0), backlog=1024), ["127.0.0.1"]
    else:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        listener = socket.create_server(("", 0), family=family, dualstack_ipv6=both, backlog=1024)
        addresses = list(
            dict.fromkeys([*(address_towards(host.name) for host in plan.others()), socket.gethostname()])
        )
    job = {"addresses": addresses, "port": listener.getsockname()[1], "token": token, "folder": plan.session_folder}
    return listener, json.dumps(job)


def start(
    command: list[str],
    environ: dict[str, str],
    source: int | IO = subprocess.DEVNULL,
    death: int = signal.SIGKILL,
) -> subprocess.Popen:
    """Start a process that gets ``death`` when this one dies; its output is read from ``stdout``, without blocking."""
    launcher = os.getpid()

    def set_up() -> None:
        prctl(PR_SET_PDEATHSIG, death)
        if os.getppid() != launcher:
            os._exit(1)

    process = subprocess.Popen(
        command,
        bufsize=0,
        env=environ,
        stdin=source,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # a terminal's Ctrl-C goes to the launcher alone
        preexec_fn=set_up,
    )
    os.set_blocking(process.stdout.fileno(), False)
    return process


def start_engine(
    plan: launch.Plan,
    host: Host | None,
    command: list[str],
    environ: dict[str, str],
    remote_environ: dict[str, str],
    log: str | None,
) -> Engine:
    """Start an engine on this host, or with ssh on another, which gets ``remote_environ`` without a command line."""
    if host is None:
        # Only mpirun has something to clear up; the others may hang in that, while the ranks end by themselves.
        death = signal.SIGTERM if plan.engine == "mpi" else signal.SIGKILL
        return Engine(host, start(command, environ, death=death), log)
    order = {"command": command, "folder": plan.folder, "env": remote_environ}
    with tempfile.TemporaryFile() as source:
        source.write(json.dumps(order).encode() + b"\n")
        source.seek(0)
        return Engine(host, start(launch.over_ssh(host, launch.REMOTE_START), environ, source), log)


def check_hosts(plan: launch.Plan) -> str | None:
    """Log in to the other hosts, all at once; what is wrong with the first one that cannot take part."""
    checks = [
        (host, start(launch.over_ssh(host, launch.host_check(plan)), dict(os.environ))) for host in plan.others()
    ]
    problems = []
    for host, process in checks:
        os.set_blocking(process.stdout.fileno(), True)
        lines = process.communicate()[0].decode(errors="replace").split("\n")
        if process.returncode:
            reason = next((line.strip() for line in reversed(lines) if line.strip()), f"status {process.returncode}")
            problems.append(f"host {host.name}: {reason}")
    return problems[0] if problems else None
