"""Callbacks that follow a run step by step."""

from __future__ import annotations

import contextlib
import logging
import math
import re
import time

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import EarlyStoppingCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_utils import has_length

from gaudi_lm.arguments.schedules import odd_stages

logger = logging.getLogger("gaudi_lm")

EVERY = 30.0  # seconds between two lines about an evaluation, where there is no bar
BAR = "{n_fmt}/{total_fmt} |{bar}| {remaining} left{postfix}"
BESIDE = "^epoch$|^graph_|_(samples|tokens|seen|runtime|per_second|per_step|gb)$|padding_share$"  # not in a log line


class StepClock(TrainerCallback):
    """Tells the trainer's throughput that an optimizer step is over, and how much of its epoch."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if odd := odd_stages(args, state.max_steps):  # how many steps there are is known by now
            logger.warning(odd)

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.throughput.end_step(*self.trainer._window)
        if batches := self.trainer.batches_per_epoch:  # GaudiTrainer divides by what is left of a resumed epoch
            epoch, steps = divmod(state.global_step - 1, self.trainer.steps_per_epoch)
            state.epoch = epoch + min((steps + 1) * args.gradient_accumulation_steps, batches) / batches


class EarlyStopping(EarlyStoppingCallback):
    """transformers' own, whose count of evaluations goes on after a resume, and which says why training ends."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.early_stopping_patience_counter = evaluations_without_better(vars(state)) if state.global_step else 0
        state.stateful_callbacks[type(self).__name__] = self.state()  # the trainer looks for it there
        self._training = False

    def on_step_end(self, args, state, control, **kwargs):
        self._training = True

    def on_train_end(self, args, state, control, **kwargs):
        self._training = False

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        if not self._training:  # that of --eval_on_start comes again with each resumption
            return
        if f"eval_{args.metric_for_best_model.removeprefix('eval_')}" not in metrics:
            return  # of another evaluation set
        super().on_evaluate(args, state, control, metrics, **kwargs)
        if (count := self.early_stopping_patience_counter) >= self.early_stopping_patience:
            steps, metric = f"step {state.global_step}/{state.max_steps}", args.metric_for_best_model
            logger.info("%s: training ends, %d evaluations without a better %s", steps, count, metric)


def evaluations_without_better(state: dict) -> int:
    """How many there have been in a row, by a trainer's state."""
    noted = (state.get("stateful_callbacks") or {}).get(EarlyStopping.__name__, {})
    return noted.get("attributes", {}).get("early_stopping_patience_counter", 0)


class Progress(ProgressCallback):
    """Loss, learning rate, tokens a second and time left: in a bar, or without ``bars`` in a line for each log."""

    def __init__(self, bars: bool):
        super().__init__()
        self.bars = bars
        self._training = False
        self._lines_above_bar = contextlib.ExitStack()
        self._first: tuple[float, int] | None = None  # when the first step of this process was over, and its number
        self._batches, self._evaluated, self._said = 0, 0.0, 0.0
        self._lost = False

    def on_train_end(self, *args, **kwargs):
        """Training is over, however it has ended: what is printed now begins a line of its own."""
        self._training = False
        self._lines_above_bar.close()
        for bar in filter(None, (self.prediction_bar, self.training_bar)):
            bar.close()
        self.prediction_bar = self.training_bar = None

    def on_train_begin(self, args, state, control, **kwargs):
        self._training, self._first = True, None
        if self.bars and state.is_world_process_zero:
            # Upstream's begins at 0, and so takes the steps before a checkpoint for work of the first second.
            self.current_step = state.global_step
            steps = {"total": state.max_steps, "initial": state.global_step}
            self.training_bar = tqdm(**steps, bar_format=BAR, dynamic_ncols=True, delay=0)
            self._lines_above_bar.enter_context(logging_redirect_tqdm())

    def on_step_end(self, args, state, control, **kwargs):
        self._first = self._first or (time.monotonic(), state.global_step)
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if self.bars:
            super().on_prediction_step(args, state, control, eval_dataloader=eval_dataloader, **kwargs)
            return
        now = time.monotonic()
        if not self._batches:
            self._evaluated = self._said = now
        self._batches += 1
        if now - self._said >= EVERY:
            self._said, seconds = now, (now - self._evaluated) / (self._batches - 1)
            total = len(eval_dataloader) if has_length(eval_dataloader) else self._batches
            left = tqdm.format_interval(seconds * (total - self._batches))
            logger.info("evaluation: batch %d/%d, %s left", self._batches, total, left)

    def on_evaluate(self, args, state, control, **kwargs):
        self._batches = 0
        super().on_evaluate(args, state, control, **kwargs)

    on_predict = on_evaluate  # the next one counts its batches anew

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not (self._training and state.is_world_process_zero and logs) or "train_runtime" in logs:
            return
        if not (self._lost or math.isfinite(logs.get("loss", 0.0))):
            self._lost = True
            logger.warning(
                "the loss is %s at step %d, which usually ruins the weights: start anew, or resume from an older "
                "checkpoint, with a lower --learning_rate, and see that the weights of the model are numbers",
                logs["loss"],
                state.global_step,
            )
        if "loss" not in logs:
            super().on_evaluate(args, state, control, **kwargs)  # its bar would stay among the lines
        elif self.training_bar is not None:
            speed = logs.get("tokens_per_second")
            rate = "" if speed is None else f", {tqdm.format_sizeof(speed)} tokens/s"
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.4g}, lr {logs['learning_rate']:.2g}{rate}")
            return
        numbers = {name: value for name, value in logs.items() if isinstance(value, (int, float))}
        words = [f"{name} {value:.5g}" for name, value in numbers.items() if not re.search(BESIDE, name)]
        if "tokens_per_second" in logs:
            words.append(f"{logs['tokens_per_second']:,.0f} tokens/s")
        if "loss" in logs and self._first is not None and state.global_step > self._first[1]:
            seconds = (time.monotonic() - self._first[0]) / (state.global_step - self._first[1])
            words.append(f"{tqdm.format_interval(seconds * (state.max_steps - state.global_step))} left")
        logger.info("step %d/%d: %s", state.global_step, state.max_steps, ", ".join(words))
