"""Files of a model before it is loaded: cut, empty, pointers instead of content, impossible sizes, quantized."""

from __future__ import annotations

import json
import logging
from argparse import ArgumentTypeError
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from transformers import PretrainedConfig

from gaudi_lm.arguments.optional_packages import require
from gaudi_lm.device import parse_bool
from gaudi_lm.errors import UserError, unknown

if TYPE_CHECKING:
    from transformers import GenerationConfig

logger = logging.getLogger("gaudi_lm")

_SUFFIXES = (".safetensors", ".bin", ".json", ".model", ".txt")
# The first of them that is there is what from_pretrained loads.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_LFS_POINTER = b"version https://git-lfs"
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# What loading weights in these formats imports.
_QUANTIZERS: dict[str, tuple[tuple[str, ...], str]] = {
    "aqlm": (("aqlm",), "aqlm"),
    "awq": (("awq", "gptqmodel"), "autoawq"),
    "bitsandbytes": (("bitsandbytes",), "bitsandbytes"),
    "bitsandbytes_4bit": (("bitsandbytes",), "bitsandbytes"),
    "bitsandbytes_8bit": (("bitsandbytes",), "bitsandbytes"),
    "compressed-tensors": (("compressed_tensors",), "compressed-tensors"),
    "eetq": (("eetq",), "eetq"),
    "fbgemm_fp8": (("fbgemm_gpu",), "fbgemm-gpu"),
    "gptq": (("gptqmodel", "auto_gptq"), "gptqmodel"),
    "hqq": (("hqq",), "hqq"),
    "quanto": (("optimum.quanto",), "optimum-quanto"),
    "torchao": (("torchao",), "torchao"),
    "vptq": (("vptq",), "vptq"),
}


