"""What one of several cards holds of weights, gradients and optimizer: all of it, or by ZeRO's or FSDP's rules.

Each class takes :class:`gaudi_lm.training.live_memory.LiveBytes` through a step: what the libraries allocate beside
the model's own arithmetic is allocated here in the same order, as far as it matters (DeepSpeed 0.19, accelerate 1.10).
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from gaudi_lm.training.live_memory import LiveBytes

DOUBLE = 8  # bytes of what DeepSpeed computes the norm of a gradient in


class Replicas:
    """Every card has all of it. With several, DistributedDataParallel keeps the gradients in its buckets."""

    dtype: torch.dtype | None = None  # of the weights, where it is not that of the flags

    def __init__(self, cards: int = 1):
        self.cards = cards

    def place(self, live: LiveBytes, model: nn.Module) -> None:
        """The weights, and what is there before the first step."""
        self.trained = [p for p in model.parameters() if p.requires_grad]
        for tensor in (*model.parameters(), *model.buffers()):
            live.hold(tensor, "weights")
        if self.cards > 1:
            for p in self.trained:
                p.grad = torch.empty_like(p)
                live.hold(p.grad, "gradients")
                if p.device.type == "cpu":  # where they are no views of the buckets
                    live.add("collectives", p.numel() * p.element_size())

    def make_state(self, live: LiveBytes, optimizer: Optimizer) -> None:
        """The optimizer's state, which is there from the second step on."""
        with live.counting_as("gradients"):
            absent = [p for p in self.trained if p.grad is None]
            for p in absent:
                p.grad = torch.empty_like(p)
        with live.counting_as("optimizer"):
            optimizer.step()
        for p in absent:
            p.grad = None

    def begin_batch(self, live: LiveBytes) -> None:
        """Before each forward pass."""

    def end_forward(self, live: LiveBytes) -> None:
        """Between a forward pass and its backward pass."""

    def take_gradient(self, live: LiveBytes, p: nn.Parameter) -> None:
        """Called when a backward pass has added to the gradient of a weight."""
        live.hold(p.grad, "gradients")

    def step(self, live: LiveBytes, optimizer: Optimizer) -> None:
        """From the end of the last backward pass to that of the optimizer's step."""
        with live.counting_as("optimizer"):
            optimizer.step()


@dataclass(frozen=True)
class ZeroSettings:
    """What of DeepSpeed's configuration decides on memory; the defaults are those of ``configs/deepspeed``."""

    stage: int = 1
    dtype: torch.dtype = torch.bfloat16
    bucket: int = 500_000_000  # elements that are reduced at once
    buffers: int = 0  # of that size, which stay
    reuse: int = 1_000_000_000  # ZeRO-3: elements within which a gathered weight is kept for its next use
    prefetch: int = 50_000_000
    ahead: int = 1_000_000_000  # gathered weights up to which the next ones are fetched
    offload_optimizer: bool = False
    offload_weights: bool = False

    @classmethod
    def of(cls, config: dict) -> ZeroSettings:
        """From DeepSpeed's configuration, without ``auto``; what it leaves out is DeepSpeed's default."""
        from deepspeed.runtime.zero.config import get_zero_config

        zero = get_zero_config(config)
        offload = [
            part is not None and getattr(part.device, "value", part.device) != "none"
            for part in (zero.offload_optimizer, zero.offload_param)
        ]
        buffers = (2 if zero.overlap_comm and zero.stage < 3 else 1) if zero.contiguous_gradients else 0
        return cls(
            # Without ZeRO, its bf16 optimizer divides its state over ranks all the same.
            stage=max(int(zero.stage), 1),
            dtype=torch.bfloat16 if config.get("bf16", {}).get("enabled") else torch.float32,
            bucket=zero.reduce_bucket_size,
            buffers=buffers,
            reuse=zero.max_reuse_distance,
            prefetch=zero.prefetch_bucket_size,
            ahead=zero.max_live_parameters if zero.prefetch_bucket_size else 0,
            offload_optimizer=offload[0],
            offload_weights=offload[1],
        )


