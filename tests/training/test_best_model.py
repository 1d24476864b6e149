"""The best model: told before training whether it can be found, kept at the top, named in log and card; samples."""

import ast
import contextlib
import json
import re
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from running import load_elsewhere, log_history, losses, run, run_many, run_ranks
from safetensors.torch import load_file
from short_runs import GPT2, scratch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, RobertaConfig, Trainer

from gaudi_lm.errors import UserError
from gaudi_lm.training import saving
from gaudi_lm.training.best_model import BestModelTrainer
from gaudi_lm.training.resumed_state import Resumption
from gaudi_lm.training.samples import NEW_TOKENS, check_prompts

EVALUATIONS = ("--do_train", "--do_eval", "--eval_strategy", "steps", "--eval_steps", 1, "--save_steps", 1)
WORSE = ("--max_grad_norm", 0, "--optim", "sgd", "--learning_rate", 100, "--lr_scheduler_type", "constant")


def equal(one, other) -> bool:
    a, b = (load_file(folder / "model.safetensors") for folder in (one, other))
    return all(a[name].equal(b[name]) for name in a | b)


@pytest.mark.parametrize("there", ["out", "elsewhere", None])
def test_the_best_checkpoint_of_a_resumed_run(there, tmp_path, caplog):
    """In the output folder, where that has another name by now; or where it was; or gone, with its figure."""
    if there is not None:
        (tmp_path / there / "checkpoint-1").mkdir(parents=True)
    resumption = Resumption()
    resumption.checkpoint = str(tmp_path)
    noted = {"best_model_checkpoint": str(tmp_path / "elsewhere/checkpoint-1"), "best_metric": 2.5}
    args = SimpleNamespace(output_dir=str(tmp_path / "out"), world_size=1, use_habana=False)
    trainer = SimpleNamespace(args=args, state=SimpleNamespace(**noted), epochs=1)
    resumption.restore(trainer)
    best = None if there is None else str(tmp_path / there / "checkpoint-1")
    assert trainer.state.best_model_checkpoint == best
    assert trainer.state.best_metric == (None if there is None else 2.5)
    assert ("elsewhere/checkpoint-1, the best checkpoint, is gone" in caplog.text) == (there is None)


@pytest.mark.parametrize("main", [True, False])
def test_ranks_look_for_the_best_checkpoint_when_others_are_set_aside(main, monkeypatch):
    """Not while the main one does so, which may give that one another name."""
    done = []
    monkeypatch.setattr(saving, "clear_the_way", lambda *args, **kwargs: done.append("set aside"))
    monkeypatch.setattr(saving, "gather", lambda value: done.append("all there"))
    resumption = SimpleNamespace(restore=lambda trainer: done.append("looked"))
    trainer = SimpleNamespace(loading=contextlib.ExitStack(), resumption=resumption)
    args = SimpleNamespace(should_save=main, output_dir="out", overwrite_output_dir=False)
    state = SimpleNamespace(compute_steps=lambda *args: None, max_steps=1)
    saving.SavingSteps(trainer).on_train_begin(args, state, None)
    assert done == ["set aside"] * main + ["all there", "looked"]


