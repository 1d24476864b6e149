"""The rows of an evaluation: static shapes, each counted once on all ranks; and the precision of its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from gaudi_lm.data.sampling import PADDING_ROW, silence_padding_rows


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
        if not self.sized:
            raise TypeError("the length of a stream is not known")
        return self._padded(len(self.dataset))

    def __iter__(self) -> Iterator[dict]:
        return self._rows() if self.sized else self._streamed_rows()

    def _rows(self) -> Iterator[dict]:
        """Of several worker processes each yields whole batches in its turn, so that their order does not change."""
        worker = get_worker_info()
        turn, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        rows = self.dataset.with_format("numpy")
        own = range(self.rank, self.rows_seen, self.world_size)
        for place in range(len(self)):
            if place // self.batch_size % workers != turn:
                continue
            index = own[min(place, len(own) - 1)] if own else 0
            row = {**rows[index], "draw": index}
            yield row if place < len(own) else {**row, PADDING_ROW: True}

    def _streamed_rows(self) -> Iterator[dict]:
        row, own = None, 0
        for index, any_row in enumerate(self.dataset):
            self.rows_seen = index + 1
            if index % self.world_size == self.rank:
                row, own = {**any_row, "draw": index}, own + 1
                yield dict(row)
        if row is None and self.rows_seen:
            row = {**next(iter(self.dataset)), "draw": 0}
        for _ in range(self._padded(self.rows_seen) - own):
            yield {**row, PADDING_ROW: True}


def evaluation_loader(
    dataset, collator: Callable[[list[dict]], dict], batch_size: int, rank: int, world_size: int, **options
) -> DataLoader:
    """Batches of the rows of this rank; ``labels`` of completing rows are -100.

    Args:
        options: of the ``DataLoader``; a stream is read by this process alone, which counts its rows.
    """
    rows = EvaluationRows(dataset, batch_size, rank, world_size)
    if not rows.sized:
        options |= {"num_workers": 0, "prefetch_factor": None}
    return DataLoader(rows, batch_size=batch_size, collate_fn=silence_padding_rows(collator), **options)


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
