"""Prompt, prefix and P-tuning: learned vectors before each text, and nothing else is trained.

peft's own forward pass of such a model knows rows of one text only: it takes masks of two dimensions and drops
position ids. Here each text of a packed row sees the same virtual tokens and itself, at the positions that it has when
it stands alone, and the first token of a text is no target, as without virtual tokens.
"""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from types import MethodType

import torch
from peft import (
    PeftConfig,
    PeftModel,
    PeftType,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    PromptTuningInit,
    get_peft_model,
    set_peft_model_state_dict,
)
from peft.utils.integrations import gather_params_ctx
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gaudi_lm.architectures import is_patched
from gaudi_lm.data.masked_token_budget import IGNORE_INDEX
from gaudi_lm.errors import UserError

logger = logging.getLogger("gaudi_lm")

HIDDEN = torch.finfo(torch.bfloat16).min  # finite in every type that autocast may turn the mask into
ENCODER = "prompt_encoder.safetensors"


def virtual_token_config(kind: str, number: int, hidden_size: int) -> PeftConfig:
    """The settings of one of `VIRTUAL_TOKENS`.

    Args:
        number: of virtual tokens.
        hidden_size: of the network that makes them, for P-tuning.
    """
    common = {"task_type": "CAUSAL_LM", "num_virtual_tokens": number}
    if kind == "prefix_tuning":
        return PrefixTuningConfig(**common)
    if kind == "p_tuning":
        return PromptEncoderConfig(encoder_hidden_size=hidden_size, **common)
    # Vectors of peft's default, a normal distribution, are fifty times as long as those of tokens.
    return PromptTuningConfig(prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB, **common)


def check_virtual_tokens(model: PreTrainedModel, config: PeftConfig) -> None:
    """Refuse a model that cannot have them; the keys of a prefix are checked when it is there.

    Raises:
        UserError: it takes no vectors in place of tokens, or they are narrower than its layers.
    """
    if config.peft_type == PeftType.PREFIX_TUNING:
        return
    settings, kind = model.config, config.peft_type.lower()
    if "inputs_embeds" not in inspect.signature(model.forward).parameters:
        raise UserError(f"--peft_type {kind}: {settings.model_type} takes tokens only")
    if (width := model.get_input_embeddings().embedding_dim) != settings.hidden_size:
        raise UserError(
            f"--peft_type {kind}: embeddings of {width} features in a model of {settings.hidden_size} are not those "
            "that peft makes; choose prefix_tuning"
        )


def _check_keys(model: PeftModel) -> None:
    """Refuse a prefix whose keys, as peft made them, are not as wide as the model's."""
    settings = model.get_base_model().config
    heads = getattr(settings, "num_key_value_heads", None) or settings.num_attention_heads
    width = getattr(settings, "head_dim", None) or settings.hidden_size // settings.num_attention_heads
    if settings.model_type == "falcon" or model.active_peft_config.token_dim != heads * width:
        raise UserError(
            f"--peft_type prefix_tuning: peft cannot tell the shape of the keys of this {settings.model_type}; choose "
            "prompt_tuning or p_tuning"
        )


def load_trainable(model: PreTrainedModel, config: PeftConfig, saved: dict[str, torch.Tensor], name: str) -> PeftModel:
    """Saved virtual tokens, to train them further, which peft's own `from_pretrained` refuses.

    Raises:
        UserError: the network behind them was not saved.
    """
    if getattr(config, "prefix_projection", False):
        raise UserError(
            f"--adapter_name_or_path {name}: a network made its prefix (prefix_projection), and peft saves only what "
            "it made; it can be evaluated, but not trained further"
        )
    config.inference_mode = False
    adapted = get_peft_model(model, config)
    set_peft_model_state_dict(adapted, saved)
    load_encoder(adapted, name)
    return adapted


