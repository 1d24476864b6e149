"""run_clm.py under the three engines: two ranks learn what one rank with twice the batch learns."""

import json
import os
import subprocess
import sys

import pytest
from running import environment, losses

from launch.spawning import ENGINES, ROOT, clm_flags, spawn

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("heavy")]


@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_equal_one_with_twice_the_batch(engine, assets, one_rank, tmp_path):
    script = [str(ROOT / "run_clm.py"), *clm_flags(assets, tmp_path / "out", 4, "--use_cpu")]
    options = ["--world_size", "2", "--log_dir", str(tmp_path / "logs")]
    done = spawn(*ENGINES[engine], *options, *script, environ=environment())
    assert done.returncode == 0, done.stderr
    got = losses(tmp_path / "out")
    assert len(got) == 12
    assert got[-1] < got[0]
    assert got == pytest.approx(one_rank, abs=1e-5)
    # Logs and progress bars come from the main rank only.
    assert "gaudi_lm" not in (tmp_path / "logs/rank1.log").read_text()
    assert "INFO" in (tmp_path / "logs/rank0.log").read_text()
    assert "INFO" not in (tmp_path / "logs/rank1.log").read_text()


def test_a_rank_that_ends_right_after_a_collective_ends_well(tmp_path):
    """Without `run_script`, 3 of 40 ranks died of SIGABRT here: see there."""
    rounds = 12
    command = [sys.executable, ROOT / "tests/launch/ranks/last_collective.py", str(rounds), tmp_path]
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in os.sched_getaffinity(0)]
    try:
        done = subprocess.run(
            command, env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True, timeout=300, check=False
        )
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert done.returncode == 0, done.stderr
    spoken, statuses = done.stdout.splitlines()
    assert json.loads(statuses) == [[0] * 4] * rounds, done.stderr
    assert spoken.count("last words") == spoken.count("of a thread") == 4 * rounds
