"""What may be in --output_dir when a run begins there: logs of the launcher, of TensorBoard and of a shell."""

from types import SimpleNamespace

import pytest
from running import losses, run

from gaudi_lm.errors import UserError
from gaudi_lm.training.resume import find_checkpoint


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("logs/20261125120000_rank0.log", True),
        ("rank0.log", True),
        ("logs/none_5dhg/attempt_0/0/stdout.log", True),
        ("logs/prterun-host-17@1/rank.0/stdout", True),
        ("runs/Nov25_host/events.out.tfevents.1.host", True),
        ("board/events.out.tfevents.1.host", True),
        ("slurm-17.out", True),
        ("deep/er/slurm-17.err", True),
        ("all_results.json", True),
        ("logs/model.safetensors", False),
        ("notes.txt", False),
        ("catalog/pages.csv", False),
    ],
)
def test_logs_are_no_obstacle(tmp_path, path, allowed):
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text("something")
    run_flags = SimpleNamespace(
        dry_run=False,
        do_train=True, resume_from_checkpoint=None, output_dir=str(tmp_path), overwrite_output_dir=False,
        process_index=0, world_size=1,
    )  # fmt: skip
    if allowed:
        assert find_checkpoint(run_flags) is None
    else:
        with pytest.raises(UserError, match="is not empty and holds no checkpoint"):
            find_checkpoint(run_flags)
    assert (tmp_path / path).read_text() == "something"


@pytest.mark.slow
def test_the_launchers_logs_inside(assets, tmp_path):
    output = tmp_path / "out"
    run(
        "gaudi_spawn.py", "--world_size", 1, "--use_mpi", "--log_dir", output / "logs", "run_clm.py",
        "--model_name_or_path", assets.gpt2, "--train_file", assets.train, "--do_train", "--max_steps", 2,
        "--max_train_samples", 8, "--output_dir", output, "--logging_dir", output / "board", "--use_cpu",
        "--block_size", 32, "--logging_steps", 1,
    )  # fmt: skip
    assert len(losses(output)) == 2 and any((output / "logs").glob("*/rank.0/stdout"))
