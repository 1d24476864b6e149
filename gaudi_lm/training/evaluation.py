"""Evaluation and prediction: rows in static shapes, each counted once on all ranks; the precision of the weights."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from optimum.habana.transformers.trainer import GaudiTrainer, _get_input_update_settings
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers.integrations.deepspeed import deepspeed_init, is_deepspeed_zero3_enabled
from transformers.trainer_utils import PredictionOutput

from gaudi_lm.arguments.context_parallel import data_ranks, sequence_part
from gaudi_lm.data.masked_token_budget import IGNORE_INDEX
from gaudi_lm.data.sampling import (
    FILLER_SAMPLE,
    REAL_SAMPLES,
    SAMPLE_ID,
    as_arrays,
    count_tokens,
    ignore_filler_samples,
    loader_options,
    read_rows,
)
from gaudi_lm.errors import memory_errors
from gaudi_lm.modeling.cross_entropy import full_cross_entropy
from gaudi_lm.modeling.loss import logits_of
from gaudi_lm.training.best_model import BestModelTrainer
from gaudi_lm.training.custom_parts import own_figures
from gaudi_lm.training.length_warmup import of_length, several_lengths
from gaudi_lm.training.metrics import Throughput, token_metrics
from gaudi_lm.training.predictions import Predictions, as_float
from gaudi_lm.training.sums import TokenSums


class EvaluationRows(IterableDataset):
    """The rows of one rank, completed to full batches and to the same number of batches on every rank.

    A row that completes a batch repeats an earlier one and carries ``padding_row``: the collator of
    :func:`evaluation_loader` takes its labels away, so it adds nothing to any sum.

    Args:
        dataset: with a length and an index, or a stream.
        batch_size: rows in a batch of one rank.
        rank: this rank; it takes every ``world_size``-th row.
    """

    def __init__(self, dataset, batch_size: int, rank: int, world_size: int):
        self.dataset = dataset
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.sized = hasattr(dataset, "__len__")
        self.rows_seen = len(dataset) if self.sized else 0

    def _padded(self, rows: int) -> int:
        per_step = self.batch_size * self.world_size
        return -(-rows // per_step) * self.batch_size

    def __len__(self) -> int:
        return self._padded(len(self.dataset))  # of a stream a TypeError

    def __iter__(self) -> Iterator[dict]:
        return self._rows() if self.sized else self._streamed_rows()

    def _rows(self) -> Iterator[dict]:
        """Of several worker processes each yields whole batches in its turn, so that their order does not change."""
        worker = get_worker_info()
        turn, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        rows = as_arrays(self.dataset)
        own = range(self.rank, self.rows_seen, self.world_size)
        for start in range(turn * self.batch_size, len(self), workers * self.batch_size):
            positions = range(start, start + self.batch_size)
            indices = [own[min(position, len(own) - 1)] if own else 0 for position in positions]
            for position, index, row in zip(positions, indices, read_rows(rows, indices, indices[0]), strict=True):
                row[SAMPLE_ID] = index
                yield row if position < len(own) else {**row, FILLER_SAMPLE: True}

    def _streamed_rows(self) -> Iterator[dict]:
        row, own = dict[str, object](), 0
        for index, any_row in enumerate(self.dataset):
            self.rows_seen = index + 1
            if index % self.world_size == self.rank:
                row, own = {**any_row, SAMPLE_ID: index}, own + 1
                yield dict(row)
        if not row and self.rows_seen:
            row = {**next(iter(self.dataset)), SAMPLE_ID: 0}
        for _ in range(self._padded(self.rows_seen) - own):
            yield {**row, FILLER_SAMPLE: True}


def evaluation_loader(
    dataset,
    collator: Callable[[list[dict]], dict],
    batch_size: int,
    rank: int,
    world_size: int,
    labels_from_inputs: bool = False,
    part: tuple[int, int] = (0, 1),
    **options,
) -> DataLoader:
    """Batches of the rows of this rank; ``labels`` of completing rows are -100.

    Args:
        labels_from_inputs, part: see :func:`gaudi_lm.data.sampling.ignore_filler_samples`.
        options: of the ``DataLoader``; a stream is read by this process alone, which counts its rows.
    """
    rows = EvaluationRows(dataset, batch_size, rank, world_size)
    if not rows.sized:
        options |= {"num_workers": 0, "prefetch_factor": None}
    collate = ignore_filler_samples(collator, labels_from_inputs, part)
    generator = torch.Generator()  # a loader draws a seed: not from the numbers that dropout draws from
    return DataLoader(rows, batch_size=batch_size, collate_fn=collate, generator=generator, **options)


@contextmanager
def weights_as(model: nn.Module, dtype: torch.dtype | None, restore: bool) -> Iterator[None]:
    """Hold the floating-point weights of ``model`` in ``dtype``; None leaves them as they are.

    Buffers that are no part of a checkpoint, such as the frequencies of rotary embeddings, keep their precision.

    Args:
        restore: whether they are needed again as they were, bit by bit; a copy is kept in host memory for that long.
    """
    changed = []
    if dtype is not None:
        for weight in model.state_dict(keep_vars=True).values():
            if weight.is_floating_point() and weight.dtype is not dtype:
                if restore:
                    changed.append((weight, weight.data.cpu(), weight.device))
                weight.data = weight.data.to(dtype)
    try:
        yield
    finally:
        for weight, values, device in changed:
            weight.data = values.to(device)


class EvaluatingTrainer(BestModelTrainer):
    """Evaluation by sums over tokens; logits are kept for ``compute_metrics`` and ``predict`` alone."""

    causal: bool
    evaluation_collator: Callable[[list[dict]], dict]
    _graphed_model: torch.nn.Module | None = None
    _compiled_model: torch.nn.Module | None = None  # for batches of every length

    def _prepare_input(self, data):
        # Parts of rows are cut when they are collated, with the label that follows; GaudiTrainer would cut them again.
        if self.args.context_parallel_size > 1:
            return super(GaudiTrainer, self)._prepare_input(data)
        return super()._prepare_input(data)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Token-weighted loss, perplexity and accuracy, and the speed of the evaluation, over all ranks.

        Of a dict of datasets all figures of each, with its name after the prefix. What ``compute_metrics`` returns is
        added; with a loss function of one's own there is its loss, but no perplexity and no accuracy.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):  # one of those that the trainer has by name
            dataset = self.eval_dataset[dataset]
        if isinstance(dataset, dict):
            parts = [self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}") for name, part in dataset.items()]
            return {name: value for metrics in parts for name, value in metrics.items()}
        self._synchronise()  # a step of training that had no memory may fail as late as here, and is not to be saved
        metrics = self._run_over(dataset, ignore_keys, metric_key_prefix, self.compute_metrics is not None).metrics
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix: str = "test") -> PredictionOutput:
        """Predictions and labels as numpy arrays in the order of the dataset, and metrics as of :meth:`evaluate`."""
        output = self._run_over(test_dataset, ignore_keys, metric_key_prefix, True)
        self.control = self.callback_handler.on_predict(self.args, self.state, self.control, output.metrics)
        return output

    @memory_errors("give a smaller --per_device_eval_batch_size")
    def _run_over(self, dataset, ignore_keys: list[str] | None, prefix: str, predict: bool) -> PredictionOutput:
        args = self.args
        options = {**loader_options(args), "worker_init_fn": self.worker_init}
        options |= {"labels_from_inputs": self.causal, "part": sequence_part(args)}
        rows = args.eval_batch_size, *data_ranks(args)
        loader = evaluation_loader(dataset, self.evaluation_collator, *rows, **options)
        model = self._evaluation_model()
        self.callback_handler.eval_dataloader = loader
        update, extra_inputs = _get_input_update_settings(self.model)
        warmup = 0 if self.is_in_train else args.throughput_warmup_steps
        throughput = Throughput(warmup, self._synchronise, args.context_parallel_size)
        sums, started = TokenSums(), time.perf_counter()
        throughput.begin_step()
        dtype = torch.bfloat16 if args.bf16_full_eval and not self.is_in_train else None
        predictions = Predictions() if predict else None
        own = predict or self.compute_loss_func is not None

        def run(batch: dict[str, Tensor], real: Tensor, sums: TokenSums) -> None:
            inputs = self._prepare_inputs({**batch, **extra_inputs} if update else batch)
            with torch.no_grad(), self.compute_loss_context_manager():
                if own:
                    self._predict_batch(model, inputs, real, ignore_keys, sums, predictions)
                else:
                    outputs = model(**inputs)
                    sums.add(outputs["loss_sum"], outputs["correct"], outputs["count"])
            if args.use_lazy_mode:
                self.htcore.mark_step()

        uncompiled = () if own or model is self._compiled_model else several_lengths(self.evaluation_collator, self)
        with weights_as(self.model, dtype, restore=args.do_train):
            for batch in loader:
                real = batch[REAL_SAMPLES]
                window = count_tokens(batch)
                for length in uncompiled:
                    nothing = TokenSums()
                    for _ in range(2):  # onto no sums, and onto some
                        run(of_length(batch, length), real, nothing)
                if uncompiled:
                    uncompiled, self._compiled_model = (), model
                run(batch, real, sums)
                self.control = self.callback_handler.on_prediction_step(args, self.state, self.control)
                throughput.end_step(*window)
                throughput.begin_step()
        parts = sums.over_ranks()
        result = token_metrics(**parts)
        if self.compute_loss_func is not None:
            result = {"loss": result["loss"]}
        found, labels = predictions.over_ranks() if predictions else (None, None)
        if self.compute_metrics is not None and found is not None and labels is not None:
            result |= own_figures(self.compute_metrics, found, labels)
        metrics = {
            name if name.startswith(f"{prefix}_") else f"{prefix}_{name}": value for name, value in result.items()
        }
        metrics[f"{prefix}_samples"] = loader.dataset.rows_seen
        metrics[f"{prefix}_tokens"] = sum(parts["count"])
        metrics[f"{prefix}_runtime"] = round(time.perf_counter() - started, 3)
        metrics.update(throughput.figures(prefix))
        return PredictionOutput(predictions=found, label_ids=labels, metrics=metrics)

    def _predict_batch(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        real: Tensor,
        ignore_keys: list[str] | None,
        sums: TokenSums,
        predictions: Predictions | None,
    ) -> None:
        """Run the model's own forward without labels, and add what it returns to the sums and predictions."""
        labels = inputs.pop("labels", None)
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        if "use_cache" in inspect.signature(base.forward).parameters:
            inputs["use_cache"] = False
        outputs = model(**inputs)
        if labels is not None:
            targets = functional.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:] if self.causal else labels
            count = (targets != IGNORE_INDEX).sum()
            if self.compute_loss_func is None:
                sums.add(*full_cross_entropy(logits_of(base, outputs), targets), count)
            else:
                mean = self.compute_loss_func(outputs, labels, num_items_in_batch=count.clamp(min=1))
                sums.add(torch.where(count > 0, mean * count, 0.0), torch.zeros_like(count), count)
        if predictions is None:
            return
        if ignore_keys is None:
            ignore_keys = getattr(base.config, "keys_to_ignore_at_inference", ["past_key_values"])
        kept = tuple(value for name, value in outputs.items() if name not in {*ignore_keys, "loss"})
        logits = as_float(kept[0] if len(kept) == 1 else kept)
        if self.preprocess_logits_for_metrics is not None:
            logits = self.preprocess_logits_for_metrics(logits, labels)
        predictions.add(logits, labels, real)

    def _evaluation_model(self) -> torch.nn.Module:
        """The model in evaluation mode on the card, in HPU graphs where they are asked for and training is over."""
        if self.is_deepspeed_enabled and self.deepspeed is None:
            if is_deepspeed_zero3_enabled():
                deepspeed_init(self, num_training_steps=0, inference=True)
                self.deepspeed = self.model_wrapped = self.accelerator.prepare(self.model)
            else:
                self._move_model_to_device(self.model, self.args.device)
        elif self.is_fsdp_enabled and not self.is_in_train and not hasattr(self.model, "_fsdp_wrapped_module"):
            self.model = self.model_wrapped = self.accelerator.prepare(self.model)
        elif self.args.bf16_full_eval and not self.args.do_train:  # transformers leaves it to its own evaluation
            self._move_model_to_device(self.model, self.args.device)
        model = self.model
        if not self.is_in_train and self.args.use_hpu_graphs_for_inference:
            if self._graphed_model is None:
                from habana_frameworks.torch.hpu import wrap_in_hpu_graph

                self._graphed_model = wrap_in_hpu_graph(
                    model,
                    disable_tensor_cache=self.args.disable_tensor_cache_hpu_graphs,
                    max_graphs=self.args.max_hpu_graphs,
                )
            model = self._graphed_model
        model.eval()
        return model
