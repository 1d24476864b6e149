"""One rank of a job: started by the engine, it starts the script, watches it and reports to the launcher.

Every engine starts ``python -I rank.py SCRIPT ARGUMENTS``, so that placement, logs, signals and exit statuses are the
same under all of them. It runs by path and, beside this package, needs the standard library only: it starts in 0.1 s.
Without ``GAUDI_SPAWN_JOB`` in the environment (a pasted command) it becomes the script at once.

With it, a socket to the launcher carries frames of one kind byte, four length bytes and a payload:

===== =================== ==========================================================
kind  direction           payload
===== =================== ==========================================================
H     rank to launcher    JSON: token, rank, host name, CPUs, digests of settings
1, 2  rank to launcher    output of the script, as written
T     rank to launcher    the last output of a rank whose output was not shown
X     rank to launcher    JSON: exit status of the script; whether launcher or engine stopped it
S     launcher to rank    JSON: start the script, with these settings
K     launcher to rank    a signal number for the script; 9 is for all its processes
R     launcher to rank    released: end, with the script's exit status
===== =================== ==========================================================

A rank that has ended waits for its release, so that no engine ends the job in its own way while others still run. The
launcher's death closes the socket, and then the rank kills its script.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import pty
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import time

if __name__ == "__main__":
    # Started by path, perhaps where the package is not installed.
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from gaudi_lm.placement import cpu_quota, place_of_rank, prepare, probe_port, threads_per_rank
from gaudi_lm.processes import (
    PR_SET_CHILD_SUBREAPER,
    PR_SET_PDEATHSIG,
    frame,
    keep_alive,
    kill_descendants,
    prctl,
    signal_pipe,
    take_frames,
)

JOB_VARIABLE = "GAUDI_SPAWN_JOB"
TAIL_BYTES = 64 * 1024
BUFFER_BYTES = 1024 * 1024
# Settings that all ranks must agree on, and the few among them that differ between cards or hosts by nature.
AGREED_PREFIXES = ("PT_", "HCCL_", "HABANA_")
PER_RANK = ("HABANA_VISIBLE_", "HABANA_LOGS", "HCCL_SOCKET_IFNAME")
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def script_command(script: list[str]) -> list[str]:
    """The script's command; -u, so that a log shows what was printed up to a crash."""
    # mpirun reads a lone ":" as the start of another program, so the launcher adds one colon to such arguments.
    return [sys.executable, "-u", *(word[1:] if len(word) > 1 and not word.strip(":") else word for word in script)]


