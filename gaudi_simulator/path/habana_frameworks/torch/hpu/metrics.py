"""Counters by the real names. `host_sync`, `compilations` and `collectives` exist on a simulated card only."""

import contextlib
from collections.abc import Iterator

from habana_frameworks.torch import _simulator
from habana_frameworks.torch._simulator import collectives, compilations

__all__ = ["Metric", "collectives", "compilations", "metric_global", "metric_localcontext"]


def _totals(name: str) -> dict[str, int]:
    if name == "graph_compilation":
        return {"TotalNumber": _simulator.library.gaudi_compilations(), "TotalTime": 0, "AvgTime": 0}
    if name == "host_sync":
        return {"TotalNumber": _simulator.library.gaudi_host_syncs(), **_simulator.host_syncs()}
    if name == "cpu_fallback":
        return {"TotalNumber": 0}
    raise ValueError(f"no such metric: {name!r}; there are graph_compilation, cpu_fallback and host_sync")


class Metric:
    """A counter since it was made or reset."""

    def __init__(self, name: str, since_start: bool):
        self.name = name
        self._start = {} if since_start else _totals(name)

    def stats(self) -> list[tuple[str, int]]:
        """("TotalNumber", n) first."""
        return [(key, value - self._start.get(key, 0)) for key, value in _totals(self.name).items()]

    def reset(self) -> None:
        self._start = _totals(self.name)


_global: dict[str, Metric] = {}


def metric_global(name: str) -> Metric:
    """The counter of this process."""
    if name not in _global:
        _totals(name)
        _global[name] = Metric(name, since_start=True)
    return _global[name]


@contextlib.contextmanager
def metric_localcontext(name: str) -> Iterator[Metric]:
    """A counter of what happens inside."""
    yield Metric(name, since_start=False)
