"""Adapters merged into the model that they were made for."""

from __future__ import annotations

import logging
import re
import warnings
from collections import Counter
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from gaudi_lm.arguments.adapters import VIRTUAL_TOKENS
from gaudi_lm.arguments.definitions import LMTrainingArguments
from gaudi_lm.data.memory import host_copies
from gaudi_lm.errors import UserError
from gaudi_lm.modeling.adalora import saved_config
from gaudi_lm.modeling.layer_names import plain_name
from gaudi_lm.training.trainer import LMTrainer

logger = logging.getLogger("gaudi_lm")

# Settings of peft's own adapters that no weights of the model can hold.
UNMERGEABLE = {
    "alora_invocation_tokens": "it changes only what follows these tokens, which no weight can hold",
    "layer_replication": "its layers share weights, which the merged model would not",
}


def check_base_model(model_args, peft_type: str, training_args: LMTrainingArguments) -> None:
    """Before anything is trained: whether there is a model, and the adapter can be merged into it.

    Args:
        model_args: ``ModelArguments`` with ``adapter_name_or_path``, ``merge_adapter`` and ``load_meta_device``.
        peft_type: of a new adapter, as the flag has it.

    Raises:
        UserError: there is none, or what is asked for cannot be done with such an adapter.
    """
    if model_args.model_name_or_path is None:
        raise UserError("no model: an adapter is tuned on top of one, give --model_name_or_path")
    if is_deepspeed_zero3_enabled() and (model_args.merge_adapter or model_args.load_meta_device):
        flag = "--merge_adapter" if model_args.merge_adapter else "--load_meta_device"
        raise UserError(f"{flag}: DeepSpeed ZeRO-3 places the weights itself, and does not allow it")
    name = model_args.adapter_name_or_path
    saved = None if name is None else saved_config(name)
    kind = peft_type if saved is None else saved.peft_type.lower()
    for setting in ("modules_to_save", "trainable_token_indices", "use_dora"):
        if training_args.fsdp and getattr(saved, setting, None):
            raise UserError(
                f"--fsdp: --adapter_name_or_path {name} has {setting}, which FSDP does not gather; "
                "leave --fsdp out, or give --deepspeed"
            )
    if kind == "prefix_tuning" and training_args.gradient_checkpointing:
        raise UserError("--gradient_checkpointing: prefix_tuning keeps keys and values, which it would drop")
    if kind == "prefix_tuning" and training_args.flash_attention_causal_mask and not training_args.use_cpu:
        raise UserError("--flash_attention_causal_mask: for as many keys as queries, and prefix_tuning adds keys")
    if kind in (*VIRTUAL_TOKENS, "llama-adapter", "adaption_prompt") and training_args.context_parallel_size > 1:
        raise UserError(f"--context_parallel_size: {kind} puts its tokens before every part of a row")
    if kind in VIRTUAL_TOKENS and (is_deepspeed_zero3_enabled() or training_args.fsdp):
        raise UserError(f"--peft_type {kind}: not with ZeRO-3 or FSDP, which divide virtual tokens; use ZeRO-1 or 2")
    if kind in VIRTUAL_TOKENS and training_args.neftune_noise_alpha is not None:
        raise UserError(f"--neftune_noise_alpha: not with {kind}, where transformers does not find the embeddings")
    if kind == "adalora" and training_args.fsdp:
        raise UserError("--peft_type adalora: not with FSDP, which divides the ranks it reduces; leave --fsdp out")
    if kind == "adalora" and training_args.gradient_checkpointing and training_args.fp8:
        raise UserError("--gradient_checkpointing: not with --fp8 and AdaLoRA at once, which optimum-habana excludes")
    if kind == "ln_tuning" and training_args.do_train and is_deepspeed_zero3_enabled():
        raise UserError(
            "--peft_type ln_tuning: not with ZeRO-3, which cannot divide its copies of norms; use ZeRO-1 or 2"
        )
    if not model_args.merge_adapter:
        return
    if name is None and not training_args.do_train:
        raise UserError("--merge_adapter: no adapter; give --adapter_name_or_path, or --do_train to make one")
    if kind in VIRTUAL_TOKENS:
        raise UserError(f"--merge_adapter: {kind} adds tokens before each text, which no weight can hold")
    if kind in ("llama-adapter", "adaption_prompt"):
        raise UserError("--merge_adapter: a llama-adapter is a part of attention, which no weight can hold")
    for setting, reason in UNMERGEABLE.items():
        if getattr(saved, setting, None):
            raise UserError(f"--merge_adapter: --adapter_name_or_path {name} has {setting}: {reason}")


