"""Schedules of the learning rate, tried before a run begins."""

from __future__ import annotations

import json
import re

import torch
from transformers import get_scheduler

from gaudi_lm.errors import UserError


def check_scheduler(args, kwargs: dict) -> None:
    """Refuse settings that the schedule does not take, or by which a learning rate is none.

    Args:
        args: :class:`gaudi_lm.arguments.definitions.LMTrainingArguments`.
        kwargs: its ``--lr_scheduler_kwargs``, read.

    Raises:
        UserError: see the message.
    """
    name = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    for stage in ("num_decay_steps", "num_stable_steps"):
        if stage in kwargs and not (type(kwargs[stage]) is int and kwargs[stage] >= 0):
            raise UserError(f"--lr_scheduler_kwargs {json.dumps(kwargs)}: {stage} is a whole number of steps")
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=args.learning_rate)
    try:
        scheduler = get_scheduler(
            name, optimizer, num_warmup_steps=2, num_training_steps=10, scheduler_specific_kwargs=dict(kwargs)
        )
        for _ in range(10):
            optimizer.step()
            scheduler.step(0.0) if name == "reduce_lr_on_plateau" else scheduler.step()
            rate = optimizer.param_groups[0]["lr"]
            if not 0 <= rate <= args.learning_rate * (1 + 1e-6):
                raise ValueError(f"the rate would be {rate:g}, outside of 0 to --learning_rate {args.learning_rate:g}")
    except (TypeError, ValueError, AssertionError, ArithmeticError, KeyError, AttributeError) as error:
        reason = re.sub(r"^\w+(\.\w+)*\(\) ", "", str(error))  # the name of a function says nothing to a user
        raise UserError(
            f"--lr_scheduler_kwargs {json.dumps(kwargs)} with --lr_scheduler_type {name}: {reason}"
        ) from error


def odd_stages(args, steps: int) -> str | None:
    """What to say of a schedule in stages whose steps are not those of the run; None where they are.

    Args:
        args: :class:`gaudi_lm.arguments.definitions.LMTrainingArguments`.
        steps: optimizer steps of the run.
    """
    if args.lr_scheduler_type != "warmup_stable_decay":
        return None
    warmup, decay = args.get_warmup_steps(steps), args.lr_scheduler_kwargs["num_decay_steps"]
    stable = args.lr_scheduler_kwargs.get("num_stable_steps", max(0, steps - warmup - decay))
    if warmup + stable + decay == steps:
        return None
    return (
        f"--lr_scheduler_type warmup_stable_decay is odd: {warmup} steps of warm-up, {stable} stable ones and {decay} "
        f"of decay (num_decay_steps) are {warmup + stable + decay}, and the run has {steps}"
    )
