"""Gradient checkpointing where optimum-habana 1.21.2 does not do what `--gradient_checkpointing` asks for."""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


def _checkpoint(function, *args, use_reentrant: bool | None = None, **kwargs):
    return checkpoint(function, *args, use_reentrant=False, **kwargs)


def repair_gradient_checkpointing(model: torch.nn.Module) -> None:
    """Make `gradient_checkpointing_enable` work on `model` on a card; call it before training starts.

    Lazy mode's own `checkpoint` is PyTorch's non-reentrant one, but calls an internal function of PyTorch whose
    parameters have changed since (`early_stop`), so that inputs are lost: the public one takes its place. And
    GaudiGPT2Block leaves `GradientCheckpointingLayer` out, and so would keep all its activations.
    """
    # Imported here: a CPU run has no use for optimum-habana's models, which take seconds to import.
    from optimum.habana.transformers import gradient_checkpointing as lazy_mode
    from optimum.habana.transformers.models.gpt2.modeling_gpt2 import GaudiGPT2Block

    lazy_mode.checkpoint = _checkpoint
    for module in model.modules():
        if type(module) is GaudiGPT2Block:
            module.__class__ = type("CheckpointedGPT2Block", (GradientCheckpointingLayer, GaudiGPT2Block), {})
