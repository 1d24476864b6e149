"""One training step of a trainer on a card that is not there, for its memory."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from optimum.habana.transformers.trainer import _get_input_update_settings

from gaudi_lm.modeling.patches import repair_gradient_checkpointing
from gaudi_lm.training.live_memory import LiveBytes, empty_on, gradients_seen, loss_counted, without_data
from gaudi_lm.training.sharding import Replicas


def step_memory(
    trainer, batch: dict[str, torch.Tensor], cards: Replicas, accumulation: int = 1, checkpointing: bool = False
) -> LiveBytes:
    """What is alive on one card in a training step that is not the first one.

    Args:
        trainer: :class:`gaudi_lm.training.trainer.LMTrainer`, its model on any device.
        batch: of one card; only shapes and dtypes count.
        cards: what this card holds of what all of them train.
        accumulation: batches in a step.
    """
    args, model = trainer.args, trainer.model
    live = LiveBytes(args.device.type)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    model.train()
    with ExitStack() as stack:
        if checkpointing:
            if args.device.type == "hpu":
                repair_gradient_checkpointing(model)
            model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
            stack.callback(model.gradient_checkpointing_disable)
        mode = stack.enter_context(without_data(model, args.device, cards.dtype))
        stack.callback(setattr, trainer, "optimizer", None)
        stack.enter_context(mode)
        stack.enter_context(live)
        cards.place(live, model)
        with live.counting_as("optimizer"):  # some make their state at once
            optimizer = trainer.create_optimizer()
        cards.make_state(live, optimizer)
        stack.enter_context(gradients_seen(model, lambda p: cards.take_gradient(live, p)))
        stack.enter_context(loss_counted(live, base.get_output_embeddings()))
        for _ in range(min(accumulation, 2)):  # the second one meets gradients; a third would be as it
            inputs = {name: empty_on(mode, args.device, value.shape, value.dtype) for name, value in batch.items()}
            cards.begin_batch(live)
            inputs |= _get_input_update_settings(model, lazy_mode=args.use_lazy_mode)[1]
            with trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(model, inputs)
            cards.end_forward(live)
            loss.backward()
            del loss, inputs
        cards.step(live, optimizer)
    return live
