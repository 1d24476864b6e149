"""Why a file could not be written, and what a first checkpoint takes."""

from __future__ import annotations

import os
import re

import torch
from transformers import Trainer

from gaudi_lm.errors import UserError


class WriteError(UserError):
    """A file that could not be written: the run ends with one line, what was complete before still is."""

    status = 1


def reason_of(error: BaseException | None) -> str | None:
    """Why a file could not be written; None where the error is another one.

    Libraries in Rust put the number of the error into a text, and torch raises an error of its own while that of the
    system passes by.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return os.strerror(error.errno)
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            return os.strerror(int(found[1]))
        if isinstance(error, RuntimeError) and any(word in str(error) for word in ("inline_container", "iostream")):
            return "a file of torch was cut short"
        error = error.__cause__ or error.__context__
    return None


def size_of_state(trainer: Trainer) -> int:
    """Bytes of weights and optimizer state in memory: about what a first checkpoint takes."""
    tensors = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    for state in getattr(trainer.optimizer, "state", {}).values():
        tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
