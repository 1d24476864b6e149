"""What the suite knows of each architecture: one row each, and a test for every field of a row."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from gaudi_lm.errors import UserError

logger = logging.getLogger("gaudi_lm")

PADDING = "padding"
# Loaded as causal models, these are encoders all the same, unless their configuration has is_decoder.
ENCODERS = {
    "bert-generation",
    *(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() & MODEL_FOR_MASKED_LM_MAPPING_NAMES.keys()),
}
SEE_ALL = ("cpmant", "mega", "xlm", "xlnet")  # and so they are whatever it has
MIXED_UP = ("llama4", "llama4_text")  # whose experts, in transformers 4.55, get the router's scores of other tokens


@dataclass(frozen=True)
class Architecture:
    """One architecture, as transformers wrote it and as optimum-habana patches it.

    Attributes:
        causal_head: a causal model's logits are ``softcap(scale * (hidden @ weight.T + bias))``, with weight and bias
            of its output embedding.
        masked_head: of a masked model, the module that receives the encoder's output first: it and what follows make
            the logits position by position.
        logit_transform: from a model to ``(scale, softcap)``, a softcap of None being none.
        first_position: index of the first token in the table of positions; ``padding``: one more than the padding id,
            which is then the position of padding.
        packs: a block-diagonal mask and position ids keep the texts of a row apart.
        packs_patched: so they do in optimum-habana's model, where there is one.
        patched_sdpa: that model has PyTorch's own fused attention, ``sdpa``; others compute eagerly when asked for it.
        fuses: an encoder whose ``sdpa`` attention is computed by Gaudi's fused kernel on a card.
        patched_router_loss: that model, a mixture of experts, has the loss that balances its routers.
        unpatched: whether that model is wrong for a configuration: then, on a card too, transformers' own is used.
    """

    causal_head: bool = False
    masked_head: str | None = None
    logit_transform: Callable[[PreTrainedModel], tuple[float, float | None]] = lambda model: (1.0, None)
    first_position: int | str = 0
    packs: bool = False
    packs_patched: bool = False
    patched_sdpa: bool = False
    fuses: bool = False
    patched_router_loss: bool = False
    unpatched: Callable[[PretrainedConfig], bool] = lambda config: False

    def position_of_first_token(self, config: PretrainedConfig) -> int:
        """Where positions start, for this configuration, which needs a padding id if they start after it."""
        return config.pad_token_id + 1 if self.first_position == PADDING else int(self.first_position)


def _scaled(model: PreTrainedModel) -> tuple[float, None]:
    return float(model.logit_scale), None


def _divided(model: PreTrainedModel) -> tuple[float, None]:
    return 1.0 / model.config.logits_scaling, None


def _capped(model: PreTrainedModel) -> tuple[float, float | None]:
    return 1.0, model.config.final_logit_softcapping


def _always(config: PretrainedConfig) -> bool:
    return True


def _drops(config: PretrainedConfig) -> bool:
    return bool(config.attention_dropout)


def _shared_keys(config: PretrainedConfig) -> bool:
    return config.num_key_value_heads != config.num_attention_heads


def _window(config: PretrainedConfig) -> bool:
    return bool(config.use_sliding_window)


def _window_or_dense_layers(config: PretrainedConfig) -> bool:
    return _window(config) or bool(config.mlp_only_layers) or config.decoder_sparse_step != 1


def _causal(packs: bool = True, patched: bool = False, **fields) -> Architecture:
    return Architecture(causal_head=True, packs=packs, packs_patched=patched, **fields)


def _masked(head: str, first: int | str = 0, packs: bool = True, patched: bool = False, **fields) -> Architecture:
    return Architecture(masked_head=head, first_position=first, packs=packs, packs_patched=patched, **fields)


ARCHITECTURES: dict[str, Architecture] = {
    "bloom": _causal(packs=False),
    "codegen": _causal(unpatched=_always),
    "cohere": _causal(logit_transform=_scaled, unpatched=_always),
    "cohere2": _causal(logit_transform=_scaled),
    "falcon": _causal(patched=True, patched_sdpa=True),
    "gemma": _causal(unpatched=_always),
    "gemma2": _causal(patched=True, logit_transform=_capped),
    "gemma3_text": _causal(patched=True, logit_transform=_capped),
    "gpt2": _causal(),
    "gpt_bigcode": _causal(),
    "gpt_neo": _causal(patched=True),
    "gpt_neox": _causal(),
    "gpt_oss": _causal(patched=True),
    "gptj": _causal(),
    "granite": _causal(logit_transform=_divided),
    "granitemoe": _causal(logit_transform=_divided),
    "llama": _causal(patched=True),
    "mistral": _causal(patched=True),
    "mixtral": _causal(patched=True, unpatched=_drops),
    "mpt": _causal(packs=False, patched=True),
    "olmo": _causal(),
    "olmo2": _causal(),
    "olmoe": _causal(),
    "opt": _causal(),  # its table of positions has the two rows more that it starts after
    "persimmon": _causal(patched=True),
    "phi": _causal(patched=True, unpatched=_shared_keys),
    "phi3": _causal(),
    "qwen2": _causal(patched=True, unpatched=_window),
    "qwen2_moe": _causal(patched=True, patched_router_loss=True, unpatched=_window),
    "qwen3": _causal(patched=True, unpatched=_window),
    "qwen3_moe": _causal(patched=True, unpatched=_window_or_dense_layers),
    "smollm3": _causal(),
    "stablelm": _causal(patched=True),
    "starcoder2": _causal(unpatched=_always),
    "albert": _masked("predictions", packs=False, patched_sdpa=True),
    "bert": _masked("cls", patched=True, patched_sdpa=True, fuses=True),
    "camembert": _masked("lm_head", PADDING, fuses=True),
    "deberta": _masked("cls", packs=False),
    "deberta-v2": _masked("cls", packs=False),
    "distilbert": _masked("vocab_transform", packs=False),
    "electra": _masked("generator_predictions"),
    "modernbert": _masked("head", packs=False),
    "mpnet": _masked("lm_head", 2),  # whatever its padding id is
    "roberta": _masked("lm_head", PADDING, fuses=True),
    "roberta-prelayernorm": _masked("lm_head", PADDING),
    "xlm-roberta": _masked("lm_head", PADDING, fuses=True),
    "xlm-roberta-xl": _masked("lm_head", PADDING, fuses=True),
    # Their heads are not known: the loss is made from the full logits.
    "data2vec-text": Architecture(first_position=PADDING),
    "esm": Architecture(first_position=PADDING),
    "ibert": Architecture(first_position=PADDING),
    "longformer": Architecture(first_position=PADDING),
    "luke": Architecture(first_position=PADDING),
    "xmod": Architecture(first_position=PADDING),
}

UNKNOWN = Architecture()


def architecture_of(config: PretrainedConfig) -> Architecture:
    """The row of a model's configuration; one that claims nothing for an architecture that has none."""
    return ARCHITECTURES.get(config.model_type, UNKNOWN)


