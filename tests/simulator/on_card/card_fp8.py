"""The stand-in for the Transformer Engine: numbers, scales, gradients, checkpointing, torch.compile."""

import copy

import habana_frameworks.torch.hpex.experimental.transformer_engine as te
import pytest
import torch
from habana_frameworks.torch.hpex.experimental.transformer_engine.fp8 import Scaling, Settings, widen
from habana_frameworks.torch.hpex.kernels import FusedSDPA
from torch.utils.checkpoint import checkpoint

E4M3, E5M2 = te.recipe.Format.HYBRID.value


def recipe(**values) -> te.recipe.DelayedScaling:
    return te.recipe.DelayedScaling(**{"reduce_amax": False, **values})


def rounded(x: torch.Tensor, grid, exponent: int) -> torch.Tensor:
    """x on the numbers of a format scaled by 2^exponent, without PyTorch's FP8 dtypes."""
    bits, least = (3, -6) if grid is E4M3 else (2, -14)
    scaled = (x.double().cpu() * 2.0**exponent).clamp(-grid.largest, grid.largest)
    step = torch.exp2(torch.floor(torch.log2(scaled.abs())).clamp(min=least) - bits)
    return (torch.round(scaled / step) * step * 2.0**-exponent).float()


def exponent_of(x: torch.Tensor, grid) -> int:
    return int(torch.floor(torch.log2(grid.largest / x.abs().max().float())))


def layer(inputs: int = 16, outputs: int = 8, **options) -> te.Linear:
    torch.hpu.manual_seed(3)
    return te.Linear(inputs, outputs, device="hpu", **options)


