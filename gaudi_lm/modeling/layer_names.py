"""By which names layers go: in a model that is divided among cards, and of the classes that a card has for them."""

from __future__ import annotations

from torch.nn import Module, ModuleList

from gaudi_lm.errors import UserError

# What FSDP, its activation checkpointing and torch.compile put around a module.
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


def plain_name(name: str) -> str:
    """The name that a weight or module has in a model that nothing wraps."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def layer_classes(model: Module) -> list[str]:
    """The classes of the layers that a model is a stack of: those in its lists, and none that is within another."""
    stacked: list[Module] = []
    inner: set[Module] = set()
    for module in model.modules():  # outer ones come first
        if isinstance(module, ModuleList) and module not in inner:
            stacked += module
            inner |= {part for layer in module for part in layer.modules()}
    return sorted({type(layer).__name__ for layer in stacked})


def classes_on_card(model: Module, names: list[str]) -> list[str]:
    """The classes of those names in a model, with optimum-habana's for transformers', such as ``GaudiGPT2Block``.

    Raises:
        UserError: there is no such class.
    """
    there = {type(module).__name__ for module in model.modules()}
    found = []
    for name in names:
        own = name if name in there else f"Gaudi{name}"
        if own not in there:
            raise UserError(
                f"--fsdp_config: transformer_layer_cls_to_wrap {name}: the model has no such class; its layers are "
                f"{', '.join(layer_classes(model))}"
            )
        found.append(own)
    return found
