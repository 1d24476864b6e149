"""FP8 and activation checkpointing: what is computed again uses the scales that it had the first time."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from .fp8 import Scaling, Settings, round_to
from .recipe import Grid


class _Recording:
    """The scales of one call of a checkpointed function, in the order in which layers asked for them."""

    def __init__(self):
        self.scales: list[tuple[Scaling, torch.Tensor]] = []
        self.repeated = 0


_recordings: list[tuple[_Recording, bool]] = []


def quantise(scaling: Scaling, x: torch.Tensor, grid: Grid, how: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    """As `scaling.quantise`, but with the scale of the first time where a checkpointed function runs again."""
    if not _recordings:
        return scaling.quantise(x, grid, how)
    recording, repeats = _recordings[-1]
    if repeats:
        known, scale = recording.scales[recording.repeated]
        if known is not scaling:
            raise RuntimeError("a checkpointed function called its FP8 layers in another order the second time")
        recording.repeated += 1
        return round_to(x, scale, grid), scale
    rounded, scale = scaling.quantise(x, grid, how)
    recording.scales.append((scaling, scale))
    return rounded, scale


def activation_checkpointing() -> Callable[[Callable], Callable]:
    """A decorator for a function that is given to a checkpoint: its second call computes again what the first did."""

    def decorate(function: Callable) -> Callable:
        recording: _Recording | None = None

        @functools.wraps(function)
        def call(*args, **kwargs):
            nonlocal recording
            repeats = recording is not None
            recording = recording or _Recording()
            recording.repeated = 0
            _recordings.append((recording, repeats))
            try:
                return function(*args, **kwargs)
            finally:
                _recordings.pop()

        return call

    return decorate
