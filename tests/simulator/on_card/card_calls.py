"""Calls of DeepSpeed and of optimum-habana's models by name: step closures, torch.ops.hpu."""

import math

import habana_frameworks.torch.core as htcore
import pytest
import torch
from deepspeed.ops.op_builder.hpu.fused_adam import HPUFusedAdam
from habana_frameworks.torch.hpu.metrics import metric_localcontext
from habana_frameworks.torch.utils.internal import is_lazy


def test_step_closures_run_at_the_next_mark():
    x, seen = torch.ones(3, device="hpu"), []
    htcore.step_closure.add_step_closure(lambda t, n: seen.append((t.tolist(), n)), args=(x * 2, 7))
    assert seen == []
    htcore.step_closure._mark_step_if_lazy()
    htcore.mark_step()
    assert seen == ([([2, 2, 2], 7)] if is_lazy() else [])


def test_adam_of_deepspeed():
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(5, 3, generator=generator), torch.randn(4, generator=generator)]
    wanted = [value.double() for value in values]
    squares = [torch.zeros_like(value) for value in wanted]
    moments = [torch.zeros_like(value) for value in wanted]
    card = [value.to("hpu") for value in values]
    state = [[torch.zeros_like(value) for value in card] for _ in range(2)]
    compiled = []
    for step in range(1, 5):
        lr = 0.1 / step
        gradients = [torch.randn(value.shape, generator=generator) for value in values]
        lists = [[gradient.to("hpu") for gradient in gradients], card, *state]
        with metric_localcontext("graph_compilation") as metric:
            HPUFusedAdam.multi_tensor_adam(2048, None, lists, lr, 0.9, 0.99, 1e-6, step, 1, 1, 0.01)
            htcore.mark_step()
        compiled.append(metric.stats()[0][1])
        for value, gradient, m, v in zip(wanted, gradients, moments, squares, strict=True):
            m.mul_(0.9).add_(0.1 * gradient.double())
            v.mul_(0.99).add_(0.01 * gradient.double() ** 2)
            value.mul_(1 - lr * 0.01)
            value.sub_(lr * math.sqrt(1 - 0.99**step) / (1 - 0.9**step) * m / (v.sqrt() + 1e-6))
    for found, value in zip(card, wanted, strict=True):
        torch.testing.assert_close(found.cpu(), value.float(), rtol=1e-4, atol=1e-6)
    assert compiled[2:] == [0, 0], "the learning rate of a step is no constant of a graph"


@pytest.mark.parametrize("permuted", [True, False])
def test_mixture_of_experts(permuted):
    tokens, width, inner, experts = 7, 6, 5, 3
    generator = torch.Generator().manual_seed(2)

    def some(*shape):
        return torch.randn(*shape, generator=generator).to("hpu").requires_grad_()

    x, logits = some(tokens, width), some(tokens, experts + 1)
    w1, w2, w3 = ([some(*shape) for _ in range(experts)] for shape in ((inner, width), (inner, width), (width, inner)))
    weights, table = torch.topk(logits.softmax(-1), 2)
    given = (w1, w2, w3) if permuted else [[w.t() for w in each] for each in (w1, w2, w3)]
    # The last expert is another rank's.
    found = torch.ops.hpu.mixture_of_experts(x, table, weights, *given, permuted, "silu", 0, experts - 1)
    rows = []
    for token in range(tokens):
        row = torch.zeros(width, device="hpu")
        for index in range(2):
            expert = int(table[token, index])
            if expert < experts:
                gate = torch.nn.functional.silu(w1[expert] @ x[token])
                row = row + weights[token, index] * (w3[expert] @ (gate * (w2[expert] @ x[token])))
        rows.append(row)
    wanted = torch.stack(rows)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    leaves = [x, logits, *w1, *w2, *w3]
    for one, other in zip(
        torch.autograd.grad(
            found.square().sum(), leaves, retain_graph=True, allow_unused=True, materialize_grads=True
        ),
        torch.autograd.grad(
            wanted.square().sum(), leaves, retain_graph=True, allow_unused=True, materialize_grads=True
        ),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
