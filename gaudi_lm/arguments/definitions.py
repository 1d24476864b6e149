"""The flags that all three scripts share."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from optimum.habana.transformers.training_args import GaudiTrainingArguments
from transformers.utils.logging import get_log_levels_dict

from gaudi_lm.arguments.consistency import check_together
from gaudi_lm.arguments.context_parallel import data_ranks
from gaudi_lm.arguments.dry_runs import prepare_dry_run, without_groups
from gaudi_lm.arguments.gaudi_configs import resolve_gaudi_config
from gaudi_lm.arguments.refusals import CARD_ONLY
from gaudi_lm.errors import UserError
from gaudi_lm.optimum_imports import answers_without_pip, leave_out_libraries

CARD_BACKEND = "hpu_backend"  # of torch.compile


@dataclass
class ModelArguments:
    """Which model, configuration and tokenizer."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Model to start from: a folder or a hub name; without it, one is made from scratch."},
    )
    config_name: str | None = field(
        default=None, metadata={"help": "Configuration, if not the model's own: a folder or a hub name."}
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Tokenizer, if not the model's own: a folder or a hub name."}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where files from the hub are kept."})
    use_fast_tokenizer: bool = field(
        default=True, metadata={"help": "Use the tokenizer of the `tokenizers` library, several times faster."}
    )
    model_revision: str = field(
        default="main",
        metadata={"help": "Branch, tag or commit on the hub, of the model, its configuration and its tokenizer."},
    )
    token: str | None = field(
        default=None, metadata={"help": "Token for gated or private repositories; by default the stored login."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Allow code from the model's hub repository to run on this machine."}
    )
    torch_dtype: str | None = field(
        default=None,
        metadata={
            "help": "Dtype in which the weights are loaded or made; `auto` takes the checkpoint's.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    use_cache: bool = field(
        default=True, metadata={"help": "Value of `use_cache` in the saved configuration. Training never caches keys."}
    )
    low_cpu_mem_usage: bool = field(
        default=False, metadata={"help": "Load weights one tensor at a time instead of twice the whole model."}
    )
    attn_softmax_bf16: bool = field(
        default=False, metadata={"help": "Attention softmax in bf16, where optimum-habana's model offers it."}
    )


@dataclass
class DataArguments:
    """Which text, how much of it, and how it is read."""

    dataset_name: str | None = field(default=None, metadata={"help": "Dataset on the hub, or a local folder of one."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that dataset."})
    train_file: str | None = field(
        default=None,
        metadata={
            "help": "Training file or glob: csv, tsv, json, jsonl, txt or parquet, also compressed (.gz, .zst)."
        },
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "Validation file or glob; with --dataset_name, instead of its validation set."}
    )
    csv_delimiter: str | None = field(
        default=None,
        metadata={
            "help": "What separates the fields of csv and tsv files, such as ';'; by default a tab in .tsv files, and "
            "otherwise the first of comma, tab and semicolon that is in a file's first line."
        },
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on at most this many blocks (or rows, where nothing is concatenated)."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Evaluate on at most this many blocks (or rows)."}
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read the data while training instead of preparing all of it first."}
    )
    overwrite_cache: bool = field(default=False, metadata={"help": "Preprocess again even if a cached result exists."})
    validation_split_percentage: int = field(
        default=5,
        metadata={"help": "Percentage of the training rows kept for validation where there is no validation set."},
    )
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Processes for preprocessing; by default one process with all its threads."}
    )
    keep_linebreaks: bool = field(default=True, metadata={"help": "Keep line breaks when reading txt files."})
    save_last_ckpt: bool = field(
        default=True, metadata={"help": "Save the final model at the top of --output_dir after training."}
    )
    text_column_name: str | None = field(
        default=None,
        metadata={"help": "Column that holds the text; by default `text`, or else the first one with words."},
    )

    def described(self) -> str:
        """The data in a few words, for the model card."""
        hub = " ".join(filter(None, (self.dataset_name, self.dataset_config_name)))
        files = (Path(file).name for file in (self.train_file, self.validation_file) if file)
        return ", ".join(filter(None, (hub, *files)))

    def check(self, max_steps: int, allow_no_split: bool = False, do_train: bool = True) -> None:
        """Refuse what cannot work, by the flag's name.

        Raises:
            UserError: see the message.
        """
        if self.dataset_name is None and self.train_file is None and self.validation_file is None:
            raise UserError("no data: give --dataset_name, or --train_file and/or --validation_file")
        if self.dataset_name and self.train_file:
            raise UserError("--dataset_name and --train_file exclude each other: both are what is trained on")
        if self.csv_delimiter is not None and not (self.train_file or self.validation_file):
            raise UserError("--csv_delimiter goes with --train_file or --validation_file")
        low = 0 if allow_no_split else 1
        if not low <= self.validation_split_percentage <= 99:
            raise UserError(f"--validation_split_percentage {self.validation_split_percentage} is outside {low}-99")
        if self.streaming and do_train and max_steps <= 0:
            raise UserError("--streaming needs --max_steps: the length of a stream is not known in advance")


@dataclass
class LMTrainingArguments(GaudiTrainingArguments):
    """GaudiTrainingArguments with defaults that depend on the card; --use_cpu overrides the Gaudi flags."""

    optim: str | None = field(
        default=None,
        metadata={"help": "Optimizer; by default fused AdamW (on a Gaudi by the Gaudi configuration)."},
    )
    report_to: list[str] | None = field(
        default_factory=lambda: ["none"],
        metadata={"help": "Where to report: `tensorboard`, `wandb`, ... Nothing is reported unless named here."},
    )
    disable_tqdm: bool | None = field(
        default=None, metadata={"help": "Turn progress bars off; by default they show on a terminal only."}
    )
    log_level_replica: str = field(
        default="error",
        metadata={
            "help": "Level of the log of the ranks other than the first, such as `warning` or `info`.",
            "choices": [*get_log_levels_dict(), "passive"],
        },
    )
    chunked_loss: bool = field(
        default=True,
        metadata={"help": "Cross-entropy in chunks; False, or compiling on the CPU, keeps a batch's full logits."},
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "Attention: by default `sdpa` on the CPU and `eager` on a Gaudi.",
            "choices": ["eager", "sdpa", "gaudi_fused_sdpa"],
        },
    )
    show_examples: int = field(default=1, metadata={"help": "Log so many training samples, their targets marked."})
    generate: list[str] | None = field(
        default=None, metadata={"help": "Texts for the trained model to continue or fill in.", "action": "extend"}
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "End training after so many evaluations in a row without a better one."}
    )
    save_on_signal: bool = field(
        default=True,
        metadata={
            "help": "On SIGTERM, SIGUSR1, SIGHUP and the first Ctrl-C: finish the step, save a checkpoint and end "
            "with exit status 128 plus the signal's number. False: end at once."
        },
    )
    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Load no weights and write nothing: print parameters, steps and the memory of a card, and end."
        },
    )
    dry_run_cards: int | None = field(
        default=None, metadata={"help": "With --dry_run in one process: the number of cards that it stands for."}
    )
    card_memory_gb: float | None = field(
        default=None,
        metadata={"help": "With --dry_run: memory of a card in GB of 2^30 bytes; by default 96, a Gaudi 2's."},
    )

    def __post_init__(self):
        self.overridden_flags: list[str] = []
        if self.dry_run:
            prepare_dry_run(self)
        if self.use_cpu:
            self._prefer_cpu()
        elif not self.use_habana:
            raise UserError("no card chosen: give --use_habana (a Gaudi, or a simulated one) or --use_cpu")
        else:
            self._match_lazy_mode()
        self.chosen = {x for x in ("optim", "attn_implementation", "disable_tqdm") if getattr(self, x) is not None}
        if self.optim is None:
            self.optim = "adamw_torch_fused" if self.use_cpu else "adamw_torch"
        if self.attn_implementation is None:
            self.attn_implementation = "sdpa" if self.use_cpu else "eager"
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()
        check_together(self)
        if self.gaudi_config_name is not None:
            self.gaudi_config_name = resolve_gaudi_config(self.gaudi_config_name)
        # The datasets hold only what the model takes.
        self.remove_unused_columns = False
        try:
            # On a card this imports optimum-habana's models, which print.
            with contextlib.redirect_stdout(None), answers_without_pip(), without_groups(self):
                leave_out_libraries(self)
                super().__post_init__()
        except (ValueError, AssertionError) as error:
            raise UserError(str(error)) from error
        differing = getattr(getattr(self, "hf_deepspeed_config", None), "mismatches", None)
        if differing:
            raise UserError(f"--deepspeed: values that differ from the flags: {'; '.join(differing)}; use auto there")
        if not (self.do_train or self.do_eval):
            raise UserError("nothing to do: give --do_train, --do_eval, or both")

    def to_dict(self) -> dict:
        """For trackers: all flags of the script, without secrets."""
        return {**getattr(self, "flags", {}), **super().to_dict()}

    @property
    def device(self) -> torch.device:
        """The device of this rank; accelerate's ``cpu:0`` for several ranks is a place torch 2.13 loads nothing to."""
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device

    @property
    def world_size(self) -> int:
        """Ranks that train; in a dry run, those that this process stands for."""
        return self.dry_run_cards or super().world_size

    @property
    def should_save(self) -> bool:
        """Whether this rank writes; in a dry run none does, not even the folder."""
        return super().should_save and not self.dry_run

    @property
    def place_model_on_device(self) -> bool:
        """Whether the trainer moves the model to the card; in a dry run there is nothing to move."""
        return super().place_model_on_device and not self.dry_run

    @contextlib.contextmanager
    def main_process_first(self, local: bool = True, desc: str = "work") -> Iterator[None]:
        """Of several ranks of a host, let the first one prepare what the others then find."""
        with contextlib.nullcontext() if self.dry_run_cards else super().main_process_first(local, desc):
            yield

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimizer step, of all ranks."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * data_ranks(self)[1]

    def _prefer_cpu(self) -> None:
        defaults = {f.name: f.default for f in fields(GaudiTrainingArguments)}
        for name, value in CARD_ONLY.items():
            # --use_lazy_mode is on by default: only what the user typed is worth a word.
            if getattr(self, name) not in (value, None) and getattr(self, name) != defaults[name]:
                self.overridden_flags.append(f"--{name}")
            setattr(self, name, value)
        if self.attn_implementation == "gaudi_fused_sdpa":
            self.overridden_flags.append("--attn_implementation gaudi_fused_sdpa")
            self.attn_implementation = None
        if self.torch_compile_backend == CARD_BACKEND:
            self.overridden_flags.append(f"--torch_compile_backend {CARD_BACKEND}")
            self.torch_compile_backend = None
        if self.torch_compile or self.torch_compile_mode or self.torch_compile_backend:
            # GaudiTrainingArguments would take the backend of the card, and ask for its mode.
            self.torch_compile = True
            self.torch_compile_backend = self.torch_compile_backend or "inductor"
        self.half_precision_backend = "cpu_amp"

    def _match_lazy_mode(self) -> None:
        # device.choose_card has set the variable from the flags, unless the user's environment had it.
        if os.environ.get("PT_HPU_LAZY_MODE") == "0":
            self.use_lazy_mode = False
