"""Gaudi configurations: by folder, file or hub name, and what holds without one."""

from __future__ import annotations

import json
import logging
import shutil
import socket
import tempfile
import urllib.parse
import urllib.request
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.constants import ENDPOINT
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from optimum.habana import GaudiConfig, GaudiTrainingArguments

from gaudi_lm.device import UserError

logger = logging.getLogger("gaudi_lm")

REPOSITORY = Path(__file__).resolve().parents[2]


def hub_answers() -> bool:
    """Whether something listens where the hub, or the proxy to it, is expected."""
    proxy = urllib.request.getproxies().get(urllib.parse.urlsplit(ENDPOINT).scheme)
    address = urllib.parse.urlsplit(proxy or ENDPOINT)
    try:
        port = address.port or (443 if address.scheme == "https" else 80)
        socket.create_connection((address.hostname, port), timeout=5).close()
    except OSError:
        return False
    return True


def resolve_gaudi_config(name: str) -> str:
    """A folder that holds ``gaudi_config.json``, from a folder, a file or a hub name.

    The hub is asked first; where it cannot be reached, the configurations under ``configs/gaudi`` serve the names of
    the documentation (``Habana/gpt2``, ``Habana/roberta-base``).

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
        folder = Path(tempfile.mkdtemp(prefix="gaudi_config_"))
        shutil.copyfile(path, folder / "gaudi_config.json")
        return str(folder)
    bundled = REPOSITORY / "configs" / "gaudi" / path.name
    if not (name.startswith("Habana/") and bundled.is_dir()):
        bundled = None
    try:
        # Without a connection, the hub's client tries again for half a minute.
        offline = bundled is not None and not hub_answers()
        return str(Path(hf_hub_download(name, "gaudi_config.json", etag_timeout=5, local_files_only=offline)).parent)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        if bundled is not None:
            return str(bundled)
        raise UserError(f"--gaudi_config_name {name}: neither a folder, a file, nor on the hub ({error})") from error


def _check(name: str, file: Path) -> None:
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise UserError(f"--gaudi_config_name {name}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"--gaudi_config_name {name}: it holds a {type(content).__name__}, not a mapping")


def gaudi_config(training_args: GaudiTrainingArguments) -> GaudiConfig:
    """The Gaudi configuration of ``--gaudi_config_name``; without one, the fused optimizer and clipping on a card.

    The fused optimizer is AdamW: another one that is asked for by ``--optim`` wins over it.
    """
    if training_args.gaudi_config_name:
        logger.info("Gaudi configuration: %s", training_args.gaudi_config_name)
        config = GaudiConfig.from_pretrained(training_args.gaudi_config_name)
    else:
        on_card = training_args.use_habana
        config = GaudiConfig(use_fused_adam=on_card, use_fused_clip_norm=on_card)
    if config.use_fused_adam and "optim" in training_args.chosen:
        logger.info("--optim %s wins over the fused AdamW of the Gaudi configuration", training_args.optim.value)
        config.use_fused_adam = False
    return config
