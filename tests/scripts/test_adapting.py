"""docs/adapting.md: each diff applies to its script, and the result does what the page says."""

import contextlib
import dataclasses
import json
import shutil
import subprocess
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from documentation import REPOSITORY
from optimum.habana.transformers.trainer import GaudiTrainer
from running import ROOT, copy_elsewhere, load_script, log_history, losses, results, run, run_ranks
from short_runs import common, scratch
from tiny_models import tiny_model
from transformers import BertConfig, BertForMaskedLM, DataCollatorForLanguageModeling, Trainer

from gaudi_lm.arguments.definitions import LMTrainingArguments
from gaudi_lm.errors import UserError
from gaudi_lm.modeling.loss import install_token_loss
from gaudi_lm.training.custom_parts import (
    NEVER_CALLED,
    check_budget,
    check_weights,
    is_mean,
    own_figures,
    returning_loss,
)
from gaudi_lm.training.predictions import Predictions
from gaudi_lm.training.samples import most_probable_tokens
from gaudi_lm.training.trainer import LMTrainer, build_trainer

from documentation import code_blocks  # isort: skip

DIFFS = code_blocks("diff")
EVALUATE = ("--do_train", "--do_eval", "--max_steps", 4, "--max_eval_samples", 6)


def adapted(folder, word: str):
    """A copy of a script with the one diff that has this word applied."""
    (diff,) = [diff for diff in DIFFS if word in diff]
    script = copy_elsewhere(diff.split("\n")[0].removeprefix("--- a/"), folder)
    done = subprocess.run(
        ["patch", str(script)], input=diff + "\n", cwd=folder, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return script


def test_each_diff_is_short():
    assert len(DIFFS) == 8
    for diff in DIFFS:
        assert len(diff.splitlines()) <= 15, diff
        assert (REPOSITORY / diff.split("\n")[0].removeprefix("--- a/")).exists()


def test_other_data(instructions, tmp_path):
    script = adapted(tmp_path / "mine", "Question: ")
    flags = [*common(instructions, tmp_path / "out"), "--do_train", "--max_steps", 2, "--use_cpu"]
    log = run(script, *flags, "--train_on_inputs", "False").stderr
    assert "Question: Explain" in log and ">>>" in log
    assert results(tmp_path / "out")["train_loss"] > 0


@pytest.mark.slow
def test_other_columns(instructions, tmp_path):
    rows = [json.loads(line) for line in instructions.train.read_text().splitlines()]
    lines = [json.dumps({"title": row["instruction"], "body": row["output"], "id": 7}) for row in rows]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    script = adapted(tmp_path / "mine", "read_row")
    flags = [*common(instructions, tmp_path / "out"), "--do_train", "--max_steps", 2, "--use_cpu"]
    flags[flags.index("--train_file") + 1] = tmp_path / "train.jsonl"
    log = run(script, *flags).stderr
    assert "what is it?" in log and "### Response:" in log
    assert results(tmp_path / "out")["train_loss"] > 0


@pytest.mark.slow
def test_a_mixture(assets, tmp_path):
    """A fifth of the rows are of the second file; all rows have one length, so a fifth of the tokens are too."""
    script = adapted(tmp_path / "mine", "interleave_datasets")
    (tmp_path / "one.txt").write_text("abcdefg hijklmn\n" * 4000)
    (tmp_path / "more.txt").write_text("7777777 7777777\n" * 4000)
    flags = scratch(assets, tmp_path / "out", *EVALUATE[:1], "--max_steps", 1, "--show_examples", 200)
    log = run(script, *flags, "--train_file", tmp_path / "one.txt", cwd=tmp_path).stderr
    first, second = log.count("abcdefg"), log.count("7777777 7777777")
    assert second / (first + second) == pytest.approx(0.2, abs=0.05)


@pytest.mark.slow
def test_another_loss(assets, tmp_path):
    """The loss is above the ordinary one by its penalty, and means the same however a step is split."""
    script = adapted(tmp_path / "mine", "loss_func")
    steps = {"plain": ["run_clm.py", 8, 1], "own": [script, 8, 1], "split": [script, 2, 4]}
    for name, (path, batch, accumulation) in steps.items():
        more = ["--per_device_train_batch_size", batch, "--gradient_accumulation_steps", accumulation]
        log = run(path, *scratch(assets, tmp_path / name, *EVALUATE), *more).stderr
        assert ("by loss_func, from the full logits" in log) == (name != "plain")
    assert 0 < losses(tmp_path / "own")[0] - losses(tmp_path / "plain")[0] < 0.1
    assert losses(tmp_path / "split") == pytest.approx(losses(tmp_path / "own"), rel=1e-4)
    run_ranks(2, script, *scratch(assets, tmp_path / "ranks", *EVALUATE), "--per_device_train_batch_size", 4)
    assert losses(tmp_path / "ranks") == pytest.approx(losses(tmp_path / "own"), rel=1e-4)
    assert results(tmp_path / "ranks")["eval_loss"] == pytest.approx(results(tmp_path / "own")["eval_loss"], rel=1e-4)
    figures, plain = results(tmp_path / "own"), results(tmp_path / "plain")
    assert 0 < figures["eval_loss"] - plain["eval_loss"] < 0.1
    assert figures["eval_tokens"] == plain["eval_tokens"] and "eval_perplexity" not in figures


@pytest.mark.slow
def test_a_loss_that_is_a_mean(assets, tmp_path):
    """One that leaves num_items_in_batch alone means the same however a step is split, over batches or ranks."""
    code = adapted(tmp_path / "mine", "loss_func").read_text()
    start, end = code.index("    logits, targets = outputs.logits"), code.index("def make_blocks")
    # Where a batch has no labels, the gradients of this one are NaN.
    mean = """    targets, mask = labels[:, 1:].clamp(min=0), (labels[:, 1:] != -100).float()
    logps = outputs.logits[:, :-1].log_softmax(-1).gather(2, targets[..., None]).squeeze(2)
    return -(logps * mask).sum() / mask.sum()\n\n\n"""
    (script := tmp_path / "mean.py").write_text(code[:start] + mean + code[end:])
    flags = {"plain": ["run_clm.py", 8, 1], "own": [script, 8, 1], "split": [script, 2, 4]}
    for name, (path, batch, accumulation) in flags.items():
        more = ["--per_device_train_batch_size", batch, "--gradient_accumulation_steps", accumulation]
        run(path, *scratch(assets, tmp_path / name, *EVALUATE), *more)
    run_ranks(2, script, *scratch(assets, tmp_path / "ranks", *EVALUATE), "--per_device_train_batch_size", 4)
    for name in ("own", "split", "ranks"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "plain"), rel=1e-4), name
        assert results(tmp_path / name)["eval_loss"] == pytest.approx(
            results(tmp_path / "plain")["eval_loss"], rel=1e-4
        )
    # Ten rows: of the second step's batches, the first one alone has rows of its own.
    few = ["--do_train", "--max_train_samples", 10, "--num_train_epochs", 2]
    run("run_clm.py", *scratch(assets, tmp_path / "few", *few))
    for batch, accumulation in ((4, 1), (2, 2)):
        more = ["--per_device_train_batch_size", batch, "--gradient_accumulation_steps", accumulation]
        run_ranks(2, script, *scratch(assets, tmp_path / f"few{batch}", *few), *more)
        assert losses(tmp_path / f"few{batch}") == pytest.approx(losses(tmp_path / "few"), rel=1e-4)


