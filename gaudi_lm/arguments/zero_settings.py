"""What a DeepSpeed configuration asks for, checked by DeepSpeed's own table before data and model are loaded."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, get_args

from gaudi_lm.errors import UserError, nearest
from gaudi_lm.optimum_imports import import_deepspeed

if TYPE_CHECKING:
    from pydantic import BaseModel

    from gaudi_lm.arguments.definitions import LMTrainingArguments

logger = logging.getLogger("gaudi_lm")

SECTION = "zero_optimization"
# The names of one setting of DeepSpeed.
GATHERED = (
    "stage3_gather_16bit_weights_on_model_save",
    "gather_16bit_weights_on_model_save",
    "stage3_gather_fp16_weights_on_model_save",
)


def check_zero_settings(source: str, config: dict) -> None:
    """Refuse a section ``zero_optimization`` that DeepSpeed would refuse once the model is there, and fp16.

    Args:
        source: the flag and the file, for messages.
        config: DeepSpeed's configuration, in which ``auto`` may stand for any value.

    Raises:
        UserError: an unknown key, a value that cannot be, or training in fp16.
    """
    half = config.get("fp16")
    if isinstance(half, dict) and half.get("enabled") is True:
        raise UserError(f'{source}: fp16 does not exist on a Gaudi; bf16 does: "bf16": {{"enabled": true}}')
    if not isinstance(config.get(SECTION, {}), (dict, bool)):
        raise UserError(f"{source}: {SECTION} is a mapping, from names such as stage to values")
    import_deepspeed()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig, get_zero_config
    from pydantic import ValidationError

    try:
        get_zero_config(config)
    except ValidationError as error:
        # First the names that are unknown: a misspelt one may be why another value does not fit.
        fault = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
        where = ".".join(map(str, (SECTION, *fault["loc"])))
        if fault["type"] == "extra_forbidden":
            *sections, key = map(str, fault["loc"])
            known = _names(DeepSpeedZeroConfig, sections)
            raise UserError(f"{source}: unknown key {where}{nearest(key, known)}") from error
        raise UserError(f"{source}: {where} is {fault['input']!r}: {fault['msg']}") from error
    except (AssertionError, TypeError) as error:
        raise UserError(f"{source}: {SECTION}: {error}") from error


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


def _names(model: type[BaseModel], sections: list[str]) -> list[str]:
    """The keys of a section within a section, as they are written in a file."""
    for section in sections:
        kinds = [kind for field, kind in _fields(model) if field == section]
        found = [one for kind in kinds for one in (kind, *get_args(kind)) if hasattr(one, "model_fields")]
        if not found:
            return []
        model = found[0]
    return [name for name, _ in _fields(model)]


def _fields(model: type[BaseModel]) -> list[tuple[str, object]]:
    return [(field.alias or name, field.annotation) for name, field in model.model_fields.items()]
