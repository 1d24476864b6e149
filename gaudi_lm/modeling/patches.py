"""Every patch of a library, apart from the trainer's own overrides: the fault that it mends, and where it is needed.

Nothing is patched by importing this. :func:`patch_libraries` is called once by a script's set-up, before a model is
loaded; the others get the one object that they change, or are for :func:`gaudi_lm.training.trainer.build_trainer`.
With a release of the library that a patch was not written for, the patch is left out;
`tests/modeling/test_patches.py` has a test for each, which fails when the library no longer needs it. What the trainer
overrides in GaudiTrainer is in `gaudi_lm/training/`, what fused attention lacks in
:mod:`gaudi_lm.modeling.fused_attention`, and when AdaLoRA's ranks are reduced in :mod:`gaudi_lm.modeling.adalora`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable
from typing import Any

import accelerate.utils.other
import torch
import transformers
import transformers.modeling_utils
from peft import PeftModel, tuners
from peft.tuners import tuners_utils
from torch.nn import Module
from torch.utils.checkpoint import DefaultDeviceType, checkpoint
from transformers import GenerationConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from gaudi_lm.modeling.layer_names import plain_name
from gaudi_lm.modeling.releases import needed_in

logger = logging.getLogger("gaudi_lm")

FLASH_ATTENTION = tuple(f"flash_attention_{way}" for way in ("recompute", "causal_mask", "fast_softmax", "fp8"))
NOT_CHECKPOINTED = ["GPTBigCodeBlock", "GaudiGPT2Block", "GaudiOPTDecoderLayer"]
NOT_CHECKPOINTED += ["GaudiPhiDecoderLayer", "GaudiStableLmDecoderLayer"]


def patch_libraries(device_type: str) -> None:
    """What is changed in this process as a whole, for a run on ``cpu`` or ``hpu``; repeating it changes nothing."""
    keep_pickled_weights()
    find_scikit_learn()
    leave_out_deepspeed()
    set_checkpoint_device(device_type)
    find_adapters_in_shards()
    compile_regions_in_place()
    if device_type == "hpu":
        patch_adapter_layers()
        keep_width_of_heads()
        narrow_windows()
        scale_positions_once()


@needed_in("transformers", "4.55")
def keep_pickled_weights() -> None:
    """Load weights that are only there in pickled form without asking a public service to convert them.

    transformers 4.55 asks it from a thread while it loads such a model, and no setting turns that off.
    """
    transformers.modeling_utils.auto_conversion = lambda *args, **kwargs: (None, None, None)


LOSSES_OF_OBJECTS = ("for_object_detection", "deformable_detr", "rt_detr", "grounding_dino")
LEFT_OUT = {"transformers.generation.candidate_generator": ("sklearn.metrics", "roc_curve")}
LEFT_OUT |= {f"transformers.loss.loss_{of}": ("scipy.optimize", "linear_sum_assignment") for of in LOSSES_OF_OBJECTS}


@needed_in("transformers", "4.55")
def find_scikit_learn() -> None:
    """Import what transformers takes of scikit-learn and scipy when it is called: it was left out at the start."""
    for name, (origin, function) in LEFT_OUT.items():
        library, module = origin.partition(".")[0], importlib.import_module(name)
        if not hasattr(module, function) and importlib.util.find_spec(library):
            setattr(module, function, functools.partial(_call, origin, function))
            setattr(transformers.utils.import_utils, f"_{library}_available", True)


def _call(origin: str, function: str, *args, **kwargs):
    return getattr(importlib.import_module(origin), function)(*args, **kwargs)


@needed_in("accelerate", "1.10")
def leave_out_deepspeed() -> None:
    """Let accelerate look for DeepSpeed's models only where DeepSpeed is imported, so where such a model can be.

    accelerate 1.10 imports it in every run, where it is installed, to compare a model's class: a second in each rank.
    """
    accelerate.utils.other.is_deepspeed_available = lambda: "deepspeed" in sys.modules


@needed_in("accelerate", "1.10")
def compile_regions_in_place() -> None:
    """Compile layers where they are, as under DeepSpeed: in a copy, a ``forward`` of the model's own calls none."""
    accelerator: Any = importlib.import_module("optimum.habana.accelerate.accelerator")
    compile_layers = accelerate.utils.other.compile_regions_deepspeed
    accelerator.compile_regions = lambda model, **how: compile_layers(model, **how) or model


