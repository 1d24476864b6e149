"""A GaudiTrainer whose checkpoints are whole or not there, and that goes on from them exactly.

The format of a checkpoint is in :mod:`gaudi_lm.training.checkpoints`, which one is taken in
:mod:`gaudi_lm.training.resume`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from transformers import TrainerCallback, TrainerState
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from gaudi_lm.data.memory import host_copies
from gaudi_lm.errors import UserError
from gaudi_lm.training import checkpoints, digests
from gaudi_lm.training.agreement import gather
from gaudi_lm.training.fsdp import FSDPTrainer
from gaudi_lm.training.hub import HubUploads
from gaudi_lm.training.resume import clear_the_way
from gaudi_lm.training.resumed_state import Resumption
from gaudi_lm.training.signals import SaveOnSignal, begin_loading
from gaudi_lm.training.sums import TrainingLoss
from gaudi_lm.training.write_errors import WriteError, reason_of, size_of_state

logger = logging.getLogger("gaudi_lm")


class SavingSteps(TrainerCallback):
    """Which steps end with a checkpoint, beside what the flags say."""

    def __init__(self, trainer: ResumableTrainer):
        self.trainer = trainer
        self._at_epoch_end = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.loading.close()
        if args.should_save:  # now that trackers have begun, whose servers may not answer
            clear_the_way(Path(args.output_dir), self.trainer.resumption, remove=args.overwrite_output_dir)
        gather(None)  # the others look at what is there, below
        # Those of the checkpoint would win over the flags of this start.
        state.compute_steps(args, state.max_steps)
        self.trainer.resumption.restore(self.trainer)

    def on_step_end(self, args, state, control, **kwargs):
        # What is logged and evaluated at the end of an epoch goes into the checkpoint of its last step: a run that
        # is killed before it would not make up for it.
        last = state.global_step >= state.max_steps or state.global_step % self.trainer.steps_per_epoch == 0
        self._at_epoch_end = control.should_save and last
        control.should_save = control.should_save and not last

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_save = control.should_save or self._at_epoch_end
        self._at_epoch_end = False


class ResumableTrainer(FSDPTrainer):
    """GaudiTrainer with complete checkpoints only, exact resumption, and an end with a checkpoint on a signal."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.uploads = HubUploads(self.args)
        self.epochs = self.steps_per_epoch = 1
        self.batches_per_epoch: int | None = None
        self.resumption = Resumption()
        self.loading = contextlib.ExitStack()
        self.signals = SaveOnSignal(self.args.process_index == 0)
        self.worker_init = functools.partial(
            begin_loading, self.signals.stopping if self.args.save_on_signal else None
        )
        self.add_callback(self.signals)
        self.add_callback(SavingSteps(self))  # has the last word about the end of an epoch

    @functools.cached_property
    def digests(self) -> dict:
        """Tell the weights that are trained, read before FSDP flattens them, and the data from others."""
        sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        return {
            "model": digests.model_digest(self.model),
            "data": digests.data_digest(self.train_dataset),
            "eval_data": {name: digests.data_digest(one) for name, one in sets.items()},
        }

    @property
    def training_loss(self) -> TrainingLoss:
        return next(cb for cb in self.callback_handler.callbacks if isinstance(cb, TrainingLoss))

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        if resume_from_checkpoint is True:
            resume_from_checkpoint = next(map(str, checkpoints.checkpoints_in(Path(self.args.output_dir))), True)
        checkpoint = None if resume_from_checkpoint in (True, False) else resume_from_checkpoint
        self.resumption = Resumption.of(self, checkpoint)
        if self.resumption.checkpoint is not None and self.args.fp8:
            logger.warning(
                "--fp8: its scales are not in a checkpoint; losses will be near those of a whole run, not equal"
            )
        _ = self.digests
        with self.signals.watching() if self.args.save_on_signal else contextlib.nullcontext():
            try:
                return super().train(resume_from_checkpoint, *args, **kwargs)
            except UserError as error:
                raise (self._saved_before(error) or error) from error.__cause__

    def _saved_before(self, error: UserError) -> UserError | None:
        """Save the steps before data that cannot be read, or an evaluation that has no room; of one rank alone."""
        folder = Path(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        new = self.state.global_step > self.resumption.step and not folder.exists()
        if isinstance(error, WriteError) or self.args.world_size > 1 or not (new and self.args.save_on_signal):
            return None
        self.args.save_only_model = False
        self._save_checkpoint(self.model_wrapped, trial=None)
        return type(error)(f"{error}; the steps before it are saved in {folder}")

    def _inner_training_loop(self, batch_size=None, *args, **kwargs):
        batch_size = self.args.train_batch_size  # that of the checkpoint would win over the flag
        with self.loading:
            if self.resumption.checkpoint is not None:
                self.loading.enter_context(checkpoints.data_only())  # until training begins
                self.load_divided_adapter(self.resumption.checkpoint)
            return super()._inner_training_loop(batch_size, *args, **kwargs)

    def init_hf_repo(self, token: str | None = None) -> None:
        """Nothing: a repository is made with the first upload, so that training needs no network."""

    def _finish_current_push(self) -> None:
        """Nothing: the last upload, after all else, makes up for one of a checkpoint."""

    def push_to_hub(self, commit_message: str | None = "End of training", **kwargs) -> None:
        """Upload what is at the top of ``--output_dir``; where that fails, the log says so. All ranks must call it."""
        if self.args.process_index == 0:
            self.uploads.result(commit_message or "End of training")
        if self.args.should_save:
            self._rotate_checkpoints(use_mtime=False, output_dir=self.args.output_dir)
        gather(None)  # the other ranks wait as long as it takes

    def set_initial_training_values(self, args, dataloader, total_train_batch_size):
        values = list(super().set_initial_training_values(args, dataloader, total_train_batch_size))
        self.epochs, self.steps_per_epoch = values[:2]
        self.batches_per_epoch = values[5]
        stopped = self.resumption.without_better >= (args.early_stopping_patience or math.inf)
        if stopped or self.resumption.step >= values[-1]:
            values[0] = 0  # no epoch is left: the loop would train one more step before it looks at max_steps
        return tuple(values)

    def create_optimizer(self):
        optimizer = super().create_optimizer()
        self.resumption.note_flags(optimizer, self.args)
        return optimizer

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        self.resumption.apply_flags(self.optimizer, self.lr_scheduler)

    def _save(self, output_dir=None, state_dict=None):
        if state_dict is None and is_deepspeed_zero3_enabled():
            return  # a copy of --save_on_each_node: DeepSpeed gathers the weights on rank 0, here they are empty
        if state_dict is None and self.args.device.type == "hpu":
            state_dict = host_copies(self.model.state_dict(keep_vars=True))
        kept, self.args = self.args, copy.copy(self.args)
        self.args.hub_token = self.args.push_to_hub_token = None  # the arguments are pickled beside the weights
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args = kept

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        if self.is_deepspeed_enabled and self.args.should_save and self.args.process_index > 0:
            # A copy of --save_on_each_node: DeepSpeed writes on rank 0 alone what it finds the parts by.
            (parts,) = Path(output_dir).glob("global_step*")
            Path(output_dir, "latest").write_text(parts.name)

    def _load_rng_state(self, checkpoint):
        with contextlib.suppress(KeyError):  # from the CPU to a card, which the log has said
            super()._load_rng_state(checkpoint)

    def _save_checkpoint(self, model, trial):
        run_dir = Path(self._get_output_dir(trial=trial))
        folder = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if trial is None:
            self.store_flos()
        run = Resumption.facts(self)
        self.training_loss.keep()

        def publish(staging: Path) -> None:
            checkpoints.seal(staging, run)
            checkpoints.publish(folder)

        with self._written_whole(folder, publish) as staging:
            self.save_weights_of_checkpoint(staging)
            if not self.args.save_only_model or self.signals.decided:
                self._save_optimizer_and_scheduler(str(staging))
                self._save_scaler(str(staging))
                self._save_rng_state(str(staging))
            best = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            if self.state.best_global_step and (best == folder or best.exists()):
                self.state.best_model_checkpoint = str(best)  # on each rank: all of them load it in the end
            if self.args.should_save:
                exportable = [*self.callback_handler.callbacks, self.control]
                exportable = [one for one in exportable if isinstance(one, ExportableState)]
                self.state.stateful_callbacks = TrainerState(stateful_callbacks=exportable).stateful_callbacks
                self.state.save_to_json(str(staging / checkpoints.STATE))
        if self.args.should_save:
            self._rotate_checkpoints(use_mtime=False, output_dir=str(run_dir))
        if self.args.push_to_hub and self.args.process_index == 0:
            self.uploads.checkpoint(folder, self.state.global_step)

    @contextlib.contextmanager
    def files_at_top(self) -> Iterator[Path]:
        """A folder for files that are then moved to the top of ``output_dir``; all ranks must come here.

        Raises:
            WriteError: they could not be written; none of them is at the top.
        """
        output = Path(self.args.output_dir)
        with self._written_whole(
            output / "files", lambda staging: checkpoints.publish_files(staging, output)
        ) as staging:
            yield staging

    @contextlib.contextmanager
    def _written_whole(self, folder: Path, publish: Callable[[Path], None]) -> Iterator[Path]:
        """A folder for all ranks to write into; when all of them have, the main one publishes it."""
        staging = checkpoints.incomplete(folder)
        failure: Exception | None = None
        try:
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir(parents=True)
        except OSError as error:
            failure = self._write_error(folder, error)
        # On all ranks: the others would write there, and then wait for this one without end.
        if (failure := next(filter(None, gather(failure)), None)) is not None:
            raise failure
        try:
            yield staging
        except Exception as error:
            failure = self._write_error(folder, error)
            if failure is error or self.is_deepspeed_enabled:
                # The other ranks may be in the midst of talking to this one: they are ended with it.
                shutil.rmtree(staging, ignore_errors=True)
                raise failure from error.__cause__
        failure = next(filter(None, gather(failure)), None)
        if failure is None and self.args.should_save:
            try:
                publish(staging)
            except OSError as error:
                failure = self._write_error(folder, error)
        if (failure := next(filter(None, gather(failure)), None)) is not None:
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
            raise failure

    def _write_error(self, folder: Path, error: Exception) -> Exception:
        """The line for the user, or the error itself where it is no matter of disks."""
        reason = reason_of(error)
        if reason is None:
            return error
        output = folder.parent
        older = [path for path in checkpoints.checkpoints_in(output) if path != folder]
        intact = next((path for path in older if not checkpoints.faults(path)), None)
        needed = checkpoints.size_of(older[0]) if older else size_of_state(self)
        try:
            # What is half-written is given back.
            free = shutil.disk_usage(output).free + checkpoints.size_of(checkpoints.incomplete(folder))
        except OSError:
            free = 0
        left = f"{intact} is intact, and the next start resumes from it" if intact else "no checkpoint is complete yet"
        what = folder.name if checkpoints.checkpoint_step(folder) is not None else "the results"
        return WriteError(
            f"{output}: {what} could not be written ({reason}): about {needed / 1e6:.1f} MB are needed, "
            f"{free / 1e6:.1f} MB are free; {left}"
        )
