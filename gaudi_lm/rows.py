"""Rows of tokens of any lengths as two flat arrays: all tokens, and how many each row has."""

from __future__ import annotations

import numpy as np


def join_rows(*parts: tuple[np.ndarray, np.ndarray] | list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Row by row, the tokens of all parts one after the other.

    Args:
        parts: each ``(tokens, lengths)``, int32 of shape ``[sum(lengths)]`` and int64 of shape ``[rows]``, or a list
            of tokens that every row gets at this place.

    Returns:
        ``(tokens, lengths)`` of the joined rows.
    """
    rows = next(len(part[1]) for part in parts if isinstance(part, tuple))
    parts = [
        part if isinstance(part, tuple) else (np.tile(np.array(part, np.int32), rows), np.full(rows, len(part)))
        for part in parts
    ]
    lengths = sum(part[1] for part in parts)
    joined = np.empty(int(lengths.sum()), dtype=np.int32)
    place = np.cumsum(lengths) - lengths
    for tokens, own in parts:
        joined[np.repeat(place - (np.cumsum(own) - own), own) + np.arange(len(tokens))] = tokens
        place = place + own
    return joined, lengths


def shorten_rows(tokens: np.ndarray, lengths: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """The first ``limit`` tokens of each row, as ``(tokens, lengths)``."""
    place = np.arange(len(tokens)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return tokens[place < limit], np.minimum(lengths, limit)
