"""run_clm.py under the three engines: two ranks learn what one rank with twice the batch learns."""

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