@needed_in("optimum-habana", "1.21")
def set_checkpoint_device(device_type: str) -> None:
    """Let gradient checkpointing look for the device that the run is on, by PyTorch's own setting.

    Importing optimum-habana 1.21 sets it to ``hpu``, also where all tensors are on the CPU.
    """
    DefaultDeviceType.set_device_type(device_type)


@needed_in("optimum-habana", "1.21")
def complete_generation_config() -> None:
    """Give transformers' generation configuration the settings that GaudiTrainer reads from it, unset.

    GaudiTrainer (optimum-habana 1.21) reads them without asking whether they are there; on a card, optimum-habana's
    own configuration has them. As class attributes they are not saved with a model.
    """
    for name in ("attn_softmax_bf16", "use_flash_attention", *FLASH_ATTENTION):
        setattr(GenerationConfig, name, None)


@needed_in("optimum-habana", "1.21")
def narrow_windows() -> None:
    """Let a token see as many as its window has; with optimum-habana 1.21, and the masks that it extends, one more."""
    masks = importlib.import_module("optimum.habana.transformers.modeling_attn_mask_utils")
    for converter in (masks.GaudiAttentionMaskConverter, masks.AttentionMaskConverter):
        if (make := converter._make_causal_mask).__module__ != __name__:
            converter._make_causal_mask = staticmethod(_narrower(make))


