"""The linear layer."""

from __future__ import annotations

import itertools
import weakref

import torch

from .distributed import quantise
from .fp8 import Scaling, is_fp8_enabled, round_to, settings, widen

_handles = itertools.count(2)  # torch.compile makes constants of 0 and 1
_layers: weakref.WeakValueDictionary[int, Linear] = weakref.WeakValueDictionary()


class Linear(torch.nn.Module):
    """y = x weight^T + bias. Inside `fp8_autocast` x, weight and the gradient of y are rounded to FP8 numbers first.

    Products of FP8 numbers are summed in float32 and rounded once, to the dtype of x (of autocast, where that is on).
    Gradients of weight and bias have the dtypes of these. Outside of `fp8_autocast`: an ordinary linear layer.

    Args:
        skip_weight_param_allocation: leave `weight` and `bias` to be set by the caller.
        minimize_memory: round the weight again in the backward pass rather than keep it.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        params_dtype: torch.dtype | None = None,
        skip_weight_param_allocation: bool = False,
        minimize_memory: bool = False,
        device: torch.device | str = "hpu",
    ):
        super().__init__()
        self.in_features, self.out_features, self.minimize_memory = in_features, out_features, minimize_memory
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)
        if not skip_weight_param_allocation:
            options = {"dtype": params_dtype or torch.get_default_dtype(), "device": device}
            plain = torch.nn.Linear(in_features, out_features, bias, **options)
            self.weight, self.bias = plain.weight, plain.bias
        self._input, self._weight, self._gradient = Scaling(), Scaling(), Scaling()
        self._how = settings()
        self._register()

    def _register(self) -> None:
        self.handle = next(_handles)
        _layers[self.handle] = self

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._register()  # a copy has scales of its own

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def forward(self, x: torch.Tensor, is_first_microbatch: bool | None = None) -> torch.Tensor:
        """x [..., in_features] -> [..., out_features]."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        if not is_fp8_enabled():
            bias = None if self.bias is None else self.bias.to(dtype)
            return torch.nn.functional.linear(x.to(dtype), self.weight.to(dtype), bias)
        y, *_ = torch.ops.hpu.te_linear(x.to(dtype), self.weight, self.minimize_memory, self.handle)
        return y if self.bias is None else y + self.bias.to(dtype)


# One operation, into which torch.compile does not look: it changes the state of the layer that `handle` stands for.
@torch.library.custom_op("hpu::te_linear", mutates_args=())
def _linear(
    x: torch.Tensor, weight: torch.Tensor, minimize_memory: bool, handle: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, and x and weight as FP8 numbers with their scales; an empty tensor for weight with `minimize_memory`."""
    layer = _layers[handle]
    layer._how = how = settings()
    grid = how.recipe.fp8_format.value.forward
    x8, x_scale = quantise(layer._input, x, grid, how)
    w8, w_scale = quantise(layer._weight, weight, grid, how)
    y = torch.nn.functional.linear(widen(x8, x_scale, x.dtype), widen(w8, w_scale, x.dtype))
    return y, x8, x_scale.clone(), w8.new_empty(0) if minimize_memory else w8, w_scale.clone()


@_linear.register_fake
def _(x, weight, minimize_memory, handle):
    grid = settings().recipe.fp8_format.value.forward
    x8, scale = torch.empty_like(x, dtype=grid.dtype), x.new_empty((), dtype=torch.float32)
    w8 = weight.new_empty(0 if minimize_memory else weight.shape, dtype=grid.dtype)
    return x.new_empty((*x.shape[:-1], weight.shape[0])), x8, scale, w8, torch.empty_like(scale)


@torch.library.custom_op("hpu::te_linear_backward", mutates_args=())
def _linear_backward(
    gradient: torch.Tensor, x8: torch.Tensor | None, x_scale: torch.Tensor, w8: torch.Tensor, w_scale: torch.Tensor,
    dtype: torch.dtype, handle: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of x and, as `dtype`, of weight; an empty tensor for that one without `x8`."""
    layer = _layers[handle]
    g8, g_scale = layer._gradient.quantise(gradient, layer._how.recipe.fp8_format.value.backward, layer._how)
    wide = widen(g8, g_scale, gradient.dtype)
    of_x = wide @ widen(w8, w_scale, gradient.dtype)
    if x8 is None:
        return of_x, wide.new_empty(0, dtype=dtype)
    return of_x, (wide.flatten(0, -2).t() @ widen(x8, x_scale, gradient.dtype).flatten(0, -2)).to(dtype)


@_linear_backward.register_fake
def _(gradient, x8, x_scale, w8, w_scale, dtype, handle):
    of_x = gradient.new_empty((*gradient.shape[:-1], w8.shape[1]))
    return of_x, gradient.new_empty(0 if x8 is None else w8.shape, dtype=dtype)


def _set_up(ctx, inputs, output) -> None:
    x, weight, minimize_memory, ctx.handle = inputs
    _, x8, x_scale, w8, w_scale = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(x8, x_scale, w8, w_scale)
    ctx.weight_dtype, ctx.minimize_memory = weight.dtype, minimize_memory
    ctx.save_for_backward(x8 if ctx.needs_input_grad[1] else None, x_scale, weight if minimize_memory else w8, w_scale)


def _backward(ctx, gradient, *_others):
    if gradient is None:
        return None, None, None, None
    x8, x_scale, w8, w_scale = ctx.saved_tensors
    if ctx.minimize_memory:
        w8 = round_to(w8, w_scale, _layers[ctx.handle]._how.recipe.fp8_format.value.forward)
    of_x, of_weight = torch.ops.hpu.te_linear_backward(
        gradient, x8, x_scale, w8, w_scale, ctx.weight_dtype, ctx.handle
    )
    return of_x, None if x8 is None else of_weight, None, None


_linear.register_autograd(_backward, setup_context=_set_up)
