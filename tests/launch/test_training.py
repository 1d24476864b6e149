"""run_clm.py under the three backends: two ranks learn what one rank with twice the batch learns."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from running import environment, losses

from launch.spawning import BACKENDS, ROOT, clm_flags, log_of, spawn

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("heavy")]


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_ranks_equal_one_with_twice_the_batch(backend, assets, one_rank, tmp_path):
    script = [str(ROOT / "run_clm.py"), *clm_flags(assets, tmp_path / "out", 4, "--use_cpu")]
    options = ["--world_size", "2", "--log_dir", str(tmp_path / "logs")]
    done = spawn(*BACKENDS[backend], *options, *script, environ=environment())
    assert done.returncode == 0, done.stderr
    got = losses(tmp_path / "out")
    assert len(got) == 12
    assert got[-1] < got[0]
    assert got == pytest.approx(one_rank, abs=1e-5)
    # Logs and progress bars come from the main rank only.
    assert "gaudi_lm" not in log_of(tmp_path / "logs", 1)
    assert "INFO" in log_of(tmp_path / "logs", 0)
    assert "INFO" not in log_of(tmp_path / "logs", 1)


PLAIN = {
    "torchrun": ["torchrun", "--standalone", "--nproc_per_node", "2"],
    "accelerate": ["accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "PORT"],
    "mpirun": ["mpirun", "-n", "2", "--map-by", "slot:oversubscribe", "--bind-to", "none", "--allow-run-as-root"],
    "deepspeed": ["deepspeed", "--num_gpus", "2", "--master_port", "PORT"],
}


@pytest.mark.parametrize("backend", PLAIN)
def test_without_gaudi_spawn(backend, assets, one_rank, tmp_path):
    """The backends by themselves, as the README shows them: the same results."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    python = [] if backend != "mpirun" else [sys.executable]
    words = [word.replace("PORT", port) for word in PLAIN[backend]]
    script = [*python, str(ROOT / "run_clm.py"), *clm_flags(assets, tmp_path / "out", 4, "--use_cpu")]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environ = environment(PATH=path, **({"MASTER_PORT": port} if backend == "mpirun" else {}))
    done = subprocess.run([*words, *script], env=environ, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "out") == pytest.approx(one_rank, abs=1e-5)
