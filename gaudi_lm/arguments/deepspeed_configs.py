"""What a DeepSpeed configuration asks for, read by DeepSpeed itself before data and model are loaded."""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Collection
from types import ModuleType
from typing import TYPE_CHECKING, Any, get_args

from gaudi_lm.arguments.optional_packages import check_optimizer_of_shares
from gaudi_lm.errors import UserError, nearest, unknown
from gaudi_lm.optimum_imports import import_deepspeed

if TYPE_CHECKING:
    from pydantic import BaseModel

    from gaudi_lm.arguments.definitions import LMTrainingArguments

logger = logging.getLogger("gaudi_lm")

ZERO = "zero_optimization"
SECTIONS = (
    *(ZERO, "activation_checkpointing", "bf16", "checkpoint", "comms_logger", "data_types", "fp16", "optimizer"),
    *("scheduler", "tensor_parallel", "tensorboard", "torch_autocast"),
)
BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
UNTESTED = "zero_allow_untested_optimizer"
NOT_ON_CARDS = ("lamb", "lion")  # DeepSpeed's own kernels, none of which its HPU backend has
NOT_STEPPED = {"LBFGS": "asks for losses again within a step", "SparseAdam": "takes sparse gradients alone"}
# The names of one setting of DeepSpeed.
GATHERED = (
    "stage3_gather_16bit_weights_on_model_save",
    "gather_16bit_weights_on_model_save",
    "stage3_gather_fp16_weights_on_model_save",
)


def check_deepspeed_config(source: str, config: dict, warms_up: bool = True) -> None:
    """Refuse a configuration that DeepSpeed would refuse once the model is there, or read in part; and fp16.

    Args:
        source: the flag and the file, for messages.
        config: DeepSpeed's configuration, in which ``auto`` may stand for any value.
        warms_up: whether the flags name steps, or a share of them, to warm up.

    Raises:
        UserError: an unknown key, a value that cannot be, training in fp16, or tensor parallelism.
    """
    half = config.get("fp16")
    if isinstance(half, dict) and half.get("enabled") is True:
        raise UserError(f'{source}: fp16 does not exist on a Gaudi; bf16 does: "bf16": {{"enabled": true}}')
    import_deepspeed()
    from deepspeed.runtime import config as deepspeed_config

    for key, value in config.items():
        if key not in BATCH and (key in SECTIONS or value != "auto"):  # transformers fills in, and holds against flags
            _check_entry(source, key, value)
    _check_names(source, config, deepspeed_config)
    _check_optimizer(source, config, deepspeed_config.DEEPSPEED_OPTIMIZERS)
    _check_scheduler(source, config.get("scheduler", {}), warms_up)
    parallel = config.get("tensor_parallel", {}).get("autotp_size", 0)
    if parallel not in (0, 1, "auto"):
        raise UserError(f"{source}: tensor_parallel: each card trains on data of its own here; ZeRO-3 splits a model")


def _check_names(source: str, config: dict, deepspeed_config: ModuleType) -> None:
    """DeepSpeed passes over a key that it does not know: one that is nearly a known one is misspelt."""
    known = {value for name, value in vars(deepspeed_config).items() if name.isupper() and isinstance(value, str)}
    known.update(SECTIONS)
    for key in sorted(config.keys() - known):
        if close := difflib.get_close_matches(key, known, n=1, cutoff=0.8):
            raise UserError(f"{source}: unknown key {key}; did you mean {close[0]}?")


def _check_entry(source: str, key: str, value: Any) -> None:
    """Let DeepSpeed read a configuration of this key alone, so that the message can name it."""
    from deepspeed.runtime.config import DeepSpeedConfig, DtypeEnum
    from pydantic import ValidationError

    if key in SECTIONS and not isinstance(value, dict):
        raise UserError(f"{source}: {key} is a mapping, from names to values")
    try:
        DeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, key: _without_auto(value)})
        if key == "data_types":
            for name in [name for name in value if name.endswith("_dtype")]:
                DtypeEnum(value[name])  # which DeepSpeed asks once the model is there
    except ValidationError as error:
        # First the names that are unknown: a misspelt one may be why another value does not fit.
        fault = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
        loc = [str(part) for part in fault["loc"]]
        loc = loc[1:] if loc[0] == key else loc
        where = ".".join([key, *loc])
        if fault["type"] == "extra_forbidden":
            raise UserError(
                f"{source}: unknown key {where}{nearest(loc[-1], _names(error.title, loc[:-1]))}"
            ) from error
        raise UserError(f"{source}: {where} is {fault['input']!r}: {fault['msg']}") from error
    except Exception as error:  # of many kinds, by whatever the values meet first
        raise UserError(f"{source}: {key}: {error}") from error


def divides(config: dict) -> bool:
    """Whether ZeRO divides the optimizer's state among ranks, by DeepSpeed's configuration."""
    return bool(config.get(ZERO, {}).get("stage", 0))