class Shards(Replicas):
    """Of gradients and optimizer, a card has its share alone, as flat tensors of the optimizer's groups."""

    master: torch.dtype | None = None  # of what the optimizer updates; None is that of the weights
    updated = "weights"  # what that counts as

    def __init__(self, cards: int):
        super().__init__(cards)
        self.parts: list[nn.Parameter] = []
        self.reduced = 0  # bytes of the gradients that are there as a share

    def share(self, elements: int) -> int:
        return math.ceil(elements / self.cards)

    def make_state(self, live: LiveBytes, optimizer: Optimizer) -> None:
        with live.counting_as(self.updated):
            for group in optimizer.param_groups:
                first, elements = group["params"][0], sum(p.numel() for p in group["params"])
                part = torch.empty(self.share(elements), dtype=self.master or first.dtype, device=first.device)
                self.parts.append(nn.Parameter(part))
                group["params"] = [self.parts[-1]]
        for part in self.parts:
            self._update(live, optimizer, part)

    def _update(self, live: LiveBytes, optimizer: Optimizer, part: nn.Parameter) -> None:
        """The optimizer's step of one group."""
        with live.counting_as("gradients"):
            part.grad = torch.empty(part.shape, dtype=self.dtype or part.dtype, device=part.device).to(part.dtype)
        with live.counting_as("optimizer"):
            optimizer.step()
        part.grad = None

    def _keep_shares(self, live: LiveBytes, elements: int, size: int) -> None:
        """Of the gradients of so many elements, ``size`` bytes each, the share stays; later ones are added to it."""
        most = self.share(sum(p.numel() for p in self.trained)) * size
        kept = min(self.share(elements) * size, most - self.reduced)
        live.add("gradients", kept)
        self.reduced += kept

    def step(self, live: LiveBytes, optimizer: Optimizer) -> None:
        for part in self.parts:
            self._update(live, optimizer, part)
        live.add("gradients", -self.reduced)
        self.reduced = 0


class Zero(Shards):
    """DeepSpeed's ZeRO, stage 1 to 3: weights in the dtype of its configuration, the optimizer's own in fp32."""

    master = torch.float32
    updated = "optimizer"

    def __init__(self, settings: ZeroSettings, cards: int):
        super().__init__(cards)
        self.settings, self.dtype = settings, settings.dtype
        self.filled = 0  # elements in the bucket
        self.whole = self.in_flight = self.gathered = 0  # bytes of weights beside this card's share; the last: now
        self.done = 0  # elements whose gradients this batch has brought

    def place(self, live: LiveBytes, model: nn.Module) -> None:
        self.trained = [p for p in model.parameters() if p.requires_grad]
        settings, size = self.settings, self.settings.dtype.itemsize
        elements = sum(p.numel() for p in model.parameters())
        for tensor in (*model.buffers(), *(model.parameters() if settings.stage < 3 else ())):
            live.hold(tensor, "weights")
        if settings.stage == 3:
            for p in model.parameters():
                live.leave_out(p)
            # What is used again within so many elements stays gathered after its first use; the next ones are fetched
            # module by module, which runs ahead of their use.
            most = max(settings.reuse + settings.prefetch, settings.ahead)
            self.whole = min(elements, most) * size if self.cards > 1 else 0
            # Gathered together, then copied apart.
            self.in_flight = min(elements, settings.prefetch) * size if self.cards > 1 else 0
            live.add("weights", self.share(elements) * size * (not settings.offload_weights))
            if not settings.offload_optimizer:
                live.add("gradients", self.share(sum(p.numel() for p in self.trained)) * size)
        live.add("collectives", settings.buffers * settings.bucket * size)

    def make_state(self, live: LiveBytes, optimizer: Optimizer) -> None:
        if not self.settings.offload_optimizer:
            super().make_state(live, optimizer)

    def begin_batch(self, live: LiveBytes) -> None:
        self.done = 0
        self._gather(live, self.whole + self.in_flight)

    def end_forward(self, live: LiveBytes) -> None:
        self._gather(live, self.whole)

    def _gather(self, live: LiveBytes, size: int) -> None:
        live.add("weights", size - self.gathered)
        self.gathered = size

    def take_gradient(self, live: LiveBytes, p: nn.Parameter) -> None:
        live.hold(p.grad, "gradients")
        self.done += p.numel()
        # The backward pass lets go of weights as it goes, of frozen ones in step with the trained ones beside them.
        self._gather(live, int(self.whole * (1 - self.done / sum(p.numel() for p in self.trained))))
        if self.settings.stage == 1:
            return
        if self.filled + p.numel() > self.settings.bucket:
            self._reduce(live)
        if self.settings.buffers and p.numel() <= self.settings.bucket:
            p.grad = None  # copied into the bucket's buffer
        self.filled += p.numel()

    def _reduce(self, live: LiveBytes) -> None:
        """The gradients in the bucket: one copy for the collective, unless they are in its buffer, then shares."""
        size = self.settings.dtype.itemsize
        if self.settings.stage == 3 or not self.settings.buffers:
            live.for_a_moment("collectives", min(self.filled, self.settings.bucket) * size)
        for p in self.trained:
            p.grad = None
        on_card = self.settings.stage < 3 and not self.settings.offload_optimizer
        self._keep_shares(live, self.filled if on_card else 0, size)
        self.filled = 0

    def step(self, live: LiveBytes, optimizer: Optimizer) -> None:
        if self.settings.stage == 1:
            self.filled = sum(p.numel() for p in self.trained)
        self._reduce(live)
        largest = max(p.numel() for p in self.trained)
        live.for_a_moment("gradients", (self.share(largest) if self.settings.stage == 3 else largest) * DOUBLE)
        super().step(live, optimizer)