def save_merged(trainer: LMTrainer) -> None:
    """Save the model with the adapter merged in, and its tokenizer, to ``OUTPUT_DIR/merged``.

    The trainer's model keeps its adapter, and exactly its weights: subtracting what was added would round them.
    Embeddings that are tied in the model and come apart by the adapter are both saved, and tied no longer.
    """
    with trainer.files_at_top() as staging, trainer.whole_model() as adapted:
        if trainer.is_world_process_zero():
            _write_merged(adapted, staging / "merged")
            trainer.processing_class.save_pretrained(staging / "merged")
    logger.info("the merged model is in %s", Path(trainer.args.output_dir, "merged").resolve())


def _write_merged(adapted: PeftModel, folder: Path) -> None:
    model = adapted.get_base_model()
    tied = _tied_names(model)
    shared = _part_adapted_layers(model)
    before = {
        name: weight.detach().to("cpu", copy=True)
        for name, weight in model.named_parameters()
        if ".base_layer." in name and name not in shared
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Model with `tie_word_embeddings=True`")  # peft's, of what is done here
        try:
            adapted.merge_adapter()
        except (RuntimeError, NotImplementedError, ValueError) as error:
            raise UserError(
                f"--merge_adapter: peft cannot merge this adapter ({str(error).splitlines()[0]})"
            ) from error
    weights = _without_adapter(model, adapted.active_adapter)
    came_apart = [names for names in tied if names <= weights.keys() and not _tie(weights, names)]
    configs = (model.config, model.config.get_text_config(decoder=True)) if came_apart else ()
    for config in configs:
        config.tie_word_embeddings = False
    model.save_pretrained(folder, state_dict=weights)
    for config in configs:
        config.tie_word_embeddings = True
    adapted.unmerge_adapter()
    with torch.no_grad():
        for name, weight in before.items():
            model.get_parameter(name).copy_(weight)
    for name, weight in shared.items():
        _set_parameter(model, name, weight)


def _tied_names(model: PreTrainedModel) -> list[set[str]]:
    """For each weight that the model itself has in several places, such as tied embeddings: its names there."""
    names: dict[int, set[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        if ".modules_to_save." not in name:
            names.setdefault(id(weight), set()).add(_name_in_model(name.replace(".original_module.", ".")))
    return [places for places in names.values() if len(places) > 1]


def _part_adapted_layers(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """Give each adapted layer that shares its weight a copy: merging must change this layer, and no other.

    Returns:
        The weights that were shared, by the names of what is a copy now.
    """
    places = list(model.named_parameters(remove_duplicate=False))
    uses = Counter(id(weight) for _, weight in places)
    shared = {name: weight for name, weight in places if ".base_layer." in name and uses[id(weight)] > 1}
    for name, weight in shared.items():
        _set_parameter(model, name, torch.nn.Parameter(weight.detach().clone(), requires_grad=False))
    return shared


def _set_parameter(model: PreTrainedModel, name: str, weight: torch.nn.Parameter) -> None:
    layer, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(layer), attribute, weight)


def _tie(weights: dict[str, torch.Tensor], names: set[str]) -> bool:
    """Make weights that are equal one, to be saved once; False if they are not equal."""
    first, *others = (weights[name] for name in names)
    if not all(torch.equal(first, other) for other in others):
        return False
    weights.update(dict.fromkeys(names, first))
    return True


def _name_in_model(name: str) -> str:
    # Of a module several weights of which are adapted (`target_parameters`), each is wrapped in one more layer.
    return re.sub(r"(\.base_layer)+\.", ".", plain_name(name).replace(".token_adapter.", "."))


def _is_of_model(name: str, adapted: set[str]) -> bool:
    """Whether a weight is the model's: what an adapted layer has beside its base layer is the adapter's."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if ".".join(parts[:end]) in adapted:
            return parts[end] == "base_layer"
    return True


def _without_adapter(model: PreTrainedModel, adapter: str) -> dict[str, torch.Tensor]:
    """The weights by the names that they have without an adapter, in host memory; tied ones stay tied.

    Of a layer that was trained whole (peft's `modules_to_save`) the adapter's own weights count, not the original.
    """
    adapted = {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    state = dict(model.named_parameters(remove_duplicate=False))  # state_dict() is not for a gathered FSDP model
    for prefix, module in model.named_modules():
        buffers = dict(module.named_buffers(prefix, recurse=False))
        transient = module._non_persistent_buffers_set
        state |= {name: buffer for name, buffer in buffers.items() if name.rpartition(".")[2] not in transient}
    weights = {
        _name_in_model(name.replace(f".modules_to_save.{adapter}.", ".")): weight
        for name, weight in state.items()
        if ".original_module." not in name and _is_of_model(name, adapted)
    }
    return host_copies(weights)
