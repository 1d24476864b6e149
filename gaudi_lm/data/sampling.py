"""Which rows are in which batch: by seed and epoch alone, the same for every number of interruptions."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from transformers.trainer_pt_utils import get_length_grouped_indices

from gaudi_lm.arguments.definitions import LMTrainingArguments
from gaudi_lm.errors import UserError

FILLER_SAMPLE = "padding_row"
SAMPLE_ID = "sample_id"
REAL_SAMPLES = "real_rows"


class TrainingRows(torch.utils.data.Dataset):
    """Rows as numpy arrays, asked for by numbers ``epoch * len + row``; a complement, ``~number``, completes a batch.

    Each row carries that number as ``sample_id``: a collator that draws at random seeds itself from it, so that what
    it draws is new in each epoch and the same after a resume, in any number of worker processes. So is what the
    dataset's transform draws, with ``seed``.
    """

    def __init__(self, dataset: Dataset, seed: int = 0):
        self.dataset = as_arrays(dataset)
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, numbers: list[int]) -> list[dict]:
        own = [number if number >= 0 else ~number for number in numbers]
        rows = read_rows(self.dataset, [number % len(self.dataset) for number in own], self.seed, own[0])
        for row, number, sample_id in zip(rows, numbers, own, strict=True):
            row[SAMPLE_ID] = sample_id
            if number < 0:
                row[FILLER_SAMPLE] = True
        return rows


def as_arrays(dataset: Dataset) -> Dataset:
    """A dataset whose rows are numpy arrays, or what its ``set_transform`` makes, if it has one."""
    return dataset if dataset.format["type"] == "custom" else dataset.with_format("numpy")


def read_rows(dataset: Dataset, indices: list[int], *numbers: int) -> list[dict]:
    """Rows of a dataset that are read at once, several times as fast as one by one.

    Args:
        numbers: on which depends what a transform draws, see :func:`draws_of`.
    """
    with draws_of(*numbers) if dataset.format["type"] == "custom" else contextlib.nullcontext():
        columns = dataset[indices]
    return [{name: column[index] for name, column in columns.items()} for index in range(len(indices))]


def row_lengths(dataset: Dataset) -> np.ndarray:
    """Tokens of each row, int64 of shape ``[rows]``; of a ``set_transform`` those of the rows that it makes now."""
    if dataset.format["type"] != "custom":
        return pc.list_value_length(dataset.with_format("arrow")[:]["input_ids"]).to_numpy().astype(np.int64)
    with draws_of(0):
        rows = (row for batch in dataset.iter(1000) for row in batch["input_ids"])
        return np.fromiter(map(len, rows), np.int64, len(dataset))


def loader_options(args: LMTrainingArguments) -> dict:
    """Options of a ``DataLoader`` by the flags, in training and evaluation alike."""
    return {
        "num_workers": args.dataloader_num_workers,
        "pin_memory": args.dataloader_pin_memory and args.device.type != "cpu",
        "prefetch_factor": args.dataloader_prefetch_factor,
    }


@contextlib.contextmanager
def draws_of(*numbers: int) -> Iterator[None]:
    """What torch, NumPy and Python draw in here depends on these numbers alone, and what they draw later not on it."""
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])


def ignore_filler_samples(
    collator: Callable[[list[dict]], dict],
    labels_from_inputs: bool = False,
    part: tuple[int, int] = (0, 1),
    seed: tuple[int, ...] = (),
) -> Callable[[list[dict]], dict]:
    """Any collator of ``transformers`` or of one's own, for the batches of a trainer.

    - A row's ``sample_id`` reaches only a collator with a true attribute ``needs_sample_id``. What others draw depends
      on that of a batch's first row: a resumed run draws it again, in any number of worker processes.
    - Rows that only complete a batch get the labels -100, so that they add nothing to any sum; batches say under
      ``real_rows`` which are the others, bool of shape ``[rows]``.
    - Token ids and labels become int64.

    Args:
        labels_from_inputs: where the collator makes no labels, each token that is not padding is one.
        part: ``(k, n)`` takes the k-th of n parts of each row, see :func:`cut_rows`.
        seed: numbers on which such draws depend as well.
    """
    whole = partial(_collate, collator, labels_from_inputs, seed)
    return whole if part[1] == 1 else partial(_collate_part, whole, part)


def _collate_part(collate: Callable[[list[dict]], dict], part: tuple[int, int], rows: list[dict]) -> dict:
    return cut_rows(collate(rows), *part)


def cut_rows(batch: dict[str, torch.Tensor], part: int, parts: int) -> dict[str, torch.Tensor]:
    """The ``part``-th of ``parts`` parts of the rows of a batch, for context parallelism.

    Labels of the part have one column more than its tokens: the last token predicts the first label of the next part.
    The part has `position_ids` (batch, tokens of the part) int64, those in the whole row: Qwen2 of optimum-habana
    1.21.2 numbers each part from 0 without them.

    Raises:
        UserError: the length of the rows cannot be divided so.
    """
    rows, length = batch["input_ids"].shape
    if length % parts**2:
        raise UserError(f"--context_parallel_size {parts}: rows of {length} tokens are no multiple of {parts**2}")
    start, end = length // parts * part, length // parts * (part + 1)
    cut = {
        name: value[:, start : end + (name == "labels")] if value.shape[:2] == (rows, length) else value
        for name, value in batch.items()
    }
    if end == length:
        cut["labels"] = torch.nn.functional.pad(cut["labels"], (0, 1), value=-100)
    return {"position_ids": torch.arange(start, end).repeat(rows, 1), **cut}


def _needs_sample_id(collator: Callable) -> bool:
    while isinstance(collator, partial):
        collator = collator.func
    return getattr(collator, "needs_sample_id", False)


def _collate(
    collator: Callable[[list[dict]], dict], labels_from_inputs: bool, seed: tuple[int, ...], rows: list[dict]
) -> dict:
    completing = torch.tensor([row.get(FILLER_SAMPLE, False) for row in rows])
    seeds_itself = _needs_sample_id(collator) or not isinstance(rows[0].get(SAMPLE_ID), int)
    hidden = {FILLER_SAMPLE} if _needs_sample_id(collator) else {FILLER_SAMPLE, SAMPLE_ID}
    with contextlib.nullcontext() if seeds_itself else draws_of(*seed, rows[0][SAMPLE_ID]):
        batch = dict(collator([{name: value for name, value in row.items() if name not in hidden} for row in rows]))
    if labels_from_inputs and batch.get("labels") is None:
        batch["labels"] = batch["input_ids"].clone()
        mask = batch.get("attention_mask")
        if mask is not None and mask.dim() == 2:
            batch["labels"][mask == 0] = -100
    for name in ("input_ids", "labels"):
        if batch.get(name) is not None:
            batch[name] = batch[name].long()
    if batch.get("labels") is not None:
        batch["labels"][completing] = -100
    batch[REAL_SAMPLES] = ~completing
    return batch


class TrainingBatches:
    """Batches of one rank: a new permutation each epoch, every batch full.

    Batch k of an epoch belongs to rank ``k % world_size``, so that n ranks take in one step the rows that one rank
    with n times the batch takes. The last step is completed with the first rows of the epoch's permutation, which come
    as complements and are not trained on again, or left out with ``drop_last``.

    Raises:
        UserError: there are no rows, or ``drop_last`` leaves none.
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
        if not self.rows:
            raise UserError("train_dataset has no rows")
        if not self.steps:
            raise UserError(
                f"--dataloader_drop_last leaves nothing: {self.rows} rows are less than one step of {per_step}"
            )
        self._left, self._resumed, self._done = self.steps, -1, 0
        self.lengths: list[int] | None = None
        if group_by_length:
            self.lengths = row_lengths(dataset).tolist()

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self._left = self.steps - (self._done if epoch == self._resumed else 0)

    def resume_after(self, steps: int, batches: int) -> None:
        """Count in the epoch of a resumed run only the batches that are left.

        GaudiTrainer (optimum-habana 1.21) counts batches from where it goes on, but ends the last step of an epoch,
        which may accumulate fewer of them, by the number of all.

        Args:
            steps: optimizer steps before.
            batches: that a step accumulates.
        """
        self._resumed, steps = divmod(steps, -(-self.steps // batches))
        self._done = steps * batches

    def __len__(self) -> int:
        return self._left

    def _order(self) -> np.ndarray:
        if self.lengths is None:
            return np.random.default_rng([self.seed, self.epoch]).permutation(self.rows)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return np.array(
            get_length_grouped_indices(self.lengths, self.batch_size * self.world_size, generator=generator)
        )

    def __iter__(self) -> Iterator[list[int]]:
        order = np.resize(self._order(), self.steps * self.batch_size * self.world_size) + self.epoch * self.rows
        order[self.rows :] = ~order[self.rows :]
        for step in range(self.steps):
            start = (step * self.world_size + self.rank) * self.batch_size
            yield order[start : start + self.batch_size].tolist()


def count_tokens(batch: dict[str, torch.Tensor]) -> tuple[int, int, int]:
    """Rows, tokens that are not padding, and positions of a batch in host memory.

    A batch without an attention mask has no padding. A block-diagonal mask ``[rows, length, length]`` or
    ``[rows, 1, length, length]`` counts by its diagonal. Rows that only complete a batch are neither rows nor tokens:
    ``real_rows``, which tells them and is not for the model, is taken out of the batch.
    """
    rows, length = batch["input_ids"].shape
    real = batch.pop(REAL_SAMPLES, torch.ones(rows, dtype=torch.bool))
    mask = batch.get("attention_mask")
    if mask is None:
        return int(real.sum()), int(real.sum()) * length, rows * length
    if mask.dim() > 2:
        mask = mask.diagonal(dim1=-2, dim2=-1)
        mask = mask if not mask.is_floating_point() else mask == 0
    return int(real.sum()), int(mask[real].bool().sum()), rows * length
