"""How several ranks end: `gaudi_lm.device.run_script`, which the scripts and all ranks of the tests use."""

import json
import os
import subprocess
import sys

import pytest
from running import ROOT, environment

# `make stress` sets STRESS_ROUNDS.
ROUNDS = 200 if "STRESS_ROUNDS" in os.environ else 5
RANKS = 2


@pytest.fixture
def busy_processors():
    """Something else to do for every processor."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in os.sched_getaffinity(0)]
    yield
    for process in busy:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.xdist_group("launcher")
@pytest.mark.parametrize("last", ["gather", "backward"])
def test_ranks_end_well_right_after_a_collective(last, busy_processors, tmp_path):
    """A rank that neither hangs nor dies of SIGABRT has status 0 and has said its last words."""
    command = [sys.executable, ROOT / "tests/launcher/ranks/ending.py", last, str(ROUNDS), tmp_path]
    done = subprocess.run(
        command,
        env=environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=15 * ROUNDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    spoken, statuses = done.stdout.splitlines()
    assert json.loads(statuses) == [[0] * RANKS] * ROUNDS, done.stderr
    assert spoken.count("last words") == RANKS * ROUNDS
    assert spoken.count("of a thread") == (ROUNDS if last == "gather" else 0)
