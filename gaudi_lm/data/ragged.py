"""Rows of tokens of any lengths as two flat arrays: all tokens, and how many each row has."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import numpy as np
from datasets import Dataset

from gaudi_lm.arguments.definitions import LMTrainingArguments
from gaudi_lm.data.sampling import row_lengths

logger = logging.getLogger("gaudi_lm")

MOST_LENGTHS, MULTIPLE = 4, 8  # of the lengths that batches are padded to


def join_rows(*parts: tuple[np.ndarray, np.ndarray] | list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Row by row, the tokens of all parts one after the other.

    Args:
        parts: each ``(tokens, lengths)``, int32 of shape ``[sum(lengths)]`` and int64 of shape ``[rows]``, or a list
            of tokens that every row gets at this place.

    Returns:
        ``(tokens, lengths)`` of the joined rows.
    """
    rows = next(len(part[1]) for part in parts if isinstance(part, tuple))
    arrays = [
        part if isinstance(part, tuple) else (np.tile(np.array(part, np.int32), rows), np.full(rows, len(part)))
        for part in parts
    ]
    lengths = np.sum([own for _, own in arrays], axis=0)
    joined = np.empty(int(lengths.sum()), dtype=np.int32)
    position = np.cumsum(lengths) - lengths
    for tokens, own in arrays:
        joined[np.repeat(position - (np.cumsum(own) - own), own) + np.arange(len(tokens))] = tokens
        position = position + own
    return joined, lengths


def shorten_rows(tokens: np.ndarray, lengths: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """The first ``limit`` tokens of each row, as ``(tokens, lengths)``."""
    position = np.arange(len(tokens)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return tokens[position < limit], np.minimum(lengths, limit)


def bucket_lengths(lengths: np.ndarray, batch_size: int, max_length: int) -> list:
    """The few lengths to pad batches to that waste the least, for these row lengths.

    A batch of random rows is padded to the smallest chosen length that holds its longest row. Exact, by dynamic
    programming over the distribution of the longest of ``batch_size`` rows.

    Args:
        lengths: tokens of each row, int of shape ``[rows]``, each at most ``max_length``.

    Returns:
        At most four rising lengths, multiples of 8 except ``max_length``; the last one holds every row.
    """
    ends = np.unique(np.minimum(-(-np.unique(lengths) // MULTIPLE) * MULTIPLE, max_length))
    below = np.searchsorted(np.sort(lengths), ends, side="right") / len(lengths)
    longest = below**batch_size  # chance that a batch fits into each length
    # cost[i]: expected length of batches that fit into ends[i], with ends[i] chosen and one length less at each round
    cost, chosen = ends * longest, [[int(end)] for end in ends]
    for _ in range(MOST_LENGTHS - 1):
        share = longest[:, None] - longest[None, :]  # [i, j]: batches that fit into i and not into j
        total = np.where(share >= 0, cost[None, :] + ends[:, None] * share, np.inf)
        total[np.triu_indices(len(ends))] = np.inf
        best = total.argmin(1)
        better = total[np.arange(len(ends)), best] < cost
        chosen = [
            [*chosen[best[i]], int(ends[i])] if better[i] else chosen[i]
            for i in range(len(ends))
        ]  # fmt: skip
        cost = np.where(better, total[np.arange(len(ends)), best], cost)
    return chosen[-1]


def padded_lengths(splits: Iterable, max_length: int, pad_to_max_length: bool, args: LMTrainingArguments) -> list[int]:
    """The lengths to pad batches to: on a card at most four, so that it compiles few graphs.

    Args:
        splits: datasets with ``input_ids``, or streams, whose lengths are not known.

    Returns:
        Rising lengths; none where a batch is padded to its longest row.
    """
    if pad_to_max_length or args.context_parallel_size > 1:
        return [max_length]
    if args.device.type != "hpu":
        return []
    if all(isinstance(split, Dataset) for split in splits):
        random_rows = 1 if args.group_by_length else args.per_device_train_batch_size
        lengths = bucket_lengths(np.concatenate([*map(row_lengths, splits)]), random_rows, max_length)
    else:
        lengths = sorted({-(-max_length * part // 4) for part in (1, 2, 3, 4)})
    logger.info("batches are padded to one of the lengths %s", lengths)
    return lengths


def unpadded(row: dict, name: str = "input_ids") -> np.ndarray | list[int]:
    """A column of a row without what its own ``attention_mask``, if it has one, tells as padding, to be made anew."""
    mask = row.get("attention_mask")
    return row[name] if mask is None else np.asarray(row[name])[np.asarray(mask) == 1]


def pad_rows(
    rows: list[np.ndarray], lengths: Sequence[int], padding: int, start: Sequence[int] = (), end: Sequence[int] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Rows side by side, padded behind to the smallest of ``lengths`` that holds all, or else to the longest row.

    Args:
        start, end: tokens put around each row.

    Returns:
        ``(tokens, used)``: int64 of shape ``[rows, length]``, and how many tokens of each are not padding.
    """
    used = np.array([len(row) + len(start) + len(end) for row in rows])
    length = next((length for length in lengths if length >= used.max()), int(used.max()))
    tokens = np.full((len(rows), length), padding, dtype=np.int64)
    for position, row in enumerate(rows):
        tokens[position, len(start) : used[position] - len(end)] = row
        tokens[position, : len(start)] = start
        tokens[position, used[position] - len(end) : used[position]] = end
    return tokens, used
