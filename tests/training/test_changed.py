"""What has changed since a checkpoint is said, and counts; what cannot be resumed with is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from resuming import CARD, CPU, batch, essence, script_flags, start, zero
from running import ROOT, log_history, run, run_ranks, run_several
from simulator.cards import card_environment

pytestmark = [pytest.mark.slow]


@pytest.fixture(scope="module")
def base(assets, masked_assets, instructions) -> list:
    return [*script_flags("run_clm.py", assets, masked_assets, instructions), *CPU]


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "out"
    start("run_clm.py", 1, output, *base)
    return output


# Flags that change at the restart from step 3 of 5 an epoch, 20 rows, 4 a step: exit code, words of the log.
CHANGES = {
    "nothing": ([], 0, []),
    "batch": (
        ["--per_device_train_batch_size", 2], 0,
        ["--per_device_train_batch_size 2 (was 4)", "a step takes 2 rows, 4 before", "at row 6, not 12",
         "6 rows come a second time"],
    ),
    "larger batch": (
        ["--per_device_train_batch_size", 5], 0,
        ["a step takes 5 rows, 4 before", "at row 15, not 12", "3 rows are left out"],
    ),
    "accumulation": (
        ["--gradient_accumulation_steps", 2], 0,
        ["--gradient_accumulation_steps 2 (was 1)", "a step takes 8 rows, 4 before", "at row 20, not 12"],
    ),
    "the same rows": (
        ["--gradient_accumulation_steps", 2, "--per_device_train_batch_size", 2], 0,
        ["each step still takes the same 4 rows"],
    ),
    "seed": (["--seed", 7], 0, ["--seed 7 (was 42)", "the order of the data is another one"]),
    "fewer rows": (
        ["--max_train_samples", 16], 0,
        ["the training data are not those of the checkpoint (16 rows, 20 before)", "after step 3 of 4 of epoch 1"],
    ),
    "learning rate": (["--learning_rate", 1e-3], 0, ["--learning_rate 0.001 (was 0.01)", "lr 0.001 (was 0.01)"]),
    "weight decay": (["--weight_decay", 0.1], 0, ["weight_decay 0.1 (was 0.0)"]),
    "schedule": (["--lr_scheduler_type", "constant"], 0, ["--lr_scheduler_type constant (was linear)"]),
    "steps": (["--max_steps", 12], 0, ["--max_steps 12 (was 8)"]),
    "optimizer": (["--optim", "adafactor"], 2, ["--optim", "AdamW", "Adafactor", "checkpoint-3"]),
    "model": (
        ["--config_overrides", "n_embd=16,n_layer=2,n_head=2,n_positions=64"], 2,
        ["other names or shapes", "checkpoint-3"],
    ),
    "without effect": (
        ["--logging_steps", 1, "--save_steps", 4, "--dataloader_num_workers", 1, "--dataloader_persistent_workers"],
        0,
        [],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def ends(base, whole, tmp_path_factory) -> dict:
    root = tmp_path_factory.mktemp("changed")
    runs = []
    for index, (flags, _, _) in enumerate(CHANGES.values()):
        output = root / str(index)
        output.mkdir()
        shutil.copytree(whole / "checkpoint-3", output / "checkpoint-3")
        runs.append([*base, *batch(1), "--output_dir", output, *flags])
    return dict(
        zip(
            CHANGES,
            zip(run_several("run_clm", runs), [root / str(n) for n in range(len(runs))], strict=True),
            strict=True,
        )
    )


@pytest.mark.parametrize("case", CHANGES)
def test_a_changed_flag(case, ends):
    _, status, words = CHANGES[case]
    end, _ = ends[case]
    assert end.status == status, end.log
    assert "Traceback" not in end.log
    assert [word for word in words if word not in end.log] == []
    if not words:
        assert "WARNING" not in end.log, end.log
    if status:
        assert end.log.rstrip().splitlines()[-1].startswith("error: ")


def test_the_flags_of_the_new_start_count(ends, whole):
    assert essence(ends["nothing"][1]) == essence(whole)
    rates = {
        name: [row["learning_rate"] for row in log_history(output) if "loss" in row]
        for name, (end, output) in ends.items()
        if not end.status
    }
    linear = [1e-2 * (1 - (step - 1) / 8) for step in (2, 4, 6, 8)]
    assert rates["nothing"] == pytest.approx(linear)
    assert rates["learning rate"] == pytest.approx([linear[0], *(rate / 10 for rate in linear[1:])])
    assert rates["schedule"] == pytest.approx([linear[0], 1e-2, 1e-2, 1e-2])
    assert rates["steps"] == pytest.approx([linear[0], *(1e-2 * (1 - (step - 1) / 12) for step in (4, 6, 8, 10, 12))])
    assert [row["step"] for row in log_history(ends["without effect"][1]) if "loss" in row] == [2, 4, 5, 6, 7, 8]
    assert (ends["without effect"][1] / "checkpoint-4").is_dir()
    assert essence(ends["without effect"][1])[0] == essence(whole)[0]
    groups = torch.load(ends["weight decay"][1] / "checkpoint-8" / "optimizer.pt", weights_only=True)["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    state = json.loads((ends["batch"][1] / "checkpoint-8" / "trainer_state.json").read_text())
    assert state["epoch"] == pytest.approx(0.8)  # of ten steps


def test_rows_of_an_epoch_that_begins_anew(base, whole, tmp_path):
    shutil.copytree(whole / "checkpoint-3", tmp_path / "out" / "checkpoint-3")
    (said,) = start("run_clm.py", 1, tmp_path / "out", *base, "--ignore_data_skip")
    assert "--ignore_data_skip True (was False)" in said and "some rows come a second time" in said


def test_a_stream_has_no_order_of_its_own(base, assets, tmp_path):
    """It is read as it comes, whatever the seed, and nobody knows its rows."""
    flags = [*base, "--streaming"]
    start("run_clm.py", 1, tmp_path / "stream", *flags, "--max_steps", 3)
    for name, more in {"seed": [*flags, "--seed", 7], "whole": base}.items():
        shutil.copytree(tmp_path / "stream" / "checkpoint-3", tmp_path / name / "checkpoint-3")
        (said,) = start("run_clm.py", 1, tmp_path / name, *more, "--max_steps", 4)
        assert ("the order of the data" in said, "None before" in said) == (False, False)
        assert ("the training data are not those of the checkpoint: " in said) == (name == "whole")
    other = tmp_path / "train.txt"
    other.write_text(assets.train.read_text().replace("the", "The"))
    flags = [other if flag == assets.train else flag for flag in flags]
    (said,) = start("run_clm.py", 1, tmp_path / "stream", *flags, "--max_steps", 4)
    assert "the training data are not those of the checkpoint: " in said


def test_a_schedule_by_the_metric_ends_no_other(base, tmp_path):
    plateau = ["--lr_scheduler_type", "reduce_lr_on_plateau", "--save_steps", 4, "--max_steps", 4]
    start("run_clm.py", 1, tmp_path / "out", *base, *plateau)
    done = run("run_clm.py", *base, *batch(1), "--output_dir", tmp_path / "out", code=2)
    assert "--lr_scheduler_type reduce_lr_on_plateau followed the metric" in done.stderr.splitlines()[-1]


def test_the_text_behind_the_same_flags(base, whole, assets, tmp_path):
    changed = tmp_path / "train.txt"
    changed.write_text(assets.train.read_text().replace("the", "The"))
    flags = [changed if flag == assets.train else flag for flag in base]
    shutil.copytree(whole / "checkpoint-3", tmp_path / "out" / "checkpoint-3")
    (said,) = start("run_clm.py", 1, tmp_path / "out", *flags)
    assert "the training data are not those of the checkpoint: " in said


def test_another_number_of_ranks(base, whole, tmp_path):
    shutil.copytree(whole / "checkpoint-3", tmp_path / "out" / "checkpoint-3")
    said = start("run_clm.py", 2, tmp_path / "out", *base)[0]
    for words in (
        "--world_size 2 (was 1)",
        "each step still takes the same 4 rows",
        "no RNG state for this number of ranks",
    ):
        assert words in said


def test_from_the_cpu_to_a_card_and_back(base, tmp_path):
    start("run_clm.py", 2, tmp_path / "cpu", *base, "--max_steps", 4)
    shutil.copytree(tmp_path / "cpu" / "checkpoint-3", tmp_path / "card" / "checkpoint-3")
    (tmp_path / "gaudi.json").write_text('{"use_fused_adam": false, "use_fused_clip_norm": false}')
    on_card = [*base[: -len(CPU)], *CARD, "--max_steps", 6]
    said = start("run_clm.py", 2, tmp_path / "card", *on_card, "--gaudi_config_name", tmp_path / "gaudi.json")[0]
    assert "--use_habana True (was False)" in said and "has no RNG state of a card" in said
    # By default a card has an optimizer of its own, whose state is another one.
    shutil.copytree(tmp_path / "cpu" / "checkpoint-3", tmp_path / "fused" / "checkpoint-3")
    flags = [*on_card, *batch(1), "--output_dir", tmp_path / "fused"]
    done = run("run_clm.py", *flags, env=card_environment(), code=2)
    assert "the state of the optimizer AdamW, this run has FusedAdamW" in done.stderr.splitlines()[-1]
    shutil.copytree(tmp_path / "card" / "checkpoint-6", tmp_path / "back" / "checkpoint-6")
    said = start("run_clm.py", 2, tmp_path / "back", *base)[0]
    assert "--use_habana False (was True)" in said
    assert [row["step"] for row in log_history(tmp_path / "back") if "loss" in row] == [2, 4, 6, 8]


def test_a_run_that_has_ended_is_not_trained_on(base, whole, tmp_path):
    """It stopped in the midst of an epoch: the loop would train one more step before it looks at --max_steps."""
    shutil.copytree(whole, tmp_path / "out")
    before = essence(whole)
    start("run_clm.py", 1, tmp_path / "out", *base)
    again = essence(tmp_path / "out")
    assert again == before


def test_what_is_evaluated_at_the_end_of_an_epoch_is_in_its_checkpoint(base, tmp_path):
    flags = [*base, "--eval_strategy", "epoch", "--save_steps", 5, "--max_steps", 10, "--logging_steps", 1]
    start("run_clm.py", 1, tmp_path / "whole", *flags)
    shutil.copytree(tmp_path / "whole" / "checkpoint-5", tmp_path / "again" / "checkpoint-5")
    start("run_clm.py", 1, tmp_path / "again", *flags)
    assert essence(tmp_path / "again") == essence(tmp_path / "whole")
    assert [row["step"] for row in log_history(tmp_path / "again") if "eval_loss" in row] == [5, 10, 10]


def test_overwriting_removes_what_was_there(base, whole, tmp_path):
    """Its checkpoints would be resumed from after an interruption, or be kept in place of the new ones."""
    shutil.copytree(whole, tmp_path / "out")
    flags = ["--overwrite_output_dir", "--max_steps", 4, "--save_total_limit", 1, "--seed", 3]
    start("run_clm.py", 1, tmp_path / "out", *base, *flags)
    assert [path.name for path in (tmp_path / "out").glob("*checkpoint-*")] == ["checkpoint-4"]


def test_newer_checkpoints_than_the_named_one_are_set_aside(base, whole, tmp_path):
    """With --save_total_limit they would be kept, and those of this run removed."""
    shutil.copytree(whole, tmp_path / "out")
    named = ["--resume_from_checkpoint", tmp_path / "out" / "checkpoint-3", "--save_total_limit", 1, "--max_steps", 6]
    start("run_clm.py", 1, tmp_path / "out", *base, *named)
    found = {path.name for path in (tmp_path / "out").glob("*checkpoint-*")}
    assert found == {"checkpoint-6", "unused-checkpoint-6", "unused-checkpoint-8"}


def test_the_best_model_is_not_that_of_another_run(base, tmp_path):
    """Its checkpoint had the step of this run's best one, and was loaded in its place."""
    flags = [*base, "--save_steps", 2, "--eval_steps", 2, "--max_steps", 6, "--load_best_model_at_end"]
    flags += ["--metric_for_best_model", "loss", "--greater_is_better", "True"]  # the first one is the best
    start("run_clm.py", 1, tmp_path / "whole", *flags)
    other = [*flags, "--seed", 7, "--max_steps", 4]
    start("run_clm.py", 1, tmp_path / "again", *other)
    other_weights = essence(tmp_path / "again" / "checkpoint-4")[0]
    named = ["--resume_from_checkpoint", tmp_path / "whole" / "checkpoint-4"]
    (said,) = start("run_clm.py", 1, tmp_path / "again", *flags, *named)
    assert "checkpoint-2 is not what training resumes from; it is now unused-checkpoint-2" in said
    assert essence(tmp_path / "again") == essence(tmp_path / "whole")
    # From the other one, which was set aside: its name is taken, and it is not written over.
    aside = tmp_path / "again" / "unused-checkpoint-4"
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "again" / "checkpoint-4")
    start("run_clm.py", 1, tmp_path / "again", *other, "--max_steps", 6, "--resume_from_checkpoint", aside)
    assert essence(aside)[0] == other_weights
    assert (tmp_path / "again" / "unused-unused-checkpoint-4").is_dir()