def begin_with_text(model: PeftModel, text: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let the virtual tokens of prompt tuning begin as those of a text, repeated or cut to their number.

    Not by peft, which would look for the tokenizer, by the path of today, whenever the adapter is trained further.

    Raises:
        UserError: the text has no tokens.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UserError(f"--prompt_tuning_init_text {text!r}: it has no tokens")
    number = model.active_peft_config.num_virtual_tokens
    if len(ids) > number:
        logger.warning(
            "--prompt_tuning_init_text: %d tokens, of which --num_virtual_tokens %d are taken", len(ids), number
        )
    words, virtual = model.word_embeddings.weight, model.prompt_encoder[model.active_adapter].embedding.weight
    chosen = torch.tensor((ids * number)[:number], device=words.device)
    with torch.no_grad(), gather_params_ctx([words, virtual]):
        virtual.copy_(words[chosen])


def install_virtual_tokens(model: PeftModel) -> None:
    """Replace peft's forward pass; it still runs where keys and values of earlier tokens are given, in generation.

    Logits that are made, where there are no labels, are those of the text, as those of other adapters.

    Raises:
        UserError: a prefix for a model whose keys have another shape.
    """
    base = model.get_base_model()
    prefix = model.peft_type == PeftType.PREFIX_TUNING
    if prefix:
        _check_keys(model)
    original = type(model).forward
    cached = prefix and is_patched(base)  # optimum-habana's causal mask forgets the keys that are there already

    def forward(self, input_ids=None, attention_mask=None, labels=None, position_ids=None, **kwargs):
        if input_ids is None or kwargs.get("past_key_values") is not None:
            kwargs |= {"labels": labels} | ({} if position_ids is None else {"position_ids": position_ids})
            return original(self, input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        batch, number = len(input_ids), self.active_peft_config.num_virtual_tokens
        if labels is not None:
            labels = labels.clone()
            labels[:, 0] = IGNORE_INDEX
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if cached:
            if input_ids.shape[1] <= number:
                raise UserError(
                    f"--num_virtual_tokens {number}: optimum-habana's {base.config.model_type} would write a row of "
                    f"{input_ids.shape[1]} tokens over them; give longer rows, --pad_to_max_length or fewer of them"
                )
            if attention_mask.dim() == 2:
                attention_mask = _causal_mask(attention_mask)
                position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        kwargs["attention_mask"] = _mask_with_virtual(attention_mask, number, queries=not prefix)
        if prefix:
            length = input_ids.shape[1] + number
            kwargs["past_key_values"] = self.get_prompt(batch, max_cache_len=length)
            if cached:
                kwargs["use_cache"] = True  # otherwise that model passes over them
            if position_ids is not None:
                kwargs["position_ids"] = position_ids + number
            return self.base_model(input_ids=input_ids, labels=labels, **kwargs)
        embedded = self.word_embeddings(input_ids)
        virtual = self.get_prompt(batch).to(embedded.dtype)
        if position_ids is not None:
            first = torch.arange(number, device=position_ids.device).expand(batch, number) + position_ids[:, :1]
            kwargs["position_ids"] = torch.cat([first, position_ids + number], dim=1)
        inputs = torch.cat([virtual, embedded], dim=1)
        if labels is not None:
            labels = torch.cat([labels.new_full((batch, number), IGNORE_INDEX), labels], dim=1)
            return self.base_model(inputs_embeds=inputs, labels=labels, **kwargs)
        outputs = self.base_model(inputs_embeds=inputs, **kwargs)
        outputs.logits = outputs.logits[:, number:]
        return outputs

    model.forward = MethodType(forward, model)


def _causal_mask(mask: torch.Tensor) -> torch.Tensor:
    """A mask (batch, length) as (batch, 1, length, length), of ones and zeros."""
    return (mask > 0)[:, None, None, :].repeat(1, 1, mask.shape[1], 1).tril().to(torch.uint8)


def _mask_with_virtual(mask: torch.Tensor, number: int, queries: bool) -> torch.Tensor:
    """A mask (batch, length) or (batch, 1, length, length) with virtual tokens before the others, seen by all.

    Args:
        mask: of the latter shape, of ones and zeros, or, if it is of a float type, to be added to the scores.
        queries: virtual tokens are in the row, and see those before them; otherwise only their keys and values.
    """
    if mask.dim() == 2:
        return torch.cat([mask.new_ones(len(mask), number), mask], dim=1)
    batch, _, length, _ = mask.shape
    seen, hidden = (0, HIDDEN) if mask.is_floating_point() else (1, 0)
    mask = torch.cat([mask.new_full((batch, 1, length, number), seen), mask], dim=3)
    if not queries:
        return mask
    virtual = mask.new_full((batch, 1, number, number + length), hidden)
    before = torch.ones(number, number, dtype=torch.bool, device=mask.device).tril()
    virtual[..., :number].masked_fill_(before, seen)
    return torch.cat([virtual, mask], dim=2)


def save_encoder(model: PeftModel, folder: str | Path) -> None:
    """Beside an adapter of P-tuning, which holds only the vectors that it made: the network that makes them."""
    if getattr(model, "peft_type", None) == PeftType.P_TUNING and not model.active_peft_config.inference_mode:
        encoder = model.prompt_encoder[model.active_adapter]
        save_file({n: w.detach().cpu().contiguous() for n, w in encoder.state_dict().items()}, Path(folder) / ENCODER)


def load_encoder(model: PeftModel, folder: str | Path) -> None:
    """What :func:`save_encoder` saved, to train it further.

    Raises:
        UserError: it is not there, or of another size.
    """
    if getattr(model, "peft_type", None) != PeftType.P_TUNING:
        return
    path = Path(folder) / ENCODER
    if not path.is_file():
        raise UserError(
            f"{folder}: without {ENCODER}, which holds the network behind its virtual tokens, it can be evaluated, "
            "but not trained further"
        )
    try:
        model.prompt_encoder[model.active_adapter].load_state_dict(load_file(path))
    except RuntimeError as error:
        raise UserError(f"{path}: of another adapter ({' '.join(str(error).split())[:150]})") from error
