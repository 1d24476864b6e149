"""Configuration, tokenizer and model, from a folder, the hub, or from scratch."""

from __future__ import annotations

import logging
from argparse import ArgumentTypeError
from contextlib import nullcontext
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from gaudi_lm.architectures import PADDING, architecture_of, make_causal
from gaudi_lm.arguments.definitions import LMTrainingArguments, ModelArguments
from gaudi_lm.arguments.model_files import check_config, first_line, tokenizer_damage
from gaudi_lm.data.tokenization import vocabulary_size
from gaudi_lm.device import parse_bool
from gaudi_lm.errors import UserError, nearest
from gaudi_lm.modeling.activations import fuse_activations
from gaudi_lm.modeling.attention import check_attention, choose_attention, hand_over_flags
from gaudi_lm.modeling.embeddings import enlarge_embeddings
from gaudi_lm.modeling.loaded import load_weights, repair_generation_config
from gaudi_lm.modeling.patches import restore_own_model

logger = logging.getLogger("gaudi_lm")


def _hub_options(model_args: ModelArguments) -> dict:
    return {
        "cache_dir": model_args.cache_dir,
        "revision": model_args.model_revision,
        "token": model_args.token,
        "trust_remote_code": model_args.trust_remote_code,
    }


def load_config(
    model_args: ModelArguments, model_type: str | None = None, config_overrides: str | None = None
) -> PretrainedConfig:
    """The model's configuration, by ``--config_name``, ``--model_name_or_path`` or ``--model_type``.

    Raises:
        UserError: no such model or type, or overrides that do not fit.
    """
    if config_overrides and (model_args.model_name_or_path or model_args.config_name):
        flag = "--model_name_or_path" if model_args.model_name_or_path else "--config_name"
        raise UserError(f"--config_overrides changes a model made by --model_type; it cannot be combined with {flag}")
    name = model_args.config_name or model_args.model_name_or_path
    if name:
        flag = "--config_name" if model_args.config_name else "--model_name_or_path"
        try:
            config = AutoConfig.from_pretrained(name, **_hub_options(model_args))
        except Exception as error:  # what a damaged or foreign file leads to is of any class
            raise UserError(f"{flag} {name}: no configuration ({first_line(error)})") from error
        check_config(flag, name, config)
        return config
    if not model_type:
        raise UserError(
            "no model: give --model_name_or_path to fine-tune, or --config_name or --model_type to train from scratch"
        )
    if model_type not in CONFIG_MAPPING:
        raise UserError(f"--model_type {model_type}: unknown{nearest(model_type, list(CONFIG_MAPPING.keys()))}")
    config = CONFIG_MAPPING[model_type]()
    if config_overrides:
        override_config(config, config_overrides)
        check_config("--config_overrides", config_overrides, config)
        logger.info("configuration: %s with %s", model_type, config_overrides)
    return config


def override_config(config: PretrainedConfig, overrides: str) -> None:
    """Set ``key=value`` pairs, separated by commas, in place, each in the type of the value it replaces.

    Raises:
        UserError: an unknown key (the nearest are named), or a value of another type.
    """
    for pair in overrides.split(","):
        key, equals, text = (part.strip() for part in pair.partition("="))
        if not equals:
            raise UserError(f"--config_overrides: {pair!r} is not of the form key=value")
        known = config.to_dict()
        if key not in known and key not in config.attribute_map:
            raise UserError(
                f"--config_overrides: {config.model_type} has no {key}{nearest(key, [*known, *config.attribute_map])}"
            )
        old = getattr(config, key)
        kind = type(old)
        try:
            if old is None:
                value = _guess(text)
            elif kind is bool:
                value = parse_bool(text)
            elif kind is int and "dropout" in key:
                value = float(text)  # some configurations write no dropout as 0
            elif kind in (int, float, str):
                value = kind(text)
            else:
                raise UserError(
                    f"--config_overrides: {key} is a {kind.__name__}, which cannot be set from the command line"
                )
        except (ValueError, ArgumentTypeError) as error:
            raise UserError(f"--config_overrides: {key} takes a {kind.__name__}, not {text!r}") from error
        setattr(config, key, value)


