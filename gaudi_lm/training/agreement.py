"""What the processes of a run tell each other from host to host, past the cards: nothing here waits for a card."""

from __future__ import annotations

from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

T = TypeVar("T")

_groups: dict[object, distributed.ProcessGroup] = {}


def _host_group() -> distributed.ProcessGroup | None:
    """A gloo group of all ranks, made when all of them first come here; None where there is but one."""
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return None
    world = distributed.group.WORLD
    if world not in _groups:
        # A rank that dies closes its connections; one that writes a large checkpoint may take its time.
        _groups[world] = distributed.new_group(backend="gloo", timeout=timedelta(days=1))
    return _groups[world]


def gather(value: T) -> list[T]:
    """``value`` of each rank, in their order, on every rank; all ranks must call it."""
    group = _host_group()
    if group is None:
        return [value]
    values: list = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value, group=group)
    return values


def from_main(value: T) -> T:
    """``value`` of rank 0, on every rank; all ranks must call it."""
    group = _host_group()
    if group is None:
        return value
    values = [value]
    distributed.broadcast_object_list(values, src=0, group=group)
    return values[0]


class Vote:
    """The highest number that a rank gives; between :meth:`cast` and :meth:`settle` a rank can do other work."""

    def __init__(self):
        self._number = torch.tensor(0)
        self._work: distributed.Work | None = None

    def cast(self, number: int) -> None:
        """Give this rank's number; all ranks must call it."""
        group = _host_group()
        self._number = torch.tensor(number)
        if group is not None:
            self._work = distributed.all_reduce(self._number, distributed.ReduceOp.MAX, group=group, async_op=True)

    def settle(self) -> int:
        """The highest number of all ranks, once the last of them has cast its own."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return int(self._number)