def test_parts_that_return_or_take_something_else(tmp_path):
    args = LMTrainingArguments(output_dir=str(tmp_path), use_cpu=True, do_train=True)
    with pytest.raises(UserError, match="^loss_func takes outputs, labels and num_items_in_batch: "):
        build_trainer(None, "causal", args, None, None, loss_func=lambda outputs, labels: None)
    with pytest.raises(UserError, match="^compute_metrics returns a dict of figures by name, not None$"):
        own_figures(lambda prediction: None, None, None)
    weight = torch.ones(2, requires_grad=True)
    for loss, words in ((None, "not None$"), (weight, r"shape \(2,\)$"), (weight.sum().detach(), "detached")):
        with pytest.raises(UserError, match=f"^loss_func returns a loss.*{words}"):
            returning_loss(lambda outputs, labels, num_items_in_batch, loss=loss: loss, "loss_func")(1, 2, 3)
    with torch.no_grad():
        assert returning_loss(lambda outputs: outputs, "loss_func")(weight.sum()) == 2
    with pytest.raises(UserError, match="^rows have the columns tokens: the tokens are to be in input_ids$"):
        load_script("run_clm").collate_blocks([{"tokens": [1]}])


def test_training_arguments_are_copied_with_a_change(tmp_path):
    args = LMTrainingArguments(output_dir=str(tmp_path), use_cpu=True, do_train=True)
    assert dataclasses.replace(args, learning_rate=1).learning_rate == 1


