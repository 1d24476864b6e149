"""Eager mode: every operation is a graph by itself, compiled once for its shapes."""

import habana_frameworks.torch.core as htcore
import pytest
import torch
from habana_frameworks.torch import _simulator
from habana_frameworks.torch.hpu.metrics import metric_localcontext
from habana_frameworks.torch.utils.internal import is_lazy
from optimum.habana.transformers.modeling_utils import adapt_transformers_to_gaudi
from peft import LoraConfig, get_peft_model
from tiny_models import objective_of, tiny_model

from gaudi_lm.modeling.loss import install_token_loss
from gaudi_lm.modeling.patches import patch_libraries


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


@pytest.mark.parametrize("model_type", ["gpt2", "bert", "llama", "llama-lora", "falcon", "gemma2", "mistral", "qwen3"])
def test_compiled_models(model_type):
    """Forward and backward are one graph each, with what this suite changes, and the results are the model's own."""
    adapt_transformers_to_gaudi()
    patch_libraries("hpu")
    model_type, _, adapted = model_type.partition("-")
    model = tiny_model(model_type)
    if adapted:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    limit = {"max_predictions_per_seq": 16} if objective_of(model_type) == "masked" else {}
    assert "in row chunks" in install_token_loss(model.to("hpu"), objective_of(model_type), **limit)
    tokens = torch.arange(3, 19)[None].to("hpu")
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}

    def train(run) -> list[torch.Tensor]:
        model.zero_grad()
        loss = run(**inputs).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    compiled = torch.compile(model, backend="hpu_backend", fullgraph=True)
    for got, wanted in zip(train(compiled), train(model), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    with metric_localcontext("graph_compilation") as metric:
        train(compiled)
        assert metric.stats()[0][1] == 0


def test_a_compiled_step_holds_no_full_logits():
    tokens = torch.randint(3, 9000, (4, 64)).to("hpu")
    peaks = {}
    for chunked in (False, True):
        model = tiny_model("gpt2", vocab_size=9000).to("hpu")
        install_token_loss(model, "causal", chunked=chunked)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="hpu_backend", fullgraph=True)
        compiled(input_ids=tokens, labels=tokens).loss.backward()  # gradients are there from now on
        before = torch.hpu.memory_allocated()
        torch.hpu.reset_peak_memory_stats()
        compiled(input_ids=tokens, labels=tokens).loss.backward()
        peaks[chunked] = torch.hpu.max_memory_allocated() - before
    logits = 4 * 64 * 9000 * 4
    assert peaks[False] > 2 * logits and peaks[True] < logits, peaks
