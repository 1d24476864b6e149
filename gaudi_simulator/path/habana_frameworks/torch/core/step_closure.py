"""Marks of a step, and what is to be done once the step before a mark has run."""

from collections.abc import Callable, Sequence

from habana_frameworks.torch import _simulator, hpu
from habana_frameworks.torch.utils.internal import is_lazy, lazy_only

_closures: list[tuple[Callable, tuple]] = []


@lazy_only
def mark_step(device_str: str = "", sync: bool = False) -> None:
    """Close the graph gathered since the last mark.

    What :func:`add_step_closure` was given since the last mark is called now.
    """
    if _simulator.CARDS:
        _simulator.library.gaudi_mark_step()
        if sync:
            hpu.synchronize()
    waiting = _closures[:]
    _closures.clear()
    for function, arguments in waiting:
        function(*arguments)


def _mark_step_if_lazy(device_str: str = "") -> None:
    if is_lazy():
        mark_step(device_str)


@lazy_only
def add_step_closure(closure: Callable, args: Sequence = ()) -> None:
    """Call `closure(*args)` at the next mark, when tensors among `args` have their values."""
    _closures.append((closure, tuple(args)))