@pytest.mark.slow
def test_early_stopping_and_the_best_model(assets, tmp_path):
    """Each step makes the model worse, from the second on; the samples are in log and card."""
    output = tmp_path / "out"
    flags = [*EVALUATIONS, *WORSE, "--max_steps", 9, "--max_eval_samples", 2, "--load_best_model_at_end"]
    flags += ["--early_stopping_patience", 2, "--metric_for_best_model", "perplexity", "--show_examples", 2]
    flags += ["--generate", "The for statement", "--generate", "a ``` b", "c"]
    flags = scratch(assets, output, *flags)
    log = run("run_clm.py", *flags).stderr
    rows = [row for row in log_history(output) if "eval_perplexity" in row][:-1]  # the last is of the best model
    best = min(rows, key=lambda row: row["eval_perplexity"])["step"]
    last = best + 2
    assert rows[-1]["step"] == len(losses(output)) == last < 9
    said = f"step {last}/9: training ends, 2 evaluations without a better perplexity\n"
    assert log.count(said) == 1 and "generation flags" not in log and "Device set" not in log
    assert f"the model is that of step {best} of {last}, the best by perplexity" in log
    assert equal(output, output / f"checkpoint-{best}") and not equal(output, output / f"checkpoint-{last}")
    card = (output / "README.md").read_text()
    assert f"| this model, the best by perplexity | step {best} |" in card
    (figure,) = [one for one in ModelCard(card).data.eval_results if one.metric_type == "perplexity"]
    assert figure.metric_value == json.loads((output / "all_results.json").read_text())["eval_perplexity"]
    assert "num_train_epochs" not in card and "| max_steps | 9 |" in card
    samples = [line for line in log.splitlines() if "the tokens of the loss between >>> and <<<" in line]
    assert len(samples) == 2 and all(">>>" in line.partition(": ")[2] for line in samples)
    for prompt in ("The for statement", "a ``` b", "c"):
        assert f"INFO {prompt!r} -> '" in log and f"\n    {prompt}\n\ngives\n\n    " in card
    load_elsewhere(("AutoModelForCausalLM", output, None))
    again = run("run_clm.py", *flags).stderr
    assert len(losses(output)) == last and "training ends" not in again, "it had ended"
    assert equal(output, output / f"checkpoint-{best}")


@pytest.mark.slow
def test_every_rank_loads_the_best_model(assets, tmp_path):
    output = tmp_path / "out"
    flags = [*EVALUATIONS, *WORSE, "--max_steps", 3, "--max_eval_samples", 4, "--load_best_model_at_end"]
    run_ranks(2, "run_clm.py", *scratch(assets, output, *flags))
    rows = {row["step"]: row["eval_loss"] for row in reversed(log_history(output)) if "eval_loss" in row}
    best = min(rows, key=rows.get)
    assert best < 3 and equal(output, output / f"checkpoint-{best}")
    assert json.loads((output / "all_results.json").read_text())["eval_loss"] == pytest.approx(rows[best])


@pytest.mark.parametrize("best", [None, 2, 12])
def test_rotation_deletes_no_copy_of_a_users_own(best, tmp_path):
    """Which may lie behind the newest one, and counts for nothing."""
    for name in ("2", "10", "12", "2-kept", "12-kept", "best"):
        (tmp_path / f"checkpoint-{name}").mkdir()
    state = SimpleNamespace(best_model_checkpoint=best and str(tmp_path / f"checkpoint-{best}"))
    uploads = SimpleNamespace(is_uploading=lambda path: path == str(tmp_path / "checkpoint-10"))
    trainer = SimpleNamespace(state=state, args=SimpleNamespace(save_total_limit=1), uploads=uploads)
    order = partial(BestModelTrainer._sorted_checkpoints, trainer)
    assert [Path(one).name for one in order(str(tmp_path))] == ["checkpoint-2", "checkpoint-12"]
    trainer._sorted_checkpoints, uploads.is_uploading = order, lambda path: False
    Trainer._rotate_checkpoints(trainer, output_dir=str(tmp_path))
    left = {2, 12} if best == 2 else {12}
    assert {path.name for path in tmp_path.iterdir()} == {
        *(f"checkpoint-{step}" for step in left), "checkpoint-2-kept", "checkpoint-12-kept", "checkpoint-best",
    }  # fmt: skip


@pytest.mark.slow
def test_what_cannot_be_is_said_before_training(assets, tmp_path):
    base = scratch(assets, tmp_path / "out", "--do_train", "--max_steps", 2)
    every = ["--do_eval", "--eval_strategy", "steps", "--eval_steps", 2]
    cases = {
        "--early_stopping_patience needs --load_best_model_at_end": [*every, "--early_stopping_patience", 2],
        "saving steps to be a round multiple": [*every, "--save_steps", 3, "--load_best_model_at_end"],
        "strategy to match": [*every, "--save_strategy", "epoch", "--load_best_model_at_end"],
        "--metric_for_best_model f1: an evaluation gives": [*every, "--metric_for_best_model", "f1"],
        "--early_stopping_patience 0": [*every, "--early_stopping_patience", 0, "--load_best_model_at_end"],
        "--generate 'word word": ["--generate", "word " * 200],
        "--generate '': it is empty": ["--generate", ""],
        "--show_examples -1": ["--show_examples", -1],
    }
    cases = {said: [*base, *flags] for said, flags in cases.items()}
    cases["--generate needs --do_train"] = [
        *(flag for flag in base if flag != "--do_train"), "--do_eval", "--generate", "a",
    ]  # fmt: skip
    for said, (status, log) in run_many("run_clm.py", cases, tmp_path).items():
        (line,) = [line for line in log.splitlines() if line.startswith("error: ")]
        assert status == 2 and said in line, log
    assert not (tmp_path / "out").exists()


