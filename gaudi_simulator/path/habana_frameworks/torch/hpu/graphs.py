"""HPU graphs: a captured module is one graph for every set of shapes, an explicit capture is run again by `replay`."""

import contextlib
import functools
from collections.abc import Iterator

import torch

from habana_frameworks.torch import _simulator


def wrap_in_hpu_graph(
    module: torch.nn.Module,
    asynchronous: bool = False,
    disable_tensor_cache: bool = False,
    dry_run: bool = False,
    max_graphs: int | None = None,
    **_options,
) -> torch.nn.Module:
    """Make every call of the module's `forward` one graph, compiled for every new set of shapes; returns the module.

    The calls run in Python each time, where a card replays what it captured: results are those of the module itself.
    """
    if not _simulator.CARDS or hasattr(module, "clear_cache"):
        return module
    forward = module.forward

    @functools.wraps(forward)
    def captured(*args, **kwargs):
        with _simulator.one_graph():
            return forward(*args, **kwargs)

    module.forward = captured
    module.clear_cache = module.clear_inputs = lambda: None
    return module


class ModuleCacher:
    """HPU graphs for training: as `wrap_in_hpu_graph`, for a module whose gradients are wanted."""

    def __init__(self, max_graphs: int = 10):
        self.max_graphs = max_graphs

    def __call__(self, model: torch.nn.Module, inplace: bool = False, **_options) -> torch.nn.Module:
        if not inplace:
            raise NotImplementedError("the simulated ModuleCacher changes the model in place: pass inplace=True")
        return wrap_in_hpu_graph(model)


class HPUGraph:
    """A graph captured once and replayed in the same memory.

    As on a card, capturing computes nothing; and inside it the host may not ask for a value.
    """

    def __init__(self):
        self._number = None

    def capture_begin(self, *_args, **_kwargs) -> None:
        self.reset()
        self._number = torch.ops.gaudi_simulator.capture_begin()

    def capture_end(self) -> None:
        torch.ops.gaudi_simulator.capture_end()

    def replay(self, asynchronous: bool = False) -> None:
        if self._number is None:
            raise RuntimeError("this hpu graph has captured nothing")
        torch.ops.gaudi_simulator.replay(self._number)

    def reset(self) -> None:
        if self._number is not None:
            torch.ops.gaudi_simulator.drop(self._number)
            self._number = None

    def __del__(self):
        with contextlib.suppress(AttributeError):  # at the end of the interpreter
            self.reset()


@contextlib.contextmanager
def graph(hpu_graph: HPUGraph, pool=None, stream=None) -> Iterator[None]:
    """Capture what runs inside."""
    hpu_graph.capture_begin()
    try:
        yield
    finally:
        hpu_graph.capture_end()