def _check_optimizer(source: str, config: dict, own: list[str]) -> None:
    import torch

    optimizer = config.get("optimizer", {})
    kind = str(optimizer.get("type", "AdamW"))
    known = getattr(torch.optim, kind, None)
    if kind.lower() not in own and not (isinstance(known, type) and known is not torch.optim.Optimizer):
        raise UserError(f"{source}: optimizer.type is {kind}, which neither DeepSpeed nor torch.optim has")
    if kind.lower() in NOT_ON_CARDS:
        raise UserError(f"{source}: optimizer.type {kind}: DeepSpeed has no {kind} for a Gaudi; use AdamW")
    if kind in NOT_STEPPED:
        raise UserError(f"{source}: optimizer.type {kind}: it {NOT_STEPPED[kind]}; use AdamW")
    if divides(config):
        check_optimizer_of_shares(f"{source}: optimizer.type", kind, zero=True)
        if kind.lower() not in own and config.get(UNTESTED) is not True:
            raise UserError(f'{source}: optimizer.type {kind}: ZeRO takes it only with "{UNTESTED}": true in the file')
    if kind.lower() in ("adam", "adamw"):
        from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

        kinds = (torch.optim.AdamW, FusedAdam, DeepSpeedCPUAdam)
        names = {name for one in kinds for name in _parameters(one)}
        _check_parameters(f"{source}: optimizer.params", optimizer, {"torch_adam", *names})
    elif known is not None and kind.lower() not in own:
        _check_parameters(f"{source}: optimizer.params", optimizer, _parameters(known))


def _check_scheduler(source: str, scheduler: dict, warms_up: bool) -> None:
    import torch
    from deepspeed.runtime import lr_schedules

    kind = str(scheduler.get("type", "WarmupLR"))
    if kind not in lr_schedules.VALID_LR_SCHEDULES:
        raise UserError(f"{source}: scheduler.type {kind}: {unknown(kind, lr_schedules.VALID_LR_SCHEDULES)}")
    schedule = getattr(lr_schedules, kind)
    _check_parameters(f"{source}: scheduler.params", scheduler, known := _parameters(schedule))
    if (scheduler.get("params") or {}).get("warmup_num_steps") == "auto" and not warms_up:
        steps = {"warmup_num_steps": 0} | ({"total_num_steps": 1} if "total_num_steps" in known else {})
        try:
            schedule(torch.optim.SGD([torch.zeros(1)], lr=1.0), **steps)
        except ValueError as error:  # not of each release
            way_out = "--warmup_steps or --warmup_ratio is needed"
            raise UserError(f"{source}: scheduler.params.warmup_num_steps auto: {way_out} ({error})") from error


def _parameters(kind: type) -> list[str]:
    return list(inspect.signature(kind).parameters)[1:]  # the first are the model's weights, or the optimizer


def _check_parameters(message: str, section: dict, known: Collection[str]) -> None:
    given = section.get("params") or {}
    if not isinstance(given, dict):
        raise UserError(f"{message} is a mapping, from names to values")
    for key in given:
        if key not in known:
            raise UserError(f"{message}.{key}: {unknown(key, sorted(known))}")


def _without_auto(value: object) -> object:
    """The value without what transformers fills in later."""
    if not isinstance(value, dict):
        return value
    return {key: _without_auto(inner) for key, inner in value.items() if inner != "auto"}


def check_saved_form(training_args: LMTrainingArguments) -> None:
    """Warn where ZeRO-3 is to save a model as the shares of its cards, and refuse it for an adapter.

    transformers 4.55 then writes `adapter_model.safetensors` without a single weight.

    Raises:
        UserError: an adapter would be lost.
    """
    zero, flags = getattr(training_args, "hf_deepspeed_config", None), getattr(training_args, "flags", {})
    saves = training_args.save_strategy != "no" or flags.get("save_last_ckpt", True)
    if zero is None or not zero.is_zero3() or not training_args.do_train or not saves:
        return
    if any(zero.get_value(f"zero_optimization.{name}", False) is True for name in GATHERED):
        return
    way_out = f'"zero_optimization": {{"{GATHERED[0]}": true}} in the file'
    if "peft_type" in flags:
        raise UserError(f"--deepspeed: ZeRO-3 saves adapters only with {way_out}")
    logger.warning(
        "--deepspeed: no model.safetensors is saved, but what each card has (global_step*/, to be put together by "
        "zero_to_fp32.py); with %s the model is saved whole",
        way_out,
    )


def _names(title: str, sections: list[str]) -> list[str]:
    """The keys of a section within the sections of one of DeepSpeed's tables, as they are written in a file."""
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    model = {one.__name__: one for one in DeepSpeedConfigModel.__subclasses__()}.get(title)
    for section in sections:
        kinds = [kind for field, kind in _fields(model) if field == section]
        model = next((one for kind in kinds for one in (kind, *get_args(kind)) if hasattr(one, "model_fields")), None)
    return [name for name, _ in _fields(model)]


def _fields(model: type[BaseModel] | None) -> list[tuple[str, object]]:
    return [(field.alias or name, field.annotation) for name, field in getattr(model, "model_fields", {}).items()]
