"""How scripts are run for tests: a run that goes wrong leaves the next one alone, and other processes too."""

import os
import signal
import socket
import time
from pathlib import Path

import pytest
from ports import reserved_port
from running import ROOT, environment, run_interrupted
from warm import run

SCRIPT = """
import os, subprocess, sys, time
if "waits" in sys.argv:
    print(subprocess.Popen(["sleep", "600"]).pid, file=sys.stderr, flush=True)
    time.sleep(600)
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path / "script.py"


def until(true) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def state(pid: int) -> str:
    """R, S or Z for one that nobody has waited for; empty where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_signal_to_a_run_that_has_ended_reaches_nobody(ranks, script):
    """Its id is not given to another process until the test has done with it."""

    def meanwhile(pids: list[int]) -> None:
        until(lambda: [state(pid) for pid in pids] == ["Z"] * len(pids))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    assert [end.returncode for end in run_interrupted(ranks, script, 3, meanwhile=meanwhile)] == [3] * max(ranks, 1)


def test_a_test_that_fails_meanwhile_ends_its_runs_alone(script):
    """Its processes end, and the next run gets its own ids: not a status, which may be 0, all of the tests' group."""
    started = []

    def meanwhile(pids: list[int]) -> None:
        stderr = Path(f"/proc/{pids[0]}/fd/2")
        until(lambda: stderr.read_text().endswith("\n"))
        started.extend([*pids, int(stderr.read_text())])
        raise AssertionError("as a test does")

    with pytest.raises(AssertionError, match="as a test does"):
        run_interrupted(2, script, 0, "waits", meanwhile=meanwhile)
    until(lambda: not any(map(state, started)))
    found = []
    (end,) = run_interrupted(0, script, 0, meanwhile=found.extend)
    assert end.returncode == 0 and not set(found) & {0, *started}


def test_a_run_that_takes_too_long_is_ended(script):
    started = []
    with pytest.raises(TimeoutError):
        run([str(script), "0", "waits"], environment(), ROOT, {}, 0.5, meanwhile=started.extend)
    until(lambda: not any(map(state, started)))
    assert run([str(script), "5"], environment(), ROOT, {}, 60)[0].returncode == 5


def test_a_reserved_port_is_that_of_rank_0():
    with reserved_port() as port, socket.socket() as other:
        with pytest.raises(OSError, match="in use"):
            other.bind(("", port))
        with socket.create_server(("127.0.0.1", port)):
            pass
