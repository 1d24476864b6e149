"""Which rows are in which batch: by seed and epoch alone, the same for every number of interruptions."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from transformers.trainer_pt_utils import get_length_grouped_indices

from .runtime import UserError


class TrainingRows(torch.utils.data.Dataset):
    """Rows as numpy arrays, asked for by numbers ``epoch * len + row``.

    Each row carries that number as ``draw``: a collator that draws at random seeds itself from it, so that the draw is
    new in each epoch and the same after a resume, in any number of worker processes.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset.with_format("numpy")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, numbers: list[int]) -> list[dict]:
        columns = self.dataset[[number % len(self.dataset) for number in numbers]]
        return [
            {**{name: column[place] for name, column in columns.items()}, "draw": number}
            for place, number in enumerate(numbers)
        ]


class TrainingBatches:
    """Batches of one rank: a new permutation each epoch, every batch full.

    Batch k of an epoch belongs to rank ``k % world_size``, so that n ranks take in one step the rows that one rank
    with n times the batch takes. The last step is completed with the first rows of the epoch's permutation, or left
    out with ``drop_last``.

    Raises:
        UserError: ``drop_last`` leaves nothing.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        group_by_length: bool = False,
    ):
        self.rows = len(dataset)
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        per_step = batch_size * world_size
        self.steps = self.rows // per_step if drop_last else -(-self.rows // per_step)
        if not self.steps:
            raise UserError(
                f"--dataloader_drop_last leaves nothing: {self.rows} rows are less than one step of {per_step}"
            )
        self.lengths: list[int] | None = None
        if group_by_length:
            column = dataset.with_format("arrow")[:]["input_ids"]
            self.lengths = pc.list_value_length(column).to_pylist()

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps

    def _order(self) -> np.ndarray:
        if self.lengths is None:
            return np.random.default_rng([self.seed, self.epoch]).permutation(self.rows)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return np.array(
            get_length_grouped_indices(self.lengths, self.batch_size * self.world_size, generator=generator)
        )

    def __iter__(self) -> Iterator[list[int]]:
        order = np.resize(self._order(), self.steps * self.batch_size * self.world_size) + self.epoch * self.rows
        for step in range(self.steps):
            start = (step * self.world_size + self.rank) * self.batch_size
            yield order[start : start + self.batch_size].tolist()


def count_tokens(batch: dict[str, torch.Tensor]) -> tuple[int, int, int]:
    """Rows, tokens that are not padding, and positions of a batch in host memory.

    A batch without an attention mask has no padding. A block-diagonal mask ``[rows, length, length]`` or
    ``[rows, 1, length, length]`` counts by its diagonal.
    """
    rows, length = batch["input_ids"].shape
    mask = batch.get("attention_mask")
    if mask is None:
        return rows, rows * length, rows * length
    if mask.dim() > 2:
        mask = mask.diagonal(dim1=-2, dim2=-1)
        mask = mask if not mask.is_floating_point() else mask == 0
    return rows, int(mask.bool().sum()), rows * length
