"""A signal to the launcher: the ranks save a checkpoint, and the launcher ends as they do."""

import re
import signal
import subprocess

import pytest
from running import environment

from launch.spawning import BACKENDS, ROOT, Launch, clm_flags

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("heavy")]


@pytest.mark.parametrize(
    ("backend", "number"), [("torch", signal.SIGUSR1), ("mpi", signal.SIGINT), ("deepspeed", signal.SIGTERM)]
)
def test_the_launcher_ends_with_the_status_of_its_ranks(backend, number, assets, tmp_path):
    output = tmp_path / "out"
    script = [str(ROOT / "run_clm.py"), *clm_flags(assets, output, 4, "--use_cpu", "--max_steps", "100000")]
    launch = Launch(*BACKENDS[backend], "--world_size", "2", *script, environ=environment(), stderr=subprocess.STDOUT)
    launch.wait_for(b"step 3/")
    launch.process.send_signal(number)
    done = launch.finish(120)
    assert launch.survivors(5.0) == []
    assert done.returncode == 128 + number, done.stdout
    assert "Traceback" not in done.stdout
    (step,) = re.findall(rf"training ends after step (\d+); the checkpoint is {output}/checkpoint-\1", done.stdout)
    assert (output / f"checkpoint-{step}" / "manifest.json").is_file()
    assert not list(output.glob("incomplete-*"))