class FullySharded(Shards):
    """PyTorch's FSDP, by the options of ``--fsdp``: one layer's weights gathered at a time, without prefetching."""

    def __init__(self, cards: int, options: str, layers: tuple[str, ...] = (), bf16: bool = False):
        super().__init__(cards if "no_shard" not in options.split() else 1)
        self.keeps_weights = "shard_grad_op" in options.split() or "hybrid_shard_zero2" in options.split()
        self.layers = layers  # by the names of their classes
        self.gathered = 0  # bytes of weights beside this card's share
        if bf16:  # weights are gathered and gradients made in it; what is trained has its shares in fp32
            self.dtype, self.master = torch.bfloat16, torch.float32

    def place(self, live: LiveBytes, model: nn.Module) -> None:
        self.trained = [p for p in model.parameters() if p.requires_grad]
        for p in model.parameters():
            live.leave_out(p)
        whole = _size(model)
        live.add("weights", math.ceil((whole - sum(p.numel() * p.element_size() for p in self.trained)) / self.cards))
        layers = [module for module in model.modules() if type(module).__name__ in self.layers]
        sizes = [_size(layer) for layer in layers]
        gathered = whole if self.keeps_weights or not layers else whole - sum(sizes) + max(sizes)
        self.most = min(gathered, whole)
        for buffer in model.buffers():
            live.hold(buffer, "weights")
        self.unit_of = {p: layer for layer in (model, *layers) for p in layer.parameters() if p.requires_grad}

    def begin_batch(self, live: LiveBytes) -> None:
        live.add("weights", self.most - self.gathered)
        self.gathered = self.most
        self.missing = Counter(self.unit_of.values())

    def take_gradient(self, live: LiveBytes, p: nn.Parameter) -> None:
        live.hold(p.grad, "gradients")
        unit = self.unit_of[p]
        self.missing[unit] -= 1
        if self.missing[unit] == 0:  # the gradients of a unit are reduced together, as one flat tensor
            ready = [one for one in self.trained if self.unit_of[one] is unit]
            size = sum(one.numel() * one.element_size() for one in ready)
            live.for_a_moment("gradients", size)
            for one in ready:
                one.grad = None
            self._keep_shares(live, size // p.element_size(), (self.master or p.dtype).itemsize)

    def step(self, live: LiveBytes, optimizer: Optimizer) -> None:
        live.add("weights", -self.gathered)
        live.add("gradients", -self.reduced)  # the optimizer takes the shares themselves
        self.gathered = self.reduced = 0
        super().step(live, optimizer)


def _size(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())