def test_a_compute_loss_of_an_older_transformers(tmp_path):
    class Older(LMTrainer):
        def compute_loss(self, model, inputs, return_outputs=False):
            return model(**inputs).loss

    args = LMTrainingArguments(output_dir=str(tmp_path), use_cpu=True, do_train=True)
    with pytest.raises(UserError, match="^Older.compute_loss takes model, inputs and num_items_in_batch: "):
        build_trainer(None, "causal", args, None, None, trainer_class=Older)


def test_what_is_a_mean():
    """A loss that does not read the number of label tokens, named or among others."""

    def named(outputs, labels, num_items_in_batch):
        return outputs.sum()

    def keywords(outputs, labels, **kwargs):
        return outputs.sum()

    def reads(outputs, labels, num_items_in_batch, **kwargs):
        return outputs.sum() / num_items_in_batch

    def reads_keywords(outputs, labels, **kwargs):
        return outputs.sum() / kwargs["num_items_in_batch"]

    class Module(torch.nn.Module):
        def forward(self, outputs, labels, num_items_in_batch=None):
            return outputs.sum()

    class Reads:
        def __call__(self, outputs, labels, num_items_in_batch=None):
            return self.of(outputs, labels, num_items_in_batch)

        def of(self, outputs, labels, num_items_in_batch):
            return outputs.sum() / num_items_in_batch

        def mean(self, outputs, labels, num_items_in_batch):
            return outputs.sum()

    means = (named, keywords, partial(partial(named), labels=1), Module(), Reads().mean)
    sums = (reads, reads_keywords, partial(reads, labels=1), Reads(), Reads().of, print)
    for one in (*means, *sums):
        assert is_mean(one) == is_mean(returning_loss(one, "loss_func")) == (one in means), one


def test_label_smoothing_is_of_the_ordinary_loss(tmp_path):
    args = LMTrainingArguments(output_dir=str(tmp_path), use_cpu=True, do_train=True, label_smoothing_factor=0.1)
    with pytest.raises(UserError, match="--label_smoothing_factor"):
        build_trainer(None, "causal", args, None, None, loss_func=print)


def parts(tmp_path, *methods: str, **given) -> None:
    """`build_trainer` with a class that has these methods of its own, and nothing else that it could use."""
    own = type("MyTrainer", (LMTrainer,), dict.fromkeys(methods, lambda *args, **kwargs: None))
    args = LMTrainingArguments(output_dir=str(tmp_path), use_cpu=True, do_train=True)
    build_trainer(None, "causal", args, None, None, trainer_class=own, **given)


@pytest.mark.parametrize("method", NEVER_CALLED)
def test_a_method_that_is_never_called_is_refused(tmp_path, method):
    assert callable(getattr(Trainer, method, getattr(GaudiTrainer, method, None))), "transformers has it no more"
    with pytest.raises(UserError, match=f"MyTrainer.{method} is never called: give build_trainer "):
        parts(tmp_path, method)


def test_a_loss_of_training_alone_is_said(tmp_path, caplog):
    rows = Dataset.from_list([{"input_ids": [3, 4]}])
    for evaluation, said in ((None, False), (rows, True), ({"a": rows}, True)):
        caplog.clear()
        with pytest.raises(UserError, match="^build_trainer takes a PreTrainedModel .*, not a NoneType$"):
            parts(tmp_path, "compute_loss", eval_dataset=evaluation)
        assert ("evaluation does not call MyTrainer.compute_loss" in caplog.text) == said


