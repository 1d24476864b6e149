"""What the numbers of the flags may be: one table for all scripts."""

from __future__ import annotations

from dataclasses import dataclass

from gaudi_lm.errors import UserError, warn


@dataclass(frozen=True)
class Range:
    """The values that a flag may have, ends included unless said otherwise.

    Args:
        also: values outside of the range that have a meaning of their own.
        whole_from: where it is given, numbers from there on must be whole ones.
        hint: for the message, what to do instead.
        odd: from a value to a warning; what it names is possible, and seldom meant.
    """

    low: float
    high: float = 2.0**53
    without_low: bool = False
    without_high: bool = False
    also: tuple[float, ...] = ()
    whole_from: float | None = None
    hint: str = ""
    odd_low: float | None = None
    odd_high: float | None = None
    odd: str = ""

    def holds(self, value: float) -> bool:
        """Whether a value is within; NaN never is."""
        if value in self.also:
            return True
        above = value > self.low if self.without_low else value >= self.low
        below = value < self.high if self.without_high else value <= self.high
        whole = self.whole_from is None or value < self.whole_from or float(value).is_integer()
        return above and below and whole

    def is_odd(self, value: float) -> bool:
        """Whether a value deserves a warning."""
        return (self.odd_low is not None and value <= self.odd_low) or (
            self.odd_high is not None and value >= self.odd_high
        )

    def __str__(self) -> str:
        low = f"{'more than' if self.without_low else 'at least'} {_written(self.low)}"
        if self.high >= 2.0**53:
            words = low
        elif self.without_low or self.without_high:
            words = f"{low} and {'less than' if self.without_high else 'at most'} {_written(self.high)}"
        else:
            words = f"between {_written(self.low)} and {_written(self.high)}"
        if self.whole_from is not None:
            words += f", and whole from {_written(self.whole_from)} on"
        return " or ".join([words, *map(_written, self.also)]) + (f"; {self.hint}" if self.hint else "")


COUNT = Range(1)
FROM_ZERO = Range(0)
SEED = Range(0, 2**32 - 1)
ROWS = Range(1, 2**20)
WORKERS = Range(0, 1024)
DROPOUT = Range(0, 1, without_high=True)
RANK = Range(1, 2**14)
# Upstream's own meaning of a number below 1: a share of all steps.
INTERVAL = Range(0, without_low=True, whole_from=1, hint="a number below 1 is a share of all steps")

RANGES: dict[str, Range] = {
    "max_train_samples": COUNT,
    "max_eval_samples": COUNT,
    "validation_split_percentage": Range(0, 99),
    "preprocessing_num_workers": Range(1, 1024),
    "block_size": Range(2, hint="the first token of a block is never predicted"),
    "max_seq_length": Range(2),
    "per_device_train_batch_size": ROWS,
    "per_device_eval_batch_size": ROWS,
    "gradient_accumulation_steps": ROWS,
    "eval_accumulation_steps": COUNT,
    "eval_delay": FROM_ZERO,
    "learning_rate": Range(0, 1e6, odd_low=0, odd_high=1, odd="nothing is learnt at 0, and little above 1"),
    "weight_decay": Range(0, 1e6, odd_high=1, odd="weights are usually decayed by 0 to 0.3"),
    "adam_beta1": Range(0, 1, without_high=True),
    "adam_beta2": Range(0, 1, without_high=True),
    "adam_epsilon": Range(0, 1, odd_low=0, odd="a weight without a gradient becomes NaN"),
    "max_grad_norm": Range(0, hint="0 turns clipping off"),
    "num_train_epochs": Range(0, 1e9, without_low=True, hint="without training, leave out --do_train"),
    "max_steps": Range(1, also=(-1,), hint="-1 leaves it to --num_train_epochs"),
    "warmup_ratio": Range(0, 1, odd_high=1, odd="the learning rate is reached in the last step only"),
    "warmup_steps": FROM_ZERO,
    "logging_steps": INTERVAL,
    "save_steps": INTERVAL,
    "eval_steps": INTERVAL,
    "show_examples": Range(0, 1000),
    "early_stopping_patience": COUNT,
    "save_total_limit": Range(1, hint="without it all checkpoints are kept"),
    "seed": SEED,
    "data_seed": SEED,
    "dataset_seed": SEED,
    "local_rank": Range(0, also=(-1,)),
    "dataloader_num_workers": WORKERS,
    "dataloader_prefetch_factor": COUNT,
    "fsdp_min_num_params": FROM_ZERO,
    "label_smoothing_factor": DROPOUT,
    "ddp_bucket_cap_mb": COUNT,
    "ddp_timeout": Range(1, 1e9),
    "neftune_noise_alpha": Range(0, 1e6, odd_low=0, odd="no noise is added at 0"),
    "cache_size_limit": COUNT,
    "dry_run_cards": Range(1, 2**20),
    "card_memory_gb": Range(0, without_low=True),
    "max_hpu_graphs": COUNT,
    "context_parallel_size": COUNT,
    "throughput_warmup_steps": FROM_ZERO,
    "profiling_warmup_steps": FROM_ZERO,
    "profiling_steps": FROM_ZERO,
    "mlm_probability": Range(0, 1, without_low=True, odd_high=0.6, odd="little is left to predict from"),
    "max_predictions_per_seq": FROM_ZERO,
    "lora_rank": RANK,
    "lora_alpha": COUNT,
    "lora_dropout": DROPOUT,
    "adalora_init_r": RANK,
    "adalora_target_r": RANK,
    "adalora_tinit": FROM_ZERO,
    "adalora_tfinal": FROM_ZERO,
    "adalora_delta_t": COUNT,
    "adalora_orth_reg_weight": Range(0, 1e6, without_low=True),
    "adapter_layers": COUNT,
    "num_virtual_tokens": COUNT,
    "encoder_hidden_size": COUNT,
    "adapter_len": COUNT,
}


def check_ranges(values: dict) -> None:
    """Refuse numbers outside of their meaning; odd ones get a warning.

    Args:
        values: by the name of the flag; None is a flag that was not given.

    Raises:
        UserError: the first flag that is out of its range.
    """
    for name, allowed in RANGES.items():
        value = values.get(name)
        if value is None:
            continue
        if not allowed.holds(value):
            raise UserError(f"--{name} {_written(value)}: it must be {allowed}")
        if allowed.is_odd(value):
            warn(f"--{name} {_written(value)} is odd: {allowed.odd}")


def _written(value: float) -> str:
    whole = isinstance(value, float) and value.is_integer()
    return str(int(value) if whole else value)
