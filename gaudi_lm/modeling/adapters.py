"""Adapters: put on a model, loaded, merged."""

from __future__ import annotations

import logging
import re
import warnings
from dataclasses import fields
from pathlib import Path

import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from peft import (
    AdaLoraConfig,
    AdaptionPromptConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.utils import load_peft_weights
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.pytorch_utils import Conv1D

from gaudi_lm.arguments.adapters import SETTINGS, VIRTUAL_TOKENS, AdapterArguments
from gaudi_lm.errors import UserError
from gaudi_lm.modeling.adalora import load_adalora, refuse_deepspeed, saved_config
from gaudi_lm.modeling.patches import complete_adapter
from gaudi_lm.modeling.virtual_tokens import (
    begin_with_text,
    check_virtual_tokens,
    install_virtual_tokens,
    load_trainable,
    virtual_token_config,
)

logger = logging.getLogger("gaudi_lm")


TARGET_FLAGS = {
    "lora": "--lora_target_modules",
    "adalora": "--lora_target_modules",
    "ia3": "--ia3_target_modules",
    "vera": "--vera_target_modules",
    "ln_tuning": "--ln_target_modules",
    "llama-adapter": "--adapter_layers",
    **dict.fromkeys(VIRTUAL_TOKENS, "--peft_type"),
}


# What loading raises where an adapter and a model do not fit.
UNFIT = (ValueError, RuntimeError, LookupError, TypeError, AttributeError, AssertionError, SafetensorError)


def chosen_layers(flag: str, words: list[str] | None) -> list[str] | str | None:
    """Names of layers, parted by spaces or commas, or one regular expression, as peft takes them.

    Raises:
        UserError: an expression that cannot be read, or that stands among names.
    """
    if not words:
        return None
    expressions = [word for word in words if re.search(r"[\\^$*+?{}()|\[\]]", word)]
    if not expressions:
        names = [name for word in words for name in re.split(r"[,\s]+", word) if name]
        if not names:
            raise UserError(f"{flag}: no layer is named")
        return names[0] if names == ["all-linear"] else names
    if len(words) > 1:
        raise UserError(f"{flag} {expressions[0]}: a regular expression stands alone; join several by |")
    try:
        re.compile(words[0])
    except re.error as error:
        raise UserError(f"{flag} {words[0]}: not a regular expression ({error})") from error
    return words[0]


def adapter_config(args: AdapterArguments, name: str | None = None) -> PeftConfig:
    """The adapter that the flags describe, or the saved one of that name, with which they must agree.

    Raises:
        UserError: a rank, a length, a dropout or a schedule that cannot be, or that the saved adapter does not have.
    """
    described = _described(args)
    if name is None:
        return described
    saved = saved_config(name)
    alike = saved.peft_type == described.peft_type
    for setting in fields(args):
        if getattr(args, setting.name) == setting.default:
            continue
        attribute, kinds = SETTINGS.get(setting.name, (setting.name, (args.peft_type,)))
        if attribute == "lora_dropout" and args.peft_type == "vera":
            attribute = "vera_dropout"
        served = alike and args.peft_type in kinds
        if not (served and (not attribute or _agree(getattr(saved, attribute), getattr(described, attribute)))):
            raise UserError(
                f"--{setting.name}: --adapter_name_or_path {name} has settings of its own, and not this one; leave it "
                "out, or train a new adapter without --adapter_name_or_path"
            )
    return saved


def _agree(saved: object, described: object) -> bool:
    """Whether a setting may be that of a saved adapter; peft saves other names for ``all-linear`` and many layers."""
    return described in (saved, "all-linear") or (isinstance(described, set) and len(described) >= 20)


def _described(args: AdapterArguments) -> PeftConfig:
    if args.peft_type == "adalora":
        refuse_deepspeed()
    if args.peft_type == "adalora" and args.adalora_init_r <= args.adalora_target_r:
        raise UserError(
            f"--adalora_init_r {args.adalora_init_r}: ranks only shrink, to --adalora_target_r {args.adalora_target_r}"
        )
    if args.peft_type in VIRTUAL_TOKENS:
        return virtual_token_config(args.peft_type, args.num_virtual_tokens, args.encoder_hidden_size)
    if args.peft_type == "llama-adapter":
        return AdaptionPromptConfig(
            adapter_layers=args.adapter_layers, adapter_len=args.adapter_len, task_type="CAUSAL_LM"
        )
    flag = TARGET_FLAGS[args.peft_type]
    targets = chosen_layers(flag, getattr(args, flag.removeprefix("--")))
    common = {"target_modules": targets, "task_type": "CAUSAL_LM"}
    lora = {"lora_alpha": args.lora_alpha, "lora_dropout": args.lora_dropout, **common}
    try:
        if args.peft_type == "lora":
            return LoraConfig(r=args.lora_rank, **lora)
        if args.peft_type == "vera":
            return VeraConfig(vera_dropout=args.lora_dropout, **common)
        if args.peft_type == "ia3":
            inputs = chosen_layers("--feedforward_modules", args.feedforward_modules)
            return IA3Config(feedforward_modules=inputs, **common)
        if args.peft_type == "ln_tuning":
            return LNTuningConfig(**common)
        return AdaLoraConfig(
            init_r=args.adalora_init_r,
            target_r=args.adalora_target_r,
            tinit=args.adalora_tinit,
            tfinal=args.adalora_tfinal,
            deltaT=args.adalora_delta_t,
            orth_reg_weight=args.adalora_orth_reg_weight,
            total_step=args.adalora_tinit + args.adalora_tfinal + 1,  # the trainer puts the run's own number there
            **lora,
        )
    except ValueError as error:
        raise UserError(f"--peft_type {args.peft_type}: {error}") from error


def layer_names(model: torch.nn.Module, norms: bool = False) -> list[str]:
    """The last names of the linear layers, or of the norms, without the output embedding."""
    head = model.get_output_embeddings()
    return sorted(
        {
            name.rsplit(".", 1)[-1]
            for name, module in model.named_modules()
            if (("Norm" in type(module).__name__) if norms else isinstance(module, (torch.nn.Linear, Conv1D)))
            and module is not head
        }
    )


def _check_takes_adapter(model: PreTrainedModel) -> None:
    """Refuse a model that has one, or that peft has no wrapper for: it asks a causal model how it generates."""
    if getattr(model, "_hf_peft_config_loaded", False):  # transformers has loaded the base of an adapter with it
        raise UserError("--model_name_or_path is an adapter: name its base model, and it by --adapter_name_or_path")
    if not hasattr(model, "prepare_inputs_for_generation"):
        name = type(model).__name__
        raise UserError(f"{name}: adapters are for models that generate: derive it from GenerationMixin as well")


def add_adapter(
    model: PreTrainedModel, config: PeftConfig, args: AdapterArguments, tokenizer: PreTrainedTokenizerBase
) -> PeftModel:
    """Freeze the model and put a new adapter on it, with the settings that :func:`adapter_config` made of ``args``.

    Raises:
        UserError: a target that matches no layer, or an adapter that the model cannot have.
    """
    _check_takes_adapter(model)
    flag, norms = TARGET_FLAGS[args.peft_type], config.peft_type == "LN_TUNING"
    layers = ", ".join(layer_names(model, norms))
    there = f"the model's {'norms' if norms else 'linear layers'} are {layers}"
    modules = [name for name, _ in model.named_modules()]
    targets = getattr(config, "target_modules", None) or ()
    for target in () if isinstance(targets, str) else sorted(targets):
        if not any(name == target or name.endswith(f".{target}") for name in modules):
            raise UserError(f"{flag} {target}: no such layer; {there}")
    if config.is_prompt_learning:
        check_virtual_tokens(model, config)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")  # peft has set it right by then
            adapted = get_peft_model(model, config)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(f"{flag}: {str(error).splitlines()[0]}; {there}") from error
    if args.prompt_tuning_init_text is not None:
        begin_with_text(adapted, args.prompt_tuning_init_text, tokenizer)
    return _announced(adapted)


def load_adapter(model: PreTrainedModel, name: str, trainable: bool) -> PeftModel:
    """Put a saved adapter on the model: a folder or a hub name.

    Raises:
        UserError: there is no adapter, it was made for another model or vocabulary, or it cannot be trained further.
    """
    _check_takes_adapter(model)
    config = saved_config(name)
    try:
        saved = load_peft_weights(name, device="cpu")
        embeddings = _saved_embeddings(model, saved, name)
        if config.peft_type == PeftType.ADALORA:
            if trainable:
                refuse_deepspeed()
            adapted = load_adalora(model, config, saved, trainable)
        elif trainable and config.is_prompt_learning:
            adapted = load_trainable(model, config, saved, name)
        else:
            adapted = PeftModel.from_pretrained(model, name, is_trainable=trainable)
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise UserError(f"--adapter_name_or_path {name}: no adapter there ({str(error).splitlines()[0]})") from error
    except UNFIT as error:
        reason = " ".join(str(error).split())[:200]
        if is_deepspeed_zero3_enabled():
            raise UserError(
                f"--adapter_name_or_path {name}: not for a model that ZeRO-3 divides ({reason}); use ZeRO-1 or 2"
            ) from error
        raise UserError(f"--adapter_name_or_path {name}: made for another model ({reason})") from error
    own = set(get_peft_model_state_dict(adapted))
    if trainable and (unsaved := {key for key, changed in embeddings.items() if changed} - own):
        raise UserError(
            f"--adapter_name_or_path {name}: it has embeddings of its own ({min(unsaved)}), which are not saved again "
            "after training; merge it first (--do_eval --merge_adapter), and train a new adapter on that"
        )
    needed = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))  # the model has the others
    unlike = (needed ^ set(saved)) - set(embeddings)
    if unlike:
        raise UserError(
            f"--adapter_name_or_path {name}: made for another model; {len(unlike)} tensors are in one and not in the "
            f"other, such as {sorted(unlike)[0]}"
        )
    return _announced(adapted)