def test_figures_of_a_metric_are_what_json_holds():
    """Arrays, such as one figure for each class, are lists in the files; transformers' savers fail on them."""
    seen = []

    def batches(prediction, compute_result):
        seen.append(compute_result)
        return {
            "shares": np.array([0.5, 1], np.float32),
            "loss": torch.tensor(2.0),
            7: {"all": np.int64(3)},
            "no": None,
        }

    figures = own_figures(batches, np.zeros(2), np.zeros(2))
    assert figures == {"shares": [0.5, 1.0], "loss": 2.0, "7": {"all": 3}, "no": None} and seen == [True]
    for value in (object(), {3, 4}, {(1, 2): 3}):
        with pytest.raises(UserError, match="^compute_metrics returns figures that JSON can hold, not "):
            own_figures(lambda prediction, value=value: {"a": value}, None, None)


@pytest.mark.parametrize("shape", [(), (6,), (6, 5)])
def test_predictions_keep_rows_apart(shape):
    real = torch.tensor([True, True, False])
    with pytest.raises(UserError, match="for 3 rows: preprocess_logits_for_metrics keeps the rows apart"):
        Predictions().add((torch.zeros(3, 2), torch.zeros(shape)), None, real)


@pytest.mark.parametrize("where", ["train_dataset", "eval_dataset"])
def test_rows_that_are_no_dataset_are_refused(tmp_path, where):
    with pytest.raises(UserError, match=r"not a list: datasets.Dataset.from_list\(rows\)"):
        parts(tmp_path, **{where: [{"input_ids": [3, 4]}]})


@pytest.mark.slow
def test_an_evaluation_set_without_rows_is_refused(tmp_path):
    rows = Dataset.from_list([{"input_ids": [3, 4]}])
    none = rows.select([])
    for given, name in ((none, ""), ({"a": rows, "b": none}, " b")):
        with pytest.raises(UserError, match=f"^eval_dataset{name} has no rows$"):
            parts(tmp_path, eval_dataset=given)