FOREIGN = {
    "width": (["--config_overrides", "n_embd=32,n_layer=1,n_head=2,n_positions=64"], "weights are not of this model"),
    "layers": (["--config_overrides", "n_embd=16,n_layer=2,n_head=2,n_positions=64"], "or of another model"),
    "adafactor": (["--optim", "adafactor"], "the state of another optimizer"),
    "sgd": (["--optim", "sgd"], "the state of another optimizer"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOREIGN)
def test_what_does_not_fit_a_checkpoint_of_another_tool(case, base, whole, tmp_path):
    """Without a manifest nothing can be compared beforehand: these ended in tracebacks."""
    shutil.copytree(whole / "checkpoint-3", tmp_path / "out" / "checkpoint-3")
    (tmp_path / "out" / "checkpoint-3" / "manifest.json").unlink()
    flags, words = FOREIGN[case]
    done = run("run_clm.py", *base, *flags, *batch(1), "--output_dir", tmp_path / "out", code=2)
    assert words in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_deepspeed_needs_the_same_ranks_and_stage(base, assets, masked_assets, instructions, tmp_path):
    flags = [*script_flags("run_clm.py", assets, masked_assets, instructions), *CARD, "--max_steps", 3]
    start("run_clm.py", 2, tmp_path / "out", *flags, *zero(2))
    flags += ["--max_steps", 4, "--output_dir", tmp_path / "out", *batch(1)]
    done = run(ROOT / "run_clm.py", *flags, env={"GAUDI_SIMULATOR": "1"}, code=2)
    assert "by ZeRO-2 on 2 ranks, this run trains without DeepSpeed on 1" in done.stderr.splitlines()[-1]


def test_an_optimizer_of_deepspeeds_configuration(assets, masked_assets, instructions, tmp_path):
    """Its learning rate stayed that of the checkpoint, and another one failed in its first step."""
    flags = [*script_flags("run_clm.py", assets, masked_assets, instructions), *CARD, "--logging_steps", 1]
    config = json.loads((ROOT / "configs/deepspeed/zero_2.json").read_text())
    config["zero_allow_untested_optimizer"] = True
    for kind, more in {"AdamW": {"torch_adam": True, "betas": "auto"}, "SGD": {}}.items():
        config["optimizer"] = {"type": kind, "params": {"lr": "auto", "weight_decay": "auto", **more}}
        (tmp_path / f"{kind}.json").write_text(json.dumps(config))
    adam = [*flags, "--deepspeed", tmp_path / "AdamW.json"]
    start("run_clm.py", 2, tmp_path / "out", *adam, "--max_steps", 3)
    shutil.copytree(tmp_path / "out", tmp_path / "other")
    said = start("run_clm.py", 2, tmp_path / "out", *adam, "--max_steps", 5, "--learning_rate", 1e-3)[0]
    assert "the optimizer continues with lr 0.001 (was 0.01)\n" in said
    assert [row["learning_rate"] < 1e-3 for row in log_history(tmp_path / "out") if "loss" in row][3:] == [True, True]
    other = [*flags, "--deepspeed", tmp_path / "SGD.json", *batch(2), "--output_dir", tmp_path / "other"]
    with pytest.raises(AssertionError, match="the state of the optimizer AdamW, this run has SGD"):
        run_ranks(2, "run_clm.py", *other, env=card_environment(2))
