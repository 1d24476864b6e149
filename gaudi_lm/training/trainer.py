"""The GaudiTrainer set-up that the three scripts share."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from optimum.habana.transformers.trainer import GaudiTrainer
from peft import PeftType
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer_utils import EvalPrediction, SaveStrategy, TrainOutput

from gaudi_lm.arguments.consistency import METRICS, check_best_metric
from gaudi_lm.arguments.context_parallel import data_ranks, sequence_part
from gaudi_lm.arguments.definitions import LMTrainingArguments
from gaudi_lm.arguments.gaudi_configs import gaudi_config
from gaudi_lm.data.sampling import TrainingBatches, TrainingRows, count_tokens, ignore_filler_samples, loader_options
from gaudi_lm.data.streams import stream_batches
from gaudi_lm.errors import UserError
from gaudi_lm.modeling.adalora import RankReduction
from gaudi_lm.modeling.attention import check_model
from gaudi_lm.modeling.loss import install_token_loss
from gaudi_lm.modeling.patches import complete_generation_config, repair_gradient_checkpointing
from gaudi_lm.training import custom_parts
from gaudi_lm.training.deepspeed_engine import EngineFigures
from gaudi_lm.training.device_metrics import DeviceMetrics
from gaudi_lm.training.dry_run import dry_run
from gaudi_lm.training.evaluation import EvaluatingTrainer
from gaudi_lm.training.fsdp import choose_layers
from gaudi_lm.training.length_warmup import compile_lengths, separate_graph, several_lengths
from gaudi_lm.training.metrics import Throughput
from gaudi_lm.training.progress import EarlyStopping, Progress, StepClock
from gaudi_lm.training.samples import check_prompts, show_samples
from gaudi_lm.training.sums import TrainingLoss
from gaudi_lm.training.trackers import Trackers

logger = logging.getLogger("gaudi_lm")


# Private methods of transformers and optimum-habana that are overridden, where no public one or callback would do:
# `_maybe_log_save_evaluate`, as the loss of a step is of all ranks by label tokens, and callbacks come after the log;
# here and in `saving`, `_save*`, `_load*`, `_inner_training_loop`, `_finish_current_push`, as files are written as a
# whole or not, and resumed runs are exact; `_issue_warnings_after_load` and `_move_model_to_device`, for tied weights.
class LMTrainer(EvaluatingTrainer):
    """GaudiTrainer for models with :func:`gaudi_lm.modeling.loss.install_token_loss`.

    What differs from GaudiTrainer: the loss is a mean over the label tokens of the whole optimizer step, on all ranks
    and for every architecture (unless ``compute_loss_func`` takes its place); the order of the data depends on seed
    and epoch alone, so a resumed run sees the same batches; evaluation keeps sums, not logits; throughput counts what
    was executed.
    """

    def __init__(self, *args, objective: str, evaluation_collator=None, **kwargs):
        bf16 = kwargs["args"].bf16
        super().__init__(*args, **kwargs)
        # GaudiTrainer turns this on before transformers' own constructor turns it off: --bf16 did nothing on a CPU.
        self.use_cpu_amp = bf16 and self.args.half_precision_backend == "cpu_amp"
        self.causal = objective == "causal"
        self.evaluation_collator = evaluation_collator or self.data_collator
        self.model_accepts_loss_kwargs = True
        warmup = self.args.throughput_warmup_steps
        self.throughput = Throughput(warmup, self._synchronise, self.args.context_parallel_size)
        self._window: tuple[int, ...] = (0, 0, 0)  # of an optimizer step: rows, tokens and positions of this rank
        self._ranks: torch.Tensor | float = 1  # over whose label tokens its loss is a mean
        self.batches_with_labels: torch.Tensor | float = 1  # of a rank, on average, that have labels
        self._lengths = self._uncompiled = tuple[int, ...]()  # that batches are padded to
        self.results: dict[str, float] = {}  # of the whole run, see :func:`gaudi_lm.training.outputs.report`
        self.device_metrics = DeviceMetrics(warmup)
        adalora = getattr(self.model, "peft_type", None) == PeftType.ADALORA
        self.rank_reduction = RankReduction(self.model) if adalora else None
        loss = TrainingLoss(self.args.logging_nan_inf_filter, adds_orthogonality=adalora)
        # The clock waits for the card at the end of warm-up, before that step's figures of the card are read.
        self.progress = Progress(bars=not self.args.disable_tqdm)
        self.remove_callback(PrinterCallback if self.args.disable_tqdm else ProgressCallback)
        early = EarlyStopping(self.args.early_stopping_patience) if self.args.early_stopping_patience else None
        self.engine = EngineFigures(self) if self.is_deepspeed_enabled else None
        own = (StepClock(self), self.device_metrics, loss, self.rank_reduction, self.progress, early, self.engine)
        for callback in filter(None, own):
            self.add_callback(callback)
        self.trackers = Trackers(self)
        self._has_mean_loss = self.compute_loss_func is not None and custom_parts.is_mean(self.compute_loss_func)
        self._has_own_loss = type(self).compute_loss is not LMTrainer.compute_loss
        if self._has_own_loss:
            self.compute_loss = custom_parts.own_compute_loss(self)  # type: ignore

    def _synchronise(self) -> None:
        if self.args.device.type == "hpu":
            torch.hpu.synchronize()

    def get_train_dataloader(self) -> DataLoader:
        args = self.args
        # A loader draws a seed when processes start: not from the numbers of dropout, however often that is.
        own = {"generator": torch.Generator().manual_seed(args.seed), "worker_init_fn": self.worker_init}
        options = {**loader_options(args), **own, "persistent_workers": args.dataloader_persistent_workers}
        draws = args.seed, data_ranks(args)[0]
        options["collate_fn"] = ignore_filler_samples(self.data_collator, self.causal, sequence_part(args), draws)
        if isinstance(self.train_dataset, torch.utils.data.IterableDataset):
            return stream_batches(self.train_dataset, args.per_device_train_batch_size, options)
        seed = args.seed if args.data_seed is None else args.data_seed
        order = {"drop_last": args.dataloader_drop_last, "group_by_length": args.group_by_length}
        sampler = TrainingBatches(self.train_dataset, self._train_batch_size, seed, *data_ranks(args), **order)
        if not args.ignore_data_skip:
            sampler.resume_after(self.resumption.step, args.gradient_accumulation_steps)
        loader = DataLoader(TrainingRows(self.train_dataset, args.seed), batch_sampler=sampler, **options)
        loader.set_epoch = sampler.set_epoch
        return loader

    def get_batch_samples_transformers(
        self, epoch_iterator: Iterator[dict], num_batches: int, device: torch.device
    ) -> tuple[list[dict], torch.Tensor | None]:
        """The batches of one optimizer step, and the number of label tokens in them on all ranks."""
        self.throughput.begin_step()
        batches = list(itertools.islice(epoch_iterator, num_batches))
        if not batches:
            return [], None
        # The batches are still in host memory: counting them waits for nothing.
        if any(batch.get("labels") is None for batch in batches):
            raise UserError("the collator makes no labels: a masked language model cannot be trained without")
        # No token predicts the first one.
        labels = [int((batch["labels"][:, int(self.causal) :] != -100).sum()) for batch in batches]
        self._window = tuple(map(sum, zip(*map(count_tokens, batches), strict=True)))
        tokens, filled = sum(labels), sum(map(bool, labels))
        items, self.batches_with_labels = torch.tensor(tokens, device=device), max(filled, 1)
        if (ranks := self.args.world_size) > 1:
            of_ranks = self.accelerator.gather(torch.tensor([[tokens, filled]], device=device))
            total, with_labels = of_ranks.sum(0)
            self.batches_with_labels = with_labels.clamp(min=1) / ranks
            # Rows that only complete a step have no mean of their own, which would count as 0.
            means = ranks / (of_ranks[:, 0] > 0).sum().clamp(min=1)
            together = self.args.average_tokens_across_devices
            items, self._ranks = (total, ranks) if together else (items, means)
        if self._uncompiled:
            compile_lengths(self, self._uncompiled, batches[0], items)
            self._uncompiled = ()
        return batches, items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # A mean over the batch, so that what wrappers add to it (AdaLoRA) gets the batch's share of the step too.
        # Gradients are averaged over ranks, while label tokens are of all ranks.
        if self.compute_loss_func is not None:
            labels, mean = inputs.pop("labels"), self._has_mean_loss
            outputs = model(**inputs)
            targets = custom_parts.labels_of_mean(labels, self) if mean else labels
            loss = self.compute_loss_func(outputs, targets, num_items_in_batch=num_items_in_batch)
            loss = custom_parts.share_of_step(loss, labels, self) if mean else loss * self._ranks
            return (loss, outputs) if return_outputs else loss
        outputs = model(**inputs)
        loss = outputs["loss"]
        if num_items_in_batch is not None:
            share = self._ranks / num_items_in_batch.clamp(min=1)
            loss = loss * (outputs["count"] * share)
            self.training_loss.add(loss.detach(), outputs, share)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args, **kwargs):
        batches = self.training_loss.batches
        with separate_graph(self._lengths):
            loss = super().training_step(*args, **kwargs)
            if self.training_loss.batches == batches:  # a loss that is not the suite's
                self.training_loss.add(loss)
            elif self._has_own_loss:  # which may add something to it
                self.training_loss.correct(loss)
        return loss

    def dry_run(self) -> dict[str, float]:
        """Print what :meth:`train` would do and take, see :mod:`gaudi_lm.training.dry_run`; the figures of it."""
        return dry_run(self)

    def train(self, *args, **kwargs) -> TrainOutput:
        self._lengths = self._uncompiled = several_lengths(self.data_collator, self)
        try:
            output = super().train(*args, **kwargs)
        finally:
            self.progress.on_train_end()
        return output._replace(training_loss=output.metrics.get("train_loss", float("nan")))

    def _maybe_log_save_evaluate(
        self, tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate=None
    ):
        if self.control.should_log and self.training_loss.steps:
            tr_loss.zero_()
            logs = self.training_loss.take()
            if self.engine is not None:
                grad_norm, learning_rate = model.get_global_grad_norm(), self.engine.learning_rate
            if grad_norm is not None:
                logs["grad_norm"] = float(grad_norm)
            logs["learning_rate"] = self._get_learning_rate() if learning_rate is None else learning_rate
            logs.update(self.throughput.since_last() | self.device_metrics.figures())
            self._globalstep_last_logged = self.state.global_step
            self.store_flos()
            self.log(logs, start_time=start_time)
        if self.control.should_evaluate or self.control.should_save:
            self.throughput.pause()
        if self.control.should_evaluate:
            metrics = custom_parts.as_json(self._evaluate(trial, ignore_keys_for_eval), "evaluate returns")
            is_best = self._determine_best_metric(metrics=metrics, trial=trial)
            if self.args.save_strategy == SaveStrategy.BEST:
                self.control.should_save = self.control.should_save or is_best
        if self.control.should_save:
            self._save_checkpoint(model, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def log(self, logs: dict[str, float], start_time: float | None = None, end_time: float | None = None) -> None:
        if "train_runtime" in logs:
            # Upstream divides all samples by the time after warm-up, and counts resumed steps as done.
            for name in ("loss", "samples_per_second", "steps_per_second", "tokens_per_second"):
                logs.pop(f"train_{name}", None)
            logs.update(self.throughput.figures("train") | self.training_loss.result())
        logs.update(custom_parts.as_json(logs, "trainer.log takes"))  # or the next checkpoint could not be written
        # Not GaudiTrainer's own, which adds the memory of the card a second time, in names of its own.
        super(GaudiTrainer, self).log(logs, start_time)

    def compare_trainer_and_checkpoint_args(self, training_args, trainer_state) -> None:
        """Nothing: :class:`gaudi_lm.training.resumed_state.Resumption` has said what counts."""

    def _issue_warnings_after_load(self, load_result):
        tied = re.compile("|".join(getattr(self.model, "_tied_weights_keys", None) or ["^$"]))  # not in checkpoints
        load_result.missing_keys[:] = [key for key in load_result.missing_keys if not tied.search(key)]
        super()._issue_warnings_after_load(load_result)


def build_trainer(
    model,
    objective: Literal["causal", "masked"],
    training_args: LMTrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    collator: Callable[[list[dict]], dict],
    train_dataset=None,
    eval_dataset=None,
    evaluation_collator: Callable[[list[dict]], dict] | None = None,
    callbacks: list[TrainerCallback] | None = None,
    loss_func: Callable | None = None,
    compute_metrics: Callable[[EvalPrediction], dict] | None = None,
    preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    trainer_class: type[LMTrainer] = LMTrainer,
    max_predictions_per_seq: int | Callable[[int, int], int] | None = None,
) -> LMTrainer:
    """The trainer, with the token loss installed on the model.

    Args:
        objective: ``causal`` or ``masked``.
        collator: from rows to a batch, any of ``transformers`` included. One with a true attribute ``needs_sample_id``
            finds ``sample_id`` in each row, a number that is new for each row and epoch. Labels of a causal model are
            by default its tokens; the trainer counts them shifted by one.
        train_dataset: a ``datasets.Dataset``, or an iterable one of this rank's rows.
        eval_dataset: one, or a dict of several by name; the figures of each then have its name in theirs.
        evaluation_collator: for evaluation, where it differs; ``sample_id`` is then the row's number.
        loss_func: of ``(outputs, labels, num_items_in_batch)``, as the ``compute_loss_func`` of transformers' Trainer:
            it gets the logits of the unchanged model, and divides a sum by the label tokens of the optimizer step.
        compute_metrics, preprocess_logits_for_metrics: as for transformers' Trainer; without, logits are not kept.
        trainer_class: a subclass of :class:`LMTrainer`.
        max_predictions_per_seq: of a masked model, see :func:`gaudi_lm.modeling.loss.install_token_loss`.
    """
    custom_parts.check_parts(trainer_class, LMTrainer, loss_func, training_args, train_dataset, eval_dataset)
    custom_parts.check_budget(max_predictions_per_seq, collator, evaluation_collator or collator)
    custom_parts.check_class(model)
    if training_args.gradient_checkpointing and training_args.device.type == "hpu":
        repair_gradient_checkpointing(model)
    if loss_func is None:
        # Chunks are compiled for one number of rows, and on a CPU each batch may have another.
        chunked = training_args.chunked_loss and not (training_args.torch_compile and training_args.use_cpu)
        rows, smoothing = max_predictions_per_seq, training_args.label_smoothing_factor
        logger.info(
            install_token_loss(
                model, objective, chunked=chunked, max_predictions_per_seq=rows, label_smoothing=smoothing
            )
        )
    else:
        logger.info("Loss of %s language modelling by loss_func, from the full logits", objective)
    if training_args.device.type != "hpu":
        complete_generation_config()
    check_model(model, training_args, own_figures=bool(loss_func or compute_metrics))
    if compute_metrics is None and trainer_class.evaluate is LMTrainer.evaluate:
        given = METRICS if loss_func is None else ("loss",)
        check_best_metric(training_args.metric_for_best_model, eval_dataset, given)
    custom_parts.check_weights(model, training_args)
    check_prompts(training_args, objective == "causal", model, tokenizer)
    choose_layers(model, training_args)
    trainer = trainer_class(
        model=model,
        objective=objective,
        gaudi_config=gaudi_config(training_args),
        args=training_args,
        data_collator=collator,
        evaluation_collator=evaluation_collator,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        callbacks=callbacks,
        compute_loss_func=loss_func and custom_parts.returning_loss(loss_func, "loss_func"),
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=preprocess_logits_for_metrics,
    )
    show_samples(trainer)
    return trainer