def test_another_metric(assets, tmp_path):
    script = adapted(tmp_path / "mine", "compute_metrics")
    run("run_clm.py", *scratch(assets, tmp_path / "plain", *EVALUATE))
    run(script, *scratch(assets, tmp_path / "own", *EVALUATE))
    figures, plain = results(tmp_path / "own"), results(tmp_path / "plain")
    assert losses(tmp_path / "own") == losses(tmp_path / "plain")
    assert figures["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-6)
    assert figures["eval_accuracy"] == plain["eval_accuracy"]
    assert figures["eval_accuracy"] < figures["eval_top_5_accuracy"] < 1
    assert "| eval top 5 accuracy |" in (tmp_path / "own" / "README.md").read_text()
    best = ["--metric_for_best_model", "top_5_accuracy", "--eval_strategy", "steps", "--eval_steps", 2]
    run(script, *scratch(assets, tmp_path / "best", *EVALUATE), *best, "--save_steps", 2, "--load_best_model_at_end")
    state = json.loads((tmp_path / "best" / "trainer_state.json").read_text())
    rows = [row["eval_top_5_accuracy"] for row in state["log_history"] if "eval_top_5_accuracy" in row]
    assert state["best_metric"] == max(rows[:2]), "of the two evaluations while training"
    best[1] = "top_3_accuracy"
    flags = [*scratch(assets, tmp_path / "none", *EVALUATE), *best, "--save_steps", 2, "--load_best_model_at_end"]
    line = "error: --metric_for_best_model top_3_accuracy: an evaluation gives loss, perplexity, accuracy, top_5_acc"
    assert line in run(script, *flags, code=2).stderr


SHARE_RIGHT = """
import datasets
import evaluate

class ShareRight(evaluate.Metric):
    def _info(self):
        numbers = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description="-", citation="-", inputs_description="-", features=numbers)

    def _compute(self, predictions, references):
        return {"share_right": sum(a == b for a, b in zip(predictions, references)) / len(references)}
"""


@pytest.mark.slow
def test_a_metric_of_evaluate(assets, tmp_path):
    (tmp_path / "share_right.py").write_text(SHARE_RIGHT)
    script = adapted(tmp_path / "mine", "compute_metrics")
    text = script.read_text()
    top_5 = 'return {"top_5_accuracy": (best == labels[..., None]).any(-1)[labels != -100].mean()}'
    assert top_5 in text
    load = f"evaluate.load({str(tmp_path / 'share_right.py')!r})"
    own = f"return {load}.compute(predictions=best[..., 0][labels != -100], references=labels[labels != -100])"
    script.write_text(
        text.replace(top_5, own).replace("import numpy as np\n", "import evaluate\nimport numpy as np\n")
    )
    run(script, *scratch(assets, tmp_path / "own", *EVALUATE), env={"HF_HOME": str(tmp_path / "home")}, fresh=True)
    figures = results(tmp_path / "own")
    assert figures["eval_share_right"] == pytest.approx(figures["eval_accuracy"])


@pytest.mark.slow
def test_another_collator(assets, masked_assets, tmp_path):
    script = adapted(tmp_path / "mine", "DataCollatorForWholeWordMask")
    texts = ["--train_file", assets.train, "--validation_file", assets.validation, "--max_seq_length", 32]
    flags = [*masked_assets.scratch("bert"), *texts, "--line_by_line", "--use_cpu", "--logging_steps", 1, *EVALUATE]
    run(script, *flags, "--save_steps", 2, "--output_dir", tmp_path / "out")
    assert len(losses(tmp_path / "out")) == 4
    assert 0 < results(tmp_path / "out")["eval_tokens"] < 6 * 32
    more = go_on_from(tmp_path / "out" / "checkpoint-2", tmp_path / "resumed")
    run(script, *flags, "--save_steps", 2, "--dataloader_num_workers", 1, *more)  # it draws masks as it did before
    assert losses(tmp_path / "resumed") == losses(tmp_path / "out")
    assert results(tmp_path / "resumed")["eval_loss"] == results(tmp_path / "out")["eval_loss"]


@pytest.mark.slow
def test_another_trainer_and_several_evaluation_sets(assets, tmp_path):
    script = adapted(tmp_path / "mine", "MyTrainer")
    decay = ["--weight_decay", 0.9, "--learning_rate", 0.1]
    run("run_clm.py", *scratch(assets, tmp_path / "plain", *EVALUATE, *decay))
    run(script, *scratch(assets, tmp_path / "own", *EVALUATE, *decay))
    figures = results(tmp_path / "own")
    assert figures["eval_seen_samples"] == 4 and figures["eval_unseen_samples"] == 6
    assert 0 < figures["eval_seen_loss"] != figures["eval_unseen_loss"] > 0
    code = script.read_text()
    by_name = code.replace("trainer.evaluate()", 'trainer.evaluate("unseen")')
    assert code.count("trainer.evaluate()") == 1
    (script.parent / "by_name.py").write_text(by_name)
    run(script.parent / "by_name.py", *scratch(assets, tmp_path / "named", *EVALUATE, *decay))
    assert results(tmp_path / "named")["eval_loss"] == figures["eval_unseen_loss"]
    assert "eval_loss" not in figures
    card = (tmp_path / "own" / "README.md").read_text()
    for name in ("seen", "unseen"):
        assert f"| eval {name} loss | {figures[f'eval_{name}_loss']:.4f} |" in card and f"type: {name}_loss" in card
    assert "runtime" not in card and "eval_" not in card.replace("per_device_eval_batch", "").replace("max_eval", "")
    # GPT-2 has no matrix that transformers does not decay.
    assert losses(tmp_path / "own") == losses(tmp_path / "plain")


TRAINERS = """from gaudi_lm.training.trainer import LMTrainer, build_trainer


class Mean(LMTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        return torch.nn.functional.cross_entropy(model(**inputs).logits.flatten(0, 1), labels.flatten())


class Sum(LMTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        logits = model(**inputs).logits.flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum") / num_items_in_batch


class Twice(LMTrainer):
    def compute_loss(self, *args, **kwargs):
        return 2 * super().compute_loss(*args, **kwargs)


class Logits(LMTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**inputs).logits.sum()
"""


@pytest.mark.slow
def test_a_compute_loss_of_ones_own(assets, masked_assets, tmp_path):
    """The loss that is trained and logged: of the batches of a step their mean, unless it is divided there."""
    text = (ROOT / "run_mlm.py").read_text().replace("from gaudi_lm.training.trainer import build_trainer\n", TRAINERS)
    for old, new in (
        ("\nfrom datasets", "\nimport torch\nfrom datasets"),
        ("        evaluation_collator=", "        trainer_class=KIND,\n        evaluation_collator="),
    ):
        assert text.count(old) == 1, old
        text = text.replace(old, new)

    def found(kind: str, rows: int, batches: int) -> dict:
        (script := tmp_path / f"{kind}.py").write_text(text.replace("=KIND,", f"={kind},"))
        output = tmp_path / f"{kind}{rows}"
        flags = [*masked_assets.scratch("bert"), "--train_file", assets.train, "--max_seq_length", 32, "--use_cpu"]
        flags += ["--do_train", "--max_steps", 1, "--logging_steps", 1, "--output_dir", output]
        flags += ["--per_device_train_batch_size", rows, "--gradient_accumulation_steps", batches]
        run(script, *flags)
        return log_history(output)[0]

    plain = found("LMTrainer", 8, 1)
    for kind, factor in (("Mean", 1), ("Sum", 1), ("Twice", 2)):
        for rows, batches in ((8, 1), (4, 2)):
            one = found(kind, rows, batches)
            assert one["loss"] == pytest.approx(factor * plain["loss"], rel=0.01), (kind, rows)
            assert one["grad_norm"] == pytest.approx(factor * plain["grad_norm"], rel=0.1), (kind, rows)


def with_blocks(folder, line: str):
    """A copy of run_clm.py that changes its blocks by this line before it makes the trainer."""
    script = copy_elsewhere("run_clm.py", folder)
    before = "    # Trainer\n"
    assert script.read_text().count(before) == 1
    script.write_text(script.read_text().replace(before, f"    {line}\n{before}"))
    return script


@pytest.mark.slow
def test_a_stream_of_ones_own(assets, tmp_path):
    script = with_blocks(tmp_path / "mine", 'blocks["train"] = blocks["train"].to_iterable_dataset()')
    flags = scratch(assets, tmp_path / "out", "--do_train")
    assert "error: --max_steps: the length of a stream is not known" in run(script, *flags, code=2).stderr
    run(script, *flags, "--max_steps", 3)
    assert len(losses(tmp_path / "out")) == 3 and (tmp_path / "out" / "model.safetensors").exists()


def go_on_from(checkpoint, folder) -> list:
    """Flags of a run in a new folder that has this checkpoint alone."""
    shutil.copytree(checkpoint, folder / checkpoint.name)
    return ["--output_dir", folder]


@pytest.mark.slow
def test_a_stream_of_ones_own_that_ends(assets, tmp_path):
    """It goes round until all steps are done, after a resume too."""
    few = 'blocks["train"] = blocks["train"].select(range(20)).to_iterable_dataset()'
    script = with_blocks(tmp_path / "mine", few)
    flags = scratch(assets, tmp_path / "whole", "--do_train", "--max_steps", 6, "--save_steps", 4)
    run(script, *flags)
    run(script, *flags, *go_on_from(tmp_path / "whole" / "checkpoint-4", tmp_path / "resumed"))
    assert len(losses(tmp_path / "whole")) == 6 and losses(tmp_path / "resumed") == losses(tmp_path / "whole")


@pytest.mark.slow
def test_rows_that_a_transform_makes(assets, tmp_path):
    """In training and evaluation: of blocks whose tokens are all the same, each is soon predicted."""
    made = "lambda rows: {'input_ids': [[7] * 16 for _ in rows['input_ids']]}"
    line = f"blocks = {{split: rows.with_transform({made}) for split, rows in blocks.items()}}"
    script = with_blocks(tmp_path / "mine", line)
    run(script, *scratch(assets, tmp_path / "out", *EVALUATE, "--learning_rate", 0.1, "--dataloader_num_workers", 1))
    assert results(tmp_path / "out")["eval_accuracy"] == 1 and results(tmp_path / "out")["eval_tokens"] == 6 * 15


def small_model() -> BertForMaskedLM:
    return BertForMaskedLM(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=16))


