"""The supervisor of a job on one host: it starts the backend, passes signals to the ranks, and leaves nothing behind.

On the launcher's host it is a child of the launcher. On another host ssh starts it: its order is the first line of
standard input, further lines are signal numbers, and when they end or fail to come, so does the job. Ranks and
connections report to it by files (:func:`processes.report`) in a folder that only its owner can enter.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from gaudi_lm.host import threads_per_rank
from gaudi_lm.launcher import processes

PAUSE = 0.05  # s between two looks at what has happened
FAILURE_GRACE = 5.0  # s between the first failure and the end of the other ranks
HEARTBEAT, SILENCE = 5.0, 30.0  # s between signs of the launcher to other hosts, and until they give it up
MARK = b"\0gaudi_spawn:"  # begins a report among what another host prints on stderr
# The connection of a host that is gone is given up after 20 s.
SSH = ["ssh", "-oBatchMode=yes", "-oConnectTimeout=15", "-oServerAliveInterval=5", "-oServerAliveCountMax=4"]


def say(text: str) -> None:
    """A line of the launcher's own on stderr, unless a terminal stands still or is gone."""
    with contextlib.suppress(OSError, ValueError):
        if select.select([], [2], [], 2.0)[1]:
            os.write(2, f"gaudi_spawn: {text}\n".encode(errors="surrogateescape"))


class Host:
    """A job on this host, by an order of :meth:`plan.Plan.orders`; ``remote`` where the launcher is on another."""

    def __init__(self, order: dict, remote: bool = False) -> None:
        self.order, self.remote, self.folder = order, remote, order["folder"]
        self.signals, self.unread, self.heard = list[int](), b"", time.monotonic()
        self.failure, self.outside = dict[str, Any](), dict[str, Any]()  # the report that is to be said
        self.signalled = self.number = self.killed = 0  # signals to launcher and ranks; whether some had to be killed
        self.told, self.deadline = dict[str, int](), float("inf")
        processes.on_signals(self.signals.append)

    def run(self) -> int:
        """Run the job to its end; the exit status."""
        processes.adopt_orphans()
        try:
            job = self.order["job"]
            job["environ"].setdefault("OMP_NUM_THREADS", str(threads_per_rank(job["slots"])))
            Path(self.folder, "job").write_text(json.dumps(job))
            environ = {**os.environ, **self.order["environ"], processes.JOB_VARIABLE: self.folder}
            how = {"start_new_session": True, "preexec_fn": processes.die_with_parent, "cwd": self.order["cwd"]}
            backends: dict[int, int | None] = {}
            for command in self.order["commands"]:
                if not self.remote:
                    say(f"command: {shlex.join(command)}")
                process = subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL, **how)
                backends[process.pid] = None
                process.returncode = 0  # `reap` waits for it
            while self._goes_on(backends):
                time.sleep(PAUSE)
        finally:
            processes.kill_descendants()
            found = ["status" in end for end in processes.reports(self.folder).values()]
            shutil.rmtree(self.folder, ignore_errors=True)
        return self._conclude(next(filter(None, backends.values()), 0), all(found) and len(found) >= job["slots"])

    def _goes_on(self, backends: dict[int, int | None]) -> bool:
        """Serve what has happened; False when the job is over."""
        with contextlib.suppress(BlockingIOError):
            data = os.read(0, 65536) if self.remote else b"\n"
            self.heard = time.monotonic() if data else -SILENCE
            *lines, self.unread = (self.unread + data).split(b"\n")
            self.signals += [int(line) for line in lines if line]
        if time.monotonic() > self.heard + SILENCE:
            self.signals.append(processes.PARENT_ENDED)
        while self.signals:
            if (number := self.signals.pop(0)) == processes.PARENT_ENDED:
                return False
            again = self.signalled == number == signal.SIGINT
            if not self.number:
                self.signalled = number
                if not self.remote:
                    say(f"{signal.Signals(number).name}: passed on to all ranks; {self.order['grace']:g} s to end")
            self._stop(number, 0.0 if again else self.order["grace"])
        # Zombies, too. A look before that at the backends, as ranks die with theirs.
        gone = [n for n, m in processes.reports(self.folder).items() if not os.path.exists(f"/proc/{m['pid']}/exe")]
        backends.update((pid, status) for pid, status in processes.reap().items() if pid in backends)
        members = processes.reports(self.folder)  # all that they had to say before that
        killed = {"status": 137, "stopped": bool(self.number) or set(backends.values()) != {None}}
        members |= {n: {**killed, "what": f"{n} was killed, {processes.named(137)}", **members[n]} for n in gone}
        failed = sorted((m for m in members.values() if m.get("status")), key=lambda m: m["time"])
        settled = self.number or self.remote or not failed or time.monotonic() > failed[0]["time"] + self.order["wait"]
        for end in failed if settled else []:
            if not end["stopped"]:
                self._fail(end)
            elif not self.number:
                # Perhaps by the backend because of another host, whose report is then on its way.
                self.outside = end
                self._stop(signal.SIGTERM, min(self.order["grace"], FAILURE_GRACE))
        left = [name for name, member in members.items() if "status" not in member]
        for name in [name for name in left if self.told.get(name, 0) != self.number]:
            self.told[name] = self.number
            with contextlib.suppress(ProcessLookupError):
                os.kill(members[name]["pid"], self.number)
        if None not in backends.values():
            self.deadline = min(self.deadline, time.monotonic() + SILENCE)
        # A backend prints what ranks said last, and the ranks of another host may need it.
        waits = None in backends.values() and not (self.failure or self.outside)
        self.killed = bool(left) and time.monotonic() >= self.deadline
        return bool(left or waits or not (self.number or settled)) and time.monotonic() < self.deadline

    def _stop(self, number: int, grace: float) -> None:
        """Have all ranks and other hosts get a signal, and set a limit to their end."""
        self.number, self.deadline = number, min(self.deadline, time.monotonic() + grace)

    def _fail(self, end: dict) -> None:
        """Note the first failure, tell the launcher, and stop the rest of the job."""
        if not self.failure and not self.signalled:
            self.failure = end
            if self.remote:
                os.write(2, MARK + json.dumps({**end, "age": time.monotonic() - end["time"]}).encode() + b"\n")
            self._stop(signal.SIGTERM, min(self.order["grace"], FAILURE_GRACE))

    def _conclude(self, status: int, whole: bool) -> int:
        """Say how the job ended, if not well; the exit status."""
        if self.outside or status or not whole:
            early = f"{self.order['backend']} ended before the ranks had, with exit status {status}"
            end = {"time": time.monotonic(), "what": early, "status": status or 1, "stopped": False}
            self._fail(self.outside or end)
        what, status = (self.failure["what"], self.failure["status"]) if self.failure else ("", 0)
        if self.signalled:
            what, status = f"stopped by {signal.Signals(self.signalled).name}", 128 + self.signalled
            what += ", killed at the end of the grace" * self.killed
        if what and not self.remote:
            say(what if self.signalled else f"error: {what}")
        return status


