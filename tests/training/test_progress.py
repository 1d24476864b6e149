"""What a run says about itself while it goes on, and at its end: on a terminal, and elsewhere."""

import logging
import math
import re
from types import SimpleNamespace

import pytest
from running import log_history, results, run, run_in_terminal
from short_runs import scratch

from gaudi_lm.training import progress
from gaudi_lm.training.outputs import aligned

FLAGS = ("--do_train", "--do_eval", "--max_eval_samples", 8, "--max_steps", 6, "--logging_steps", 2)
EVALUATIONS = ("--eval_strategy", "steps", "--eval_steps", 3)
STEP = re.compile(
    r"INFO step (\d)/6: loss \d\.\d+, grad_norm [\d.]+, learning_rate [\d.e-]+, [\d,]+ tokens/s, \d\d:\d\d left"
)


def the_block(lines: list[str]) -> list[str]:
    """The lines of the results, without the clock."""
    return [line[14:] for line in lines if re.match(r"[\d:]{8} INFO   \w", line)]


def test_lines_and_the_block(assets, tmp_path):
    log = run("run_clm.py", *scratch(assets, tmp_path, *FLAGS, *EVALUATIONS)).stderr
    steps = [line for line in log.splitlines() if "INFO step" in line and " loss " in line]
    assert len(steps) == 3 and all(map(STEP.search, steps)), steps
    assert re.search(r"INFO step 3/6: eval_loss [\d.]+, eval_perplexity [\d.]+, eval_accuracy [\d.]+\n", log)
    assert "Tokenising" not in log and "%|" not in log
    block = the_block(log.splitlines())
    names = [line.split()[0] for line in block]
    assert set(names) == set(results(tmp_path)) and len(names) == len(set(names)) and names == sorted(names)
    assert re.search(r"  train_runtime +[\d.]+ s$", "\n".join(block), re.M)
    assert re.search(r"  total_flos +[\d.e+]+ FLOP$", "\n".join(block), re.M)
    assert len({re.match(r"  \w+ +[\d.,e+-]+", line).end() for line in block}) == 1, "numbers end in one column"
    assert all({"tokens_per_second", "padding_share"} <= row.keys() for row in log_history(tmp_path) if "loss" in row)


@pytest.mark.slow
@pytest.mark.parametrize("columns", [80, 160])
def test_a_terminal(assets, tmp_path, columns):
    flags = scratch(assets, tmp_path, *FLAGS, *EVALUATIONS, "--save_steps", 3, "--show_examples", 0)
    lines = run_in_terminal(columns, "run_clm.py", *flags)
    bars = [line for line in lines if "|" in line]
    assert len(bars) == 1, "\n".join(lines)
    assert re.fullmatch(r"6/6 \|█+\| \d\d:\d\d left, loss \d\.\d+, lr [\d.e-]+, [\d.]+k? tokens/s", bars[0])
    assert len(bars[0]) <= columns
    assert not any(STEP.search(line) for line in lines)
    said = [line for line in lines if line and line != bars[0]]
    assert columns == 80 or all(re.match(r"\d\d:\d\d:\d\d (INFO|WARNING) ", line) for line in said), said
    assert sum("INFO step" in line and "eval_loss" in line for line in lines) == 2
    assert not any("it/s" in line for line in lines), "the bar of an evaluation is gone"
    assert len(the_block(lines)) == len(results(tmp_path))


def on_log(callback, step: int, **logs) -> None:
    state = SimpleNamespace(is_world_process_zero=True, global_step=step, max_steps=100)
    callback.on_step_end(None, state, None)
    callback.on_log(None, state, None, logs=logs)


