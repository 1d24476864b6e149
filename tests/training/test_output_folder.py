"""What may be in --output_dir when a run begins there: logs of the launcher, of TensorBoard and of a shell."""

import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from running import losses, results, run
from short_runs import scratch

from gaudi_lm.errors import UserError
from gaudi_lm.training.checkpoints import remove_incomplete
from gaudi_lm.training.model_card import command_line
from gaudi_lm.training.outputs import _read_json
from gaudi_lm.training.rank_settings import check_output_folder
from gaudi_lm.training.resume import find_checkpoint, is_log


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


def test_a_folder_of_logs_and_more_is_an_obstacle(tmp_path):
    for name in ("rank0.log", "notes.txt"):
        (tmp_path / name).touch()
    assert not is_log(tmp_path)


@pytest.mark.parametrize("text", ["{", "null", "3", "[1]"])
def test_figures_that_another_tool_has_written_are_no_obstacle(tmp_path, text):
    (tmp_path / "all_results.json").write_text(text)
    assert _read_json(tmp_path / "all_results.json") == {}


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


@pytest.mark.slow
def test_what_others_have_put_there_is_left_alone(assets, tmp_path):
    """Also where a checkpoint of another folder is named."""
    first, output = tmp_path / "first", tmp_path / "out"
    run("run_clm.py", *scratch(assets, first, "--do_train", "--max_steps", 1, "--save_steps", 1))
    output.mkdir()
    for name in ("README.md", "config.json"):
        (output / name).write_text("mine")
    flags = scratch(assets, output, "--do_train", "--max_steps", 2, "--resume_from_checkpoint", first / "checkpoint-1")
    said = run("run_clm.py", *flags, code=2).stderr
    assert f"error: --output_dir {output} is not empty and holds no checkpoint" in said
    assert [path.read_text() for path in sorted(output.iterdir())] == ["mine", "mine"]
    said = run("run_clm.py", *scratch(assets, output, "--do_train", "--resume_from_checkpoint", first), code=2).stderr
    assert f"Name another one, such as {first / 'checkpoint-1'}" in said


@pytest.mark.slow
def test_overwriting_leaves_no_older_result(assets, tmp_path):
    """Of two formats one would be loaded, whichever is newer; figures of two runs would be one's."""
    output, flags = (
        tmp_path / "out",
        ["--do_train", "--max_steps", 1, "--save_strategy", "no", "--max_eval_samples", 2],
    )
    run("run_clm.py", *scratch(assets, output, *flags, "--do_eval"))
    (output / "adapter_config.json").write_text("{}")
    (output / "merged").mkdir()
    (output / "merged" / "config.json").write_text("{}")
    (output / "notes.txt").write_text("mine")
    anew = ["--overwrite_output_dir", "--save_safetensors", "False", "--learning_rate", 1e-2]
    run("run_clm.py", *scratch(assets, output, *flags, *anew))
    names = {path.name for path in output.iterdir()}
    assert {"pytorch_model.bin", "notes.txt", "train_results.json"} <= names
    assert not names & {"model.safetensors", "adapter_config.json", "eval_results.json", "merged"}
    assert "eval_loss" not in results(output)


@pytest.mark.slow
def test_a_longer_run_has_no_results_of_the_model_before_it(assets, tmp_path):
    """Of an evaluation that the second start leaves out: neither the files nor the card, which the hub shows."""
    output = tmp_path / "out"
    flags = ["--do_train", "--save_steps", 1, "--max_eval_samples", 2, "--max_steps"]
    run("run_clm.py", *scratch(assets, output, *flags, 1, "--eval_strategy", "steps", "--eval_steps", 1))
    evaluated = (output / "README.md").read_text()
    assert "eval_loss" in results(output) and "| eval loss |" in evaluated and "type: perplexity" in evaluated
    run("run_clm.py", *scratch(assets, output, *flags, 1))  # the same model
    assert (output / "eval_results.json").exists() and "eval_loss" in results(output)
    run("run_clm.py", *scratch(assets, output, *flags, 2))
    later = (output / "README.md").read_text()
    assert not (output / "eval_results.json").exists() and "eval_loss" not in results(output)
    assert "| eval loss |" not in later and "type: perplexity" not in later and "| optimizer steps | 2 " in later


@pytest.mark.slow
def test_a_prompt_of_code_does_not_end_the_command_in_the_card(assets, tmp_path):
    prompt = "```python\nprint(1)\n```\n# Title"
    flags = ["--do_train", "--max_steps", 1, "--save_strategy", "no", "--generate", prompt]
    run("run_clm.py", *scratch(assets, tmp_path / "out", *flags))
    card = (tmp_path / "out" / "README.md").read_text()
    command = card.partition("\n````bash\n")[2].partition("\n````\n")[0]
    assert command.startswith("python ") and shlex.split(command)[-1] == prompt


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--hub_token", "s3cret", "--seed", "1"], "--hub_token <hidden> --seed 1"),
        (["--hub-token=s3cret", "--seed=1"], "'--hub-token=<hidden>' --seed=1"),
        (["--tok", "s3cret", "--generate", "a b", "--"], "--tok <hidden> --generate 'a b' --"),
        (["--push-to-hub-t=s3cret", "--push_to_hub"], "'--push-to-hub-t=<hidden>' --push_to_hub"),
        (["--my_own_token", "s3cret"], "--my_own_token <hidden>"),
        (["--push_to_hub", "True", "--t", "token", "token"], "--push_to_hub True --t token token"),
        (["--hub_model_id", "me/token", "--token_length", "3"], "--hub_model_id me/token --token_length 3"),
    ],
)
def test_the_command_in_the_card_hides_tokens_alone(words, shown, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run.py", *words])
    assert command_line() == f"python run.py {shown}"


@pytest.mark.slow
def test_a_token_is_in_no_file(assets, tmp_path):
    output = tmp_path / "out"
    flags = ["--do_train", "--max_steps", 1, "--save_steps", 1, "--hub_tok", "hf_SECRET", "--token", "hf_SECRET"]
    flags += ["--push_to_hub", "False"]
    run("run_clm.py", *scratch(assets, output, *flags))
    files = [path for path in output.rglob("*") if path.is_file()]
    assert {"training_args.bin", "README.md"} <= {path.name for path in files}
    assert not [path for path in files if b"SECRET" in path.read_bytes()]
    assert "--hub_tok <hidden> --token <hidden> --push_to_hub False\n" in (output / "README.md").read_text()


@pytest.mark.slow
def test_weights_of_the_other_format_are_resumed_from(assets, tmp_path):
    output, flags = tmp_path / "out", ["--do_train", "--save_steps", 1, "--logging_steps", 1]
    run("run_clm.py", *scratch(assets, output, *flags, "--max_steps", 1))
    run("run_clm.py", *scratch(assets, output, *flags, "--max_steps", 2, "--save_safetensors", "False"))
    assert len(losses(output)) == 2 and (output / "checkpoint-2/pytorch_model.bin").is_file()


def test_looking_whether_ranks_share_a_folder_leaves_nothing(tmp_path, monkeypatch):
    """A run that is killed meanwhile leaves what the next start removes; it was refused for what was there."""
    output = tmp_path / "a" / "out"
    args = SimpleNamespace(
        world_size=2, process_index=0, should_save=True, save_on_each_node=False, save_on_signal=True,
        save_strategy="no", output_dir=str(output), fsdp="",
    )  # fmt: skip
    check_output_folder(args)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(Path, "rmdir", Mock(side_effect=OSError))
    check_output_folder(args)
    (left,) = output.iterdir()
    assert remove_incomplete(output) == [left.name] and not list(output.iterdir())