def other_host() -> int:
    """The supervisor on another host than the launcher's."""
    with open(0, "rb", buffering=0, closefd=False) as orders:
        text = orders.readline().decode()
    os.set_blocking(0, False)
    # mpirun hands the place of its files on to other hosts, where nobody would remove them.
    there, here = json.loads(text)["folder"], tempfile.mkdtemp(prefix="gaudi_spawn-")
    return Host(json.loads(text.replace(json.dumps(there)[1:-1], json.dumps(here)[1:-1])), remote=True).run()


def over_ssh(login: str, command: list[str]) -> list[str]:
    """``command`` for another host; quoted, because sshd hands it to a shell."""
    return [*SSH, login, "exec " + shlex.join(command)]


def connect(folder: str, host: str, *command: str) -> int:
    """Log in to another host and serve its supervisor; its exit status. mpirun starts this in place of ssh."""
    processes.on_signals((signals := list[int]()).append)
    processes.die_with_parent(processes.PARENT_ENDED)
    order = json.loads(Path(folder, "hosts").read_text())[host.rpartition("@")[2]]
    order["commands"] = [["sh", "-c", " ".join(command)]] if command else order["commands"]
    name, pending = f"host {order['job']['host']}", b""
    processes.report(folder, name, what=f"{name} is lost, or the connection to it was killed", stopped=True)
    how: dict = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE, "bufsize": 0, "start_new_session": True}
    ssh: Any = subprocess.Popen(over_ssh(order["login"], processes.python("supervise.other_host")), **how)
    os.set_blocking(ssh.stderr.fileno(), False)
    words, due, told = json.dumps(order).encode() + b"\n", 0.0, False
    while (data := ssh.stderr.read(65536)) != b"":
        told |= bool(signals)
        words += b"".join(b"%d\n" % signals.pop(0) for _ in list(signals))
        if b"%d\n" % processes.PARENT_ENDED in words:
            ssh.stdin.close()
        elif not ssh.stdin.closed and (words or time.monotonic() > due):
            with contextlib.suppress(BrokenPipeError):
                ssh.stdin.write(words or b"\n")
            due = time.monotonic() + HEARTBEAT
        words = b""
        *lines, pending = (pending + (data or b"")).split(b"\n")
        for output, mark, message in (line.partition(MARK) for line in lines):
            os.write(2, output if mark else output + b"\n")
            if mark:
                end = json.loads(message)
                processes.report(folder, f"{name} itself", **{**end, "time": time.monotonic() - end["age"]})
                told = True
        select.select([ssh.stderr], [], [], PAUSE)
    os.write(2, pending)
    status = ssh.wait()
    what = f"{name} is lost: ssh has ended with exit status {status}"
    processes.report(folder, name, status=int(status == 255 or status > 0 and not told), what=what, stopped=False)
    return status
