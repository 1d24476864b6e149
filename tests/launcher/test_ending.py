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


def end(last: str, rounds: int, folder) -> tuple[list[str], str]:
    """Lines of stdout, and stderr, of rounds of ranks that end so."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests/launcher/ranks/ending.py", last, str(rounds), folder],
        env=environment(PYTHONPATH=f"{ROOT}:{ROOT}/tests/support"),
        capture_output=True,
        text=True,
        timeout=50 * rounds,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr


@pytest.mark.slow
@pytest.mark.xdist_group("launcher")
@pytest.mark.parametrize("last", ["gather", "backward"])
def test_ranks_end_well_right_after_a_collective(last, busy_processors, tmp_path):
    """A rank that neither hangs nor dies of SIGABRT has status 0 and has said its last words."""
    (spoken, statuses), errors = end(last, ROUNDS, tmp_path)
    assert json.loads(statuses) == [[0] * RANKS] * ROUNDS, errors
    assert spoken.count("last words") == RANKS * ROUNDS
    assert spoken.count("of a thread") == (ROUNDS if last == "gather" else 0)


@pytest.mark.slow
@pytest.mark.xdist_group("launcher")
def test_a_mistake_that_one_rank_finds_later_is_one_line_there_too(tmp_path):
    """Rank 0 holds the store: where it ended first, the others had a traceback of a lost connection."""
    (*_, statuses), errors = end("refuse", 2, tmp_path)
    assert json.loads(statuses) == [[2] * RANKS] * 2 and "Traceback" not in errors, errors