def _narrower(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def narrowed(*args, sliding_window: int | None = None, **kwargs) -> torch.Tensor:
        return make(*args, sliding_window=sliding_window and sliding_window - 1, **kwargs)

    return narrowed  # torch.compile cannot follow a `functools.partial`


@needed_in("optimum-habana", "1.21")
def keep_width_of_heads() -> None:
    """On a card, let the configuration of a Llama keep its ``head_dim``, as Minitron's has one.

    optimum-habana's (1.21) takes the field and drops it: a model from scratch got other widths without a word.
    """
    from optimum.habana.transformers.models.llama.configuration_llama import LlamaConfig

    read = LlamaConfig.__init__

    def read_all(self, *args, head_dim: int | None = None, **fields) -> None:
        read(self, *args, **fields)
        self.head_dim = head_dim or self.head_dim

    if LlamaConfig(head_dim=1).head_dim != 1:
        LlamaConfig.__init__ = read_all


@needed_in("optimum-habana", "1.21")
def scale_positions_once() -> None:
    """Let a linear ``rope_scaling`` divide the positions of Llama, Mistral and Mixtral once, not twice.

    optimum-habana 1.21 divides them, and multiplies them by frequencies that transformers (4.55) has divided already.
    """
    embedding = importlib.import_module("optimum.habana.transformers.models.llama").GaudiLlamaRotaryEmbedding
    fill = embedding._set_cos_sin_cache

    def fill_once(self, *args, **kwargs) -> None:
        if self.rope_type == "linear":
            self.scaling_factor = 1.0
        fill(self, *args, **kwargs)

    embedding._set_cos_sin_cache = fill_once


@needed_in("optimum-habana", "1.21")
def patch_adapter_layers() -> None:
    """On a card, let AdaLoRA and llama-adapter layers call optimum-habana's models as those want to be called.

    peft (0.18 to 0.21) divides a product in bf16 in a way that a Gaudi's batched product does not do, and calls
    attention without the arguments of optimum-habana's. optimum-habana 1.21 has the layers, and leaves it to scripts
    to put them in place.
    """
    from optimum.habana.peft import (
        GaudiAdaloraLayerSVDLinearForward,
        GaudiAdaptedAttention_getattr,
        GaudiAdaptedAttentionPreAttnForward,
    )

    tuners.adalora.SVDLinear.forward = GaudiAdaloraLayerSVDLinearForward
    attention = tuners.adaption_prompt.AdaptedAttention
    attention.pre_attn_forward = GaudiAdaptedAttentionPreAttnForward
    attention.__getattr__ = GaudiAdaptedAttention_getattr


@needed_in("optimum-habana", "1.21")
def restore_own_model(model_type: str) -> None:
    """Let the models of that type be those of transformers on a card too, by loading their module anew.

    Of optimum-habana's (1.21), with transformers 4.55, CodeGen, Cohere and StarCoder2 fail in each forward pass, and
    Gemma norms the output of attention, not its sum with the residual. Qwen's (2 and 3, mixtures too) see past their
    window, Phi's cannot share keys among heads, Mixtral's never drops in attention, and Qwen3's mixtures have experts
    in each layer.
    """
    module = importlib.reload(importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}"))
    for package in (transformers, sys.modules[module.__package__ or ""]):  # they keep the classes they were asked for
        for name in vars(package).keys() & set(module.__all__):
            setattr(package, name, getattr(module, name))
    logger.info("%s: transformers' own model, since optimum-habana's computes something else", model_type)


@needed_in("transformers", "4.55")
def repair_router_loss(model: PreTrainedModel) -> None:
    """Let a mixture of experts balance its routers on the CPU too, by the function that Mixtral has for it.

    Those of OLMoE, Granite and Qwen2 (transformers 4.55) ask a device for its number, which the CPU does not have.
    """
    module: Any = sys.modules[type(model).__module__]
    if hasattr(module, "load_balancing_loss_func"):
        module.load_balancing_loss_func = load_balancing_loss_func


@needed_in("optimum-habana", "1.21")
def repair_gradient_checkpointing(model: Module) -> None:
    """Make `gradient_checkpointing_enable` work on `model` on a card; call it before training starts.

    Lazy mode's own `checkpoint` (optimum-habana 1.21) is PyTorch's non-reentrant one, but calls an internal function
    of PyTorch whose parameters have changed since (`early_stop`), so that inputs are lost: the public one takes its
    place. And the layers of some models leave `GradientCheckpointingLayer` out, and so would keep all activations.
    """
    # Imported here: a CPU run has no use for optimum-habana's models, which take seconds to import.
    from optimum.habana.transformers import gradient_checkpointing as lazy_mode

    lazy_mode.checkpoint = _checkpoint
    checkpointed: dict[type, type] = {}  # one class for all layers of a kind, and by its name: so FSDP finds them
    for module in model.modules():
        kind = type(module)
        if kind.__name__ in NOT_CHECKPOINTED and not issubclass(kind, GradientCheckpointingLayer):
            names = {"__qualname__": kind.__qualname__}
            made = type(kind.__name__, (GradientCheckpointingLayer, kind), names)
            module.__class__ = checkpointed.setdefault(kind, made)


def _checkpoint(function, *args, use_reentrant: bool | None = None, **kwargs):
    return checkpoint(function, *args, use_reentrant=False, **kwargs)


@needed_in("transformers", "4.55")
def ignore_missing_mask(model: PreTrainedModel) -> None:
    """Do not look for padding in a batch without attention mask: collators of this suite never leave one out then.

    transformers 4.55 reads the input ids back from the card in every step, for a warning that it gives once.
    """
    model.base_model.warn_if_padding_and_no_attention_mask = _nothing


@needed_in("peft", "0.21")
def find_adapters_in_shards() -> None:
    """Let peft find the weights of an adapter in layers that FSDP wraps: it would save an adapter without any.

    It looks for the names of modules, into which wrappers put their own, among those of the state, where none are.
    """
    found = tuners_utils._get_tuner_state_dict_key_prefixes
    if hasattr(found, "__wrapped__"):
        return

    @functools.wraps(found)
    def without_wrappers(*args, **kwargs) -> set[str]:
        return set(map(plain_name, found(*args, **kwargs)))

    tuners_utils._get_tuner_state_dict_key_prefixes = without_wrappers


@needed_in("peft", "0")
def complete_adapter(model: PeftModel) -> None:
    """Two things that peft (0.18 to 0.21) leaves open in an adapted model.

    The wrapper of a llama-adapter keeps the model's forward method of the moment when it was made; the one that is
    there later, with this suite's loss, must be called. And AdaLoRA's forward pass asks for the name of the adapter in
    training whenever there is a loss, but has one in training only.
    """
    if model.peft_type == "ADAPTION_PROMPT":
        model.base_model.forward = functools.partial(Module.__call__, model.base_model.model)
    if model.peft_type == "ADALORA" and "trainable_adapter_name" not in vars(model.base_model):
        model.base_model.trainable_adapter_name = model.active_adapter


@needed_in("deepspeed", "0")
def take_no_step_on_zeros() -> None:
    """In bf16 without ZeRO, let the first step of training be the optimizer's first.

    DeepSpeed (0.19) takes one on gradients of zero before, to have its memory: weights decay by it, and Adam's first
    steps are a quarter too short. The optimizer has its memory from its first step on in any case.
    """
    from deepspeed.runtime.fp16 import fused_optimizer, unfused_optimizer

    for kind in (fused_optimizer.FP16_Optimizer, unfused_optimizer.FP16_UnfusedOptimizer):
        kind.initialize_optimizer_states = _nothing


def _nothing(*args) -> None:
    pass
