"""Eager mode: every operation is a graph by itself, compiled once for its shapes."""

import habana_frameworks.torch.core as htcore
import torch
from habana_frameworks.torch import _simulator
from habana_frameworks.torch.hpu.metrics import metric_localcontext
from habana_frameworks.torch.utils.internal import is_lazy


def test_operations_are_graphs():
    assert not is_lazy()
    with metric_localcontext("graph_compilation") as metric:
        x = torch.ones(19, 3, device="hpu")
        y = x.exp() + x
        htcore.mark_step()
        first = metric.stats()[0][1]
        for _ in range(3):
            y = torch.ones(19, 3, device="hpu").exp() + x
        assert metric.stats()[0][1] == first
        torch.ones(18, 3, device="hpu").exp()
        assert metric.stats()[0][1] == first + 2, "fill and exp of a new shape"
    assert y.sum().item() > 0
    assert any(graph["first"] == "exp([18, 3] Float)" for graph in _simulator.compilations())


def test_compiled_function_is_one_graph():
    @torch.compile(backend="hpu_backend")
    def work(x):
        return (x.exp() + 1).sum() * 2

    x = torch.ones(29, device="hpu")
    work(x)
    with metric_localcontext("graph_compilation") as metric:
        torch.testing.assert_close(work(x).cpu(), (torch.ones(29).exp() + 1).sum() * 2)
        assert metric.stats()[0][1] == 0
