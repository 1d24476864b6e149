"""Follow the ranks of a job, and end all of it as one: nothing of it is left behind.

The ranks (:mod:`gaudi_lm.rank`) connect to the launcher, get their settings, and report how they end. All stopping
goes over these connections; what is left at the end is killed as a descendant of this process, never by name.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import secrets
import selectors
import signal
import socket
import time

from gaudi_lm import launch
from gaudi_lm.connections import Engine, Peer, Terminal, check_hosts, disagreement, listen, signal_name, start_engine
from gaudi_lm.processes import PR_SET_CHILD_SUBREAPER, keep_alive, kill_descendants, prctl, signal_pipe, take_frames
from gaudi_lm.rank import JOB_VARIABLE, STOP_SIGNALS

FAILURE_GRACE = 5.0  # s between the first failure and the end of the other ranks
KILL_GRACE = 3.0  # s that killed processes have to be gone
ENGINE_GRACE = 10.0  # s that an engine has to end after its ranks
START_LIMIT = 300.0  # s from the engine's start until all ranks are there
LOST = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN)


class Job:
    """One launch, from the engines' start to the exit status.

    Args:
        plan: what runs where.
        forwarded: variables that engines on other hosts get.
        rank_environ: variables that every rank gets.
        environ: environment of engines on this host.
        grace: seconds between a signal to the launcher and SIGKILL.
        log_dir: folder for one file per rank; None for none.
        map_by: order in which CPUs are given to ranks: socket, slot or none.
    """

    def __init__(
        self,
        plan: launch.Plan,
        forwarded: dict[str, str],
        rank_environ: dict[str, str],
        environ: dict[str, str],
        grace: float,
        log_dir: str | None,
        map_by: str,
    ) -> None:
        self.plan, self.forwarded, self.rank_environ, self.environ = plan, forwarded, rank_environ, environ
        self.grace, self.log_dir, self.map_by = grace, log_dir, map_by
        self.hide = [os.fsencode(value) for value in launch.secret_values(list(plan.script))]
        self.hide += [os.fsencode(value) for name, value in rank_environ.items() if value and launch.is_secret(name)]
        self.token = secrets.token_hex(16)
        self.selector = selectors.DefaultSelector()
        self.terminal = Terminal()
        self.engines: list[Engine] = []
        self.ranks: dict[int, Peer] = {}
        self.started = self.released = self.killed = False
        self.signalled: int | None = None
        self.failure: tuple[str, int] | None = None
        self.outside: tuple[str, int] | None = None
        self.deadline = time.monotonic() + START_LIMIT

    def run(self) -> int:
        """Run the job to its end; the exit status for the launcher."""
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        if problem := check_hosts(self.plan):
            self.failure = problem, 1
            self.terminal.open()
        else:
            wake = signal_pipe((*STOP_SIGNALS, signal.SIGCHLD))
            self.selector.register(wake, selectors.EVENT_READ, lambda: self._on_signals(os.read(wake, 512)))
            listener, job = listen(self.plan, self.token)
            self.environ = {**self.environ, JOB_VARIABLE: job}
            remote = {**self.forwarded, JOB_VARIABLE: job}
            with listener:
                self.selector.register(listener, selectors.EVENT_READ, lambda: self._accept(listener))
                log = os.path.join(self.log_dir, "engine.log") if self.log_dir else None
                if log:
                    open(log, "wb").close()
                for host, command in launch.engine_commands(self.plan, self.forwarded):
                    self.terminal.say(f"command{f' on {host.name}' if host else ''}: {launch.shown(command)}")
                    engine = start_engine(self.plan, host, command, self.environ, remote, log)
                    read = functools.partial(self._read_engine, engine)
                    self.selector.register(engine.process.stdout, selectors.EVENT_READ, read)
                    self.engines.append(engine)
                self.terminal.open()
                try:
                    while self._step():
                        pass
                finally:
                    for peer in self.ranks.values():
                        peer.connection.close()
                    kill_descendants()
        status = self._conclude()
        self.terminal.finish()
        return status

    def _step(self) -> bool:
        """Serve what has happened; False when the job is over."""
        # While the terminal stands still, so does the output of the ranks; not while they are being stopped.
        paused = self.terminal.waiting > 8 * 1024 * 1024 and not self._stopping()
        for key, _ in self.selector.select(min(1.0, max(0.0, self.deadline - time.monotonic()))):
            if not (paused and isinstance(key.fileobj, socket.socket)):
                key.data()
        if paused:
            time.sleep(0.01)
        if self.started and not self.released and all(peer.status is not None for peer in self.ranks.values()):
            self.released, self.deadline = True, time.monotonic() + ENGINE_GRACE
            for peer in self.ranks.values():
                peer.send(b"R")
        ended = [engine for engine in self.engines if engine.process.poll() is not None]
        if not self.released and not self._stopping():
            for engine in ended:
                self._fail(*self._engine_failure(engine))
        # Ranks whose engine is gone still end by themselves, and say so.
        if len(ended) == len(self.engines) and (self.released or not self.started):
            return False
        return time.monotonic() < self.deadline or self._on_deadline()

    def _stopping(self) -> bool:
        return self.failure is not None or self.signalled is not None

    def _on_deadline(self) -> bool:
        """End a grace; False when there is nothing more to wait for."""
        if self.killed or self.released:
            return False
        if not self._stopping():
            absent = sorted(set(range(self.plan.world_size)) - set(self.ranks))
            hosts = ", ".join(dict.fromkeys(self.plan.host_of[rank].name for rank in absent))
            late = f"ranks {absent} on host {hosts} did not start within {START_LIMIT:.0f} s"
            self._fail(*(self.outside or (late, 1)))
            return True
        self.killed, self.deadline = True, time.monotonic() + KILL_GRACE
        for peer in self.ranks.values():
            peer.send(b"K", str(int(signal.SIGKILL)).encode())
        return True

    def _on_signals(self, numbers: bytes) -> None:
        for number in numbers:
            if number in STOP_SIGNALS and not self.released:
                again = self.signalled == number == signal.SIGINT
                if not self._stopping():
                    self.signalled = number
                    self.terminal.say(f"{signal_name(number)}: passed on to all ranks; {self.grace:g} s to end")
                self._stop(number, 0 if again else self.grace)

    def _fail(self, what: str, status: int) -> None:
        """Note the first failure and stop the rest of the job."""
        if not self._stopping():
            self.failure = what, status
            self._stop(signal.SIGTERM, min(self.grace, FAILURE_GRACE))

    def _stop(self, number: int, grace: float) -> None:
        if not self.killed:
            soon = time.monotonic() + grace
            self.deadline = min(self.deadline, soon) if self.started else soon
        for peer in self.ranks.values():
            peer.send(b"K", str(number).encode())
        if not self.started:
            for engine in self.engines:
                engine.process.terminate()

    def _read_engine(self, engine: Engine) -> bool:
        """Take a piece of an engine's output; False when there is none."""
        if (took := engine.read(self.hide)) is False:
            self.selector.unregister(engine.process.stdout)
        return bool(took)

    def _accept(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        keep_alive(connection)
        peer = Peer(connection)
        self.selector.register(connection, selectors.EVENT_READ, lambda: self._read_peer(peer))

    def _read_peer(self, peer: Peer) -> None:
        problem = None
        try:
            data = peer.connection.recv(262144)
        except OSError as error:
            data, problem = b"", error
        peer.inbox += data
        if peer.rank is None and len(peer.inbox) > 1024 * 1024:
            data = b""
        for kind, payload in take_frames(peer.inbox):
            # Nothing is believed of a connection before it has shown the token.
            if peer.rank is None and not (kind == b"H" and self._hello(peer, payload)):
                data = b""
                break
            if kind in (b"1", b"2"):
                self.terminal.put(int(kind), payload)
            elif kind == b"T" and payload:
                head = f"gaudi_spawn: the last output of {self._name(peer.rank)}:\n".encode()
                self.terminal.put(2, head + payload + (b"" if payload.endswith(b"\n") else b"\n"))
            elif kind == b"X":
                self._ended(peer, **json.loads(payload))
        if not data:
            self.selector.unregister(peer.connection)
            peer.connection.close()
            if peer.rank is not None and peer.status is None:
                self._lost(peer, problem)

    def _hello(self, peer: Peer, payload: bytes) -> bool:
        """Take a connection for a rank, if it knows the token."""
        if not peer.introduce(payload, self.token):
            return False
        self.ranks[peer.rank] = peer
        if self._stopping():
            peer.send(b"K", str(int(signal.SIGTERM)).encode())
        elif len(self.ranks) == self.plan.world_size:
            self._start_ranks()
        return True

    def _start_ranks(self) -> None:
        if problem := disagreement(self.plan, self.ranks):
            self._fail(problem, 1)
            return
        threads = "OMP_NUM_THREADS" not in self.rank_environ
        if threads:
            counts = ", ".join(sorted({str(peer.threads) for peer in self.ranks.values()}))
            self.terminal.say(f"OMP_NUM_THREADS was unset: {counts} for each rank, its share of the CPUs")
        terminals = [os.isatty(1), os.isatty(2)]
        size = list(os.get_terminal_size(2))[::-1] if terminals[1] else [24, 80]
        self.started, self.deadline = True, float("inf")
        for rank, place in enumerate(self.plan.places):
            settings = {
                "place": place,
                "env": self.rank_environ,
                "threads": threads,
                "map_by": self.map_by,
                "grace": self.grace,
                "log": self._log_of(rank),
                "show": rank == 0,
                "terminals": terminals if rank == 0 else [False, False],
                "size": size,
                # torch.distributed.run listens there already.
                "probe": rank == 0 and self.plan.engine != "torch",
            }
            self.ranks[rank].send(b"S", json.dumps(settings).encode())

    def _log_of(self, rank: int) -> str | None:
        return os.path.join(self.log_dir, f"rank{rank}.log") if self.log_dir else None

    def _name(self, rank: int) -> str:
        return f"rank {rank} on host {self.plan.host_of[rank].name}"

    def _ended(self, peer: Peer, status: int, stopped_by: str | None) -> None:
        peer.status = status
        if stopped_by == "engine" and not self._stopping():
            # If it was the engine, it ends too, and has more to say.
            what = f"{self._name(peer.rank)} was stopped from outside, exit status {status}{self._see(peer.rank)}"
            self.outside = self.outside or (what, status or 128 + signal.SIGTERM)
            self.deadline = min(self.deadline, time.monotonic() + FAILURE_GRACE)
        elif status:
            number = status - 128
            by = f" ({signal_name(number)})" if 0 < number < 65 else ""
            self._fail(f"{self._name(peer.rank)} failed with exit status {status}{by}{self._see(peer.rank)}", status)

    def _see(self, rank: int) -> str:
        return f"; log: {self._log_of(rank)}" if self.log_dir else "; log: above, kept in files with --log_dir"

    def _lost(self, peer: Peer, problem: OSError | None) -> None:
        peer.status = status = 128 + signal.SIGKILL
        what = f"{self._name(peer.rank)} was killed with its watcher, exit status {status}{self._see(peer.rank)}"
        if problem is not None and problem.errno in LOST:
            what, status = f"host {self.plan.host_of[peer.rank].name} is lost: {problem.strerror}", 1
        self._fail(what, status)

    def _engine_failure(self, engine: Engine) -> tuple[str, int]:
        """What to say about an engine that ended before its ranks had, and the exit status."""
        while engine.process.stdout in self.selector.get_map() and self._read_engine(engine):
            pass
        self.terminal.put(2, engine.tail)
        code, name = engine.process.returncode, launch.ENGINES[self.plan.engine]
        if engine.host:
            what = "ssh has lost or not reached it" if code == 255 else f"{name} ended there with exit status {code}"
            return f"host {engine.host.name} is lost: {what}", 1
        others = [host.name for host in self.plan.others() if host.name.encode() in engine.tail]
        where = f"; its message names host {', '.join(others)}" if others else ""
        status = code if code > 0 else 128 - code if code < 0 else 1
        return f"{name} ended before the ranks had, with exit status {code}{where}", status

    def _conclude(self) -> int:
        """Say how the job ended, if not well; the exit status."""
        if self.signalled is not None:
            killed = ", killed at the end of the grace" if self.killed else ""
            self.terminal.say(f"stopped by {signal_name(self.signalled)}{killed}")
            return 128 + self.signalled
        failed = [engine for engine in self.engines if engine.process.returncode or not self.started]
        if self.failure is None and failed:
            self.failure = self._engine_failure(failed[0])
        what, status = self.failure or self.outside or ("", 0)
        if status:
            self.terminal.say(f"error: {what}")
        return status
