"""Predictions of an evaluation, for ``compute_metrics`` and ``predict``: on the host, in the order of the dataset."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from gaudi_lm.errors import UserError
from gaudi_lm.training.agreement import gather

PADDING = -100  # where batches differ in length, as in transformers


class Predictions:
    """What a model returned for the rows of this rank, and their labels; rows that only complete a batch are left out.

    Predictions are tensors ``[rows, ...]``, or tuples, lists or dicts of such.
    """

    def __init__(self):
        self._batches: list[Any] = []
        self._samples = 0

    def add(self, predictions: Any, labels: Tensor | None, real: Tensor) -> None:
        """Add a batch.

        Args:
            labels: int64 ``[rows, length]``, or None.
            real: bool ``[rows]``, on the host: the rows that count.

        Raises:
            UserError: predictions that are not one or more for each row.
        """
        self._samples += int(real.sum())
        self._batches.append(_to_host((predictions, labels), real.numpy()))

    def over_ranks(self) -> tuple[Any, np.ndarray | None]:
        """``(predictions, labels)`` of all ranks as numpy arrays, as the dataset has them; all ranks must call it."""
        own = _join(self._batches) if self._batches else None
        ranks = gather((self._samples, own))
        samples = [count for count, _ in ranks]
        if not sum(samples):
            return None, None
        joined = _join([part for _, part in ranks if part is not None])
        # Rank r of n has every n-th sample, from the r-th on.
        starts = np.cumsum([0, *samples[:-1]])
        index = np.arange(sum(samples))
        return _select(joined, starts[index % len(ranks)] + index // len(ranks))


def as_float(value: Any) -> Any:
    """Half-precision tensors, nested or not, as float32, which numpy and metrics can take."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value
    return _each(as_float, value)


def _each(function, value: Any, *args) -> Any:
    """``function`` of each part of a tuple, list or dict."""
    if value is None:
        return None
    if isinstance(value, dict):
        return {name: function(part, *args) for name, part in value.items()}
    return type(value)(function(part, *args) for part in value)


def _to_host(value: Any, real: np.ndarray) -> Any:
    if not isinstance(value, Tensor):
        return _each(_to_host, value, real)
    if value.shape[:1] != real.shape:
        raise UserError(
            f"predictions of shape {tuple(value.shape)} for {len(real)} rows: preprocess_logits_for_metrics keeps the "
            "rows apart, since some may only complete a batch"
        )
    return as_float(value).cpu().numpy()[real]


def _select(value: Any, index: np.ndarray) -> Any:
    return value[index] if isinstance(value, np.ndarray) else _each(_select, value, index)


def _join(parts: list[Any]) -> Any:
    first = parts[0]
    if first is None:
        return None
    if isinstance(first, dict):
        return {name: _join([part[name] for part in parts]) for name in first}
    if not isinstance(first, np.ndarray):
        return type(first)(_join(list(column)) for column in zip(*parts, strict=True))
    if first.ndim > 1:
        length = max(part.shape[1] for part in parts)
        parts = [
            np.pad(
                part,
                [(0, 0), (0, length - part.shape[1]), *[(0, 0)] * (part.ndim - 2)],
                constant_values=PADDING,
            )
            for part in parts
        ]
    return np.concatenate(parts)
