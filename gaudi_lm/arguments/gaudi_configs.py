"""Gaudi configurations: by folder, file or hub name, and what holds without one."""

from __future__ import annotations

import difflib
import json
import logging
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from optimum.habana.transformers.gaudi_configuration import GaudiConfig
from optimum.habana.transformers.training_args import GaudiTrainingArguments

from gaudi_lm.errors import UserError

logger = logging.getLogger("gaudi_lm")

# As on the hub: owner, name, gaudi_config.json.
BUNDLED = Path(__file__).with_name("bundled")


def resolve_gaudi_config(name: str) -> str:
    """A Gaudi configuration as a path: a folder, a file, one that comes with the package, or one of the hub.

    The names that the documentation uses, ``Habana/gpt2`` and ``Habana/roberta-base``, come with the package: for them
    nobody asks the hub.

    Raises:
        UserError: nothing of that name, here or there.
    """
    path = Path(name)
    if path.is_dir():
        if not (path / "gaudi_config.json").is_file():
            raise UserError(f"--gaudi_config_name {name}: the folder holds no gaudi_config.json")
        _check(name, path / "gaudi_config.json")
        return name
    if path.is_file():
        _check(name, path)
        return name
    if name in {str(file.parent.relative_to(BUNDLED)) for file in BUNDLED.glob("*/*/gaudi_config.json")}:
        return str(BUNDLED / name)
    try:
        file = Path(hf_hub_download(name, "gaudi_config.json", etag_timeout=5))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"--gaudi_config_name {name}: neither a folder, a file, nor on the hub ({error})") from error
    _check(name, file)
    return str(file.parent)


def _check(name: str, file: Path) -> None:
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise UserError(f"--gaudi_config_name {name}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"--gaudi_config_name {name}: it holds a {type(content).__name__}, not a mapping")
    known = vars(GaudiConfig())
    for key, value in content.items():
        # Files of the hub also hold keys of earlier releases; one that is nearly a known one is misspelt.
        if key not in known and (close := difflib.get_close_matches(key, known, n=1, cutoff=0.8)):
            raise UserError(f"--gaudi_config_name {name}: unknown key {key}; did you mean {close[0]}?")
        if isinstance(known.get(key), bool) and not isinstance(value, bool):
            raise UserError(f"--gaudi_config_name {name}: {key} is {value!r}, not true or false")


def gaudi_config(training_args: GaudiTrainingArguments) -> GaudiConfig:
    """The Gaudi configuration of ``--gaudi_config_name``; without one, the fused optimizer and clipping on a card.

    The fused optimizer is AdamW: another one that is asked for by ``--optim`` overrides it.
    """
    if training_args.gaudi_config_name:
        logger.info("Gaudi configuration: %s", training_args.gaudi_config_name)
        config = GaudiConfig.from_pretrained(training_args.gaudi_config_name)
    else:
        on_card = training_args.use_habana
        config = GaudiConfig(use_fused_adam=on_card, use_fused_clip_norm=on_card)
    if config.use_fused_adam and "optim" in training_args.chosen:
        logger.info("--optim %s overrides the fused AdamW of the Gaudi configuration", training_args.optim.value)
        config.use_fused_adam = False
    return config
