"""run_clm.py under the three backends: two ranks learn what one rank with twice the batch learns.

A signal to the launcher ends them: the ranks save a checkpoint, and the launcher ends as they do.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ports import reserved_port
from running import environment, losses

from launcher.spawning import BACKENDS, ROOT, Launch, clm_flags, log_of

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("launcher")]


@pytest.mark.parametrize(
    ("backend", "number"), [("torch", signal.SIGUSR1), ("mpi", signal.SIGINT), ("deepspeed", signal.SIGTERM)]
)
def test_two_ranks_equal_one_with_twice_the_batch_and_save_on_a_signal(backend, number, assets, one_rank, tmp_path):
    output, logs = tmp_path / "out", tmp_path / "logs"
    script = [str(ROOT / "run_clm.py"), *clm_flags(assets, output, 4, "--use_cpu", "--max_steps", "100000")]
    options = [*BACKENDS[backend], "--world_size", "2", "--log_dir", str(logs)]
    job = Launch(*options, *script, environ=environment(), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 280
    while "step 13/" not in log_of(logs, 0):
        assert job.process.poll() is None, job.finish().stderr
        assert time.monotonic() < deadline
        time.sleep(0.1)
    job.process.send_signal(number)
    done = job.finish(120)
    assert job.survivors(5.0) == []
    assert done.returncode == 128 + number, done.stderr
    own, other = log_of(logs, 0), log_of(logs, 1)
    assert "Traceback" not in own + other + done.stderr
    (step,) = re.findall(rf"training ends after step (\d+); the checkpoint is {output}/checkpoint-\1", own)
    assert (output / f"checkpoint-{step}" / "manifest.json").is_file()
    assert not list(output.glob("incomplete-*"))
    got = losses(output / f"checkpoint-{step}")
    assert len(got) == int(step) >= 12
    assert got[:12] == pytest.approx(one_rank, abs=1e-5)
    assert got[11] < got[0]
    # Logs and progress bars come from the main rank only.
    assert "INFO" in own
    assert "INFO" not in other and "gaudi_lm" not in other


PLAIN = {
    "torchrun": ["torchrun", "--standalone", "--nproc_per_node", "2"],
    "accelerate": ["accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "PORT"],
    "mpirun": ["mpirun", "-n", "2", "--map-by", "slot:oversubscribe", "--bind-to", "none", "--allow-run-as-root"],
    "deepspeed": ["deepspeed", "--num_gpus", "2", "--master_port", "PORT"],
}


@pytest.mark.parametrize("backend", PLAIN)
def test_without_gaudi_spawn(backend, assets, one_rank, tmp_path):
    """The backends by themselves, as docs/many_hosts.md shows them: the same results."""
    python = [] if backend != "mpirun" else [sys.executable]
    script = [*python, str(ROOT / "run_clm.py"), *clm_flags(assets, tmp_path / "out", 4, "--use_cpu")]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with reserved_port() as port:
        words = [word.replace("PORT", str(port)) for word in PLAIN[backend]]
        environ = environment(PATH=path, **({"MASTER_PORT": str(port)} if backend == "mpirun" else {}))
        done = subprocess.run([*words, *script], env=environ, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "out") == pytest.approx(one_rank, abs=1e-5)