def test_the_card_has_the_licence_of_the_base_model(assets, tmp_path):
    """Where the base model's own card names one; a card that cannot be read is no reason to lose a run."""
    cards = {"apache-2.0": "---\nlicense: apache-2.0\n---\n# A model\n", None: "---\nlicense: [\n---\n"}
    for number, (licence, card) in enumerate(cards.items()):
        base, output = tmp_path / f"base{number}", tmp_path / f"out{number}"
        shutil.copytree(assets.gpt2, base)
        (base / "README.md").write_text(card)
        flags = ["--model_name_or_path", base, "--train_file", assets.train, "--block_size", 32, "--use_cpu"]
        flags += ["--max_train_samples", 16, "--max_steps", 1, "--do_train", "--save_strategy", "no"]
        run("run_clm.py", *flags, "--output_dir", output)
        assert ModelCard.load(output / "README.md").data.license == licence


MASKED = RobertaConfig(max_position_embeddings=12, pad_token_id=1)  # whose positions begin behind the padding's


@pytest.mark.parametrize(
    ("config", "prompt", "fsdp", "said"),
    [
        (MASKED, "[MASK] " * 10, "", None),
        (MASKED, "[MASK] " * 11, "", "longer than the model takes"),
        (MASKED, "word", "", "it has no .MASK. for the model to fill"),
        (MASKED, "[MASK]", "full_shard", "not with --fsdp"),
        (GPT2Config(n_positions=10), "word " * 9, "full_shard", None),
        (GPT2Config(n_positions=10), "word " * 10, "", "longer than the model takes"),  # one is to be generated
        (GPT2Config(n_positions=99), "word " * 19, "", None),  # what the tokenizer takes
        (GPT2Config(n_positions=99), "word " * 20, "", "longer than the model takes"),
        (GPT2Config(n_positions=10), "", "", "it is empty"),
    ],
)
def test_prompts_that_a_model_cannot_take_are_refused(config, prompt, fsdp, said):
    class Words:
        mask_token, model_max_length = "[MASK]", 20
        __call__ = staticmethod(lambda prompt: {"input_ids": prompt.split()})

    args = SimpleNamespace(generate=[prompt], fsdp=fsdp)
    with pytest.raises(UserError, match=f"^--generate.*{said}") if said else contextlib.nullcontext():
        check_prompts(args, config is not MASKED, SimpleNamespace(config=config), Words())
    check_prompts(SimpleNamespace(generate=None, fsdp=fsdp), True, SimpleNamespace(config=config), Words())


@pytest.mark.slow
def test_a_prompt_goes_on_as_with_the_saved_model(assets, tmp_path):
    """After training without an evaluation, too, which leaves dropout on; by as many tokens at most."""
    flags = scratch(assets, tmp_path, "--do_train", "--max_steps", 1, "--learning_rate", 1e-2, "--generate", "The for")
    log = run("run_clm.py", *flags, "--config_overrides", GPT2.replace("pdrop=0.0", "pdrop=0.5")).stderr
    (text,) = re.findall("'The for' -> (.*)", log)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert model.config.embd_pdrop == 0.5
    inputs = tokenizer("The for", return_tensors="pt", return_token_type_ids=False)
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=tokenizer.eos_token_id)
    assert tokenizer.decode(tokens[0], skip_special_tokens=True) == "The for" + ast.literal_eval(text)


