"""`habana_frameworks.torch.core`: step marking and the few switches that callers set."""

from habana_frameworks.torch import _simulator, hpu

__all__ = ["hpu", "hpu_initialize", "hpu_set_env", "mark_step"]

if _simulator.CARDS:
    # As on a real card, the lists are what the environment says when this module is first imported.
    _simulator.register_autocast_lists()


def mark_step(device_str: str = "", sync: bool = False) -> None:
    """Close the graph gathered since the last mark, as lazy mode does; nothing in eager mode or without a card."""
    if _simulator.CARDS:
        _simulator.library.gaudi_mark_step()
        if sync:
            hpu.synchronize()


def hpu_set_env(*_args, **_kwargs) -> None:
    """Accepted: it tunes the real compiler."""


def hpu_initialize(*_args, **_kwargs) -> None:
    """Accepted: it prepares quantised inference on a real card."""
