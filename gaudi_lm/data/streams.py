"""Streams of texts: dealt out to ranks, and made into rows while they are read."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from itertools import count, islice

import numpy as np
import torch
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from gaudi_lm.data.blocks import cut
from gaudi_lm.data.columns import batches_of_text
from gaudi_lm.data.masking import encode_lines
from gaudi_lm.data.sampling import SAMPLE_ID
from gaudi_lm.data.tokenization import encode
from gaudi_lm.errors import UserError


def rank_share(
    texts: IterableDataset, column: str, limit: int | None, rank: int, world_size: int
) -> tuple[IterableDataset, int | None]:
    """What one rank trains on: its rows of a stream, and its part of ``--max_train_samples``.

    Whole shards where their number divides evenly, else every ``world_size``-th row; each row goes to one rank.

    Raises:
        UserError: this rank would have nothing to train on, which the others would wait for.
    """
    share = split_dataset_by_node(texts, rank, world_size)
    if not any(text.strip() for batch in batches_of_text(share, column, size=100) for text in batch):
        if world_size == 1:
            raise UserError(f"the stream holds no text in column {column!r}")
        raise UserError(
            f"rank {rank} of {world_size} gets no text of the stream, which comes in {texts.num_shards} file(s) or "
            "shard(s): use fewer ranks, or files that hold more rows each"
        )
    if limit is None:
        return share, None
    if limit < world_size:
        raise UserError(f"--max_train_samples {limit}: fewer than the {world_size} ranks that share the stream")
    return share, limit // world_size + (rank < limit % world_size)


class RepeatedRows(torch.utils.data.IterableDataset):
    """A stream over and over, its rows numbered under ``sample_id``; one with ``set_epoch``, as those of ``datasets``
    have it, is told each time, and shuffles anew.

    The steps end a run, not the stream. A resumed run passes over the rows of the steps before, which may go round.
    """

    def __init__(self, rows: torch.utils.data.IterableDataset):
        self.rows = rows

    def __iter__(self) -> Iterator[dict]:
        number = 0
        for epoch in count():
            first = number
            if hasattr(self.rows, "set_epoch"):
                self.rows.set_epoch(epoch)
            for row in self.rows:
                yield {**row, SAMPLE_ID: number}
                number += 1
            if number == first:
                return


def stream_batches(rows: torch.utils.data.IterableDataset, batch_size: int, options: dict) -> DataLoader:
    """Batches of a stream to train on; one that knows its length ends with it.

    Args:
        options: of the ``DataLoader``. A second worker would read the same stream again: there is one at most.
    """
    options = {**options, "num_workers": min(options["num_workers"], 1)}
    if not hasattr(rows, "__len__"):
        return DataLoader(RepeatedRows(rows), batch_size, **options)
    loader = DataLoader(rows, batch_size, **options)
    loader.set_epoch = getattr(rows, "set_epoch", lambda epoch: None)  # for the trainer
    return loader


class StreamedRows(torch.utils.data.IterableDataset):
    """Rows made while they are asked for, from a stream of texts.

    Args:
        texts: a streamed dataset; for training, the rows of one rank.
        size: tokens in a row, at most.
        repeat: start over at the end of the stream, so that --max_steps is always reached.
        max_rows: stop after so many, or with ``repeat`` start over.

    Raises:
        UserError: there is no row.

    Yields:
        ``{"input_ids": int32 array of shape [length], "sample_id": the row's number}``; it goes on in the next pass.
    """

    def __init__(
        self,
        texts: IterableDataset,
        tokenizer: PreTrainedTokenizerBase,
        column: str,
        size: int,
        *,
        repeat: bool = False,
        max_rows: int | None = None,
    ):
        self.texts = texts
        self.tokenizer = tokenizer
        self.column = column
        self.size = size
        self.repeat = repeat
        self.max_rows = max_rows
        next(iter(self))  # rather than after hours of training

    @abstractmethod
    def _rows(self) -> Iterator[np.ndarray]:
        """Rows of one pass over the texts, int32 arrays of shape ``[length]``."""

    def __iter__(self) -> Iterator[dict]:
        number = 0
        while True:
            first = number
            for row in islice(self._rows(), self.max_rows):
                yield {"input_ids": row, "sample_id": number}
                number += 1
            if number == first:
                raise UserError(
                    f"the {'training' if self.repeat else 'validation'} stream holds no text, or less than one row of "
                    f"{self.size} tokens: give more text, or lower --block_size (or --max_seq_length)"
                )
            if not self.repeat:
                return


class StreamedLines(StreamedRows):
    """Each text a row, as :func:`gaudi_lm.data.masking.encode_lines` makes them."""

    def _rows(self) -> Iterator[np.ndarray]:
        for texts in batches_of_text(self.texts, self.column):
            tokens, lengths = encode_lines(texts, self.tokenizer, self.size)
            if len(lengths):
                yield from np.split(tokens, np.cumsum(lengths)[:-1])


class StreamedBlocks(StreamedRows):
    """Blocks of exactly ``size`` tokens.

    With ``repeat`` the remainder of a pass goes on into the next one; with ``max_rows`` a pass has none.
    """

    def __init__(self, *args, add_special_tokens: bool = True, **options):
        self.add_special_tokens = add_special_tokens
        super().__init__(*args, **options)

    def _chunks(self) -> Iterator[np.ndarray]:
        for texts in batches_of_text(self.texts, self.column):
            yield encode(self.tokenizer, texts, self.add_special_tokens)[0]

    def _endless(self) -> Iterator[np.ndarray]:
        while True:
            tokens = 0
            for chunk in self._chunks():
                tokens += len(chunk)
                yield chunk
            if not tokens:
                return

    def _rows(self) -> Iterator[np.ndarray]:
        chunks = self._endless() if self.repeat and self.max_rows is None else self._chunks()
        for blocks in cut(chunks, self.size):
            yield from blocks