@pytest.mark.slow
def test_a_masked_model_fills_masks(masked_assets, assets, tmp_path):
    flags = [*masked_assets.scratch("bert"), "--train_file", assets.train, "--do_train", "--use_cpu", "--max_steps", 1]
    flags += ["--max_train_samples", 16, "--max_seq_length", 48, "--save_strategy", "no", "--generate"]
    log = run("run_mlm.py", *flags, "the [MASK] statement [MASK]", "--output_dir", tmp_path / "out").stderr
    assert "INFO 'the [MASK] statement [MASK]' -> '" in log
    assert ">>>" in log.partition("sample 0, ")[2].partition("\n")[0]
    load_elsewhere(("AutoModelForMaskedLM", tmp_path / "out", None))
    assert "\n    the [MASK] statement [MASK]\n" in (tmp_path / "out" / "README.md").read_text()
    none = run("run_mlm.py", *flags, "no mask", "--output_dir", tmp_path / "none", code=2).stderr
    assert "error: --generate 'no mask': it has no [MASK] for the model to fill" in none


@pytest.mark.slow
def test_only_the_best_is_saved(assets, tmp_path):
    """`--save_strategy best`: transformers does not note which step that was, and loads nothing in the end."""
    output = tmp_path / "out"
    flags = ["--do_train", "--do_eval", "--eval_strategy", "steps", "--eval_steps", 1, "--save_strategy", "best"]
    flags += [*WORSE, "--max_steps", 4, "--max_eval_samples", 2, "--load_best_model_at_end"]
    log = run("run_clm.py", *scratch(assets, output, *flags)).stderr
    rows = {row["step"]: row["eval_loss"] for row in reversed(log_history(output)) if "eval_loss" in row}
    best = min(rows, key=rows.get)
    assert f"the model is that of step {best} of 4, the best by loss" in log and best < 4
    assert equal(output, output / f"checkpoint-{best}")


ADAPTERS = {
    "p_tuning": ["--encoder_hidden_size", 16, "--num_virtual_tokens", 4, "--learning_rate", 3],
    "adalora": ["--adalora_tinit", 1, "--adalora_tfinal", 1, "--adalora_delta_t", 1, "--adalora_init_r", 8]
    + ["--adalora_target_r", 2, "--learning_rate", 1, "--metric_for_best_model", "accuracy"],
}


@pytest.mark.slow
@pytest.mark.parametrize("more", ([], ["--save_only_model"]), ids=("whole", "model"))
@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_best_adapter_is_that_of_its_checkpoint(kind, more, instructions, tmp_path):
    """With the ranks of that step, and the vectors that P-tuning's encoder made of its inputs, not of its outputs."""
    output = tmp_path / "out"
    flags = [
        "--model_name_or_path", instructions.llama, "--train_file", instructions.train, "--validation_file",
        instructions.validation, "--max_train_samples", 20, "--max_eval_samples", 4, "--max_seq_length", 128,
        "--use_cpu",
        "--lr_scheduler_type", "constant", "--peft_type", kind, *ADAPTERS[kind], *more,
    ]  # fmt: skip
    log = run(
        "run_lora_clm.py", *flags, *EVALUATIONS, "--max_steps", 8, "--load_best_model_at_end", "--output_dir", output
    )
    state = json.loads((output / "trainer_state.json").read_text())
    best = state["best_global_step"]
    assert f"the model is that of step {best} of 8" in log.stderr and (best < 8 or kind == "p_tuning")
    there = next(row["eval_loss"] for row in log_history(output) if row["step"] == best and "eval_loss" in row)
    assert json.loads((output / "all_results.json").read_text())["eval_loss"] == pytest.approx(there, rel=1e-6)
    if kind == "p_tuning":
        one, other = (
            load_file(place / "adapter_model.safetensors") for place in (output, output / f"checkpoint-{best}")
        )
        torch.testing.assert_close(one, other)


@pytest.mark.slow
def test_a_best_value_of_another_metric_is_forgotten(assets, tmp_path):
    output, flags = tmp_path / "out", [*EVALUATIONS, *WORSE, "--max_eval_samples", 2, "--load_best_model_at_end"]
    flags = scratch(assets, output, *flags, "--early_stopping_patience", 1, "--max_steps", 9)
    assert "1 evaluations without a better loss" in run("run_clm.py", *flags).stderr
    ended = len(losses(output))
    log = run("run_clm.py", *flags, "--metric_for_best_model", "accuracy").stderr
    assert (
        log.count("WARNING --metric_for_best_model accuracy: the best model so far was chosen by another metric") == 1
    )
    rows = {row["step"]: row["eval_accuracy"] for row in reversed(log_history(output)) if "eval_accuracy" in row}
    last = len(losses(output))
    best = max(range(ended + 1, last + 1), key=rows.get)
    assert (
        ended < last and f"the model is that of step {best} of {last}, the best by accuracy ({rows[best]:.6g})" in log
    )


