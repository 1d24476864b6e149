"""Lazy mode: what is a new graph and what is not; HPU graphs; torch.compile; the figures of a run."""

from types import SimpleNamespace

import habana_frameworks.torch as ht
import habana_frameworks.torch.core as htcore
import pytest
import torch
from habana_frameworks.torch.hpex.optimizers import FusedAdamW
from habana_frameworks.torch.hpu.metrics import compilations, metric_global, metric_localcontext

from gaudi_lm.training.device_metrics import DeviceMetrics


def compiled(action) -> int:
    """How many graphs an action compiles, with a step marked before and after it."""
    htcore.mark_step()
    with metric_localcontext("graph_compilation") as metric:
        action()
        htcore.mark_step()
        return metric.stats()[0][1]


def test_metric_has_the_real_shape():
    stats = metric_global("graph_compilation").stats()
    assert [name for name, _ in stats] == ["TotalNumber", "TotalTime", "AvgTime"]
    before = stats[0][1]
    (torch.ones(123, device="hpu") + 1).sum()
    htcore.mark_step()
    assert metric_global("graph_compilation").stats()[0][1] == before + 1
    with pytest.raises(ValueError, match="no such metric"):
        metric_global("nonsense")


def test_shapes_dtypes_and_operations_make_a_graph():
    def work(rows=4, dtype=torch.float32, more=False, alpha=1, factor=1.0, start=0):
        x = torch.ones(rows, 7, dtype=dtype).to("hpu")
        x = torch.add(x, x, alpha=alpha) * factor
        y = x[start : start + 2].sum()
        return y.exp() if more else y

    assert compiled(work) == 1
    assert compiled(work) == 0
    assert compiled(lambda: work(rows=5)) == 1
    assert compiled(lambda: work(dtype=torch.bfloat16)) == 1
    assert compiled(lambda: work(more=True)) == 1
    assert compiled(lambda: work(alpha=2)) == 1, "an attribute is a constant of the graph"
    assert compiled(lambda: work(start=1)) == 1, "so are the bounds of a slice"
    assert compiled(lambda: work(factor=0.3)) == 0, "a number that multiplies is a value"
    assert compiled(lambda: (work(), work(rows=5), work(more=True))) == 1, "one graph, as no step was marked between"
    for _ in range(2):
        assert compiled(lambda: (work(), htcore.mark_step(), work(rows=5), htcore.mark_step())) == 0


def test_host_waits_end_a_graph():
    def work(wait: bool) -> None:
        x = torch.ones(11, device="hpu") * 3
        if wait:
            x.sum().item()
        x + 2

    assert compiled(lambda: work(False)) == 1
    assert compiled(lambda: work(True)) == 2
    assert compiled(lambda: work(True)) == 0


def test_compilations_name_the_first_new_operation():
    def work(rows):
        return torch.ones(6, 3, device="hpu").t()[:, :rows].contiguous().exp()

    work(6)
    htcore.mark_step()
    number = len(compilations())
    work(5)
    htcore.mark_step()
    (graph,) = compilations(number)
    assert graph["first"].startswith("clone(") or graph["first"].startswith("copy([3, 5] Float")
    assert graph["position"] < graph["operations"]


def test_training_steps_are_one_graph_whatever_the_learning_rate():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.Linear(8, 8)).to("hpu")
    optimizer = FusedAdamW(model.parameters(), lr=0.1)

    def step(rows=4):
        optimizer.param_groups[0]["lr"] *= 0.9
        model(torch.randn(rows, 8).to("hpu")).pow(2).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    assert compiled(step) == 1
    compiled(step)
    assert [compiled(step) for _ in range(3)] == [0, 0, 0]
    assert compiled(lambda: step(3)) == 1


def test_wrapped_module_is_one_graph_for_each_set_of_shapes():
    model = torch.nn.Linear(8, 8).to("hpu").eval()
    x = {rows: torch.randn(rows, 8, device="hpu") for rows in (2, 3)}
    wanted = {rows: model(x[rows]).detach() for rows in x}
    wrapped = ht.hpu.wrap_in_hpu_graph(model, disable_tensor_cache=True, max_graphs=5)
    assert wrapped is model
    with torch.no_grad():
        assert compiled(lambda: wrapped(x[2])) == 1
        assert compiled(lambda: (wrapped(x[2]), wrapped(x[2]))) == 0
        assert compiled(lambda: wrapped(x[3])) == 1
        assert all(torch.equal(wrapped(x[rows]), wanted[rows]) for rows in x)
    wrapped.clear_inputs()


def test_module_cacher():
    model = torch.nn.Linear(8, 8).to("hpu")
    x = torch.randn(2, 8, device="hpu")
    model(x).sum().backward()
    wanted = model.weight.grad.clone()
    model.zero_grad()
    ht.hpu.ModuleCacher()(model=model, inplace=True)
    model(x).sum().backward()
    assert torch.equal(model.weight.grad, wanted)
    assert compiled(lambda: model(x)) == 0


