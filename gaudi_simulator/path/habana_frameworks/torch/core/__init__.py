"""`habana_frameworks.torch.core`: step marking and the few switches that callers set."""

from habana_frameworks.torch import _simulator, hpu

from . import step_closure
from .step_closure import add_step_closure, mark_step

__all__ = ["add_step_closure", "hpu", "hpu_initialize", "hpu_set_env", "mark_step", "step_closure"]

if _simulator.CARDS:
    # As on a real card, the lists are what the environment says when this module is first imported.
    _simulator.register_autocast_lists()


def hpu_set_env(*_args, **_kwargs) -> None:
    """Accepted: it tunes the real compiler."""


def hpu_initialize(*_args, **_kwargs) -> None:
    """Accepted: it prepares quantised inference on a real card."""