def _saved_embeddings(model: PreTrainedModel, saved: dict[str, torch.Tensor], name: str) -> dict[str, bool]:
    """The names of embeddings and heads that an adapter was saved with, and whether they differ from the model's.

    Raises:
        UserError: they are of another number of tokens.
    """
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = {f".{layer}.weight": module.weight for layer, module in model.named_modules() if module in embeddings}
    found = {}
    for key, tensor in saved.items():
        weight = next((own for end, own in weights.items() if key.replace(".base_layer.", ".").endswith(end)), None)
        if weight is None:
            continue
        rows = getattr(weight, "ds_shape", weight.shape)[0]  # of the whole, under ZeRO-3
        if len(tensor) != rows:
            there = Path(name, "tokenizer_config.json").is_file()
            raise UserError(
                f"--adapter_name_or_path {name}: its embeddings are of {len(tensor)} tokens, the model's of {rows}; "
                f"give --tokenizer_name {name if there else 'TOKENIZER, the one that it was trained with'}"
            )
        found[key] = not weight.is_meta and not torch.equal(weight.detach().cpu().to(tensor.dtype), tensor)
    return found


def _announced(model: PeftModel) -> PeftModel:
    complete_adapter(model)
    if model.active_peft_config.is_prompt_learning:
        install_virtual_tokens(model)
    trained, total = model.get_nb_trainable_parameters()
    kind = model.active_peft_config.peft_type.lower().replace("adaption_prompt", "llama-adapter")
    counts = f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}"
    logger.info("%s adapter, %s", kind, counts)
    return model
