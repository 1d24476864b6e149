"""Start a job's engines, follow its ranks, and end all of it as one: nothing of it is left behind.

The ranks (:mod:`gaudi_lm.rank`) connect to the launcher, get their settings, and report how they end. All stopping goes
over these connections, and what is left at the end is killed as a descendant of this process, never by name.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import queue
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field

from gaudi_lm import launch
from gaudi_lm.hostfile import Host
from gaudi_lm.placement import address_towards
from gaudi_lm.processes import (
    PR_SET_CHILD_SUBREAPER,
    PR_SET_PDEATHSIG,
    frame,
    keep_alive,
    kill_descendants,
    prctl,
    take_frames,
)
from gaudi_lm.rank import JOB_VARIABLE, STOP_SIGNALS, TAIL_BYTES

FAILURE_GRACE = 5.0  # s between the first failure and the end of the other ranks
KILL_GRACE = 3.0  # s that killed processes have to be gone
ENGINE_GRACE = 10.0  # s that an engine has to end after its ranks
START_LIMIT = 300.0  # s from the engine's start until all ranks are there
LOST = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN)


def say(text: str) -> None:
    """A line of the launcher's own."""
    print(f"gaudi_spawn: {text}", file=sys.stderr, flush=True)


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
        threading.Thread(target=self._write, daemon=True).start()

    def put(self, stream: int, data: bytes) -> None:
        """Queue bytes for file descriptor ``stream``."""
        self.waiting += len(data)
        self.pieces.put((stream, data))

    def _write(self) -> None:
        while True:
            stream, data = self.pieces.get()
            try:
                while data and not self.broken:
                    data = data[os.write(stream, data) :]
            except OSError:
                self.broken = True
                os.kill(os.getpid(), signal.SIGHUP)  # nobody reads any more: as after a hang-up
            self.waiting -= len(data)
            self.pieces.task_done()

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
    place: list[int] | None = None
    host: str = ""
    settings: dict = field(default_factory=dict)
    cpus: int = 0
    status: int | None = None


@dataclass
class Engine:
    """A running engine and the last of what it printed."""

    host: Host | None
    process: subprocess.Popen
    tail: bytearray = field(default_factory=bytearray)