def test_captured_graph_is_replayed_in_place():
    x, y, total = torch.ones(4, device="hpu"), torch.zeros(4, device="hpu"), torch.zeros(4, device="hpu")
    graph = ht.hpu.HPUGraph()
    with ht.hpu.stream(ht.hpu.Stream()):
        graph.capture_begin()
        product = x.unsqueeze(0) @ x.unsqueeze(1) * 2
        y.copy_(product.view(1).expand(4))
        total.add_(y)
        graph.capture_end()
    assert y.tolist() == [0] * 4 and total.tolist() == [0] * 4, "capturing computes nothing"
    graph.replay()
    assert y.tolist() == [8] * 4 and total.tolist() == [8] * 4
    x.fill_(2)
    assert compiled(graph.replay) == 0
    assert y.tolist() == [32] * 4 and total.tolist() == [40] * 4
    assert product.item() == 32


def test_captured_graph_refuses_to_wait_for_the_host():
    x = torch.ones(3, device="hpu")
    graph = ht.hpu.HPUGraph()
    with pytest.raises(RuntimeError, match="not supported during hpu graph capturing"), ht.hpu.graph(graph):
        x.sum().item()
    with ht.hpu.graph(graph):
        x.add_(1)
    graph.replay()
    assert x.tolist() == [2, 2, 2]
    with pytest.raises(RuntimeError, match="captured nothing"):
        ht.hpu.HPUGraph().replay()


def test_compile_backend():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1)).to("hpu")
    x = torch.randn(4, 8, device="hpu")

    def gradients(run):
        model.zero_grad()
        loss = run(x).pow(2).mean()
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    fast = torch.compile(model, backend="hpu_backend")
    for got, wanted in zip(gradients(fast), gradients(model), strict=True):
        torch.testing.assert_close(got, wanted)
    compiled(lambda: gradients(fast))
    assert compiled(lambda: gradients(fast)) == 0


class Run:
    """Sends the events that a trainer sends."""

    def __init__(self, warmup: int):
        self.metrics = DeviceMetrics(warmup)
        self.state = SimpleNamespace(global_step=0)

    def step(self, rows: int = 4, wait: bool = False) -> None:
        x = torch.ones(rows, 13).to("hpu").pow(2).sum()
        if wait:
            x.item()
        htcore.mark_step()
        self.state.global_step += 1
        self.event("step_end")

    def event(self, name: str, **details) -> None:
        getattr(self.metrics, f"on_{name}")(None, self.state, None, **details)


def test_device_metrics_count_after_warmup():
    run = Run(2)
    before = run.metrics.figures()["graph_compilations"]
    for rows in (21, 22, 21, 22, 23, 21):
        run.step(rows)
    figures = run.metrics.figures()
    assert figures["graph_compilations"] - before == 3
    assert figures["graph_compilations_after_warmup"] == 1 and figures["host_syncs_per_step"] == 0
    assert figures["peak_device_memory_gb"] == pytest.approx(torch.hpu.max_memory_allocated() / 2**30, abs=1e-4)
    lines = run.metrics.report_lines()
    assert len(lines) == 1 and "training step 5: copy from host([23, 13] Float)" in lines[0]


def test_device_metrics_keep_logging_apart():
    run = Run(2)
    for step in range(7):
        run.step(31, wait=step % 2 == 1)
        if step % 2 == 1:  # what a trainer does for a log line
            (torch.ones(3, 5, device="hpu").mean() * 2).item()
            torch.ones(2, 9, device="hpu") * 2
            run.event("log", logs={"loss": 1.0})
    figures = run.metrics.figures()
    assert figures["graph_compilations_after_warmup"] == 0
    assert figures["host_syncs_per_step"] == 0.5, "steps 4 to 7, two of which wait"
    (torch.ones(3, 6, device="hpu").mean() * 2).item()
    run.event("log", logs={"eval_loss": 1.0})
    assert run.metrics.figures()["graph_compilations_after_warmup"] == 0, "another log line"
    (torch.ones(3, 7, device="hpu").mean() * 2).item()
    run.event("log", logs={"eval_loss": 1.0})
    assert run.metrics.figures()["graph_compilations_after_warmup"] == 1


def test_device_metrics_watch_evaluation():
    run = Run(2)
    for rows in (4, 4, 4, 3):
        torch.ones(rows, 17, device="hpu").exp().sum()
        htcore.mark_step()
        run.event("prediction_step")
    run.event("evaluate")
    assert run.metrics.figures()["graph_compilations_after_warmup"] == 1
    assert "evaluation step 4" in run.metrics.report_lines()[0]
    assert "host_syncs_per_step" not in run.metrics.figures(), "there was no training step"