def test_time_left_is_that_of_this_process(monkeypatch, caplog):
    """Of 100 steps 40 were done before; the first one here compiles for a minute, each other one takes 2 s."""
    caplog.set_level(logging.INFO, "gaudi_lm")
    clock = iter([60.0, 80.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    callback = progress.Progress(bars=False)
    callback.on_train_begin(None, SimpleNamespace(is_world_process_zero=True, global_step=40), None)
    on_log(callback, 41, loss=3.0, learning_rate=1e-4)
    on_log(callback, 51, loss=2.0, learning_rate=1e-4, tokens_per_second=12345.6, aux_loss=0.5)
    other_rank = SimpleNamespace(is_world_process_zero=False, global_step=51, max_steps=100)
    callback.on_log(None, other_rank, None, logs={"loss": 2.0})
    on_log(callback, 52, train_runtime=9.0, train_loss=1.0)
    callback.on_train_end()
    on_log(callback, 52, loss=1.0)
    assert caplog.messages == [
        "step 41/100: loss 3, learning_rate 0.0001",
        "step 51/100: loss 2, learning_rate 0.0001, aux_loss 0.5, 12,346 tokens/s, 01:38 left",
    ]


def test_a_loss_that_is_no_number_is_warned_of_once(caplog):
    caplog.set_level(logging.WARNING, "gaudi_lm")
    callback = progress.Progress(bars=False)
    callback.on_train_begin(None, SimpleNamespace(is_world_process_zero=True, global_step=0), None)
    for step, loss in enumerate([3.0, math.nan, math.inf], 1):
        on_log(callback, step, loss=loss, learning_rate=1e-4)
    on_log(callback, 4, eval_loss=1.0)
    (message,) = caplog.messages
    assert message.startswith("the loss is nan at step 2,") and "--learning_rate" in message


def test_early_stopping_looks_at_the_set_of_its_metric(caplog):
    """Of several evaluation sets each comes by itself; the end was said with each, and that there would be none."""
    caplog.set_level(logging.INFO)
    callback, control = progress.EarlyStopping(1), SimpleNamespace(should_training_stop=False)
    args = SimpleNamespace(metric_for_best_model="a_loss", greater_is_better=False)
    state = SimpleNamespace(global_step=4, max_steps=9, best_metric=2.0)
    callback.on_step_end(args, state, control)
    for name in ("a", "b"):
        callback.on_evaluate(args, state, control, {f"eval_{name}_loss": 2.0})
    assert control.should_training_stop
    assert caplog.messages == ["step 4/9: training ends, 1 evaluations without a better a_loss"]


def test_a_bar_goes_on_where_the_checkpoint_was(capsys):
    callback = progress.Progress(bars=True)
    state = SimpleNamespace(is_world_process_zero=True, global_step=40, max_steps=100)
    callback.on_train_begin(None, state, None)
    assert (callback.training_bar.n, callback.training_bar.initial) == (40, 40)
    state.global_step = 41
    callback.on_step_end(None, state, None)
    assert callback.training_bar.n == 41
    callback.on_train_end()
    assert callback.training_bar is None and "41/100 |" in capsys.readouterr().err


@pytest.mark.parametrize("over", ["on_evaluate", "on_predict"])
def test_a_long_evaluation_says_how_far_it_is(over, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "gaudi_lm")
    clock = iter([0.0, 20.0, 40.0, 60.0, 100.0, 140.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    callback = progress.Progress(bars=False)
    for _ in range(4):
        callback.on_prediction_step(None, None, None, eval_dataloader=range(7))
    getattr(callback, over)(None, SimpleNamespace(is_world_process_zero=True), None, metrics={})
    for _ in range(2):  # of the next one
        callback.on_prediction_step(None, None, None, eval_dataloader=range(7))
    assert caplog.messages == ["evaluation: batch 3/7, 01:20 left", "evaluation: batch 2/7, 03:20 left"]


def test_early_stopping_goes_on_counting(caplog):
    """After a resume; and what is evaluated before the first step or after the last one counts for nothing."""
    caplog.set_level(logging.INFO, "gaudi_lm")
    args = SimpleNamespace(metric_for_best_model="loss", greater_is_better=False, eval_strategy="steps")
    args.load_best_model_at_end = True
    noted = {"EarlyStopping": {"attributes": {"early_stopping_patience_counter": 1}}}
    state = SimpleNamespace(global_step=3, max_steps=9, best_metric=1.0, stateful_callbacks=noted)
    callback, control = progress.EarlyStopping(early_stopping_patience=2), SimpleNamespace(should_training_stop=False)
    callback.on_train_begin(args, state, control)
    assert state.stateful_callbacks["EarlyStopping"] == callback.state()  # where the trainer looks for it
    callback.on_evaluate(args, state, control, metrics={"eval_loss": 2.0})
    assert not control.should_training_stop
    callback.on_step_end(args, state, control)
    callback.on_evaluate(args, state, control, metrics={"eval_loss": 2.0})
    assert control.should_training_stop
    assert caplog.messages == ["step 3/9: training ends, 2 evaluations without a better loss"]
    callback.on_train_end(args, state, control)
    callback.on_evaluate(args, state, control, metrics={"eval_loss": 2.0})
    assert len(caplog.messages) == 1 and callback.early_stopping_patience_counter == 2
    state.global_step, state.stateful_callbacks = 0, {"EarlyStopping": callback.state()}
    callback.on_train_begin(args, state, control)
    assert callback.early_stopping_patience_counter == 0, "training begins anew"


def test_an_epoch_is_over_with_its_last_batch():
    """Of 5 batches, two a step; the last step has one."""
    trainer = SimpleNamespace(
        steps_per_epoch=3, batches_per_epoch=5, _window=(), throughput=SimpleNamespace(end_step=lambda: None)
    )
    state, args, seen = SimpleNamespace(epoch=None), SimpleNamespace(gradient_accumulation_steps=2), []
    for state.global_step in range(1, 7):
        progress.StepClock(trainer).on_step_end(args, state, None)
        seen.append(state.epoch)
    assert seen == [0.4, 0.8, 1.0, 1.4, 1.8, 2.0]


@pytest.mark.slow
def test_preparing_data_shows_how_far_it_is(instructions, tmp_path):
    """What takes longer than TQDM_DELAY has a bar; off a terminal too, where it is renewed every 15 seconds."""
    flags = [
        "--model_name_or_path", instructions.llama, "--train_file", instructions.train, "--max_seq_length", 128,
        "--do_train", "--use_cpu", "--max_steps", 1, "--pack_sequences", "--output_dir",
    ]  # fmt: skip
    for name, more in (("on", []), ("off", ["--disable_tqdm"])):
        # A cache of its own: in the common one, another test may have prepared the same data.
        env = {"TQDM_DELAY": "0", "TQDM_MININTERVAL": "0", "HF_DATASETS_CACHE": str(tmp_path / f"{name} cache")}
        log = run("run_lora_clm.py", *flags, tmp_path / name, *more, env=env, fresh=True).stderr
        for what in ("Tokenising: 100%", "Packing: 100%"):
            assert (what in log) == (name == "on"), log


def test_units_and_width():
    lines = aligned({"train_loss": 2.0, "peak_device_memory_gb": 1.25, "note": "none", "eval_samples": 12345})
    assert lines == [
        "  eval_samples           12,345",
        "  note                     none",
        "  peak_device_memory_gb    1.25 GiB",
        "  train_loss                  2 nats/token",
    ]
