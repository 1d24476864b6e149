"""The region in which layers compute in FP8, and the delayed scaling of one tensor."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from .recipe import DelayedScaling, Grid


@dataclass(frozen=True)
class Settings:
    """What holds in the innermost `fp8_autocast`."""

    enabled: bool = False
    recipe: DelayedScaling = field(default_factory=DelayedScaling)
    group: torch.distributed.ProcessGroup | None = None
    force_measurement: bool = False


_settings = [Settings()]  # not for each thread: backward passes run in threads of their own


def settings() -> Settings:
    return _settings[-1]


def is_fp8_enabled() -> bool:
    return settings().enabled


@contextlib.contextmanager
def fp8_autocast(
    enabled: bool = False,
    force_measurement: bool | None = None,
    fp8_recipe: DelayedScaling | None = None,
    fp8_group: torch.distributed.ProcessGroup | None = None,
) -> Iterator[None]:
    """Layers of this package compute in FP8 inside. Their backward passes follow the recipe of the forward pass.

    Args:
        force_measurement: True measures in each run, whatever the recipe's interval.
        fp8_group: the ranks over which the recipe's `reduce_amax` takes the largest values; by default all.
    """
    _settings.append(Settings(enabled, fp8_recipe or DelayedScaling(), fp8_group, bool(force_measurement)))
    try:
        yield
    finally:
        _settings.pop()


class Scaling:
    """The scale of one tensor of a layer from run to run.

    The first run has no earlier one: it is scaled by its own largest value. Nothing of this is saved in checkpoints.
    """

    def __init__(self):
        self.runs = 0
        self.scale: torch.Tensor | None = None
        self.history: torch.Tensor | None = None

    def quantise(self, x: torch.Tensor, grid: Grid, how: Settings) -> tuple[torch.Tensor, torch.Tensor]:
        """x rounded to FP8 numbers after scaling, and the scale, a float32 of no dimension that is a power of two."""
        measured = self.runs % how.recipe.interval == 0 or how.force_measurement
        new = self._measure(x, grid, how) if measured else self.scale
        used = new if self.scale is None else self.scale
        self.runs += 1
        self.scale = new
        return round_to(x, used, grid), used

    def _measure(self, x: torch.Tensor, grid: Grid, how: Settings) -> torch.Tensor:
        recipe = how.recipe
        amax = x.detach().abs().amax().float() if x.numel() else x.new_zeros((), dtype=torch.float32)
        if recipe.reduce_amax and torch.distributed.is_initialized():
            torch.distributed.all_reduce(amax, torch.distributed.ReduceOp.MAX, how.group)
        if self.history is None or len(self.history) != recipe.amax_history_len:
            self.history = amax.new_zeros(recipe.amax_history_len)
        self.history = torch.cat((amax.reshape(1), self.history[:-1]))
        if recipe.amax_compute_algo == "max":
            amax = self.history.amax()
        exponent = torch.floor(torch.log2(grid.largest / amax)) - recipe.margin
        scale = torch.exp2(exponent)
        # Nothing but zeros, or a value that is not finite: the scale stays what it was.
        before = torch.ones_like(scale) if self.scale is None else self.scale
        return torch.where(torch.isfinite(scale) & (scale > 0), scale, before)


def round_to(x: torch.Tensor, scale: torch.Tensor, grid: Grid) -> torch.Tensor:
    """x * scale as FP8 numbers, rounded to nearest even; what is too large becomes the largest number."""
    return (x.float() * scale).clamp(-grid.largest, grid.largest).to(grid.dtype)


def widen(rounded: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The numbers that `rounded` stands for: exact, as scales are powers of two."""
    return (rounded.float() / scale).to(dtype)
