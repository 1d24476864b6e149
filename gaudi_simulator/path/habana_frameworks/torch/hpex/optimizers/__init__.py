"""`FusedAdamW` in plain PyTorch."""

from collections.abc import Callable, Iterable

import torch


class FusedAdamW(torch.optim.Optimizer):
    """AdamW as PyTorch defines it, so that a rehearsal gives the losses of a run on the CPU.

    p -= lr * weight_decay * p, then p -= lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps). A kernel that adds
    eps to the uncorrected root, as transformers' own AdamW did, differs where gradients are as small as eps.
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter] | Iterable[dict],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        bias_correction: bool = True,
        moments_dtype: torch.dtype | tuple | None = None,
    ):
        if lr < 0:
            raise ValueError(f"Invalid learning rate: {lr}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"Invalid betas: {betas}")
        if moments_dtype is not None:
            raise NotImplementedError("the simulated FusedAdamW keeps its moments in the parameters' dtype")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p].update(
                        exp_avg=torch.zeros_like(p),
                        exp_avg_sq=torch.zeros_like(p),
                    )
            group["step"] = group.get("step", 0) + 1
            self._update(group, params)
        return loss

    def _update(self, group: dict, params: list[torch.Tensor]) -> None:
        beta1, beta2 = group["betas"]
        t = group["step"]
        if not group["bias_correction"]:
            t = 2**24  # both corrections are 1 from here on, in double precision
        # From the host, as the real kernel gets its numbers: a value that the graph reads, not a constant of it.
        step = torch.tensor(float(t)).to(params[0].device, non_blocking=True)
        torch._fused_adamw_(
            params,
            [p.grad for p in params],
            [self.state[p]["exp_avg"] for p in params],
            [self.state[p]["exp_avg_sq"] for p in params],
            [],
            [step] * len(params),
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )
