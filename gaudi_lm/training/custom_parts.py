"""What a copied script hands to `build_trainer`: checked before anything runs, and fitted into the trainer."""

from __future__ import annotations

import dis
import functools
import inspect
import json
import logging
import re
from collections import defaultdict
from collections.abc import Callable
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel, Trainer
from transformers.modeling_utils import _get_tied_weight_keys
from transformers.trainer_utils import EvalPrediction, denumpify_detensorize

from gaudi_lm.data.masked_token_budget import IGNORE_INDEX
from gaudi_lm.errors import UserError

if TYPE_CHECKING:
    from gaudi_lm.training.trainer import LMTrainer

logger = logging.getLogger("gaudi_lm")

# Methods of transformers' Trainer that the suite's trainer does without, and what to give `build_trainer` instead.
NEVER_CALLED = {
    "prediction_step": "loss_func or compute_metrics",
    "prediction_loop": "loss_func or compute_metrics",
    "evaluation_loop": "loss_func or compute_metrics, or override evaluate",
    "get_batch_samples": "a collator",
    "get_eval_dataloader": "eval_dataset and evaluation_collator",
    "get_test_dataloader": "evaluation_collator",
    "_get_eval_sampler": "an eval_dataset in that order",
    "_get_train_sampler": "a train_dataset made so, or override get_train_dataloader",
}


def check_parts(
    trainer_class: type[Trainer], base: type[Trainer], loss_func: Callable | None, args, train_dataset, eval_dataset
) -> None:
    """Refuse what `build_trainer` could not use; say where a ``compute_loss`` of one's own is not called.

    Args:
        base: the suite's own trainer.
        args: the training arguments.
        train_dataset, eval_dataset: None, a dataset, or for evaluation a dict of them.

    Raises:
        UserError: a method that is never called, rows that cannot be read by their numbers, or a flag without effect.
    """
    if loss_func is not None and args.label_smoothing_factor:
        raise UserError("--label_smoothing_factor has no effect on a loss_func: leave it out, or smooth there")
    if loss_func is not None:
        _check_signature(loss_func, "loss_func", "outputs, labels")
    name = trainer_class.__name__
    if not issubclass(trainer_class, base):
        raise UserError(f"trainer_class: {name} is no subclass of {base.__name__}: derive it from that")
    own = {method for cls in trainer_class.__mro__ if cls not in base.__mro__ for method in vars(cls)}
    for method, instead in NEVER_CALLED.items():
        if method in own:
            raise UserError(f"{name}.{method} is never called: give build_trainer {instead}")
    if "compute_loss" in own:
        _check_signature(functools.partial(trainer_class.compute_loss, None), f"{name}.compute_loss", "model, inputs")
    if "compute_loss" in own and eval_dataset is not None:
        logger.warning("evaluation does not call %s.compute_loss: give build_trainer a loss_func for both", name)
    for rows in (train_dataset, *(eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset])):
        if rows is not None and not isinstance(rows, (Dataset, IterableDataset)):
            raise UserError(
                f"build_trainer takes a datasets.Dataset, not a {type(rows).__name__}: "
                "datasets.Dataset.from_list(rows) makes one"
            )
    sets = eval_dataset.items() if isinstance(eval_dataset, dict) else [("", eval_dataset)]
    for name, rows in sets:
        if isinstance(rows, Dataset) and not len(rows):  # its loss would be the mean of nothing
            raise UserError(f"eval_dataset{name and f' {name}'} has no rows")
    if isinstance(train_dataset, IterableDataset) and not hasattr(train_dataset, "__len__") and args.max_steps <= 0:
        raise UserError("--max_steps: the length of a stream is not known in advance; give the number of steps")


def _check_signature(function: Callable, name: str, first: str) -> None:
    try:
        inspect.signature(function).bind(None, None, num_items_in_batch=None)
    except TypeError as error:
        raise UserError(f"{name} takes {first} and num_items_in_batch: {error}") from error


def check_budget(budget: object, *collators: object) -> None:
    """Refuse a number of rows for the head of a masked model without a collator that undoes masks beyond it.

    Args:
        budget: ``max_predictions_per_seq`` of :func:`gaudi_lm.modeling.loss.install_token_loss`.

    Raises:
        UserError: a collator has no such ``masked_token_budget``.
    """
    for collator in collators:
        if budget is not None and getattr(collator, "masked_token_budget", None) != budget:
            raise UserError(
                f"max_predictions_per_seq: {getattr(collator, '__name__', type(collator).__name__)} does not undo "
                "masks beyond it: leave it out, or let the collator have it as its attribute masked_token_budget"
            )


def check_class(model: object) -> None:
    """Refuse a model without the configuration, the head and the ways to save it that transformers gives its models.

    Raises:
        UserError: it is neither one of transformers nor one of peft.
    """
    if not isinstance(model, (PreTrainedModel, PeftModel)):
        raise UserError(
            f"build_trainer takes a PreTrainedModel of transformers or a PeftModel, not a {type(model).__name__}"
        )