def test_a_model_that_is_frozen_is_not_trained():
    model = small_model()
    args = SimpleNamespace(do_train=True, save_safetensors=True)
    check_weights(model.requires_grad_(False), SimpleNamespace(do_train=False))
    with pytest.raises(UserError, match="no weight of BertForMaskedLM has requires_grad"):
        check_weights(model, args)
    model.cls.predictions.bias.requires_grad_(True)
    check_weights(model, args)


def test_a_forward_that_returns_no_logits_by_name(tmp_path):
    class Tuple(BertForMaskedLM):
        def forward(self, input_ids, labels=None):
            return super().forward(input_ids).to_tuple()

    model = Tuple(small_model().config)
    install_token_loss(model, "masked")
    with pytest.raises(UserError, match=r"^Tuple.forward made a tuple without logits: return them by name"):
        model(torch.ones(1, 2, dtype=int), labels=torch.ones(1, 2, dtype=int))
    args = LMTrainingArguments(output_dir=str(tmp_path), use_cpu=True, do_eval=True)
    own = {"eval_dataset": Dataset.from_list([{"input_ids": [3, 4]}]), "compute_metrics": len}
    trainer = build_trainer(Tuple(model.config), "masked", args, None, two_tokens, **own)
    with pytest.raises(UserError, match=r"^Tuple.forward made a tuple without logits"):
        trainer.evaluate()