def _guess(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def load_tokenizer(model_args: ModelArguments) -> PreTrainedTokenizerBase:
    """The tokenizer, by ``--tokenizer_name`` or ``--model_name_or_path``.

    Raises:
        UserError: neither is given, or there is no tokenizer there.
    """
    name = model_args.tokenizer_name or model_args.model_name_or_path
    if not name:
        raise UserError("no tokenizer: a model from scratch needs --tokenizer_name (a folder or a hub name)")
    flag = "--tokenizer_name" if model_args.tokenizer_name else "--model_name_or_path"
    try:
        return AutoTokenizer.from_pretrained(name, use_fast=model_args.use_fast_tokenizer, **_hub_options(model_args))
    except Exception as error:  # likewise
        raise UserError(f"{flag} {name}: no tokenizer ({tokenizer_damage(name) or first_line(error)})") from error


def fit_vocabulary(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, from_scratch: bool, config_overrides: str | None
) -> None:
    """Before a model is made from scratch, give its configuration the tokenizer's special tokens and vocabulary size.

    A size that the user set by ``--config_overrides`` is left alone; a checkpoint's embedding is enlarged after
    loading, by :func:`load_model`.

    Raises:
        UserError: the user's own size is smaller than the tokenizer's vocabulary, or a padding token is needed.
    """
    if architecture_of(config).first_position == PADDING:
        if tokenizer.pad_token_id is None:
            raise UserError(
                f"{config.model_type} counts positions from the padding token, and the tokenizer has none: choose "
                "another by --tokenizer_name, or give this one a pad_token in its tokenizer_config.json"
            )
        if config.pad_token_id is None:
            config.pad_token_id = tokenizer.pad_token_id
    if not from_scratch:
        return
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(config, name, None) is not None:
            setattr(config, name, getattr(tokenizer, name))
    if config.vocab_size == (size := vocabulary_size(tokenizer)):
        return
    frozen = any(pair.split("=")[0].strip() == "vocab_size" for pair in (config_overrides or "").split(","))
    if frozen:
        if config.vocab_size < size:
            raise UserError(
                f"--config_overrides: vocab_size={config.vocab_size} is smaller than the tokenizer's {size}"
            )
        return
    logger.info("vocabulary size: %d, as the tokenizer has (the configuration says %d)", size, config.vocab_size)
    config.vocab_size = size


def load_model(
    auto_class: Any,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    model_args: ModelArguments,
    training_args: LMTrainingArguments,
    **options,
) -> PreTrainedModel:
    """The model: weights from ``--model_name_or_path``, or new ones from the seed.

    Args:
        auto_class: such as ``AutoModelForCausalLM``.
        options: passed to ``from_pretrained`` or ``from_config``, such as ``device_map``.

    Raises:
        UserError: no weights there, an attention the model does not have, or a model without embeddings to enlarge.
    """
    config.use_cache = model_args.use_cache
    make_causal(auto_class, config)
    dtype = getattr(torch, model_args.torch_dtype or "", model_args.torch_dtype)  # auto and None stay as they are
    options = {"attn_implementation": choose_attention(config, training_args), "torch_dtype": dtype, **options}
    if training_args.device.type == "hpu" and architecture_of(config).unpatched(config):
        restore_own_model(config.model_type)
    name = model_args.model_name_or_path
    hub_options = _hub_options(model_args)
    if config._commit_hash and not model_args.config_name:
        # The configuration's own commit. By a branch's name, ranks that fill one cache together at times find no
        # weights in it: each writes down anew which commit the branch is at, while others read that.
        hub_options["revision"] = config._commit_hash

    def make(**options) -> PreTrainedModel:
        if name and not training_args.dry_run:
            low = model_args.low_cpu_mem_usage or "device_map" in options
            options |= {"config": config, "low_cpu_mem_usage": low, **hub_options}
            return load_weights(auto_class, name, **options)
        if options["torch_dtype"] == "auto":
            options["torch_dtype"] = config.torch_dtype if name else None
        made_on = torch.device("meta") if training_args.dry_run else nullcontext()
        options.pop("device_map", None)
        # Weights that ZeRO-3 has divided are empty to what initialises them (transformers 4.55): they would keep
        # torch's defaults, or fail. So each rank makes the whole model, and DeepSpeed divides it afterwards.
        deepspeed = getattr(training_args, "hf_deepspeed_config", None)
        unset_hf_deepspeed_config()
        try:
            with made_on:
                return auto_class.from_config(config, trust_remote_code=model_args.trust_remote_code, **options)
        finally:
            if deepspeed is not None:
                set_hf_deepspeed_config(deepspeed)

    try:
        try:
            model = make(**options)
        except (KeyError, ValueError) as error:
            # The default of the CPU is tried first; some architectures have eager attention only.
            if not any(name in str(error) for name in ("scaled_dot_product_attention", "gaudi_fused_sdpa")):
                raise
            check_attention(config, training_args, None)
            model = make(**{**options, "attn_implementation": "eager"})
        else:
            check_attention(config, training_args, model)
        repair_generation_config(model)
    except UserError:
        raise
    except Exception as error:  # likewise; nothing has been written yet
        source = f"--model_name_or_path {name}" if name else config.model_type
        raise UserError(f"{source}: {first_line(error)}") from error
    enlarge_embeddings(model, vocabulary_size(tokenizer), mean_resizing=not training_args.dry_run)
    hand_over_flags(model, model_args, training_args)
    fuse_activations(model)
    if not name:
        total = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters()) / 1e6
        logger.info("training a new %s from scratch: %.1fM parameters", config.model_type, total)
    return model


