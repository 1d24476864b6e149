"""What DeepSpeed's engine keeps to itself of an optimizer step, for the log; and the step that it takes too many."""

from __future__ import annotations

import functools
from typing import Any

from optimum.habana.transformers.trainer import GaudiTrainer
from transformers import TrainerCallback


class EngineFigures(TrainerCallback):
    """The learning rate that a step took, and the norm of its gradients.

    The engine steps its scheduler at once with the optimizer that its file names, so that afterwards it has the next
    step's learning rate; without ZeRO, it forgets the norm by which it has clipped.
    """

    def __init__(self, trainer: GaudiTrainer):
        self.trainer = trainer
        self.learning_rate = 0.0
        begin_without_a_step()

    def on_train_begin(self, args, state, control, **kwargs):
        engine = self.trainer.deepspeed
        engine.clip_fp32_gradients = functools.partial(_clip, engine)

    def on_step_begin(self, args, state, control, **kwargs):
        self.learning_rate = float(self.trainer.optimizer.param_groups[0]["lr"])


def _clip(engine: Any) -> None:
    from deepspeed.runtime.utils import clip_grad_norm_

    engine._global_grad_norm = clip_grad_norm_(
        engine.module.parameters(), max_norm=engine.gradient_clipping(), mpu=engine.mpu
    )


def begin_without_a_step() -> None:
    """In bf16 without ZeRO, let the first step of training be the optimizer's first.

    DeepSpeed (0.19) takes one on gradients of zero before, to have its memory: weights decay by it, and Adam's first
    steps are a quarter too short. The optimizer has its memory from its first step on in any case.
    """
    from deepspeed.runtime.fp16 import fused_optimizer, unfused_optimizer

    for kind in (fused_optimizer.FP16_Optimizer, unfused_optimizer.FP16_UnfusedOptimizer):
        kind.initialize_optimizer_states = _nothing


def _nothing(optimizer: object) -> None:
    pass
