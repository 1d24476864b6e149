"""How FP8 numbers are chosen: formats, and when scales are taken from the largest values seen."""

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch


class Grid(NamedTuple):
    """An FP8 format: PyTorch's dtype, and the largest number, which on a Gaudi 2 is 240 for E4M3 (not 448)."""

    dtype: torch.dtype
    largest: float


_E4M3 = Grid(torch.float8_e4m3fn, 240.0)
_E5M2 = Grid(torch.float8_e5m2, 57344.0)


class Directions(NamedTuple):
    """Formats of activations and weights, and of gradients."""

    forward: Grid
    backward: Grid


class Format(Enum):
    """FP8 formats by the real names; HYBRID is E4M3 forward and E5M2 backward."""

    E4M3 = Directions(_E4M3, _E4M3)
    E5M2 = Directions(_E5M2, _E5M2)
    HYBRID = Directions(_E4M3, _E5M2)


@dataclass
class DelayedScaling:
    """A tensor is scaled by the largest values of earlier runs.

    scale = 2 ** (floor(log2(largest number of the format / amax)) - margin), where amax is the largest absolute value
    at the last measurement, or of the last `amax_history_len` ones with `amax_compute_algo="max"`. Measured is every
    `interval`-th run of a layer.

    Args:
        reduce_amax: take the largest value over all ranks of the group, so that all use the same scale.
    """

    margin: int = 0
    interval: int = 1
    fp8_format: Format = Format.HYBRID
    amax_history_len: int = 1
    amax_compute_algo: str = "most_recent"
    reduce_amax: bool = True

    def __post_init__(self):
        if self.amax_compute_algo not in ("max", "most_recent"):
            raise ValueError(f"amax_compute_algo is {self.amax_compute_algo!r}: it is 'max' or 'most_recent'")
        if self.interval < 1 or self.amax_history_len < 1:
            raise ValueError("interval and amax_history_len are at least 1")
