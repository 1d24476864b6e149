"""Operations of the namespace `torch.ops.hpu` that callers use by name, in plain PyTorch."""

import torch

_library = torch.library.Library("hpu", "DEF")

_ADAMW = (
    "(Tensor[] gradient_vec, Tensor(a!)[] weight_vec, Tensor(b!)[] exp_avg_vec, Tensor(c!)[] exp_avg_sq_vec, "
    "Tensor neg_step_t, float beta1, float beta2, float epsilon, "
)
_library.define(f"optimizer_adamw{_ADAMW}float weight_decay) -> ()")
_library.define(f"optimizer_adamw.tensor{_ADAMW}Tensor weight_decay_t, bool has_weight_decay) -> ()")
_library.define(
    "mixture_of_experts(Tensor hidden_states, Tensor expert_routing_table, Tensor router_weights, Tensor[] w1, "
    "Tensor[] w2, Tensor[] w3, bool permuted_weights, str activation, int experts_min, int experts_max) -> Tensor"
)


@torch.library.impl(_library, "optimizer_adamw.tensor", "CompositeExplicitAutograd")
@torch.no_grad()
def _optimizer_adamw_tensor(
    gradients: list[torch.Tensor],
    weights: list[torch.Tensor],
    moments: list[torch.Tensor],
    squares: list[torch.Tensor],
    negative_step: torch.Tensor,
    beta1: float,
    beta2: float,
    epsilon: float,
    decay: torch.Tensor,
    has_decay: bool,
) -> None:
    """w = w * decay + negative_step * m / (sqrt(v) + epsilon), after m and v have taken the gradients in.

    The caller puts both bias corrections into the step, so that `epsilon` is added to the uncorrected root.
    negative_step, decay: one element each.
    """
    torch._foreach_lerp_(moments, gradients, 1 - beta1)
    torch._foreach_mul_(squares, beta2)
    torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
    changes = torch._foreach_sqrt(squares)
    torch._foreach_add_(changes, epsilon)
    changes = torch._foreach_div(moments, changes)
    torch._foreach_mul_(changes, negative_step.reshape(()))
    if has_decay:
        torch._foreach_mul_(weights, decay.reshape(()))
    torch._foreach_add_(weights, changes)


@torch.library.impl(_library, "optimizer_adamw", "CompositeExplicitAutograd")
def _optimizer_adamw(gradients, weights, moments, squares, negative_step, beta1, beta2, epsilon, decay: float) -> None:
    # From the host, as the real kernel gets its numbers: a value that the graph reads, not a constant of it.
    decay_t = torch.tensor(decay, dtype=negative_step.dtype).to(negative_step.device, non_blocking=True)
    torch.ops.hpu.optimizer_adamw.tensor(
        gradients, weights, moments, squares, negative_step, beta1, beta2, epsilon, decay_t, decay != 1.0
    )


_ACTIVATIONS = {"silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu, "relu": torch.nn.functional.relu}


@torch.library.impl(_library, "mixture_of_experts", "CompositeImplicitAutograd")
def _mixture_of_experts(
    hidden_states: torch.Tensor,
    expert_routing_table: torch.Tensor,
    router_weights: torch.Tensor,
    w1: list[torch.Tensor],
    w2: list[torch.Tensor],
    w3: list[torch.Tensor],
    permuted_weights: bool,
    activation: str,
    experts_min: int,
    experts_max: int,
) -> torch.Tensor:
    """The sum over a token's experts e of weight_e * w3_e (activation(w1_e x) * (w2_e x)).

    All experts see all tokens here, those that were not chosen with weight 0: shapes do not depend on values.

    hidden_states [tokens, width]; expert_routing_table, router_weights [tokens, experts per token]; w1, w2 [inner,
    width] and w3 [width, inner] of the experts experts_min to experts_max, transposed without `permuted_weights`.
    """
    if not permuted_weights:
        w1, w2, w3 = ([weight.t() for weight in weights] for weights in (w1, w2, w3))
    linear = torch.nn.functional.linear
    total = torch.zeros_like(hidden_states)
    for index, expert in enumerate(range(experts_min, experts_max + 1)):
        inner = _ACTIVATIONS[activation](linear(hidden_states, w1[index])) * linear(hidden_states, w2[index])
        share = (router_weights * (expert_routing_table == expert)).sum(-1, keepdim=True)
        total = total + (linear(inner, w3[index]) * share).to(total.dtype)
    return total
