"""The memory of a training step on a card, by shapes alone: every tensor of the step is made, none has any data.

The model's weights become PyTorch's `FakeTensor`s, which say that they are on the card and hold nothing. The step then
runs as it would there, autocast, autograd, checkpointing and optimizer included, and what is alive is counted. What
ranks share out among them, which a single process cannot run, is in :mod:`gaudi_lm.training.sharding`.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS = ("weights", "gradients", "optimizer", "activations", "loss", "collectives")


@contextmanager
def without_data(model: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> Iterator[FakeTensorMode]:
    """For the moment, tensors without data that say they are on ``device`` in place of all weights and buffers.

    Args:
        model: on any device, ``meta`` included.
        dtype: of the floating-point ones; None leaves each as it is.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    kept: list[tuple[dict[str, object], str, Tensor]] = []
    made: dict[int, Tensor] = {}
    for module in model.modules():
        # The last: tables of positions that some models keep as plain attributes.
        for tensors in (module._parameters, module._buffers, vars(module)):
            kept += [(tensors, name, value) for name, value in tensors.items() if isinstance(value, Tensor)]
    for tensors, name, tensor in kept:
        if id(tensor) not in made:  # tied weights stay tied
            wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
            empty = empty_on(mode, device, tensor.shape, wanted)
            is_weight = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_weight else empty
        tensors[name] = made[id(tensor)]
    try:
        yield mode
    finally:
        for tensors, name, tensor in kept:
            tensors[name] = tensor


def empty_on(mode: FakeTensorMode, device: torch.device, shape: torch.Size, dtype: torch.dtype) -> FakeTensor:
    """A tensor without data that says it is on ``device``."""
    located = device if device.type == "cpu" else torch.device(device.type, device.index or 0)
    return FakeTensor(mode, torch.empty(shape, dtype=dtype, device="meta"), located)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that are alive on a device, by what they are for, and keeps their highest sum."""

    def __init__(self, device_type: str):
        super().__init__()
        self.device_type = device_type
        self.kind = "activations"
        self.live: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        self.highest: Counter[str] = Counter()  # of each kind, at moments of their own
        self.peak = 0
        self._storages: dict[int, tuple[str, int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:  # there is no value to read
            return False if args[0].dtype is torch.bool else 1.0 if args[0].is_floating_point() else 1
        if function is torch.ops.aten.split_with_sizes.default and sum(args[1]) != args[0].shape[(*args, 0)[2]]:
            return torch.tensor_split(args[0], len(args[1]), *args[2:])  # tokens of experts, by numbers that were read
        if function is torch.ops.aten.nonzero.default:  # the CPU's loss leaves out rows without a label: none, at most
            return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, FakeTensor) and leaf.fake_device.type == self.device_type:
                self._see(leaf, self.kind)
        return result

    def _see(self, tensor: Tensor, kind: str) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._storages:
            self._storages[storage._cdata] = kind, storage.nbytes()
            weakref.finalize(storage, self._gone, storage._cdata)
            self.add(kind, storage.nbytes())

    def _gone(self, key: int) -> None:
        kind, size = self._storages.pop(key)
        self.live[kind] -= size

    def hold(self, tensor: Tensor, kind: str) -> None:
        """Count a tensor as ``kind`` from now on, whether it has been seen or not."""
        self._see(tensor, kind)
        key = tensor.untyped_storage()._cdata
        before, size = self._storages[key]
        self._storages[key] = kind, size
        self.live[before] -= size
        self.live[kind] += size

    def leave_out(self, tensor: Tensor) -> None:
        """Do not count a tensor, nor views of it."""
        self.hold(tensor, "weights")
        key = tensor.untyped_storage()._cdata
        kind, size = self._storages[key]
        self._storages[key] = kind, 0
        self.live[kind] -= size

    def add(self, kind: str, size: float) -> None:
        """Count bytes that no tensor of this process stands for; a negative number takes them back."""
        self.live[kind] += int(size)
        self.highest[kind] = max(self.highest[kind], self.live[kind])
        total = self.live.total()
        if total > self.peak:
            self.peak, self.at_peak = total, Counter(self.live)

    def for_a_moment(self, kind: str, size: float) -> None:
        """Bytes that are taken and given back at once."""
        self.add(kind, size)
        self.add(kind, -size)

    @contextmanager
    def counting_as(self, kind: str) -> Iterator[None]:
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before


@contextmanager
def loss_counted(live: LiveBytes, head: nn.Module | None) -> Iterator[None]:
    """From the output embedding until the gradient of its input is there, what is made counts as of the loss."""
    if head is None:
        yield
        return

    def enter(module, args):
        live.kind = "loss"
        if args[0].requires_grad:
            args[0].register_hook(leave)

    def leave(gradient):
        live.kind = "activations"

    handle = head.register_forward_pre_hook(enter)
    try:
        yield
    finally:
        handle.remove()
        live.kind = "activations"


@contextmanager
def gradients_seen(model: nn.Module, then: Callable[[nn.Parameter], None]) -> Iterator[None]:
    """Call ``then`` with each parameter when a backward pass has added to its gradient."""
    handles = [p.register_post_accumulate_grad_hook(then) for p in model.parameters() if p.requires_grad]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
