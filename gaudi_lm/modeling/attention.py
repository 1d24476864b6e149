"""Flags that only some models know: on to the model, or refused by name."""

from __future__ import annotations

import inspect
import logging
import sys

from optimum.habana.distributed import apply_zero3_leaf_promotion
from optimum.habana.transformers.trainer import _get_input_update_settings
from peft import PeftModel
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.pytorch_utils import Conv1D

from gaudi_lm.architectures import architecture_of, is_patched
from gaudi_lm.arguments.definitions import LMTrainingArguments, ModelArguments
from gaudi_lm.errors import UserError
from gaudi_lm.modeling.fused_attention import FUSED, fuse_self_attention, register_mask
from gaudi_lm.modeling.patches import FLASH_ATTENTION

logger = logging.getLogger("gaudi_lm")

# Types whose fused attention exchanges parts of rows in optimum-habana 1.21, and whose loss has no other terms.
CONTEXT_PARALLEL = ("llama", "qwen2")


def hand_over_flags(model: PreTrainedModel, model_args: ModelArguments, training_args: LMTrainingArguments) -> None:
    """Let the flags that only optimum-habana's models know reach the model, or refuse them by name.

    GaudiTrainer reads them from the generation configuration and passes them to ``forward`` in each step.

    Raises:
        UserError: the model has no such setting.
    """
    flags = {name: getattr(training_args, name) for name in FLASH_ATTENTION}
    flags["attn_softmax_bf16"] = model_args.attn_softmax_bf16
    fused_rope = getattr(model_args, "use_fused_rope", True)
    if training_args.device.type != "hpu":
        idle = [f"--{name}" for name, value in flags.items() if value] + ["--use_fused_rope False"] * (not fused_rope)
        if idle:
            logger.info("--use_cpu overrides %s", ", ".join(idle))
        return
    if training_args.use_zero3_leaf_promotion:
        promote_leaves(model)
    config = model.config
    fused = training_args.attn_implementation == FUSED
    if config._attn_implementation == "sdpa" and architecture_of(config).fuses:
        fuse_self_attention(model, training_args.attn_implementation)
        fused = True
    idle = [name for name in FLASH_ATTENTION if flags[name] and not fused]
    if idle:
        raise UserError(f"--{idle[0]}: it is for --attn_implementation {FUSED}")
    module = sys.modules[type(model).forward.__module__]
    if not fused_rope:
        if not hasattr(module, "has_fused_rope"):
            raise UserError(f"--use_fused_rope False: {config.model_type} has no fused rotary embedding")
        model.generation_config.use_fused_rope = False
    if not module.__name__.startswith("optimum.habana"):
        # The model of transformers itself: its fused attention takes these two from the environment.
        flags |= {"flash_attention_recompute": False, "flash_attention_fast_softmax": False}
    elif fused:
        flags["use_flash_attention"] = True
    wanted = [name for name, value in flags.items() if value]
    if model.generation_config is not None:  # masked models have none, and take none of these flags
        for name in wanted:
            setattr(model.generation_config, name, True)
    passed = _get_input_update_settings(model)[1].keys() & inspect.signature(model.forward).parameters.keys()
    for name in wanted:
        if name not in passed:
            flag = f"--attn_implementation {FUSED}" if name == "use_flash_attention" else f"--{name}"
            whose = "optimum-habana's" if is_patched(model) else "transformers' own"
            raise UserError(f"{flag}: {whose} {config.model_type} does not take it in training")
    both = training_args.flash_attention_fast_softmax and training_args.flash_attention_recompute
    if both and training_args.do_train and not training_args.flash_attention_causal_mask:
        raise UserError(
            "--flash_attention_fast_softmax with --flash_attention_recompute: in training, the kernel takes both with "
            "--flash_attention_causal_mask alone; leave one out"
        )
    rate = getattr(config, "attention_dropout", None)
    if flags.get("use_flash_attention") and rate and training_args.do_train:
        raise UserError(
            f"--attn_implementation {FUSED}: optimum-habana's {config.model_type} has no dropout in it, and "
            f"the configuration an attention dropout of {rate:g}; leave the flag out, or choose eager"
        )


