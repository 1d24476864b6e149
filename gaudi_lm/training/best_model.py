"""The best model of a run: which one it is, and that it comes back whole at the end."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from transformers.trainer_utils import SchedulerType
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from gaudi_lm.errors import UserError
from gaudi_lm.modeling.adalora import RankReduction
from gaudi_lm.modeling.virtual_tokens import load_encoder, save_encoder
from gaudi_lm.training.checkpoints import checkpoints_in
from gaudi_lm.training.metrics import is_result
from gaudi_lm.training.saving import ResumableTrainer

logger = logging.getLogger("gaudi_lm")


class BestModelTrainer(ResumableTrainer):
    """Loads the best model, and saves and loads what an adapter has beside its weights: ranks, an encoder."""

    rank_reduction: RankReduction | None = None

    def create_scheduler(self, num_training_steps, optimizer=None):
        if self.args.lr_scheduler_type == SchedulerType.REDUCE_ON_PLATEAU:
            # The scheduler is told the metric of the best model, of which more may be better.
            mode = "max" if self.args.greater_is_better else "min"
            self.args.lr_scheduler_kwargs = {"mode": mode, **(self.args.lr_scheduler_kwargs or {})}
        return super().create_scheduler(num_training_steps, optimizer)

    def _determine_best_metric(self, metrics, trial):
        name = self.args.metric_for_best_model
        if name is not None and f"eval_{name.removeprefix('eval_')}" not in metrics:
            given = [one.removeprefix("eval_") for one, value in metrics.items() if is_result(one, value)]
            raise UserError(f"--metric_for_best_model {name}: an evaluation gives {', '.join(given)}")
        better = super()._determine_best_metric(metrics, trial)
        if better:
            self.state.best_global_step = self.state.global_step  # transformers forgets it for --save_strategy best
        return better

    def _sorted_checkpoints(self, output_dir=None, *args, **kwargs) -> list[str]:
        """The oldest first, as rotation deletes them, the best one late; none that is being uploaded.

        Nor copies of a user's own, such as ``checkpoint-2-kept``, which transformers takes for checkpoints.
        """
        found = checkpoints_in(Path(output_dir))[::-1]
        if (best := Path(self.state.best_model_checkpoint or "")) in found[:-1]:
            found.insert(-1, found.pop(found.index(best)))
        return [str(one) for one in found if not self.uploads.is_uploading(str(one))]

    def _load_best_model(self):
        best = self.state.best_model_checkpoint
        with self._format_of(best):
            super()._load_best_model()
        if not Path(best).is_dir():
            return  # of another host, which has the only result
        # peft loads the vectors that an encoder made, in the place of its inputs.
        load_encoder(self.plain_model, best)
        if self.rank_reduction:
            self.rank_reduction.load(best)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        try:
            with self._format_of(resume_from_checkpoint):
                super()._load_from_checkpoint(resume_from_checkpoint, model)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()
            if "loading state_dict" not in reason[0]:
                raise
            raise UserError(f"{resume_from_checkpoint}: its weights are not of this model: {reason[-1]}") from error

    @contextlib.contextmanager
    def _format_of(self, checkpoint: str) -> Iterator[None]:
        """Read the weights that are there: ``--save_safetensors`` is about those that will be written."""
        kept = self.args.save_safetensors
        names = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
        self.args.save_safetensors = kept or any(Path(checkpoint, name).is_file() for name in names)
        try:
            yield
        finally:
            self.args.save_safetensors = kept

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        save_encoder(self.model, output_dir or self.args.output_dir)

    def save_weights_of_checkpoint(self, folder: Path) -> None:
        super().save_weights_of_checkpoint(folder)
        if self.rank_reduction and self.args.should_save:
            self.rank_reduction.save(folder)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            load_encoder(self.plain_model, checkpoint)
            if self.rank_reduction:
                self.rank_reduction.load(checkpoint)
