"""What DeepSpeed does not say: the figures of a step, and that it waits for what is being compiled."""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path
from typing import Any

from optimum.habana.transformers.trainer import GaudiTrainer
from torch.utils.cpp_extension import get_default_build_root
from transformers import TrainerCallback

from gaudi_lm.modeling.patches import take_no_step_on_zeros

logger = logging.getLogger("gaudi_lm")


class EngineFigures(TrainerCallback):
    """The learning rate that a step took, and the norm of its gradients.

    The engine steps its scheduler at once with the optimizer that its file names, so that afterwards it has the next
    step's learning rate; without ZeRO, it forgets the norm by which it has clipped.
    """

    def __init__(self, trainer: GaudiTrainer):
        self.trainer = trainer
        self.learning_rate = 0.0
        take_no_step_on_zeros()
        say_what_is_locked()

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


def say_what_is_locked() -> None:
    """Name the operations that DeepSpeed would wait for without a word, and without end where nobody compiles them.

    torch compiles them at their first use, such as Adam for ``offload_optimizer``; who is killed leaves a lock behind.
    """
    for lock in Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()).glob("**/lock"):
        logger.warning(
            "%s: %s is being compiled, or was when a run was killed: if no other run is, remove that file",
            lock, lock.parent.name,
        )  # fmt: skip
