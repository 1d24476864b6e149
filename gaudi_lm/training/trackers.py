"""What ``--report_to`` names: it ends with the run, and a run does not end with it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

from transformers import Trainer, TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks

from gaudi_lm.errors import UserError
from gaudi_lm.training.agreement import from_main
from gaudi_lm.training.model_card import without_secrets

logger = logging.getLogger("gaudi_lm")


class Trackers:
    """The trackers of a trainer.

    transformers ends a tracker's run with the training, before the evaluation that follows it, and ends training
    where a tracker's server does not answer.
    """

    def __init__(self, trainer: Trainer):
        self._trainer = trainer
        self._ends: list[Callable] = []
        self._said = set[str]()
        for name in trainer.args.report_to:
            (kind,) = get_reporting_integration_callbacks([name])
            for callback in trainer.callback_handler.callbacks:
                if isinstance(callback, kind):
                    self._guard(callback, name)

    def _guard(self, callback: TrainerCallback, name: str) -> None:
        def guarded(event: Callable, begins: bool) -> Callable:
            def call(*args, **kwargs):
                problem, argv = None, sys.argv
                sys.argv = without_secrets(argv)  # wandb shows it with the run
                try:
                    event(*args, **kwargs)
                except Exception as error:  # of any kind that its package may raise
                    logger.debug("the error of the tracker", exc_info=error)
                    problem = f"--report_to {name}: {' '.join(str(error).split())[:300] or type(error).__name__}"
                finally:
                    sys.argv = argv
                if begins and (problem := from_main(problem)):  # the main rank has the tracker, and all of them end
                    raise UserError(f"{problem}; fix that, or give --report_to none")
                if problem and problem not in self._said:
                    self._said.add(problem)
                    logger.warning("%s; the run goes on, and figures may be missing there", problem)

            return call

        for event in (event for event in dir(TrainerCallback) if event.startswith("on_")):
            setattr(callback, event, guarded(getattr(callback, event), begins=event == "on_train_begin"))
        self._ends.append(callback.on_train_end)
        callback.on_train_end = lambda *args, **kwargs: None

    def close(self) -> None:
        """End their runs, once all has been reported."""
        trainer = self._trainer
        for end in self._ends:
            end(
                trainer.args, trainer.state, trainer.control,
                model=trainer.model, processing_class=trainer.processing_class,
            )  # fmt: skip