class Rank:
    """The script of one rank and the connection to the launcher."""

    def __init__(self, script: list[str], job: dict) -> None:
        self.script, self.place = script, place_of_rank(os.environ)
        self.connection = self._connect(job)
        self.inbox, self.outbox, self.tail = bytearray(), bytearray(), bytearray()
        self.process: subprocess.Popen | None = None
        self.status: int | None = None
        self.deadline: float | None = None
        self.stopped_by: str | None = None
        self.log = None
        self.settings: dict = {}
        self.streams: dict[int, bytes] = {}
        self.selector = selectors.DefaultSelector()
        self.wake = signal_pipe((*STOP_SIGNALS, signal.SIGCHLD))
        self.selector.register(self.wake, selectors.EVENT_READ)

    def _connect(self, job: dict) -> socket.socket:
        errors = []
        for address in job["addresses"]:
            try:
                connection = socket.create_connection((address, job["port"]), timeout=10)
                break
            except OSError as error:
                errors.append(f"{address} port {job['port']}: {error}")
        else:
            sys.exit(f"rank {self.place[0]}: cannot reach the launcher: {'; '.join(errors)}")
        keep_alive(connection)
        digests = {
            name: hashlib.sha256(value.encode(errors="surrogateescape")).hexdigest()
            for name, value in os.environ.items()
            if name.startswith(AGREED_PREFIXES) and not name.startswith(PER_RANK)
        }
        hello = {"token": job["token"], "place": self.place, "host": socket.gethostname(), "settings": digests}
        hello["threads"] = threads_per_rank(len(os.sched_getaffinity(0)), self.place[3], cpu_quota())
        connection.sendall(frame(b"H", json.dumps(hello).encode()))
        connection.setblocking(False)
        return connection

    def run(self) -> int:
        """Serve until released; the exit status of the script, 128+n where signal n ended it."""
        while True:
            # While the launcher does not read, the script's output waits too.
            paused = len(self.outbox) > BUFFER_BYTES
            watched = selectors.EVENT_READ | (selectors.EVENT_WRITE if self.outbox else 0)
            for stream in self.streams:
                known = stream in self.selector.get_map()
                if paused and known:
                    self.selector.unregister(stream)
                elif not paused and not known:
                    self.selector.register(stream, selectors.EVENT_READ)
            if self.connection in self.selector.get_map():
                self.selector.modify(self.connection, watched)
            else:
                self.selector.register(self.connection, watched)
            for key, events in self.selector.select(None if self.deadline is None else self._left()):
                if key.fileobj == self.wake:
                    self._on_signals(os.read(self.wake, 512))
                elif key.fileobj is self.connection:
                    if events & selectors.EVENT_WRITE:
                        self._write()
                    if events & selectors.EVENT_READ and self._read():
                        return self.status if self.status is not None else 128 + signal.SIGTERM
                elif key.fileobj in self.streams:
                    self._copy(key.fileobj)
            if self.deadline is not None and self._left() == 0:
                self.deadline = None
                kill_descendants()

    def _left(self) -> float:
        return max(0.0, self.deadline - time.monotonic())

    def _write(self) -> None:
        with contextlib.suppress(BlockingIOError):
            del self.outbox[: self.connection.send(self.outbox)]

    def _read(self) -> bool:
        """Take orders; True when this process is to end."""
        try:
            data = self.connection.recv(65536)
        except BlockingIOError:
            return False
        if not data:
            raise ConnectionResetError
        self.inbox += data
        for kind, payload in take_frames(self.inbox):
            if kind == b"S":
                self._start(json.loads(payload))
            elif kind == b"R" or self.process is None:
                return True
            else:
                self._stop(int(payload), "launcher")
        return False

    def _start(self, settings: dict) -> None:
        self.settings = settings
        environ = {
            **prepare(os.environ, settings["place"], settings["map_by"], settings["threads"]),
            **settings["env"],
        }
        try:
            if settings["log"]:
                os.makedirs(os.path.dirname(settings["log"]), exist_ok=True)
                self.log = open(settings["log"], "wb", buffering=0)  # noqa: SIM115, open as long as the rank
            if settings["probe"]:
                probe_port(environ["MASTER_ADDR"], int(environ["MASTER_PORT"]))
        except OSError as error:
            self._end(1, f"rank {self.place[0]} cannot start: {error}\n".encode())
            return
        ends = [pty.openpty() if terminal else os.pipe() for terminal in settings["terminals"]]
        for kind, (out, inner), terminal in zip((b"1", b"2"), ends, settings["terminals"], strict=True):
            self.streams[out] = kind
            os.set_blocking(out, False)
            if terminal:
                fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", *settings["size"], 0, 0))
                attributes = termios.tcgetattr(inner)
                attributes[1] &= ~termios.OPOST  # the launcher's own terminal turns \n into \r\n
                termios.tcsetattr(inner, termios.TCSANOW, attributes)
        wrapper = os.getpid()

        def set_up() -> None:
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != wrapper:
                os._exit(128 + signal.SIGKILL)

        self.process = subprocess.Popen(
            script_command(self.script),
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=ends[0][1],
            stderr=ends[1][1],
            start_new_session=True,
            preexec_fn=set_up,
        )
        for _, inner in ends:
            os.close(inner)

    def _stop(self, number: int, by: str) -> None:
        if self.process is None or self.status is not None:
            return
        self.stopped_by = self.stopped_by or by
        if number == signal.SIGKILL:
            kill_descendants()
        else:
            # To the script alone: its data loaders would otherwise die under a script that wants to save first.
            self.process.send_signal(number)
            self.deadline = self.deadline or time.monotonic() + self.settings["grace"]

    def _on_signals(self, numbers: bytes) -> None:
        for number in numbers:
            if number in STOP_SIGNALS:
                if self.process is None:
                    sys.exit(128 + number)
                self._stop(number, "engine")
        if self.process is not None and self.status is None and self.process.poll() is not None:
            code = self.process.returncode
            kill_descendants()
            for stream in list(self.streams):
                while self._copy(stream):
                    pass
            self._end(code if code >= 0 else 128 - code, bytes(self.tail))
        with contextlib.suppress(ChildProcessError):
            while self.status is not None and os.waitpid(-1, os.WNOHANG)[0]:
                pass

    def _end(self, status: int, last_output: bytes) -> None:
        self.status, self.deadline = status, None
        if status and not self.stopped_by and not (self.settings["show"] and self.process):
            self.outbox += frame(b"T", last_output)
        self.outbox += frame(b"X", json.dumps({"status": status, "stopped_by": self.stopped_by}).encode())

    def _copy(self, stream: int) -> bool:
        """Move one piece of the script's output on; False when there is none."""
        try:
            data = os.read(stream, 65536)
        except BlockingIOError:
            return False
        except OSError:  # a terminal whose other end is closed
            data = b""
        if not data:
            if stream in self.selector.get_map():
                self.selector.unregister(stream)
            del self.streams[stream]
            os.close(stream)
            return False
        if self.log:
            try:
                self.log.write(data)
            except OSError as error:
                self.outbox += frame(b"2", f"{self.log.name}: {error.strerror}; no more is written to it\n".encode())
                self.log = None
        if self.settings["show"]:
            self.outbox += frame(self.streams[stream], data)
        else:
            self.tail += data
            del self.tail[:-TAIL_BYTES]
        return True


def main(script: list[str]) -> int:
    """Run as a rank of a job, or become the script where there is no launcher."""
    job = os.environ.pop(JOB_VARIABLE, None)
    if job is None:
        place = place_of_rank(os.environ)
        environ = prepare(os.environ, place, "socket", "OMP_NUM_THREADS" not in os.environ)
        os.execve(sys.executable, script_command(script), environ)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    job = json.loads(job)
    try:
        return Rank(script, job).run()
    except OSError as error:
        # The launcher is gone or cannot be reached any more: nobody could stop this rank later.
        print(f"rank: lost the launcher: {error}", file=sys.stderr)
        if job["folder"]:  # of mpirun, which the launcher would have removed
            shutil.rmtree(job["folder"], ignore_errors=True)
        return 128 + signal.SIGKILL
    finally:
        kill_descendants()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
