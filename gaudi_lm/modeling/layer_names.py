"""By which names layers go: in a model that is divided among cards, and of the classes that a card has for them."""

from __future__ import annotations

# What FSDP, its activation checkpointing and torch.compile put around a module.
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


def plain_name(name: str) -> str:
    """The name that a weight or module has in a model that nothing wraps."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name