def make_causal(auto_class: type, config: PretrainedConfig) -> None:
    """Let no token of a causal model see those after it, which it is to predict: encoders of BERT's kind do.

    Args:
        auto_class: that makes the model; others than ``AutoModelForCausalLM`` have no need of it.

    Raises:
        UserError: an architecture that has no setting for that, or whose experts mix up tokens.
    """
    kind = config.model_type
    if auto_class is not AutoModelForCausalLM:
        return
    if kind in SEE_ALL:
        raise UserError(
            f"{kind}: not a causal model: its tokens attend to those after them, which they are to predict"
        )
    if kind in MIXED_UP:
        raise UserError(
            f"{kind}: transformers 4.55 computes its experts wrongly, with the router's scores of other tokens; "
            "choose another model"
        )
    if kind in ENCODERS and not config.is_decoder and not config.is_encoder_decoder:
        config.is_decoder = True
        logger.info("%s: is_decoder is set, so that no token sees those after it, as in an encoder", kind)


def packable(patched: bool) -> list[str]:
    """The architectures that keep packed texts apart, in transformers or as optimum-habana patches them."""
    return sorted(name for name, row in ARCHITECTURES.items() if (row.packs_patched if patched else row.packs))


def is_patched(model: nn.Module) -> bool:
    """Whether optimum-habana replaced the forward pass of the model's backbone."""
    return type(model.base_model).forward.__module__.startswith("optimum.habana")
