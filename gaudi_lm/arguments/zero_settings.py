"""What a DeepSpeed configuration asks for, checked by DeepSpeed's own table before data and model are loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

from gaudi_lm.errors import UserError, nearest
from gaudi_lm.optimum_imports import import_deepspeed

if TYPE_CHECKING:
    from pydantic import BaseModel

SECTION = "zero_optimization"


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