class Job:
    """One launch, from the engines' start to the exit status.

    Args:
        plan: what runs where.
        commands: of :func:`gaudi_lm.launch.engine_commands`.
        environ: environment of engines on this host.
        rank_environ: variables that every rank gets.
        grace: seconds between a signal to the launcher and SIGKILL.
        log_dir: folder for one file per rank; None for none.
        map_by: order in which CPUs are given to ranks: socket, slot or none.
    """

    def __init__(
        self,
        plan: launch.Plan,
        commands: list[tuple[Host | None, list[str]]],
        environ: dict[str, str],
        rank_environ: dict[str, str],
        grace: float,
        log_dir: str | None,
        map_by: str,
    ) -> None:
        self.plan, self.commands, self.environ, self.rank_environ = plan, commands, dict(environ), rank_environ
        self.grace, self.log_dir, self.map_by = grace, log_dir, map_by
        self.token = secrets.token_hex(16)
        self.selector = selectors.DefaultSelector()
        self.terminal = Terminal()
        self.engines: list[Engine] = []
        self.ranks: dict[int, Peer] = {}
        self.started = self.released = self.killed = False
        self.signalled: int | None = None
        self.failure: tuple[str, int] | None = None
        self.failed_rank: int | None = None
        self.deadline = time.monotonic() + START_LIMIT

    def run(self) -> int:
        """Run the job to its end; the exit status for the launcher."""
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        wake, wakeup = os.pipe()
        for end in (wake, wakeup):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in STOP_SIGNALS:
            # What nohup or a shell's background job has set to be ignored stays ignored.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda *_: None)
        self.selector.register(wake, selectors.EVENT_READ, lambda: self._on_signals(os.read(wake, 512)))
        with self._listen() as listener:
            self.selector.register(listener, selectors.EVENT_READ, lambda: self._accept(listener))
            for host, command in self.commands:
                self._start_engine(host, command)
            try:
                while self._step():
                    pass
            finally:
                for peer in self.ranks.values():
                    peer.connection.close()
                kill_descendants()
        self.terminal.finish()
        return self._conclude()

    def _listen(self) -> socket.socket:
        if all(self.plan.local):
            listener, addresses = socket.create_server(("127.0.0.1", 0)), ["127.0.0.1"]
        else:
            both = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if both else socket.AF_INET
            listener = socket.create_server(("", 0), family=family, dualstack_ipv6=both, backlog=1024)
            remote = [h.name for h, here in zip(self.plan.hosts, self.plan.local, strict=True) if not here]
            addresses = list(dict.fromkeys([*map(address_towards, remote), socket.gethostname()]))
        job = {"addresses": addresses, "port": listener.getsockname()[1], "token": self.token}
        self.environ[JOB_VARIABLE] = json.dumps(job)
        return listener

    def _start_engine(self, host: Host | None, command: list[str]) -> None:
        launcher = os.getpid()

        def set_up() -> None:
            prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != launcher:
                os._exit(1)

        with contextlib.ExitStack() as files:
            source = subprocess.DEVNULL
            if host is not None:
                order = {"command": command, "folder": self.plan.folder}
                order["env"] = {**self.rank_environ, JOB_VARIABLE: self.environ[JOB_VARIABLE]}
                source = files.enter_context(tempfile.TemporaryFile())
                source.write(json.dumps(order).encode() + b"\n")
                source.seek(0)
                command = launch.over_ssh(host, [sys.executable, "-Es", "-c", launch.REMOTE_START])
            process = subprocess.Popen(
                command,
                env=self.environ,
                stdin=source,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=set_up,
            )
        engine = Engine(host, process)
        os.set_blocking(process.stdout.fileno(), False)
        self.selector.register(process.stdout, selectors.EVENT_READ, lambda: self._read_engine(engine))
        self.engines.append(engine)

    def _step(self) -> bool:
        """Serve what has happened; False when the job is over."""
        # While the terminal stands still, so does the output of the ranks; not while they are being stopped.
        paused = self.terminal.waiting > 8 * 1024 * 1024 and not self._stopping()
        left = max(0.0, self.deadline - time.monotonic())
        for key, _ in self.selector.select(min(left, 1.0)):
            if not (paused and isinstance(key.fileobj, socket.socket)):
                key.data()
        if paused:
            time.sleep(0.01)
        ended = [engine for engine in self.engines if engine.process.poll() is not None]
        if self.started and not self.released and all(peer.status is not None for peer in self.ranks.values()):
            self._release()
        if len(ended) == len(self.engines):
            return False
        if not self.released:
            for engine in ended:
                self._engine_ended_early(engine)
        if time.monotonic() >= self.deadline:
            return self._on_deadline()
        return True

    def _stopping(self) -> bool:
        return self.failure is not None or self.signalled is not None

    def _release(self) -> None:
        self.released = True
        self.deadline = time.monotonic() + ENGINE_GRACE
        for peer in self.ranks.values():
            self._send(peer, b"R")

    def _engine_ended_early(self, engine: Engine) -> None:
        ranks = self.plan.ranks_of(engine.host) if engine.host else range(self.plan.world_size)
        if any(rank not in self.ranks or self.ranks[rank].status is None for rank in ranks):
            self._fail(*self._engine_failure(engine))

    def _engine_failure(self, engine: Engine) -> tuple[str, int]:
        """What to say about an engine that ended before its ranks had, and the exit status."""
        code = engine.process.returncode
        status = code if code > 0 else 128 - code if code < 0 else 1
        lines = engine.tail.decode(errors="replace").split("\n")
        if engine.host:
            reason = next((line.strip() for line in reversed(lines) if line.strip()), "nothing was printed")
            return (
                f"host {engine.host.name} is lost: ssh or {self._engine()} ended with exit status {code}: {reason}",
                1,
            )
        missing = [host.name for host in self.plan.hosts if not set(self.plan.ranks_of(host)) <= set(self.ranks)]
        named = [host.name for host in self.plan.hosts[1:] if any(host.name in line for line in lines)]
        where = f", naming host {', '.join(named)}" if named else ""
        where += f"; no start on host {', '.join(missing)}" if missing and len(self.plan.hosts) > 1 else ""
        return f"{self._engine()} ended with exit status {code} before the ranks had{where}", status

    def _engine(self) -> str:
        return launch.ENGINES[self.plan.engine]

    def _on_deadline(self) -> bool:
        """End the grace; False when nothing more can be waited for."""
        if not self._stopping() and not self.released:
            absent = sorted(set(range(self.plan.world_size)) - set(self.ranks))
            hosts = ", ".join(dict.fromkeys(self.plan.host_of(rank).name for rank in absent))
            self._fail(f"ranks {absent} on host {hosts} did not start within {START_LIMIT:.0f} s", 1)
            return True
        if self.killed or self.released:
            return False
        self.killed = True
        self.deadline = time.monotonic() + KILL_GRACE
        for peer in self.ranks.values():
            self._send(peer, b"K", str(int(signal.SIGKILL)).encode())
        return True

    def _on_signals(self, numbers: bytes) -> None:
        for number in numbers:
            if number in STOP_SIGNALS:
                again = self.signalled == number == signal.SIGINT
                if self.signalled is None:
                    self.signalled = number
                    say(f"{signal_name(number)}: passed on to all ranks, which have {self.grace:g} s to end")
                self._stop(number, 0 if again else self.grace)

    def _fail(self, what: str, status: int, rank: int | None = None) -> None:
        """Note the first failure and stop the rest of the job."""
        if not self._stopping():
            self.failure, self.failed_rank = (what, status), rank
            self._stop(signal.SIGTERM, min(self.grace, FAILURE_GRACE))

    def _stop(self, number: int, grace: float) -> None:
        if self.released:
            return
        self.deadline = min(self.deadline, time.monotonic() + grace) if self.started else time.monotonic() + grace
        for peer in self.ranks.values():
            self._send(peer, b"K", str(number).encode())
        if not self.started:
            for engine in self.engines:
                engine.process.terminate()

    def _send(self, peer: Peer, kind: bytes, payload: bytes = b"") -> None:
        # Orders are small and ranks always read: the kernel's buffer takes them.
        with contextlib.suppress(OSError):
            peer.connection.sendall(frame(kind, payload))

    def _accept(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        keep_alive(connection)
        peer = Peer(connection)
        self.selector.register(connection, selectors.EVENT_READ, lambda: self._read_peer(peer))

    def _read_engine(self, engine: Engine) -> None:
        data = engine.process.stdout.read1(65536) if engine.process.stdout else b""
        if not data:
            self.selector.unregister(engine.process.stdout)
            return
        engine.tail += data
        del engine.tail[:-TAIL_BYTES]
        if self.log_dir:
            with open(os.path.join(self.log_dir, "engine.log"), "ab") as file:
                file.write(data)

    def _read_peer(self, peer: Peer) -> None:
        try:
            data, problem = peer.connection.recv(262144), None
        except OSError as error:
            data, problem = b"", error
        if not data:
            self.selector.unregister(peer.connection)
            peer.connection.close()
            self._lost(peer, problem)
            return
        peer.inbox += data
        for kind, payload in take_frames(peer.inbox):
            if peer.place is None:
                self._hello(peer, kind, payload)
                if peer.place is None:
                    return
            elif kind in (b"1", b"2"):
                self.terminal.put(int(kind), payload)
            elif kind == b"T":
                if not self._stopping() or self.failed_rank is not None:
                    self._show_tail(peer, payload)
            elif kind == b"X":
                self._ended(peer, json.loads(payload))

    def _hello(self, peer: Peer, kind: bytes, payload: bytes) -> None:
        try:
            hello = json.loads(payload) if kind == b"H" else {}
        except ValueError:
            hello = {}
        if not secrets.compare_digest(str(hello.get("token", "")), self.token):
            self.selector.unregister(peer.connection)
            peer.connection.close()
            return
        peer.place, peer.host = hello["place"], hello["host"]
        peer.settings, peer.cpus = hello["settings"], hello["cpus"]
        self.ranks[peer.place[0]] = peer
        if self._stopping():
            self._send(peer, b"K", str(int(signal.SIGTERM)).encode())
        elif len(self.ranks) == self.plan.world_size:
            self._start_ranks()

    def _start_ranks(self) -> None:
        first = self.ranks[0]
        for rank, peer in sorted(self.ranks.items()):
            differing = sorted(
                name
                for name in first.settings.keys() | peer.settings.keys()
                if first.settings.get(name) != peer.settings.get(name)
            )
            if differing:
                names, host = ", ".join(differing), self.plan.host_of(rank).name
                self._fail(
                    f"rank {rank} on host {host} has another {names} than rank 0; --env {differing[0]} gives all the same",
                    1,
                )
                return
        self.started, self.deadline = True, float("inf")
        terminals = [os.isatty(1), os.isatty(2)]
        size = list(os.get_terminal_size(2))[::-1] if terminals[1] else [24, 80]
        for place in self.plan.places:
            rank = place[0]
            settings = {
                "place": place,
                "env": self.rank_environ,
                "threads": "OMP_NUM_THREADS" not in self.rank_environ,
                "map_by": self.map_by,
                "grace": self.grace,
                "log": self.log_of(rank),
                "show": rank == 0,
                "terminals": terminals if rank == 0 else [False, False],
                "size": size,
                # torch.distributed.run listens there already.
                "probe": rank == 0 and self.plan.engine != "torch",
            }
            self._send(self.ranks[rank], b"S", json.dumps(settings).encode())

    def log_of(self, rank: int) -> str | None:
        """The log file of a rank, on its own host."""
        return os.path.join(self.log_dir, f"rank{rank}.log") if self.log_dir else None

    def _name(self, rank: int) -> str:
        return f"rank {rank} on host {self.plan.host_of(rank).name}"

    def _show_tail(self, peer: Peer, tail: bytes) -> None:
        if tail:
            head = f"gaudi_spawn: the last output of {self._name(peer.place[0])}:\n".encode()
            self.terminal.put(2, head + tail + (b"" if tail.endswith(b"\n") else b"\n"))

    def _ended(self, peer: Peer, report: dict) -> None:
        peer.status, rank = report["status"], peer.place[0]
        if peer.status and not self._stopping():
            number = peer.status - 128
            by = f" ({signal_name(number)})" if 0 < number < 65 else ""
            log = (
                f"; log: {self.log_of(rank)}"
                if self.log_dir
                else "; its output is above, --log_dir keeps all ranks' in files"
            )
            self._fail(f"{self._name(rank)} failed with exit status {peer.status}{by}{log}", peer.status, rank)

    def _lost(self, peer: Peer, problem: OSError | None) -> None:
        """A connection has ended."""
        if peer.place is None or peer.status is not None:
            return
        rank = peer.place[0]
        host = self.plan.host_of(rank).name
        peer.status = 128 + signal.SIGKILL
        if problem is not None and problem.errno in LOST:
            self._fail(f"host {host} is lost: {problem.strerror.lower()} (rank {rank})", 1)
        else:
            log = f"; log: {self.log_of(rank)}" if self.log_dir else ""
            self._fail(f"{self._name(rank)} was killed without a report, exit status 137{log}", peer.status, rank)

    def _conclude(self) -> int:
        """Say how the job ended, if not well; the exit status."""
        if not self._stopping():
            for engine in self.engines:
                if engine.process.returncode:
                    self.failure = self._engine_failure(engine)
            if not self.started and self.failure is None:
                self.failure = self._engine_failure(self.engines[0])
        if self.signalled is not None:
            killed = ", killed at the end of the grace" if self.killed else ""
            say(f"stopped by {signal_name(self.signalled)}{killed}")
            return 128 + self.signalled
        if self.failure is None:
            return 0
        what, status = self.failure
        if self.failed_rank is None:
            for engine in self.engines:
                sys.stderr.write(engine.tail.decode(errors="replace"))
        say(f"error: {what}")
        return status
