"""Evaluation after training: what was trained is saved first, and stays as it was."""

import json

import numpy as np
import pytest
import torch
from running import copy_elsewhere, losses, run, run_several
from safetensors.torch import load_file
from short_runs import common
from tiny_models import tiny_model

from gaudi_lm.training import predictions
from gaudi_lm.training.evaluation import EvaluatingTrainer, weights_as

FOLDERS = ("plain", "half")


@pytest.fixture
def runs(assets, masked_assets, instructions, tmp_path) -> dict[str, list[str]]:
    """Flags of a short training and evaluation, by script."""
    common_flags = ["--do_train", "--do_eval", "--use_cpu", "--max_steps", 3, "--per_device_train_batch_size", 2]
    texts = ["--train_file", assets.train, "--validation_file", assets.validation, "--max_eval_samples", 4]
    flags = {
        "run_clm": ["--model_name_or_path", assets.gpt2, *texts, "--block_size", 32, *common_flags],
        "run_mlm": [*masked_assets.scratch("bert"), *texts, "--max_seq_length", 32, *common_flags],
        "run_lora_clm": [*common(instructions, tmp_path / "run_lora_clm"), *common_flags, "--merge_adapter"],
    }
    for script in ("run_clm", "run_mlm"):
        flags[script] += ["--output_dir", tmp_path / script]
    return {script: list(map(str, own)) for script, own in flags.items()}


@pytest.mark.parametrize("script", ["run_clm", "run_mlm", "run_lora_clm"])
def test_a_crash_in_evaluation_loses_nothing(runs, script, tmp_path):
    copy = copy_elsewhere(f"{script}.py", tmp_path / "mine")
    text = copy.read_text()
    assert text.count("trainer.evaluate()") == 1
    copy.write_text(text.replace("trainer.evaluate()", "1 / 0"))
    assert "ZeroDivisionError" in run(copy, *runs[script], code=1).stderr
    name = "adapter_model" if script == "run_lora_clm" else "model"
    assert load_file(tmp_path / script / f"{name}.safetensors")
    assert json.loads((tmp_path / script / "trainer_state.json").read_text())["global_step"] == 3
    assert json.loads((tmp_path / script / "all_results.json").read_text())["train_loss"] > 0
    assert (tmp_path / script / "merged" / "model.safetensors").exists() == (script == "run_lora_clm")


@pytest.mark.slow
@pytest.mark.parametrize("script", ["run_clm", "run_mlm", "run_lora_clm"])
def test_bf16_full_eval_rounds_no_saved_weight(runs, script, tmp_path):
    packed = {"run_lora_clm": ["--pack_sequences"]}.get(script, [])
    own = str(tmp_path / script)
    plain, half = ([flag.replace(own, f"{tmp_path}/{name}") for flag in runs[script]] + packed for name in FOLDERS)
    ends = run_several(script, [plain, [*half, "--bf16_full_eval"]])
    assert [end.status for end in ends] == [0, 0], ends
    name = "adapter_model.safetensors" if script == "run_lora_clm" else "model.safetensors"
    assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "half" / name).read_bytes()
    losses = [end.metrics["eval_loss"] for end in ends]
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.02)
    for folder, loss in zip(FOLDERS, losses, strict=True):
        assert f"| eval loss | {loss:.4f} |" in (tmp_path / folder / "README.md").read_text()
        assert json.loads((tmp_path / folder / "all_results.json").read_text())["eval_loss"] == loss


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])  # tied embeddings; rotary frequencies
def test_weights_come_back_bit_by_bit(model_type):
    model = tiny_model(model_type)
    model.register_buffer("whole_number", torch.tensor(2**20 + 1))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(RuntimeError), weights_as(model, torch.bfloat16, restore=True):
        assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
        assert all(buffer.dtype != torch.bfloat16 for buffer in model.buffers())
        raise RuntimeError
    assert model.lm_head.weight is model.get_output_embeddings().weight
    for name, weight in model.state_dict().items():
        assert weight.dtype == before[name].dtype and torch.equal(weight, before[name])
    with weights_as(model, torch.bfloat16, restore=False):
        pass
    assert model.dtype == torch.bfloat16


def test_a_step_of_training_without_memory_is_not_an_evaluation():
    """A card may tell of it as late as when it is waited for; half a step would be saved."""

    class Trainer(EvaluatingTrainer):
        eval_dataset, compute_metrics = [], None

        def __init__(self):
            pass

        def _synchronise(self):
            raise RuntimeError("Allocation failed for size")

    with pytest.raises(RuntimeError, match="^Allocation failed for size$"):
        Trainer().evaluate()


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("samples", [7, 5, 1, 0])
def test_predictions_are_in_the_order_of_the_dataset(samples, labelled, monkeypatch):
    """Of three ranks with batches of two rows and other lengths, some of which only complete a batch."""
    ranks, parts, long = [predictions.Predictions() for _ in range(3)], [], 0
    for rank, own in enumerate(ranks):
        rows = [*range(rank, samples, 3)]
        for first in range(0, -(-samples // 6) * 2, 2):
            places = torch.tensor([*rows[first : first + 2], -1, -1][:2])
            ids = places[:, None].expand(2, (length := 2 + rank + first))
            long = max(long, length)
            halves = {"pairs": torch.stack([ids, -ids], 2).bfloat16(), "first": ids[:, 0].half(), "none": None}
            own.add((halves, [ids]), ids if labelled else None, places >= 0)
    monkeypatch.setattr(predictions, "gather", lambda own: parts.append(own) or [own])
    for own in ranks:
        own.over_ranks()
    monkeypatch.setattr(predictions, "gather", lambda own: parts)
    found, labels = ranks[1].over_ranks()
    if not samples:
        assert found is labels is None
        return
    expected = [[row] * (length := 2 + row % 3 + row // 6 * 2) + [-100] * (long - length) for row in range(samples)]
    (halves, (ids,)), expected = found, np.array(expected)
    assert (ids == expected).all() and halves["none"] is None
    assert (labels == expected).all() if labelled else labels is None
    assert (halves["pairs"] == np.stack([expected, np.where(expected < 0, -100, -expected)], 2)).all()
    assert halves["first"].tolist() == [*range(samples)]
    assert (ids.dtype, halves["pairs"].dtype, halves["first"].dtype) == (np.int64, np.float32, np.float32)


@pytest.mark.slow
def test_an_evaluation_without_memory_loses_no_step(instructions, tmp_path):
    """The steps before it are saved; with a smaller batch the run goes on from there, as if it had had enough."""
    flags = ["--do_train", "--do_eval", "--use_habana", "--max_steps", 4, "--eval_strategy", "steps"]
    flags += ["--eval_steps", 2, "--save_steps", 2, "--lora_dropout", 0.2, "--per_device_eval_batch_size"]
    whole, short = (common(instructions, tmp_path / name, *flags) for name in ("whole", "short"))
    run("run_lora_clm.py", *whole, 2, env={"GAUDI_SIMULATOR": "1"})
    card = {"GAUDI_SIMULATOR": "1", "GAUDI_SIMULATOR_MEMORY_GB": "0.007"}
    line = run("run_lora_clm.py", *short, 512, env=card, code=1).stderr.splitlines()[-1]
    assert line.startswith("error: out of memory: ") and "--per_device_eval_batch_size" in line, line
    assert line.endswith(f"; the steps before it are saved in {tmp_path / 'short'}/checkpoint-2"), line
    run("run_lora_clm.py", *short, 2, env=card)
    one, other = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "short"))
    assert one == other and losses(tmp_path / "whole") == losses(tmp_path / "short")
