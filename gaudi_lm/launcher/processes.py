"""Processes and what they say to each other. Standard library only, as ranks and other hosts run this."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
PARENT_ENDED = signal.SIGUSR2
JOB_VARIABLE = "GAUDI_SPAWN_JOB"


def python(function: str, *arguments: str) -> list[str]:
    """A command for a function of this package, such as ``rank.main``; the end of this file runs it."""
    return [sys.executable, "-I", __file__, function, *arguments]


def adopt_orphans() -> None:
    """Let processes below this one that lose their parent become its children."""
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Get signal ``number`` when the parent of this process ends."""
    ctypes.CDLL(None).prctl(1, number, 0, 0, 0)  # PR_SET_PDEATHSIG


def on_signals(serve: Callable[[int], object]) -> None:
    """Call ``serve`` with the number of each signal that comes."""
    # SIGHUP stays ignored where nohup has set it so. SIGINT does not, though shells start background jobs so.
    for number in (*STOP_SIGNALS, PARENT_ENDED):
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: serve(number))


def reap() -> dict[int, int]:
    """Exit statuses by process id of children that have ended, 128+n for signal n."""
    ended = {}
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            ended[found[0]] = code if (code := os.waitstatus_to_exitcode(found[1])) >= 0 else 128 - code
    return ended


def named(status: int) -> str:
    """``exit status 137 (SIGKILL)``."""
    return f"exit status {status}" + {128 + n: f" ({n.name})" for n in signal.Signals}.get(status, "")


def kill_descendants() -> None:
    """SIGKILL everything below this process, found in /proc, until nothing is left or five seconds have passed."""
    deadline, found = time.monotonic() + 5, [0, 0]
    while found[1:] and time.monotonic() < deadline:
        children: dict[int, list[int]] = {}
        for entry in filter(str.isdigit, os.listdir("/proc")):
            # A process may end between the listing and the reading.
            with contextlib.suppress(OSError), open(f"/proc/{entry}/stat", "rb") as file:
                state, parent = file.read().rpartition(b")")[2].split()[:2]
                if state not in (b"Z", b"X"):
                    children.setdefault(int(parent), []).append(int(entry))
        found = [os.getpid()]
        for above in found:
            found += children.get(above, [])
        for pid in found[1:]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02 * bool(found[1:]))


def report(folder: str, name: str, **what: object) -> None:
    """Tell the supervisor that this process is there, is ``stopped``, or how it ends: ``status`` and ``what``."""
    text = json.dumps({"pid": os.getpid(), "time": time.monotonic(), **what}).ljust(512)  # bytes of most reports
    with contextlib.suppress(FileNotFoundError):  # the job is over
        try:
            Path(folder, f".{name}").write_text(text)
            os.rename(f"{folder}/.{name}", f"{folder}/{name}.report")
        except OSError:  # on a full disk too a signal is passed on, and an end told: the report before has its place
            with open(f"{folder}/{name}.report", "r+") as file:
                file.write(text)


def reports(folder: str) -> dict[str, dict]:
    """All :func:`report`, the last one of each name."""
    return {path.stem: json.loads(path.read_text()) for path in Path(folder).glob("*.report")}


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    module, _, function = sys.argv[1].partition(".")
    sys.exit(getattr(importlib.import_module(f"gaudi_lm.launcher.{module}"), function)(*sys.argv[2:]))