def two_tokens(rows) -> dict:
    ids = torch.tensor([row["input_ids"].tolist() for row in rows])
    return {"input_ids": ids, "labels": ids.clone()}


def test_a_forward_that_returns_a_dict():
    """As training and evaluation take it, so do the samples of ``--generate``."""
    model = tiny_model("gpt2").eval()

    class Plain(type(model)):
        def forward(self, input_ids, **kwargs):
            return {"logits": super().forward(input_ids).logits}

    same = Plain(model.config).eval()
    same.load_state_dict(model.state_dict())
    found = [most_probable_tokens(one, [3, 4], 4, []) for one in (model, same)]
    assert found[0] == found[1] and len(found[0]) == 4


def test_a_continuation_is_that_of_transformers_and_ends_before_the_token_that_ends_it():
    model, prompt = tiny_model("gpt2").eval(), [3, 4]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    wanted = model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
    assert most_probable_tokens(model, prompt, 6, []) == wanted
    last = max(wanted.index(token) for token in wanted)
    assert most_probable_tokens(model, prompt, 6, [1, wanted[last]]) == wanted[:last] and last > 0


def test_a_budget_belongs_to_its_collator():
    collator = SimpleNamespace(masked_token_budget=max)
    other = DataCollatorForLanguageModeling(None, mlm=False)
    check_budget(max, collator, collator)
    check_budget(None, other)
    with pytest.raises(UserError, match="^max_predictions_per_seq: DataCollatorForLanguageModeling does not undo"):
        check_budget(max, collator, other)


def test_a_loss_func_has_no_perplexity(tmp_path):
    rows = Dataset.from_list([{"input_ids": [3, 4]}])
    for name, known in (("eval_loss", True), ("perplexity", False)):
        best = {"eval_strategy": "steps", "load_best_model_at_end": True, "metric_for_best_model": name}
        args = LMTrainingArguments(output_dir=str(tmp_path), use_cpu=True, do_train=True, **best)
        with contextlib.nullcontext() if known else pytest.raises(UserError, match="an evaluation gives loss$"):
            own = {"eval_dataset": rows, "loss_func": lambda outputs, labels, num_items_in_batch: None}
            build_trainer(small_model(), "masked", args, None, print, **own)


@pytest.mark.slow
def test_an_adapter_of_ones_own(assets, tmp_path):
    script = with_blocks(tmp_path / "mine", 'model = get_peft_model(model, LoraConfig(target_modules=["c_attn"]))')
    code = script.read_text()
    script.write_text(
        code.replace("from datasets import", "from peft import LoraConfig, get_peft_model\nfrom datasets import")
    )
    run(script, *scratch(assets, tmp_path / "out", *EVALUATE))
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert "library_name: peft" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
def test_a_figure_that_evaluate_adds(assets, tmp_path):
    """It may be that of the best model."""
    script = copy_elsewhere("run_clm.py", tmp_path / "mine")
    text = script.read_text().replace(
        "from gaudi_lm.training.trainer import build_trainer\n",
        """from gaudi_lm.training.trainer import LMTrainer, build_trainer


class MyTrainer(LMTrainer):
    def evaluate(self, *args, **kwargs):
        metrics = super().evaluate(*args, **kwargs)
        return {**metrics, "eval_bits": metrics["eval_loss"] / 0.6931}
""",
    )
    script.write_text(
        text.replace("        collate_blocks,\n", "        collate_blocks,\n        trainer_class=MyTrainer,\n")
    )
    best = ["--metric_for_best_model", "bits", "--eval_strategy", "steps", "--eval_steps", 2, "--save_steps", 2]
    run(script, *scratch(assets, tmp_path / "out", *EVALUATE, *best, "--load_best_model_at_end"))
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["best_metric"] == pytest.approx(results(tmp_path / "out")["eval_loss"] / 0.6931)


