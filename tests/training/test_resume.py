"""A run that is resumed from a checkpoint ends with the bits of one that was not interrupted, log included."""

import json
import shutil
from pathlib import Path

import pytest
from resuming import CARD, CPU, essence, script_flags, start, zero
from running import ROOT, losses

pytestmark = [pytest.mark.slow]
SCRIPTS = ["run_clm.py", "run_mlm.py", "run_lora_clm.py"]
CASES = {
    **{f"{ranks}-cpu": (ranks, CPU) for ranks in (1, 2)},
    **{f"{ranks}-card": (ranks, CARD) for ranks in (1, 2)},
    **{f"zero{stage}": (2, [*CARD, *zero(stage)]) for stage in (1, 2, 3)},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("script", SCRIPTS)
def test_resume_is_exact(script, case, assets, masked_assets, instructions, tmp_path):
    ranks, card = CASES[case]
    flags = [*script_flags(script, assets, masked_assets, instructions), *card]
    start(script, ranks, tmp_path / "whole", *flags)
    again = tmp_path / "again"
    again.mkdir()
    # As a kill in step 4 or 5 leaves it: logged and evaluated beyond the checkpoint, in the midst of an epoch.
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", again / "checkpoint-3")
    said = start(script, ranks, again, *flags)
    assert f"Resuming from {again / 'checkpoint-3'}" in said[0]
    assert essence(again) == essence(tmp_path / "whole")
    steps = [row["step"] for row in essence(again)[1] if "loss" in row]
    assert steps == [2, 4, 6, 8]


@pytest.mark.parametrize(
    ("script", "case"),
    [("run_clm.py", "1-cpu"), ("run_clm.py", "2-cpu"), ("run_mlm.py", "1-card"), ("run_lora_clm.py", "zero2")],
)
def test_accumulation_resumes_exactly(script, case, assets, masked_assets, instructions, tmp_path):
    """Five batches an epoch are two steps of two and one of one, which was lost: its gradients went into the next."""
    ranks, card = CASES[case]
    flags = [*script_flags(script, assets, masked_assets, instructions), *card, "--gradient_accumulation_steps", 2]
    flags += ["--save_steps", 1, "--logging_steps", 1]
    start(script, ranks, tmp_path / "whole", *flags)
    whole = essence(tmp_path / "whole")
    for step in (1, 4, 5):
        again = tmp_path / str(step)
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", again / f"checkpoint-{step}")
        start(script, ranks, again, *flags)
        assert essence(again) == whole, step


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_schedule_with_warm_up_resumes_exactly_with_deepspeed(stage, assets, masked_assets, instructions, tmp_path):
    """The rate of the first step of warm-up, which is 0, was taken for --learning_rate: nothing was trained any more.

    Without ZeRO, one file of a checkpoint has the optimizer of all ranks.
    """
    flags = [*script_flags("run_clm.py", assets, masked_assets, instructions), *CARD, "--warmup_steps", 2]
    config = json.loads((ROOT / "configs" / "deepspeed" / f"zero_{max(stage, 1)}.json").read_text())
    config["zero_optimization"]["stage"] = stage
    (tmp_path / "zero.json").write_text(json.dumps(config))
    flags += ["--deepspeed", tmp_path / "zero.json"]
    start("run_clm.py", 2, tmp_path / "whole", *flags)
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "again" / "checkpoint-3")
    start("run_clm.py", 2, tmp_path / "again", *flags)
    assert essence(tmp_path / "again") == essence(tmp_path / "whole")


def test_processes_that_stay_resume_exactly(assets, masked_assets, instructions, tmp_path):
    """They start once in a whole run and once more in a resumed one, which changed the dropout after it."""
    flags = [*script_flags("run_mlm.py", assets, masked_assets, instructions), *CPU, "--line_by_line"]
    flags += ["--group_by_length", "--dataloader_num_workers", 2, "--dataloader_persistent_workers"]
    start("run_mlm.py", 1, tmp_path / "whole", *flags)
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "again" / "checkpoint-3")
    start("run_mlm.py", 1, tmp_path / "again", *flags)
    assert essence(tmp_path / "again") == essence(tmp_path / "whole")


def test_a_new_model_begins_alike_with_and_without_zero_3(assets, masked_assets, instructions, tmp_path):
    """Divided weights are empty to what initialises them: they kept torch's defaults, with a loss far above chance."""
    flags = [*script_flags("run_clm.py", assets, masked_assets, instructions), *CARD]
    flags += ["--max_steps", 1, "--logging_steps", 1]
    first = {}
    for stage in (2, 3):
        start("run_clm.py", 2, tmp_path / str(stage), *flags, *zero(stage))
        first[stage] = losses(tmp_path / str(stage))[0]
    assert first[3] == pytest.approx(first[2], rel=1e-3)


def test_the_best_checkpoint_is_known_after_a_resume(assets, masked_assets, instructions, tmp_path):
    flags = [*script_flags("run_clm.py", assets, masked_assets, instructions), *CPU, "--eval_steps", 3]
    flags += ["--load_best_model_at_end", "--save_total_limit", 1, "--learning_rate", 1]  # the first is the best
    start("run_clm.py", 1, tmp_path / "whole", *flags)
    state = json.loads((tmp_path / "whole" / "trainer_state.json").read_text())
    best = Path(state["best_model_checkpoint"])
    assert best.parent == tmp_path / "whole" and best.name == f"checkpoint-{state['best_global_step']}"
    whole = essence(tmp_path / "whole")
    assert whole[0] == essence(best)[0]
    # The folder has moved meanwhile.
    shutil.copytree(best, tmp_path / "again" / best.name)
    shutil.rmtree(tmp_path / "whole")
    start("run_clm.py", 1, tmp_path / "again", *flags)
    assert essence(tmp_path / "again") == whole