def length_limit(
    flag: str,
    wanted: int | None,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    default: int = 1024,
    parts: int = 1,
    virtual_tokens: int = 0,
) -> int:
    """The block length: what was asked for, within the tokenizer's and the model's limits; each reduction is logged.

    Args:
        flag: ``--block_size`` or ``--max_seq_length``, for the messages.
        wanted: the flag's value, or None for the largest that the limits and ``default`` allow.
        parts: of a row, by ``--context_parallel_size``.
        virtual_tokens: before each text; they take positions of the model.

    Raises:
        UserError: a length below 1, here or in the tokenizer, no positions for text, or a length that is no multiple
            of the square of ``parts``.
    """
    if wanted is not None and wanted < 1:
        raise UserError(f"{flag} {wanted}: it must be at least 1")
    limit = tokenizer.model_max_length
    if not isinstance(limit, (int, float)) or not limit >= 1:
        raise UserError(f"the tokenizer's model_max_length is {limit!r}: it must be a number from 1 on")
    limits = {"the tokenizer's limit": int(min(limit, VERY_LARGE_INTEGER))}  # JSON's Infinity is no int
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        first = architecture_of(config).position_of_first_token(config)  # RoBERTa's is after the padding index
        limits["the model's positions"] = left = positions - first - virtual_tokens
        if left < 1:
            flag = f"--num_virtual_tokens {virtual_tokens}" if virtual_tokens else "max_position_embeddings"
            raise UserError(f"{flag}: {positions} positions, the first of them {first}, leave none for text")
    length = wanted
    if length is None:
        length = min(*limits.values(), default)
        if default < min(limits.values()):
            logger.info("%s: %d by default; the model and the tokenizer would allow more", flag, default)
    for name, limit in limits.items():
        if length > limit:
            logger.warning("%s: reduced from %d to %d, %s", flag, length, limit, name)
            length = limit
    if length % parts**2:  # DeepSpeed exchanges equal parts of a part
        raise UserError(f"--context_parallel_size {parts}: {flag} {length} is no multiple of {parts**2}")
    return length