def choose_attention(config: PretrainedConfig, training_args: LMTrainingArguments) -> str | None:
    """The attention to ask for: ``eager`` by default, where another would not compute what the configuration says.

    Raises:
        UserError: another one was chosen.
    """
    wanted = training_args.attn_implementation
    if wanted == FUSED:
        register_mask()
        if architecture_of(config).fuses:
            return "sdpa"
    kept = {"attn_logit_softcapping": getattr(config, "attn_logit_softcapping", None)}
    if wanted == FUSED:  # scales by the width of a head
        scalar = getattr(config, "query_pre_attn_scalar", None)
        kept["query_pre_attn_scalar"] = scalar if scalar != getattr(config, "head_dim", None) else None
    lost = [f"{name} {value:g}" for name, value in kept.items() if value]
    if config.model_type == "gpt2":  # whose sdpa, in transformers 4.55, scales by the width of a head alone
        lost += ["scale_attn_by_inverse_layer_idx"] * bool(config.scale_attn_by_inverse_layer_idx)
        lost += ["scale_attn_weights false"] * (not config.scale_attn_weights)
    if config.model_type == "doge":  # whose sdpa lets tokens see those after them where there is an attention mask
        lost.append("a dynamic mask")
    if wanted == "eager" or not lost:
        return wanted
    if "attn_implementation" in training_args.chosen:
        raise UserError(
            f"--attn_implementation {wanted}: {config.model_type} has {lost[0]}, which only eager "
            "attention knows; leave the flag out, or choose eager"
        )
    logger.info("attention: eager, since %s has %s", config.model_type, lost[0])
    training_args.attn_implementation = "eager"
    return "eager"


def check_attention(config: PretrainedConfig, training_args: LMTrainingArguments, model: PreTrainedModel | None):
    """Say where ``sdpa``, the default on the CPU, is computed eagerly; refuse an attention that was chosen in vain.

    Args:
        model: None where transformers could not make one with that attention.

    Raises:
        UserError: the model has no such attention.
    """
    wanted, row = training_args.attn_implementation, architecture_of(config)
    patched = model is not None and is_patched(model)
    if wanted == "sdpa":
        has_it = (
            model is not None and model.config._attn_implementation == "sdpa" and (not patched or row.patched_sdpa)
        )
    else:
        # optimum-habana's models are asked by hand_over_flags.
        has_it = wanted == "eager" or row.fuses or patched or (model is not None and model._supports_attention_backend)
    if has_it:
        return
    if "attn_implementation" not in training_args.chosen:
        logger.info("attention: eager, since %s has no sdpa", config.model_type)
        return
    whose = "optimum-habana's " if patched else ""
    raise UserError(
        f"--attn_implementation {wanted}: {whose}{config.model_type} does not have it; leave the flag out, or choose "
        "eager"
    )


def promote_leaves(model: PreTrainedModel) -> None:
    """Let ZeRO-3 gather the weights of a whole layer at once, where optimum-habana knows which modules are layers.

    Raises:
        UserError: another stage than 3, or an architecture that it does not know.
    """
    if not is_deepspeed_zero3_enabled():
        raise UserError("--use_zero3_leaf_promotion: the --deepspeed configuration is not of stage 3")
    known = ("llama", "mixtral", "qwen3_moe")
    if model.config.model_type not in known:
        raise UserError(f"--use_zero3_leaf_promotion: {model.config.model_type} is not among {', '.join(known)}")
    try:
        apply_zero3_leaf_promotion(model)
    except ValueError as error:  # a Mixtral that drops in attention, which is transformers' own
        raise UserError(f"--use_zero3_leaf_promotion: {str(error).splitlines()[0]}; leave it out") from error


def check_model(model: PreTrainedModel | PeftModel, training_args: LMTrainingArguments, own_figures: bool) -> None:
    """Refuse ``--fp8`` where no layer would compute in it, and ``--context_parallel_size`` where parts of a row would
    not know of each other.

    Args:
        own_figures: there is a loss or a metric of a script's own, which would see parts.

    Raises:
        UserError: see the message.
    """
    if training_args.fp8 and any(isinstance(module, Conv1D) for module in model.modules()):
        kind = model.config.model_type
        raise UserError(f"--fp8: it is for layers of torch.nn.Linear, and those of {kind} are Conv1D; leave it out")
    size = training_args.context_parallel_size
    if size == 1:
        return
    flag = f"--context_parallel_size {size}"
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    config = base.config
    if config.model_type not in CONTEXT_PARALLEL:
        raise UserError(f"{flag}: {config.model_type} is not among {', '.join(CONTEXT_PARALLEL)}")
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name)
        if heads % size:
            raise UserError(f"{flag} does not divide the {heads} {name[4:].replace('_', ' ')} of the model")
    if own_figures:
        raise UserError(f"{flag}: a loss_func or compute_metrics of a script's own would see parts of rows")
