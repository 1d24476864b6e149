"""Before the first step, compile the graphs of every length that batches are padded to.

Batches of unpacked texts are padded to one of a few lengths. A length that is met late would stop the run in its
middle for a compilation, so each is met at once: by passes over batches without labels, whose loss and gradients are
zero and are thrown away.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
from optimum.habana.transformers.trainer import _get_input_update_settings
from peft import PeftType
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from gaudi_lm.data.masked_token_budget import IGNORE_INDEX


def several_lengths(collator: Callable, trainer: Trainer) -> tuple[int, ...]:
    """The lengths that a collator of this suite pads batches to, where there are several and each is a graph."""
    lengths = collator.keywords.get("lengths") if isinstance(collator, partial) else getattr(collator, "lengths", None)
    # Some keep count of their passes: DeepSpeed's engine, the scales of FP8, AdaLoRA's ranks.
    counted = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled or trainer.accelerator.fp8_enabled
    counted = counted or getattr(trainer.model, "peft_type", None) == PeftType.ADALORA
    if counted or not trainer.args.use_lazy_mode or not isinstance(lengths, list) or len(lengths) < 2:
        return ()
    return tuple(lengths)


@contextlib.contextmanager
def separate_graph(lengths: tuple[int, ...]) -> Iterator[None]:
    """Where there are ``lengths``: what runs inside is a graph for each, whatever comes before and after it."""
    if not lengths:
        yield
        return
    import habana_frameworks.torch.core as htcore

    htcore.mark_step()
    yield
    htcore.mark_step()


def of_length(batch: dict[str, torch.Tensor], length: int) -> dict[str, torch.Tensor]:
    """A batch like this one, of another length and without labels."""
    rows, columns = batch["input_ids"].shape
    made = {}
    for name, value in batch.items():
        per_token = value.dim() == 2 and value.shape == (rows, columns)
        made[name] = value[:, :1].repeat(1, length) if per_token else value
    made["labels"].fill_(IGNORE_INDEX)
    return made


def compile_lengths(
    trainer: Trainer, lengths: tuple[int, ...], batch: dict[str, torch.Tensor], items: torch.Tensor
) -> None:
    """Run the passes of a step for each of ``lengths``, and leave the trainer as it was.

    Args:
        batch: of host memory, as the collator makes them.
        items: label tokens of a step, as `training_step` gets them.
    """
    args, model, loss = trainer.args, trainer.model_wrapped, trainer.training_loss
    more = _get_input_update_settings(trainer.model, lazy_mode=args.use_lazy_mode)[1]
    ranks = isinstance(model, DistributedDataParallel)
    # What a pass finds: a sum of losses since the last log line, gradients of the pass before; and whether ranks meet.
    last = args.gradient_accumulation_steps == 1
    passes = [(False, False, last), (True, False, last)]
    if not last:
        passes += [(True, True, False)] + [(True, True, True)] * ranks
    kept = dict(vars(loss))
    random_states = torch.get_rng_state(), torch.hpu.get_rng_state()  # OPT skips layers by the host's
    # After the ranks have met for the first time, the next pass lays the buckets of gradients out anew.
    for length in (*lengths[:1] * 2 * ranks, *lengths):
        for has_window, has_gradients, meet in passes:
            if not has_window:
                loss._window = None
            if not has_gradients:
                trainer._zero_model_grad(model)
            with contextlib.nullcontext() if meet else trainer.accelerator.no_sync(model=model):
                trainer.training_step(model, of_length(batch, length) | more, items)
    trainer._zero_model_grad(model)
    torch.set_rng_state(random_states[0])
    torch.hpu.set_rng_state(random_states[1])
    vars(loss).update(kept)
