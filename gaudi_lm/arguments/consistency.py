"""What the training arguments must be together, before torch sets up any device."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
from pathlib import Path

from accelerate.utils import DynamoBackend
from huggingface_hub import get_token
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch.utils.checkpoint import checkpoint
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import FSDPOption

from gaudi_lm.arguments.context_parallel import check_context_parallel
from gaudi_lm.arguments.deepspeed_configs import check_deepspeed_config, divides
from gaudi_lm.arguments.optional_packages import (
    check_optimizer,
    check_optimizer_of_shares,
    check_reporters,
    is_importable,
    require,
)
from gaudi_lm.arguments.schedules import check_scheduler
from gaudi_lm.errors import UserError, nearest, unknown, warn

# Figures of an evaluation, by which a best model can be told.
METRICS = ("loss", "perplexity", "accuracy")
# The scripts deal out batches themselves; accelerate's loaders are not used.
_OWN_BATCHES = ("split_batches", "dispatch_batches", "even_batches", "use_seedable_sampler")
_BOOLEAN, _COUNT, _NAMES = ("true", "false"), ("a whole number",), ("a name", "a list of names")
_FSDP_SETTINGS = {
    "activation_checkpointing": _BOOLEAN,
    "backward_prefetch": ("backward_pre", "backward_post", "no_prefetch"),
    "cpu_ram_efficient_loading": _BOOLEAN,
    "forward_prefetch": _BOOLEAN,
    "limit_all_gathers": _BOOLEAN,
    "min_num_params": _COUNT,
    "state_dict_type": ("FULL_STATE_DICT", "SHARDED_STATE_DICT"),
    "sync_module_states": _BOOLEAN,
    "transformer_layer_cls_to_wrap": _NAMES,
    "use_orig_params": _BOOLEAN,
}
_FP8 = (("habana_frameworks.torch.hpex.experimental.transformer_engine",), "habana-transformer-engine")


def read_mapping(flag: str, value: str | dict | None, is_file: bool) -> dict | None:
    """A flag's value that is a mapping, JSON text of one, or, for some flags, a JSON file of one.

    Raises:
        UserError: no such file, not JSON, or not a mapping.
    """
    if value is None or isinstance(value, dict):
        return value
    text, where = value, f"--{flag}"
    if not value.lstrip().startswith("{"):
        if not is_file:
            raise UserError(f"--{flag} {value}: it takes a mapping in JSON, such as '{{\"key\": 1}}'")
        where = f"--{flag} {value}"
        try:
            text = Path(value).read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            raise UserError(f"{where}: no such file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{where}: cannot be read ({error})") from error
    try:
        mapping = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON: {error.msg}, line {error.lineno} column {error.colno}") from error
    if not isinstance(mapping, dict):
        raise UserError(f"{where}: it holds a {type(mapping).__name__}, not a mapping")
    return mapping


def check_together(args) -> None:
    """Refuse training arguments that contradict one another, or that nothing here can serve.

    Args:
        args: :class:`gaudi_lm.arguments.definitions.LMTrainingArguments`, before its own defaults are resolved.

    Raises:
        UserError: see the message.
    """
    check_optimizer(args.optim, args.optim_args, args.optim_target_modules)
    check_reporters(args.report_to)
    check_scheduler(args, read_mapping("lr_scheduler_kwargs", args.lr_scheduler_kwargs, is_file=False) or {})
    accelerator = args.accelerator_config
    if isinstance(accelerator, AcceleratorConfig):  # of arguments that were copied
        accelerator = accelerator.to_dict()
    _check_accelerator(read_mapping("accelerator_config", accelerator, is_file=True) or {})
    _check_checkpointing(read_mapping("gradient_checkpointing_kwargs", args.gradient_checkpointing_kwargs, False))
    _check_deepspeed(args, read_mapping("deepspeed", args.deepspeed, is_file=True))
    _check_fsdp(args, read_mapping("fsdp_config", args.fsdp_config, is_file=True) or {})
    check_context_parallel(args)
    _check_best_model(args)
    _check_compile(args)
    _check_hub(args)
    if args.fp8:
        require("--fp8", _FP8)
    workers = args.dataloader_num_workers
    if workers > len(os.sched_getaffinity(0)):
        warn(f"--dataloader_num_workers {workers} is odd: this process may use {len(os.sched_getaffinity(0))} CPUs")
    if args.max_steps > 0 and args.warmup_steps >= args.max_steps:
        warn(f"--warmup_steps {args.warmup_steps} is odd: all {args.max_steps} steps are warm-up")
    backend = "cpu_amp" if args.use_cpu else "hpu_amp"
    if args.half_precision_backend != backend:
        raise UserError(f"--half_precision_backend {args.half_precision_backend}: on this device it is {backend}")


def _check_accelerator(config: dict) -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(AcceleratorConfig)}
    for key, value in config.items():
        if key not in defaults:
            raise UserError(f"--accelerator_config: unknown key {key}{nearest(key, list(defaults))}")
        if key in _OWN_BATCHES and value != defaults[key]:
            raise UserError(f"--accelerator_config: {key}: the scripts deal out batches themselves; leave it out")
        if key == "use_configured_state" and value:
            raise UserError("--accelerator_config: use_configured_state: a script configures its own state")


def _check_checkpointing(kwargs: dict | None) -> None:
    known = [*list(inspect.signature(checkpoint).parameters)[1:], "preserve_rng_state"]
    for key in kwargs or ():
        if key not in known or key in ("args", "kwargs"):
            raise UserError(f"--gradient_checkpointing_kwargs: unknown key {key}{nearest(key, known)}")


def _check_deepspeed(args, config: dict | None) -> None:
    if config is None:
        return
    if not any(name in os.environ for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE")):
        raise UserError(
            "--deepspeed: ranks are started by a launcher, one too: "
            "python gaudi_spawn.py --world_size 1 --use_deepspeed SCRIPT FLAGS"
        )
    if args.fsdp:
        raise UserError("--deepspeed and --fsdp exclude each other: both split the model's state over ranks")
    if not is_importable("deepspeed"):
        raise UserError(
            "--deepspeed: the package deepspeed is not installed; on a Gaudi it comes from Habana's fork, "
            "pip install git+https://github.com/HabanaAI/DeepSpeed.git at the release that README.md names"
        )
    named = isinstance(args.deepspeed, str) and not args.deepspeed.lstrip().startswith("{")
    warms_up = bool(args.warmup_steps or args.warmup_ratio)
    check_deepspeed_config(f"--deepspeed {args.deepspeed}" if named else "--deepspeed", config, warms_up)
    if "optimizer" not in config and divides(config):
        check_optimizer_of_shares("--optim", args.optim, zero=True)


def _check_fsdp(args, config: dict) -> None:
    if not isinstance(args.fsdp, str):
        return
    options = [option.value for option in FSDPOption]
    for word in args.fsdp.split():
        if word not in options:
            raise UserError(f"--fsdp {word}: {unknown(word, options)}")
    if not args.fsdp:
        return
    if FSDPOption.NO_SHARD.value not in args.fsdp.split():
        check_optimizer_of_shares("--optim", args.optim, zero=False)
    config = {name.removeprefix("fsdp_"): value for name, value in config.items()}
    truth = {"true": True, "false": False}
    for name in [name for name, allowed in _FSDP_SETTINGS.items() if allowed == _BOOLEAN and name in config]:
        config[name] = truth.get(str(config[name]).lower(), config[name])  # a text "false" would count as true
    if args.gradient_checkpointing and config.get("activation_checkpointing") is True:
        raise UserError("--gradient_checkpointing: --fsdp_config has activation_checkpointing; leave one of them out")
    if ignored := config.keys() - _FSDP_SETTINGS.keys():
        known = ", ".join(_FSDP_SETTINGS)
        warn(f"--fsdp_config: no effect of {', '.join(sorted(ignored))}; the settings are {known}")
    kind = os.environ.get("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT")
    given = {f"--fsdp_config: {name}": (config[name], _FSDP_SETTINGS[name]) for name in config.keys() - ignored}
    given["the variable FSDP_STATE_DICT_TYPE"] = (kind, _FSDP_SETTINGS["state_dict_type"])
    for name, (value, allowed) in given.items():
        if not _is_setting(value, allowed):
            raise UserError(f"{name} {value}: {' or '.join(allowed)}")
    if args.save_only_model and "SHARDED_STATE_DICT" in (kind, config.get("state_dict_type")):
        raise UserError("--save_only_model: not with SHARDED_STATE_DICT, whose shards are what a run goes on from")
    if not any(name in os.environ for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE")):
        raise UserError("--fsdp: it splits a model over ranks, which a launcher starts: gaudi_spawn.py --world_size N")
    if args.save_on_each_node:
        raise UserError("--save_on_each_node: not with --fsdp, whose checkpoints need a folder that all hosts share")
    args.fsdp_config = config


def _is_setting(value: object, allowed: tuple[str, ...]) -> bool:
    if allowed == _COUNT:
        return type(value) is int and value >= 0
    if allowed == _NAMES:
        return all(isinstance(name, str) for name in (value if isinstance(value, list) else [value or ""]))
    return str(value).lower() in map(str.lower, allowed)


def _check_best_model(args) -> None:
    metric, strategy = args.metric_for_best_model, getattr(args.eval_strategy, "value", args.eval_strategy)
    saved = getattr(args.save_strategy, "value", args.save_strategy)
    if strategy == "no":
        plateau = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type) == "reduce_lr_on_plateau"
        for needed, flag in (
            (saved == "best", "--save_strategy best"),
            (args.load_best_model_at_end, "--load_best_model_at_end"),
            (plateau, "--lr_scheduler_type reduce_lr_on_plateau"),
            (metric is not None, "--metric_for_best_model"),
        ):
            if needed:
                raise UserError(f"{flag} needs evaluations while training: --eval_strategy steps or epoch")
    if args.load_best_model_at_end and args.save_only_model and (args.fsdp or args.deepspeed):
        raise UserError(
            f"--save_only_model: not with {'--fsdp' if args.fsdp else '--deepspeed'} and --load_best_model_at_end, "
            "which loads divided weights from whole checkpoints; leave one of them out"
        )
    if args.greater_is_better is None and metric is not None and metric.rpartition("_")[2] in METRICS:
        # Upstream takes every figure whose name does not end with "loss" for better when greater.
        args.greater_is_better = metric.endswith("accuracy")
    if saved == "best" and metric is None:
        args.metric_for_best_model, args.greater_is_better = "loss", False


def check_best_metric(name: str | None, eval_dataset: object, metrics: tuple[str, ...] = METRICS) -> None:
    """Refuse a ``--metric_for_best_model`` that no evaluation gives; with several sets, each figure has a set's name.

    Args:
        metrics: what an evaluation gives.

    Raises:
        UserError: there is no such figure.
    """
    sets = [f"{one}_" for one in eval_dataset] if isinstance(eval_dataset, dict) else [""]
    names = [f"{prefix}{metric}" for prefix in sets for metric in metrics]
    if name is not None and name.removeprefix("eval_") not in names:
        raise UserError(f"--metric_for_best_model {name}: an evaluation gives {', '.join(names)}")


def _check_hub(args) -> None:
    if not args.push_to_hub:
        return
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        flag = "--hub_model_id" if args.hub_model_id else "--hub_model_id, by default the name of --output_dir,"
        raise UserError(f"{flag} {name}: " + str(error).partition(f": '{name}'")[0]) from error
    if not (args.hub_token or get_token()):
        raise UserError("--push_to_hub: log in with `hf auth login`, or give --hub_token")
    if HF_HUB_OFFLINE:
        warn("--push_to_hub: nothing will be uploaded with HF_HUB_OFFLINE=1 (or TRANSFORMERS_OFFLINE=1)")


def _check_compile(args) -> None:
    if args.torch_compile_backend:
        known = sorted({backend.value.lower() for backend in DynamoBackend} - {"no"} | {"hpu_backend"})
        if args.torch_compile_backend.lower() not in known:
            raise UserError(
                f"--torch_compile_backend {args.torch_compile_backend}: {unknown(args.torch_compile_backend, known)}"
            )
    modes = ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
    if args.torch_compile_mode and args.torch_compile_mode not in modes:
        raise UserError(f"--torch_compile_mode {args.torch_compile_mode}: it is one of {', '.join(modes)}")
