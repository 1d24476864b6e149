"""--dry_run: what a training run would do and take, without weights, and without a file written."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from peft import PeftType
from torch.utils.data import IterableDataset

from gaudi_lm.arguments.context_parallel import data_ranks, sequence_part
from gaudi_lm.arguments.model_files import first_line
from gaudi_lm.data.sampling import TrainingRows, count_tokens, ignore_filler_samples, row_lengths
from gaudi_lm.errors import UserError
from gaudi_lm.training.live_memory import KINDS, LiveBytes
from gaudi_lm.training.sharding import FullySharded, Replicas, Zero, ZeroSettings
from gaudi_lm.training.step_memory import step_memory

GB = 2**30


@dataclass(frozen=True)
class Setting:
    """What the memory of a step depends on, beside the model: as the flags say, or as others would."""

    rows: int  # of one card at a time
    accumulation: int
    checkpointing: bool
    bf16: bool  # autocast
    zero: ZeroSettings | None = None
    fsdp: str = ""
    layers: tuple[str, ...] = ()  # that FSDP gathers one at a time
    mixed: bool = False  # FSDP's own precision, by --bf16
    flags: str = ""  # that lead here

    def cards(self, number: int) -> Replicas:
        if self.zero is not None:
            return Zero(self.zero, number)
        return FullySharded(number, self.fsdp, self.layers, self.mixed) if self.fsdp else Replicas(number)


def dry_run(trainer) -> dict[str, float]:
    """Print what training would be, on the main rank; returns the figures.

    Args:
        trainer: :class:`gaudi_lm.training.trainer.LMTrainer`, its model on the device ``meta``.

    Raises:
        UserError: a DeepSpeed configuration that contradicts the flags.
    """
    args = trainer.args
    if args.process_index != 0:
        return {}
    batch, lengths = largest_batch(trainer)
    total = sum(p.numel() for p in trainer.model.parameters())
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    rows, groups = len(batch["input_ids"]), data_ranks(args)[1]
    length = batch["input_ids"].shape[1] * args.context_parallel_size
    loader = trainer.get_train_dataloader()
    _, per_epoch, *_, steps = trainer.set_initial_training_values(args, loader, args.rows_per_step)
    figures = {
        "parameters": total,
        "trained_parameters": trained,
        "tokens_per_step": args.rows_per_step * length,
        "steps": steps,
    }
    kind = trainer.model.config.model_type
    print(f"dry run of {Path(sys.argv[0]).name}: no weights are loaded, nothing is written")
    print(f"parameters: {total:,} of {kind}, {trained:,} of them trained ({trained / total:.3%})")
    several = "groups" if args.context_parallel_size > 1 else "cards"
    parts = {"sequences": rows, "accumulated": args.gradient_accumulation_steps, several: groups}
    product = " x ".join(f"{number} {what}" for what, number in parts.items() if number > 1 or what == "sequences")
    parted = f", each on {args.context_parallel_size} cards" * (args.context_parallel_size > 1)
    tokens = f"{args.rows_per_step:,} sequences, {figures['tokens_per_step']:,} tokens"
    print(f"step: {product} of at most {length} tokens{parted}: {tokens}", end="")
    if lengths is None:
        print(f"\nsteps: {steps:,} of a stream, whose length is not known")
    else:
        figures["epochs"] = steps / per_epoch
        mean = float(lengths.mean())
        print(f", {args.rows_per_step * mean:,.0f} without padding" if mean < 0.99 * length else "")
        print(f"steps: {steps:,}, {figures['epochs']:.4g} epochs of {per_epoch:,} ({len(lengths):,} sequences)")
    try:
        figures |= _report_memory(trainer, batch, _setting(trainer, steps))
    except UserError:
        raise
    except Exception as error:  # of FakeTensor and of what meets one
        print(f"memory of a card: not known, since {kind} cannot be run without values ({first_line(error)})")
    sys.stdout.flush()
    return figures


def largest_batch(trainer) -> tuple[dict[str, torch.Tensor], np.ndarray | None]:
    """A batch of one rank as the collator makes it, of the longest rows, and the tokens of each row of the data.

    With context parallelism it is the first part of these rows.

    Of a stream it is the first batch, and there are no lengths.
    """
    data, size = trainer.train_dataset, trainer.args.per_device_train_batch_size
    lengths = None
    if isinstance(data, IterableDataset):
        batch = next(iter(trainer.get_train_dataloader()), None)
        if batch is None:
            raise UserError("--dry_run: the stream has nothing to train on")
    else:
        lengths = row_lengths(data)
        longest = np.resize(np.argsort(-lengths, kind="stable")[:size], size)
        collate = ignore_filler_samples(trainer.data_collator, trainer.causal, sequence_part(trainer.args))
        batch = collate(TrainingRows(data).__getitems__(longest.tolist()))
    count_tokens(batch)  # takes out what is not for the model
    return batch, lengths


def _setting(trainer, steps: int) -> Setting:
    args, zero, fsdp = trainer.args, None, trainer.args.fsdp_config
    checkpoints_layers = fsdp.get("activation_checkpointing") is True
    config = getattr(args, "hf_deepspeed_config", None)
    if config is not None:
        try:
            config.trainer_config_finalize(args, trainer.model, steps)
        except ValueError as error:
            raise UserError(f"--deepspeed: {error}") from error
        zero = ZeroSettings.of(config.config)
    return Setting(
        rows=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        checkpointing=args.gradient_checkpointing or checkpoints_layers,
        bf16=trainer.use_hpu_amp or trainer.use_cpu_amp,
        zero=zero,
        mixed=trainer.accelerator.mixed_precision == "bf16",
        fsdp=" ".join(getattr(option, "value", option) for option in args.fsdp or ()),
        layers=tuple(fsdp["transformer_layer_cls_to_wrap"] or ()) if args.fsdp else (),
    )


def _measure(trainer, batch: dict[str, torch.Tensor], setting: Setting) -> LiveBytes:
    amp = "use_hpu_amp" if trainer.args.device.type == "hpu" else "use_cpu_amp"
    before = getattr(trainer, amp)
    setattr(trainer, amp, setting.bf16)
    try:
        return step_memory(
            trainer,
            {name: value[: setting.rows] for name, value in batch.items()},
            setting.cards(trainer.args.world_size),
            accumulation=setting.accumulation,
            checkpointing=setting.checkpointing,
        )
    finally:
        setattr(trainer, amp, before)


def _report_memory(trainer, batch: dict[str, torch.Tensor], setting: Setting) -> dict[str, float]:
    ways = {"without checkpointing": False}
    if _can_checkpoint(trainer):
        ways["with --gradient_checkpointing"] = True
    found = {on: _measure(trainer, batch, replace(setting, checkpointing=on)) for on in ways.values()}
    now = found[setting.checkpointing]
    simulated = os.environ.get("GAUDI_SIMULATOR") and os.environ.get("GAUDI_SIMULATOR_MEMORY_GB")
    limit = trainer.args.card_memory_gb or float(simulated or 96)
    print("memory of a card at the peak of a step, in GB of 2^30 bytes:")
    print(" " * 14 + "".join(f"{way:>32}" for way in ways))
    for kind in (*KINDS, "peak"):
        sizes = [live.peak if kind == "peak" else live.at_peak[kind] for live in found.values()]
        if any(sizes):
            print(f"  {kind:12}" + "".join(f"{size / GB:32.4f}" for size in sizes))
    print(f"  logits and loss take {now.highest['loss'] / GB:.4f} GB for a moment")
    peak = now.peak / GB
    if peak <= limit:
        print(f"it fits: {peak:.4g} of {limit:g} GB (--card_memory_gb)")
    else:
        print(f"it does not fit: {peak:.4g} GB, and a card has {limit:g} (--card_memory_gb)")
        _advise(trainer, batch, setting, now, limit)
    return {"peak_device_memory_gb": round(peak, 4)}


def _can_checkpoint(trainer) -> bool:
    if getattr(trainer.model, "peft_type", None) == PeftType.PREFIX_TUNING:
        return False
    return trainer.args.gradient_checkpointing or bool(getattr(trainer.model, "supports_gradient_checkpointing", True))


def _advise(trainer, batch: dict[str, torch.Tensor], setting: Setting, now: LiveBytes, limit: float) -> None:
    """Print the flag that saves most, then the one that saves most beside it, until the step fits."""
    peak = now.peak
    while peak / GB > limit:
        others = [(_measure(trainer, batch, other).peak, other) for other in _alternatives(trainer, setting)]
        best, other = min(others, key=lambda pair: pair[0], default=(peak, setting))
        if best >= peak:
            print("no other flag makes it fit: shorter rows, more cards with ZeRO-3, or a smaller model")
            return
        print(f"{'most helps' if peak == now.peak else 'then'} {other.flags}: {best / GB:.4g} GB")
        peak, setting = best, other


def _alternatives(trainer, setting: Setting) -> Iterator[Setting]:
    args = trainer.args
    if not setting.checkpointing and _can_checkpoint(trainer):
        yield replace(setting, checkpointing=True, flags="--gradient_checkpointing")
    if setting.rows > 1:
        rows, accumulation = setting.rows // 2, setting.accumulation * 2
        flags = f"--per_device_train_batch_size {rows} --gradient_accumulation_steps {accumulation}"
        yield replace(setting, rows=rows, accumulation=accumulation, flags=flags)
    if not setting.bf16 and setting.zero is None:
        yield replace(setting, bf16=True, mixed=True, flags="--bf16")
    if args.device.type == "hpu" and args.world_size > 1 and not setting.fsdp:
        for stage in range(1 if setting.zero is None else setting.zero.stage + 1, 4):
            zero = replace(setting.zero or ZeroSettings(), stage=stage)
            yield replace(setting, zero=zero, flags=f"ZeRO-{stage} (--deepspeed configs/deepspeed/zero_{stage}.json)")