def damage(folder: Path, weights: bool = True) -> str | None:
    """What is wrong with the first damaged file of a model or an adapter, in a few words; None where nothing is.

    Of weights only the headers are read, and whether the files are as long as those say.

    Args:
        weights: they are looked at too: not where a tokenizer or a configuration is all that is wanted.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file())
    index = next((name for name in _WEIGHTS if (folder / name).is_file()), None)
    if not weights:
        files = [path for path in files if path.suffix not in (".safetensors", ".bin") and ".index." not in path.name]
    small = (path for path in files if path.stat().st_size < 1024 and path.suffix in _SUFFIXES)
    for path in small:
        if path.read_bytes().startswith(_LFS_POINTER):
            return f"{path.name} is a Git-LFS pointer, not the file: run `git lfs pull` there"
    for path in files:
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, "np"):
                    pass
            except SafetensorError as error:
                return f"{path.name} is cut or damaged ({error})"
        elif path.name in ("config.json", "adapter_config.json", "tokenizer_config.json") or ".index." in path.name:
            try:
                content = json.loads(path.read_bytes())
            except (ValueError, UnicodeDecodeError) as error:
                return f"{path.name} is not valid JSON: {error}"
            if not isinstance(content, dict):
                return f"{path.name} holds a {type(content).__name__}, not a mapping"
            if path.name != index:  # that of weights in another format, which need not be there
                continue
            parts = content.get("weight_map")
            if not isinstance(parts, dict) or not all(isinstance(part, str) for part in parts.values()):
                return f"{path.name} has no weight_map that gives each tensor a file"
            if not isinstance(content.get("metadata"), dict):  # from_pretrained adds to it (transformers 4.55)
                return f'{path.name} has no metadata: add "metadata": {{}}'
            missing = sorted({part for part in parts.values() if not (folder / part).exists()})
            if missing:
                return f"{missing[0]} is missing, which {path.name} names"
    return None


def check_model_folders(values: dict) -> None:
    """Refuse local folders with a damaged file or of another kind, by the flags of models, tokenizers and adapters.

    Args:
        values: by the name of the flag.

    Raises:
        UserError: see :func:`damage` and :func:`_no_model`, or the name is that of a file.
    """
    for flag in ("model_name_or_path", "config_name", "tokenizer_name", "adapter_name_or_path"):
        name = values.get(flag)
        folder = Path(name) if name and Path(name).is_dir() else None
        loaded = {"adapter_name_or_path"} if values.get("dry_run") else {"adapter_name_or_path", "model_name_or_path"}
        if folder and (found := damage(folder, flag in loaded) or _no_model(flag, folder, values)):
            raise UserError(f"--{flag} {name}: {found}")
        if name and flag != "config_name" and Path(name).is_file():
            gguf = ": GGUF is not read, convert it to safetensors" if name.endswith(".gguf") else ""
            raise UserError(f"--{flag} {name}: a file, not the folder of one{gguf}")


def _no_model(flag: str, folder: Path, values: dict) -> str | None:
    """Why a folder is no model, or no configuration; None where it is, or need not be.

    Of an adapter, transformers loads the base model as well, and freezes both: that can be evaluated. Where there is
    no config.json, it would take the defaults of a type whose name is anywhere in the path.
    """
    adapter, configured = folder / "adapter_config.json", (folder / "config.json").is_file()
    if flag == "model_name_or_path":
        configured = configured or bool(values.get("config_name"))
        trained = values.get("do_train") or "adapter_name_or_path" in values  # run_lora_clm.py puts another on it
        if adapter.is_file() and (trained or not configured):
            base = json.loads(adapter.read_bytes()).get("base_model_name_or_path")
            return (
                f"adapter_config.json makes it an adapter, not a model: name its base model ({base}), and this folder "
                "by --adapter_name_or_path of run_lora_clm.py, which also merges the two (--merge_adapter)"
            )
    if flag in ("model_name_or_path", "config_name") and not configured:
        gguf = next((f"; {path.name} is not read: convert it to safetensors" for path in folder.glob("*.gguf")), "")
        return f"there is no config.json{gguf}"
    return None


def tokenizer_damage(name: str) -> str | None:
    """Why a local ``tokenizer.json`` cannot be read; None where it can, or is not there."""
    file = Path(name) / "tokenizer.json"
    if file.is_file():
        try:
            Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises no narrower class
            return f"tokenizer.json is cut or damaged: {first_line(error)}"
    return None


def hub_refusal(text: str) -> str | None:
    """What an error says of a hub that does not answer, or refuses a token; None where it is about something else."""
    if any(words in text for words in ("Invalid credentials", "Invalid username or password", "Invalid user token")):
        return "401, the hub refuses the token: log in with `hf auth login`, or give another (--token, --hub_token)"
    if "Max retries exceeded" in text:
        return "no answer from the hub; HF_HUB_OFFLINE=1 in the environment loads what is in the cache"
    return None


def first_line(error: BaseException) -> str:
    """An error of a library in one line; its traceback goes to the log at level debug."""
    logger.debug("the error of the library", exc_info=error)
    text = str(error)
    if "gated repo" in text:
        return "gated: accept its terms on its page, then log in with `hf auth login` or give --token"
    if refusal := hub_refusal(text):
        return refusal
    if "trust_remote_code" in text:
        return "it brings code of its own: look at it there, then give --trust_remote_code to let it run"
    text = text.partition(", or contain one of the following strings in its name")[0]  # all types of models follow
    if "size mismatch" in text:
        text = "the weights are not of the sizes in the configuration: " + text[text.index("size mismatch") :]
    line, more = [*filter(None, map(str.strip, text.splitlines())), "", ""][:2]
    line = f"{line} {more}" if line.endswith(":") else line
    plain = isinstance(error, (OSError, ValueError, UserError)) and not isinstance(error, KeyError)
    return (line if plain and line else f"{type(error).__name__}: {line}".rstrip(": "))[:300]


def check_config(flag: str, name: str, config: PretrainedConfig) -> None:
    """Refuse sizes that no model has, numbers and switches in quotes, and a quantization whose package is missing.

    Raises:
        UserError: the size, the text or the package.
    """
    for size in _SIZES:
        value = getattr(config, size, None)
        if value is None or isinstance(value, (list, tuple)):
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
            own = config.attribute_map.get(size, size)
            raise UserError(f"{flag} {name}: {own} is {value!r}; it must be a whole number from 1 on")
    check_quotes(flag, name, config)
    quantization = getattr(config, "quantization_config", None)
    if not quantization:
        return
    settings = quantization if isinstance(quantization, dict) else quantization.to_dict()
    method = settings.get("quant_method")
    method = getattr(method, "value", method)
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        method = "bitsandbytes"
    # Imported here: only a quantized model is worth the second that this takes.
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    if method in _QUANTIZERS:
        require(f"{flag} {name}, quantized by {method}", _QUANTIZERS[method])
    elif method not in AUTO_QUANTIZER_MAPPING:
        known = sorted(AUTO_QUANTIZER_MAPPING)
        raise UserError(f"{flag} {name}: quantized by {method}, which is {unknown(str(method), known)}")


def check_quotes(what: str, name: str, config: PretrainedConfig | GenerationConfig) -> None:
    """Refuse numbers and switches in quotes.

    Args:
        what: is called ``name``, for the message.

    Raises:
        UserError: names the setting.
    """
    for key, default in _defaults(config).items():
        value = getattr(config, key, None)
        if isinstance(value, str) and isinstance(default, (int, float)) and _in_quotes(value):  # a bool is an int
            kind = "true or false" if isinstance(default, bool) else "a number"
            raise UserError(f"{what} {name}: {key} is the text {value!r}; it must be {kind}, without quotes")


def _in_quotes(text: str) -> bool:
    """Whether a text is a number or a switch; types take words beside them, as EXAONE 4 has ``LLLG`` for 4."""
    for kind in (float, parse_bool):
        with suppress(ValueError, ArgumentTypeError):
            kind(text)
            return True
    return False


def _defaults(config: PretrainedConfig | GenerationConfig) -> dict:
    """Of the type of a configuration; nothing where there is none without arguments."""
    try:
        return type(config)().to_dict()
    except Exception:  # configurations of others' code fail with errors of any kind
        return {}