@pytest.mark.slow
def test_a_best_value_of_other_data_is_forgotten(assets, tmp_path):
    output, more = tmp_path / "out", ["--max_eval_samples", 2]
    flags = [*EVALUATIONS, "--load_best_model_at_end", "--learning_rate", 1e-3, "--max_steps"]
    run("run_clm.py", *scratch(assets, output, *flags, 2, *more))
    for steps, add, words in (
        (4, ["--max_eval_samples", 3], "the evaluation data are not those of the checkpoint, by which the best model"),
        (6, ["--greater_is_better", "True"], "--greater_is_better: the best model so far was chosen the other way"),
        (8, [], None),
    ):
        more += add
        log = run("run_clm.py", *scratch(assets, output, *flags, steps, *more)).stderr
        assert log.count("it no longer counts") == (words is not None) and (words or "") in log
        # The loss falls: of steps 5 and 6, the first has the greatest one that counts.
        assert f"the model is that of step {min(steps, 5)} of {steps}" in log, log


@pytest.mark.slow
def test_checkpoints_that_say_nothing_of_a_stream(assets, tmp_path):
    """Those of earlier versions: their data are not taken for others, nor their best value for one of others."""
    output, flags = tmp_path / "out", [*EVALUATIONS, "--load_best_model_at_end", "--streaming", "--max_steps"]
    run("run_clm.py", *scratch(assets, output, *flags, 2, "--max_eval_samples", 2))
    path = output / "checkpoint-2" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["run"] |= {"data": None, "eval_data": {"": None}}
    path.write_text(json.dumps(manifest))
    log = run("run_clm.py", *scratch(assets, output, *flags, 4, "--max_eval_samples", 2)).stderr
    assert "step 3/4" in log and "step 2/4" not in log
    assert "it no longer counts" not in log and "not those of the checkpoint" not in log


@pytest.mark.slow
def test_the_evaluation_at_the_start_is_no_sign_of_an_end(assets, tmp_path):
    """It comes again with each resumption, of a model that the patience has counted."""
    output = tmp_path / "out"
    flags = [*EVALUATIONS, "--eval_on_start", "--load_best_model_at_end", "--early_stopping_patience", 1]
    flags += ["--max_eval_samples", 4, "--learning_rate", 1e-3, "--lr_scheduler_type", "constant"]
    run("run_clm.py", *scratch(assets, output, *flags, "--max_steps", 2))
    log = run("run_clm.py", *scratch(assets, output, *flags, "--max_steps", 4)).stderr
    assert "training ends" not in log and len(losses(output)) == 4


@pytest.mark.slow
def test_a_plateau_follows_the_metric(assets, tmp_path):
    """Of an accuracy more is better; the rate was halved whenever it rose, and a reduced one taken for a new flag."""
    output, flags = (
        tmp_path / "out",
        [*EVALUATIONS, "--max_eval_samples", 4, "--lr_scheduler_type", "reduce_lr_on_plateau"],
    )
    flags += ["--lr_scheduler_kwargs", '{"patience": 0, "factor": 0.5}', "--learning_rate", 1e-2]
    flags += ["--metric_for_best_model", "accuracy", "--load_best_model_at_end"]
    run("run_clm.py", *scratch(assets, output, *flags, "--max_steps", 8))
    log = run("run_clm.py", *scratch(assets, output, *flags, "--max_steps", 9)).stderr
    assert "the optimizer continues with" not in log
    accuracies = [row["eval_accuracy"] for row in log_history(output) if "eval_accuracy" in row]
    rates = [row["learning_rate"] for row in log_history(output) if "learning_rate" in row]
    best, rate = 0.0, 1e-2
    for accuracy, found in zip(accuracies, rates[1:], strict=False):
        rate = rate if accuracy > best * (1 + 1e-4) else rate / 2
        best = max(best, accuracy)
        assert found == pytest.approx(rate), (accuracies, rates)
    assert len(rates) == 9 and len(set(rates)) > 1
