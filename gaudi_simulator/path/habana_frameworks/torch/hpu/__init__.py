"""`habana_frameworks.torch.hpu`, which is also `torch.hpu` when there are cards."""

import contextlib
import os

import torch

from habana_frameworks.torch import _simulator

from . import metrics, random
from .graphs import HPUGraph, ModuleCacher, graph, wrap_in_hpu_graph
from .random import get_rng_state, get_rng_state_all, manual_seed, manual_seed_all, set_rng_state, set_rng_state_all

__all__ = [
    "Event",
    "HPUGraph",
    "ModuleCacher",
    "Stream",
    "get_rng_state",
    "get_rng_state_all",
    "graph",
    "manual_seed",
    "manual_seed_all",
    "metrics",
    "random",
    "set_rng_state",
    "set_rng_state_all",
    "wrap_in_hpu_graph",
]

Stream = torch.Stream
Event = torch.Event

_initialized = _simulator.CARDS > 0


def init() -> None:
    pass


_lazy_init = init


def is_initialized() -> bool:
    return _initialized


def _is_in_bad_fork() -> bool:
    return False


def is_available() -> bool:
    return _simulator.CARDS > 0


def is_bf16_supported() -> bool:
    return True


def device_count() -> int:
    return _simulator.CARDS


def _card(device=None) -> int:
    if device is None:
        return current_device()
    if isinstance(device, int):
        return device
    device = torch.device(device)
    # optimum-habana asks for the memory of the device it trains on, the CPU included.
    return current_device() if device.type != "hpu" or device.index is None else device.index


def current_device() -> int:
    return _simulator.library.gaudi_current_card() if _simulator.CARDS else 0


def set_device(device) -> None:
    if {"LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"} & os.environ.keys():
        # A rank holds one card and sees it as hpu:0, whatever local rank DeepSpeed asks for here.
        return
    card = _card(device)
    if not 0 <= card < _simulator.CARDS:
        raise RuntimeError(f"hpu:{card} does not exist: there are {_simulator.CARDS} cards")
    _simulator.library.gaudi_set_card(card)


class device:
    """Make a card the current one for a while."""

    def __init__(self, device):
        self.card = _card(device)

    def __enter__(self):
        self.before = current_device()
        set_device(self.card)

    def __exit__(self, *_exception):
        set_device(self.before)
        return False


class device_of(device):
    """Make the card of a tensor the current one for a while."""

    def __init__(self, tensor: torch.Tensor):
        super().__init__(tensor.device if tensor.device.type == "hpu" else None)


def get_device_name(device=None) -> str:
    return "GAUDI2"


def get_device_capability(device=None) -> str:
    return "1.24.0"


def synchronize(device=None) -> None:
    """Wait for the card: closes the graph, and counts as a host synchronisation."""
    _simulator.library.gaudi_synchronize()


def current_stream(device=None) -> Stream:
    return torch.accelerator.current_stream(_card(device))


def default_stream(device=None) -> Stream:
    return Stream(stream_id=0, device_index=_card(device), device_type=torch._C._autograd.DeviceType.HPU.value)


def set_stream(stream: Stream) -> None:
    torch.accelerator.set_stream(stream)


@contextlib.contextmanager
def stream(stream: Stream | None):
    """Make a stream the current one for a while. It orders nothing: work is done when its call returns."""
    if stream is None:
        yield
        return
    with stream:
        yield


def memory_stats(device=None) -> dict[str, int]:
    """Bytes in use, peak and limit, and numbers of allocations of a card; zeros without one."""
    if not _simulator.CARDS:
        return dict.fromkeys(("Limit", "ActiveAllocs", *_simulator.MEMORY_FIELDS), 0)
    return _simulator.memory(_card(device))


def memory_allocated(device=None) -> int:
    return memory_stats(device)["InUse"]


def max_memory_allocated(device=None) -> int:
    return memory_stats(device)["MaxInUse"]


memory_reserved = memory_cached = memory_allocated
max_memory_reserved = max_memory_cached = max_memory_allocated


def mem_get_info(device=None) -> tuple[int, int]:
    """Free and total bytes of a card."""
    figures = memory_stats(device)
    return figures["Limit"] - figures["InUse"], figures["Limit"]


def memory_summary(device=None) -> str:
    return "\n".join(f"{name:>20}: {value}" for name, value in memory_stats(device).items())


def reset_peak_memory_stats(device=None) -> None:
    _simulator.library.gaudi_reset_peak(_card(device))


reset_max_memory_allocated = reset_max_memory_cached = reset_peak_memory_stats


def reset_accumulated_memory_stats(device=None) -> None:
    pass


def empty_cache() -> None:
    pass


def is_autocast_hpu_enabled() -> bool:
    return torch.is_autocast_enabled("hpu")


def get_autocast_hpu_dtype() -> torch.dtype:
    return torch.get_autocast_dtype("hpu")


get_autocast_dtype = get_autocast_hpu_dtype


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.bfloat16, torch.float16, torch.float32]


def enable_dynamic_shape() -> None:
    """Accepted: every new shape is a new graph here."""


disable_dynamic_shape = enable_dynamic_shape


_recompute_attention = False


def enable_recompute_sdp(enabled: bool) -> None:
    """Whether `FusedSDPA` computes its probabilities again in backward, where it is not told."""
    global _recompute_attention
    _recompute_attention = enabled


def recompute_sdp_enabled() -> bool:
    return _recompute_attention


@contextlib.contextmanager
def sdp_kernel(enable_recompute: bool = True):
    """Whether `FusedSDPA` computes its probabilities again in backward, inside of this context."""
    before = recompute_sdp_enabled()
    enable_recompute_sdp(enable_recompute)
    try:
        yield
    finally:
        enable_recompute_sdp(before)
