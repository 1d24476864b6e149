"""What has been loaded from files: whether it is the whole model, and can be trained and saved again."""

from __future__ import annotations

import logging
import re
from typing import Any

from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_utils import is_fsdp_enabled

from gaudi_lm.arguments.model_files import check_quotes
from gaudi_lm.errors import UserError

logger = logging.getLogger("gaudi_lm")

_OF_SAMPLING = {"epsilon_cutoff", "eta_cutoff", "min_p", "temperature", "top_k", "top_p", "typical_p"}


def load_weights(auto_class: Any, name: str, **options) -> PreTrainedModel:
    """The model of ``from_pretrained``, checked.

    A class may have one of its own, which returns the model alone, or adds to it: that is not asked what is missing.

    Raises:
        UserError: see :func:`check_weights_of_files`.
    """
    config, trusted = options["config"], options["trust_remote_code"]
    kinds = getattr(auto_class, "_model_mapping", {}).get(type(config), auto_class)
    kinds, usual = kinds if isinstance(kinds, tuple) else (kinds,), vars(PreTrainedModel)["from_pretrained"].__func__
    own = trusted and auto_class.__name__ in (getattr(config, "auto_map", None) or {})
    if own or any(kind.from_pretrained.__func__ is not usual for kind in kinds):
        model, found = auto_class.from_pretrained(name, **options), {}
    else:
        model, found = auto_class.from_pretrained(name, output_loading_info=True, **options)
    check_weights_of_files(model, name, found.get("missing_keys", []))
    return model


def check_weights_of_files(model: PreTrainedModel, name: str, missing: list[str]) -> None:
    """Refuse weights that are not those of a model: transformers warns of them at most, and makes up others.

    Args:
        name: of ``--model_name_or_path``.
        missing: names of weights that its files do not have.

    Raises:
        UserError: see above.
    """
    flag = f"--model_name_or_path {name}:"
    weights, quantized = dict(model.named_parameters()), getattr(model.config, "quantization_config", None)
    if weights.keys() <= set(missing):
        raise UserError(
            f"{flag} its files have no weight of {type(model).__name__}; one is named {min(weights)} in the model"
        )
    for key, weight in weights.items():
        if weight.is_meta and not is_fsdp_enabled():  # whose other ranks are sent theirs
            raise UserError(f"{flag} {key} is in none of the files, though their index names it")
        if weight.is_floating_point() and weight.dtype.itemsize == 1 and not quantized:
            raise UserError(f"{flag} {key} is {weight.dtype}, and no quantization_config says what it stands for")


def repair_generation_config(model: PreTrainedModel) -> None:
    """Make a generation configuration one that can be saved: settings of sampling let it sample, idle ones go.

    Released models have such ones: transformers 4.55 loads them, and raises when the first checkpoint is written. A
    temperature of 0 and other ways to generate, such as beams, say that no sampling is meant.

    Raises:
        UserError: a number or a switch in quotes.
        ValueError: it cannot be saved for another reason.
    """
    settings: GenerationConfig | None = getattr(model, "generation_config", None)
    if settings is None:
        return
    for name, value in model.config._get_non_default_generation_parameters().items():  # as saving would
        setattr(settings, name, value)
        setattr(model.config, name, None)
    check_quotes("generation configuration of", model.config.name_or_path, settings)
    idle = _idle_settings(settings)
    greedy = settings.temperature != 0 and settings.get_generation_mode() == GenerationMode.GREEDY_SEARCH
    if greedy and (sampling := sorted(idle & _OF_SAMPLING)):
        settings.do_sample = True
        logger.info("generation configuration: do_sample is set to true, for %s", ", ".join(sampling))
        idle = _idle_settings(settings)
    for name in idle:
        setattr(settings, name, getattr(type(settings)(), name))
        logger.info("generation configuration: %s left out, as it does nothing", name)
    settings.validate(strict=True)


def _idle_settings(settings: GenerationConfig) -> set[str]:
    """The settings that do nothing beside the others, for which transformers does not save a configuration."""
    try:
        settings.validate(strict=True)
    except ValueError as error:
        return set(re.findall(r"^- `(\w+)`:", str(error), re.MULTILINE))
    return set()