@pytest.mark.slow
def test_an_optimizer_of_ones_own(assets, tmp_path):
    """It is what trains, by its schedule, and a resumed run goes on with both."""
    script = copy_elsewhere("run_clm.py", tmp_path / "mine")
    own = """    trainer.optimizer = torch.optim.Adagrad(model.parameters(), lr=0.01)
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambda step: 0.7**step)\n"""
    script.write_text(script.read_text().replace("    # Train\n", f"{own}    # Train\n"))
    for name in ("whole", "resumed"):
        run(script, *scratch(assets, tmp_path / name, *EVALUATE, "--save_steps", 2))
        (tmp_path / "resumed").mkdir(exist_ok=True)
        if name == "whole":
            shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    rates = [row["learning_rate"] for row in log_history(tmp_path / "resumed") if "learning_rate" in row]
    assert rates == pytest.approx([0.01 * 0.7**step for step in range(4)])
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "resumed")]
    assert weights[0] == weights[1]


def test_a_part_that_build_trainer_does_not_take_is_named():
    with pytest.raises(TypeError, match=r"build_trainer\(\) got an unexpected keyword argument 'optimizers'"):
        build_trainer(None, "causal", None, None, None, optimizers=(None, None))


FIGURES = """from transformers import TrainerCallback

from gaudi_lm.training.trainer import LMTrainer, build_trainer


class MyTrainer(LMTrainer):
    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.log({"of_the_batch": loss, "bits": np.float32(0.5), "each": torch.ones(2)})
        return loss

    def evaluate(self, *args, **kwargs):
        return super().evaluate(*args, **kwargs) | {"eval_half": np.float32(0.5)}


class MyCallback(TrainerCallback):
    def on_evaluate(self, *args, metrics, **kwargs):
        metrics["eval_distinct"] = torch.tensor(3)
"""


@pytest.mark.slow
def test_figures_that_are_tensors_or_of_numpy(assets, tmp_path):
    """They are numbers in the files, of a checkpoint too: transformers' Trainer fails on them when it saves."""
    script = copy_elsewhere("run_clm.py", tmp_path / "mine")
    text = script.read_text().replace("from gaudi_lm.training.trainer import build_trainer\n", FIGURES)
    parts = "trainer_class=MyTrainer,\n        callbacks=[MyCallback],\n"
    script.write_text(text.replace("        collate_blocks,\n", f"        collate_blocks,\n        {parts}"))
    best = ["--metric_for_best_model", "half", "--eval_strategy", "steps", "--eval_steps", 2, "--save_steps", 2]
    flags = scratch(assets, tmp_path / "out", *EVALUATE, *best, "--load_best_model_at_end")
    run(script, *flags)
    logged = next(row for row in log_history(tmp_path / "out") if "bits" in row)
    assert logged["bits"] == 0.5 and logged["each"] == [1, 1] and logged["of_the_batch"] > 1
    figures = results(tmp_path / "out")
    assert figures["eval_half"] == 0.5 and figures["eval_distinct"] == 3
    script.write_text(script.read_text().replace('"each": torch.ones(2)', '"each": object()'))
    stopped = run(script, *flags, "--overwrite_output_dir", code=2)
    assert "error: trainer.log takes figures that JSON can hold, not {" in stopped.stderr


@pytest.mark.slow
def test_callbacks(assets, tmp_path):
    script = adapted(tmp_path / "mine", "EarlyStoppingCallback")
    steps = ["--eval_strategy", "steps", "--eval_steps", 1, "--save_steps", 1, "--load_best_model_at_end"]
    worse = ["--learning_rate", 100, "--metric_for_best_model", "eval_loss", "--max_grad_norm", 0, "--optim", "sgd"]
    flags = scratch(assets, tmp_path / "out", *EVALUATE[:2], "--max_steps", 12, "--max_eval_samples", 2)
    run(script, *flags, *steps, *worse)
    assert len(losses(tmp_path / "out")) < 12
