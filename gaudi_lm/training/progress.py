"""Callbacks that follow a run step by step."""

from __future__ import annotations

import logging

from transformers import Trainer, TrainerCallback

logger = logging.getLogger("gaudi_lm")


class StepClock(TrainerCallback):
    """Tells the trainer's throughput that an optimizer step is over."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.throughput.end_step(*self.trainer._window)


class LogLines(TrainerCallback):
    """One log line for each set of figures, where there is no progress bar to print them."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_local_process_zero and logs and "train_runtime" not in logs and "eval_runtime" not in logs:
            figures = ", ".join(f"{name} {value:.6g}" for name, value in logs.items() if name != "epoch")
            logger.info("step %d/%d: %s", state.global_step, state.max_steps, figures)
