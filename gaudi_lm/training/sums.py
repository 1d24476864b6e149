"""Sums that figures are made of: on the card without waiting for it, exact on the host, and over all ranks."""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from gaudi_lm.modeling.loss import TokenLossOutput
from gaudi_lm.training.agreement import gather

logger = logging.getLogger("gaudi_lm")

WINDOW = 32  # batches of an evaluation between two transfers of the sums to the host


class TokenSums:
    """Sums over the batches of an evaluation: on the card within a window, exact on the host across windows."""

    def __init__(self):
        self.loss_sum, self.correct, self.count = 0.0, 0, 0
        self._batches = 0
        self._losses: Tensor | None = None
        self._counts: Tensor | None = None

    def add(self, loss_sum: Tensor, correct: Tensor, count: Tensor) -> None:
        """Add the 0-dim sums of one batch, a float and two whole numbers; every 32nd call waits for the card."""
        losses, counts = loss_sum.float(), torch.stack([correct, count])
        self._losses = losses if self._losses is None else self._losses + losses
        self._counts = counts if self._counts is None else self._counts + counts
        self._batches += 1
        if self._batches % WINDOW == 0:
            self.flush()

    def flush(self) -> None:
        """Move what has been summed on the card to the host."""
        if self._losses is not None and self._counts is not None:
            correct, count = self._counts.tolist()
            self.loss_sum += self._losses.item()
            self.correct += correct
            self.count += count
            self._losses = self._counts = None

    def over_ranks(self) -> dict[str, list]:
        """``loss_sum``, ``correct`` and ``count``, one entry a rank; all ranks must call it."""
        self.flush()
        ranks = gather((self.loss_sum, self.correct, self.count))
        return dict(zip(("loss_sum", "correct", "count"), map(list, zip(*ranks, strict=True)), strict=True))


class TrainingLoss(TrainerCallback, ExportableState):
    """What the steps since the last log line reported, on this rank's card, and what all steps of the run did.

    Add it to the trainer's callbacks: it counts steps, and with a checkpoint it is saved in ``trainer_state.json``, so
    that a resumed run logs and reports what an uninterrupted one does.

    Args:
        skip_nan: a batch that is not finite counts as the mean of those before it (``--logging_nan_inf_filter``).
        adds_orthogonality: the model is one of AdaLoRA, which adds `orthogonality_loss`.
    """

    def __init__(self, skip_nan: bool = False, adds_orthogonality: bool = False):
        self.skip_nan = skip_nan
        self.adds_orthogonality = adds_orthogonality
        self._names: list[str] = []
        self._window: Tensor | None = None  # float32 [names], of this rank
        self._steps = self._window_batches = 0  # in the window
        self.batches = 0  # added by this process
        self._added: Tensor | None = None  # the last one's loss, all together
        self._ranks: list[list[float]] = []  # the window at the last checkpoint
        self.total, self.total_steps = 0.0, 0  # of `loss`, over all ranks and all steps before the window

    @property
    def steps(self) -> int:
        """Optimizer steps since the last log line."""
        return self._steps

    def add(self, loss: Tensor, outputs: TokenLossOutput | None = None, share: Tensor | None = None) -> None:
        """Add what one batch has in its step: `loss`, of the language model alone, and what is added to it.

        Args:
            loss: the batch's part of the step's loss, all together, detached.
            outputs: of the model with an installed token loss; without, `loss` is all there is.
            share: of one label token in the step.
        """
        self.batches += 1
        figures = {"loss": loss}
        if outputs is not None:
            figures["loss"] = outputs["loss_sum"] * share
            if outputs.get("aux_loss") is not None:
                figures["aux_loss"] = outputs["aux_loss"] * outputs["count"] * share
            if self.adds_orthogonality:
                figures["orthogonality_loss"] = loss - sum(figures.values())
        self._names = list(figures)
        values = torch.stack([figure.float() for figure in figures.values()])
        if self.skip_nan:
            before = torch.zeros_like(values) if self._window is None else self._window
            values = torch.where(values.isfinite(), values, before / max(self._window_batches, 1))
        self._window_batches += 1
        self._window = values if self._window is None else self._window + values
        self._added = loss

    def correct(self, loss: Tensor) -> None:
        """Count what a trainer's own ``compute_loss`` made of the batch that was added last, as part of `loss`."""
        if self._added is None or self._window is None:
            return
        difference = (loss - self._added).float()
        if self.skip_nan:
            difference = torch.where(difference.isfinite(), difference, 0.0)
        self._window[0] += difference

    def _over_ranks(self) -> list[list[float]]:
        return [] if self._window is None else gather(self._window.tolist())

    def take(self) -> dict[str, float]:
        """The means over ranks and over the steps since the last call, by name; they join the run's total."""
        ranks, steps = self._over_ranks(), self._steps
        sums = [math.fsum(column) / len(ranks) for column in zip(*ranks, strict=True)]
        self._window, self._steps, self._window_batches = None, 0, 0
        if not sums or not steps:
            return {}
        self.total += sums[0]
        self.total_steps += steps
        return {name: value / steps for name, value in zip(self._names, sums, strict=True)}

    def result(self) -> dict[str, float]:
        """At the end of a run: `train_loss`, the mean over all its steps; nothing where there were none."""
        self.take()
        return {"train_loss": self.total / self.total_steps} if self.total_steps else {}

    def keep(self) -> None:
        """Before a checkpoint: note the window of every rank."""
        self._ranks = self._over_ranks()

    def state(self) -> dict:
        names = ("_names", "_steps", "_window_batches", "_ranks", "total", "total_steps")
        args = {"skip_nan": self.skip_nan, "adds_orthogonality": self.adds_orthogonality}
        return {"args": args, "attributes": {name: getattr(self, name) for name in names}}

    def on_train_begin(self, args, state, control, **kwargs):
        noted = (
            state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {}) if state.global_step else {}
        )
        self.total, self.total_steps = noted.get("total", 0.0), noted.get("total_steps", 0)
        self._names, self._steps, self._window = noted.get("_names", []), noted.get("_steps", 0), None
        self._window_batches = noted.get("_window_batches", self._steps)
        ranks = noted.get("_ranks", [])
        if self._steps and ranks:
            mean = [math.fsum(column) / len(ranks) for column in zip(*ranks, strict=True)]
            own = ranks[args.process_index] if len(ranks) == args.world_size else mean
            self._window = torch.tensor(own, dtype=torch.float32, device=args.device)
        unknown = state.global_step - self.total_steps - self._steps
        if unknown:
            logger.info("train_loss will be of the steps after %d: the checkpoint has no sum of those before", unknown)
        # The trainer looks for it there, also after a checkpoint without one.
        state.stateful_callbacks[type(self).__name__] = self.state()

    def on_step_end(self, args, state, control, **kwargs):
        self._steps += 1
