"""What tests of the launcher share."""

import pytest
from running import environment, losses

from launcher.spawning import ROOT, Launch, clm_flags, spawn


@pytest.fixture(autouse=True)
def no_launch_left():
    """Nothing that a test starts outlives it, not even when the test fails."""
    yield
    while Launch.begun_here:
        process = Launch.begun_here.pop().process
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def one_rank(assets, tmp_path_factory):
    """Losses of one rank that has the whole batch, twelve of them."""
    output = tmp_path_factory.mktemp("one")
    done = spawn(str(ROOT / "run_clm.py"), *clm_flags(assets, output, 8, "--use_cpu"), environ=environment())
    assert done.returncode == 0, done.stderr
    return losses(output)