def check_weights(model: PreTrainedModel | PeftModel, args) -> None:
    """Refuse to train a model whose weights are all frozen, or float16, where the epsilon of Adam is 0, or whose class
    does not declare those that it shares: in the end it could not be saved.

    Args:
        args: the training arguments.

    Raises:
        UserError: names the model, or the weights that it shares.
    """
    if args.do_train and not any(weight.requires_grad for weight in model.parameters()):
        raise UserError(f"--do_train: no weight of {type(model).__name__} has requires_grad: all of them are frozen")
    half = any(weight.requires_grad and weight.dtype == torch.float16 for weight in model.parameters())
    if args.do_train and half and not args.deepspeed:  # which trains copies in float32; FSDP on a card does not
        raise UserError("--torch_dtype: small updates of float16 weights round to 0: give float32 or bfloat16")
    if not (args.do_train and args.save_safetensors) or isinstance(model, PeftModel):
        return
    declared, names = _get_tied_weight_keys(model) or [], defaultdict[int, list[str]](list)
    for name, weight in model.named_parameters(remove_duplicate=False):
        if not any(re.search(pattern, name) for pattern in declared):
            names[id(weight)].append(name)
    for shared in names.values():
        if len(shared) > 1:
            raise UserError(
                f"{type(model).__name__}: {' and '.join(shared)} are one tensor, which safetensors saves once: give "
                f'the class _tied_weights_keys = ["{shared[-1]}"], or the run --save_safetensors False'
            )


def own_figures(compute_metrics: Callable, predictions, labels) -> dict[str, Any]:
    """What a ``compute_metrics`` of one's own makes of predictions, as JSON has it: arrays are lists.

    One for ``--batch_eval_metrics`` gets all predictions as its last batch.

    Raises:
        UserError: it returns no dict, or what no file of metrics can hold.
    """
    last = {"compute_result": True} if "compute_result" in inspect.signature(compute_metrics).parameters else {}
    figures = compute_metrics(EvalPrediction(predictions=predictions, label_ids=labels), **last)
    return as_json(figures, "compute_metrics returns")


def as_json(figures: dict, what: str) -> dict[str, Any]:
    """Figures as the files of a run have them: numbers of NumPy and of tensors as those of Python, arrays as lists.

    Args:
        what: makes or takes them, for the message.

    Raises:
        UserError: they are no dict, or nothing that a file can hold.
    """
    if not isinstance(figures, dict):
        raise UserError(f"{what} a dict of figures by name, not {figures!r:.80}")
    try:
        return json.loads(json.dumps(denumpify_detensorize(figures), default=lambda value: value.tolist()))
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{what} figures that JSON can hold, not {figures!r:.80}: {error}") from error


def returning_loss(compute_loss: Callable, name: str) -> Callable:
    """A ``compute_loss`` or ``loss_func`` of one's own that raises a UserError where it returns no loss.

    Args:
        name: for the message.
    """

    @functools.wraps(compute_loss)
    def compute(*args, **kwargs) -> Any:
        found = compute_loss(*args, **kwargs)
        loss = found[0] if isinstance(found, tuple) else found  # with the outputs, where these are asked for
        if not isinstance(loss, Tensor):
            raise UserError(f"{name} returns a loss, a tensor of one number, not {loss!r:.80}")
        if loss.numel() != 1:
            raise UserError(f"{name} returns a loss, a tensor of one number, not one of shape {tuple(loss.shape)}")
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise UserError(f"{name} returns a loss that no weight has a gradient of: it is detached from the outputs")
        return found

    return compute


def _function_of(called: Any) -> FunctionType | None:
    """What runs where this is called: a function, one with some arguments filled in, a method, an object, a module."""
    called = inspect.unwrap(called)
    if isinstance(called, functools.partial):
        return _function_of(called.func)
    if isinstance(called, FunctionType):
        return called
    if not inspect.ismethod(called):
        called = called.forward if isinstance(called, torch.nn.Module) else called.__call__
    return getattr(called, "__func__", None)


def is_mean(compute_loss: Callable) -> bool:
    """Whether a trainer's ``compute_loss``, or a ``loss_func``, leaves its ``num_items_in_batch`` alone, by itself or
    among keywords: then its loss is a batch's own."""
    function = _function_of(compute_loss)
    if function is None:
        return False
    parameters = inspect.signature(function).parameters
    others = {name for name, one in parameters.items() if one.kind is inspect.Parameter.VAR_KEYWORD}
    where = {"num_items_in_batch"} if "num_items_in_batch" in parameters else others
    read = (step.argval for step in dis.get_instructions(function) if step.opname.startswith("LOAD"))
    return not any(where.intersection(names if isinstance(names, tuple) else (names,)) for names in read)


def _has_labels(labels: Tensor, trainer: LMTrainer) -> Tensor:
    return (labels[:, int(trainer.causal) :] != IGNORE_INDEX).any()


def labels_of_mean(labels: Tensor, trainer: LMTrainer) -> Tensor:
    """Labels for a loss that is a mean: all token 0 where a batch has none, as one whose rows only complete the step.

    The mean of nothing is NaN, and so are the gradients of its share, which is 0.
    """
    return torch.where(_has_labels(labels, trainer), labels, 0)


def share_of_step(mean: Tensor, labels: Tensor, trainer: LMTrainer) -> Tensor:
    """What the mean of a batch adds to the loss of its step, which is the mean of the batches that have labels."""
    return torch.where(_has_labels(labels, trainer), mean / trainer.batches_with_labels, 0.0)


def own_compute_loss(trainer: LMTrainer) -> Callable:
    """The ``compute_loss`` of a trainer class of one's own, checked; one that returns the mean of its batch as
    :func:`share_of_step`. So does transformers' Trainer; that of optimum-habana would add up a step's means."""
    compute_loss = type(trainer).compute_loss
    checked = returning_loss(functools.partial(compute_loss, trainer), f"{type(trainer).__name__}.compute_loss")
    if not is_mean(compute_loss):
        return checked

    def compute(model, inputs, *args, **kwargs):
        labels = inputs["labels"]
        found = checked(model, {**inputs, "labels": labels_of_mean(labels, trainer)}, *args, **kwargs)
        return share_of_step(found, labels, trainer) if isinstance(found, Tensor) else found

    return compute