def data(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to("hpu")


@pytest.mark.parametrize("grid", [E4M3, E5M2])
def test_numbers_are_those_of_the_format(grid):
    x = torch.cat((data(4000) * torch.exp2(data(4000, seed=2) * 6), torch.zeros(3, device="hpu")))
    how = Settings(True, recipe())
    eight_bits, scale = Scaling().quantise(x, grid, how)
    assert eight_bits.element_size() == 1 and scale.log2().item() == exponent_of(x, grid)
    assert torch.equal(widen(eight_bits, scale, torch.float32).cpu(), rounded(x, grid, exponent_of(x, grid)))
    assert len(eight_bits.float().unique()) <= 256


def test_scales_are_delayed():
    how, scaling, x = Settings(True, recipe()), Scaling(), data(50)
    first = exponent_of(x, E4M3)
    scales = [scaling.quantise(x * factor, E4M3, how)[1].log2().item() for factor in (1, 16, 1, 1)]
    assert scales == [first, first, first - 4, first]
    too_large = widen(*_after_one_run(x, x * 16), torch.float32)
    assert torch.equal(too_large.cpu(), rounded(x * 16, E4M3, first)), "what is too large is the largest number"
    assert too_large.abs().max().item() == E4M3.largest * 2.0**-first


def _after_one_run(x, y):
    scaling, how = Scaling(), Settings(True, recipe())
    scaling.quantise(x, E4M3, how)
    return scaling.quantise(y, E4M3, how)


def test_interval_history_margin_and_zeros():
    x = data(50)
    first = exponent_of(x, E4M3)

    def scales(factors, **values):
        scaling, how = Scaling(), Settings(True, recipe(**values))
        return [scaling.quantise(x * factor, E4M3, how)[1].log2().item() - first for factor in factors]

    assert scales([1, 2, 4, 8, 8], interval=2) == [0, 0, 0, -2, -2]
    assert scales([1, 4, 1, 1, 1], amax_history_len=2, amax_compute_algo="max") == [0, 0, -2, -2, 0]
    assert scales([1, 1], margin=3) == [-3, -3]
    assert scales([1, 0, 1], interval=1) == [0, 0, 0], "zeros leave the scale as it is"
    assert scales([1, float("inf"), 1]) == [0, 0, 0]
    with pytest.raises(ValueError, match="amax_compute_algo"):
        recipe(amax_compute_algo="mean")


@pytest.mark.parametrize("minimize_memory", [False, True])
def test_linear_multiplies_rounded_numbers(minimize_memory):
    linear, x, gradient = layer(minimize_memory=minimize_memory), data(2, 5, 16).requires_grad_(), data(2, 5, 8) * 1e-7
    with te.fp8_autocast(enabled=True, fp8_recipe=recipe()):
        y = linear(x)
    y.backward(gradient)
    x8, w8 = (rounded(t.detach(), E4M3, exponent_of(t.detach(), E4M3)) for t in (x, linear.weight))
    g8 = rounded(gradient, E5M2, exponent_of(gradient, E5M2))
    torch.testing.assert_close(y.cpu(), torch.nn.functional.linear(x8, w8, linear.bias.cpu()))
    assert not torch.equal(x8, x.cpu()) and not torch.equal(w8, linear.weight.cpu())
    torch.testing.assert_close(x.grad.cpu(), g8 @ w8, rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(linear.weight.grad.cpu(), torch.einsum("bto,bti->oi", g8, x8), rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(linear.bias.grad.cpu(), gradient.sum((0, 1)).cpu(), rtol=1e-5, atol=1e-12)
    plain = linear(x)
    expected = torch.nn.functional.linear(x, linear.weight, linear.bias)
    assert torch.equal(plain, expected), "ordinary outside of fp8_autocast"


def test_dtypes():
    linear, x = layer(), data(4, 16).requires_grad_()
    with torch.autocast("hpu", torch.bfloat16), te.fp8_autocast(enabled=True, fp8_recipe=recipe()):
        y = linear(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert linear.weight.grad.dtype == x.grad.dtype == torch.float32
    frozen = layer(params_dtype=torch.bfloat16).requires_grad_(False)
    with te.fp8_autocast(enabled=True, fp8_recipe=recipe()):
        y = frozen(x.bfloat16())
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and frozen.weight.grad is None
    with te.fp8_autocast(enabled=True, fp8_recipe=recipe(fp8_format=te.recipe.Format.E5M2)):
        y = frozen(x.detach().bfloat16())
    coarse = rounded(x.detach().bfloat16(), E5M2, exponent_of(x.detach(), E5M2))
    weight = rounded(frozen.weight, E5M2, exponent_of(frozen.weight, E5M2))
    wanted = torch.nn.functional.linear(coarse, weight).bfloat16() + frozen.bias.cpu()
    torch.testing.assert_close(y.cpu(), wanted)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_computes_the_same_again(reentrant):
    def steps(again: bool) -> list[torch.Tensor]:
        linear, second, found = layer(), layer(8, 4), []
        for step in range(4):
            x = (data(6, 16) * 3.0**step).requires_grad_()
            block = lambda x, linear=linear, second=second: second(torch.tanh(linear(x)))  # noqa: E731
            with te.fp8_autocast(enabled=True, fp8_recipe=recipe()):
                if again:
                    y = checkpoint(te.distributed.activation_checkpointing()(block), x, use_reentrant=reentrant)
                else:
                    y = block(x)
                y.square().sum().backward()
            found += [y.detach(), x.grad, linear.weight.grad.clone()]
        return found

    for kept, again in zip(steps(False), steps(True), strict=True):
        assert torch.equal(kept, again)


def test_torch_compile_sees_one_operation():
    plain, x = layer(), data(6, 16)
    compiled = torch.compile(copy.deepcopy(plain), backend="hpu_backend", fullgraph=True)
    for step in range(3):
        found = []
        for module in (plain, compiled):
            leaf = (x * 2.0**step).requires_grad_()
            module.zero_grad()
            with te.fp8_autocast(enabled=True, fp8_recipe=recipe()):
                y = module(leaf)
            y.square().sum().backward()
            found.append((y, leaf.grad, module.weight.grad))
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other)


def test_a_copy_has_scales_of_its_own():
    linear = layer()
    with te.fp8_autocast(enabled=True, fp8_recipe=recipe()):
        linear(data(3, 16))
        copied = copy.deepcopy(linear)
        before = linear._input.scale.clone()
        copied(data(3, 16) * 64)
        copied(data(3, 16) * 64)
    assert copied.handle != linear.handle and torch.equal(linear._input.scale, before)
    assert not torch.equal(copied._input.scale, before)
    assert set(linear.state_dict()) == {"weight", "bias"}, "nothing that another program could not load"


def test_attention_rounds_its_operands():
    query, key, value = (data(1, 2, 5, 8, seed=seed).requires_grad_() for seed in range(3))
    attention = te.FusedAttention(scale=0.3)
    with te.fp8_autocast(enabled=True, fp8_recipe=recipe()):
        found = attention(query, key, value, None, True)
    found.sum().backward()
    assert query.grad.abs().sum() > 0
    operands = [rounded(t.detach(), E4M3, exponent_of(t.detach(), E4M3)).to("hpu") for t in (query, key, value)]
    torch.testing.assert_close(found, FusedSDPA.apply(*operands, None, 0.0, True, 0.3))
    assert torch.equal(attention(query, key, value), FusedSDPA.apply(query, key, value, None, 0.0, False, 0.3))
