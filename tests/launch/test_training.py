"""run_clm.py under the three engines: two ranks learn what one rank with twice the batch learns."""

import pytest
from running import environment, losses

from launch.spawning import ENGINES, ROOT, spawn

SMALL = "n_embd=32,n_layer=2,n_head=2,n_positions=64,resid_pdrop=0.0,embd_pdrop=0.0,attn_pdrop=0.0"
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("heavy")]


def flags(assets, output, batch: int, *more: str) -> list[str]:
    """Twelve steps of a small GPT-2 from scratch, in fp32 and without dropout; the ranks' batches make 8."""
    text = (
        f"--model_type gpt2 --tokenizer_name {assets.tokenizer} --config_overrides {SMALL} "
        f"--train_file {assets.train} --output_dir {output} --per_device_train_batch_size {batch} --block_size 64 "
        "--logging_steps 1 --max_steps 12 --learning_rate 1e-3 --do_train --save_strategy no"
    )
    return [*text.split(), *more]


@pytest.fixture(scope="module")
def one_rank(assets, tmp_path_factory):
    """Losses of one rank with the whole batch, without the launcher's help but with its ``--world_size 1``."""
    output = tmp_path_factory.mktemp("one")
    done = spawn(str(ROOT / "run_clm.py"), *flags(assets, output, 8, "--use_cpu"), environ=environment())
    assert done.returncode == 0, done.stderr
    return losses(output)


@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_equal_one_with_twice_the_batch(engine, assets, one_rank, tmp_path):
    script = [str(ROOT / "run_clm.py"), *flags(assets, tmp_path / "out", 4, "--use_cpu")]
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
