"""The loss of language modelling, its accuracy and its counts, in front of any model's own `forward`.

`install_token_loss` replaces a model's forward by one that, given labels, returns sums over target tokens and keeps no
logits. The model's own code still runs: only its output embedding is bypassed for the duration of the call, and hands
over the hidden states that it would have projected to `gaudi_lm.cross_entropy`. A masked language model runs its whole
head on the masked positions only. Nothing in a forward pass reads a value back from the card, and shapes never depend
on values.
"""

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.utils import ModelOutput

from gaudi_lm.cross_entropy import chunked_cross_entropy, full_cross_entropy
from gaudi_lm.predictions import IGNORE_INDEX, select_targets

# Models whose logits are `scale * (hidden @ weight.T + bias)`, perhaps soft-capped, from `get_output_embeddings()`.
CAUSAL_MODELS = frozenset(
    ("bloom", "codegen", "cohere", "cohere2", "falcon", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_bigcode")
    + ("gpt_neo", "gpt_neox", "gptj", "granite", "llama", "mistral", "mixtral", "mpt", "olmo", "olmo2", "opt")
    + ("persimmon", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "smollm3", "stablelm", "starcoder2")
)

# Masked models: the module that receives the encoder's output first. It and what follows see masked rows only.
MASKED_HEADS = {
    "albert": "predictions",
    "bert": "cls",
    "camembert": "lm_head",
    "deberta": "cls",
    "deberta-v2": "cls",
    "distilbert": "vocab_transform",
    "electra": "generator_predictions",
    "modernbert": "head",
    "mpnet": "lm_head",
    "roberta": "lm_head",
    "roberta-prelayernorm": "lm_head",
    "xlm-roberta": "lm_head",
    "xlm-roberta-xl": "lm_head",
}


@dataclass
class TokenLossOutput(ModelOutput):
    """What a model with an installed token loss returns when it is given labels. Every tensor is 0-dimensional.

    loss: float32, `loss_sum / num_items_in_batch` where that was given, else `loss_sum / count`; 0 without targets.
    loss_sum: float32, detached: the sum of the negative log-likelihoods of this batch's target tokens, in nats.
    correct: int64: targets that are the argmax of their logits.
    count: int64: target tokens, that is (shifted, for causal models) labels other than -100.
    """

    loss: Tensor | None = None
    loss_sum: Tensor | None = None
    correct: Tensor | None = None
    count: Tensor | None = None


def install_token_loss(
    model: nn.Module,
    objective: Literal["causal", "masked"],
    *,
    chunked: bool = True,
    max_predictions_per_seq: int | Callable[[int, int], int] | None = None,
    label_smoothing: float = 0.0,
) -> str:
    """Replace `model.forward` by one that returns a `TokenLossOutput` where it is given labels.

    For a PEFT model the base model's forward is replaced: that is what receives the labels in the end. Without labels
    the original forward runs. To be called before the model is wrapped (DDP, DeepSpeed, HPU graphs).

    Args:
        model: a `PreTrainedModel` with a language-modelling head, or a `PeftModel` around one.
        objective: "causal" shifts the labels (batch, length) by one inside, as transformers does; "masked" does not.
        chunked: False keeps the full logits, and computes the same figures from them.
        max_predictions_per_seq: masked only: rows that the head computes, per sequence, or as a function of (batch,
            length) their number for a whole batch. More labels than that in a batch must have been removed by
            `limit_predictions`. None computes all positions.
        label_smoothing: in training, the share of a label's weight that is spread over the vocabulary.

    Returns: one line for the log, which says what was installed, and if the full logits are kept, why.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    reason = _why_full_logits(base, objective) if chunked else "asked for"
    entry = MASKED_HEADS[base.config.model_type] if objective == "masked" and not reason else None
    if base.config.model_type == "modernbert":
        base.config.reference_compile = False  # else the head is one compiled function, which cannot be entered

    # The function, not the bound method: a copy of the model must run on its own parameters.
    original = getattr(base.forward, "__func__", base.forward)
    original = getattr(original, "token_loss_original", original)
    takes_self = inspect.ismethod(base.forward)
    parameters = dict(inspect.signature(base.forward).parameters)

    def forward(self, *args, **kwargs):
        run = MethodType(original, self) if takes_self else original
        if args:
            kwargs.update(zip(parameters, args, strict=False))
        if kwargs.get("labels") is None:
            kwargs.pop("num_items_in_batch", None)
            return run(**kwargs)
        labels, num_items = kwargs.pop("labels"), kwargs.pop("num_items_in_batch", None)
        kwargs.pop("return_dict", None)
        if "use_cache" in parameters and kwargs.get("past_key_values") is None:
            kwargs["use_cache"] = False
        if objective == "causal":
            labels = functional.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:]
        smoothing = label_smoothing if self.training else 0.0
        if reason:
            outputs = run(**kwargs)
            loss_sum, correct = full_cross_entropy(outputs.logits, labels, smoothing)
        else:
            rows = None
            if entry and max_predictions_per_seq is not None:
                limit = max_predictions_per_seq
                rows = limit(*labels.shape) if callable(limit) else limit * labels.shape[0]
            outputs, hidden, labels = _run_without_head(self, run, kwargs, labels, entry, rows)
            head = self.get_output_embeddings()
            scale, softcap = _logit_transform(self)
            loss_sum, correct = chunked_cross_entropy(
                hidden, head.weight, labels, bias=head.bias, scale=scale, softcap=softcap, smoothing=smoothing
            )
        count = (labels != IGNORE_INDEX).sum()
        items = count if num_items is None else num_items
        items = items.to(loss_sum.device).clamp(min=1) if torch.is_tensor(items) else max(items, 1)
        loss = loss_sum / items
        if outputs.get("aux_loss") is not None:  # mixtures of experts balance their routers
            loss = loss + self.router_aux_loss_coef * outputs["aux_loss"].to(loss.device)
        return TokenLossOutput(loss=loss, loss_sum=loss_sum.detach(), correct=correct, count=count)

    # The keyword arguments tell the trainer that the loss is normalised here, also for models that cannot do it.
    forward.token_loss_original = original
    extra = inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)
    listed = [p for p in parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    forward.__signature__ = inspect.Signature(
        [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD), *listed, extra]
    )
    base.forward = MethodType(forward, base)
    # It reads the input ids back from the card in every step, to warn once of what our collators never do.
    base.base_model.warn_if_padding_and_no_attention_mask = _no_warning

    if reason:
        return f"Loss of {objective} language modelling from the full logits: {reason}"
    head = base.get_output_embeddings()
    frozen = "" if head.weight.requires_grad else ", no gradient for the frozen head"
    where = " on masked positions only" if entry and max_predictions_per_seq is not None else ""
    return f"Loss of {objective} language modelling in row chunks{where}, without full logits{frozen}"


def _run_without_head(model, run, kwargs, labels, entry, rows):
    """Run the model with its output embedding bypassed: (outputs, hidden states before it, labels of those rows)."""
    head = model.get_output_embeddings()
    captured = []

    def capture(hidden, *_, **__):
        captured.append(hidden)
        return hidden

    bypassed = {head: capture}
    if rows is not None:
        module = model.get_submodule(entry)
        positions, labels = select_targets(labels, rows)

        def enter(hidden, *args, _inner=module.forward, **kwargs):
            return _inner(hidden.reshape(-1, hidden.shape[-1]).index_select(0, positions), *args, **kwargs)

        bypassed[module] = enter
    kept = {module: module.__dict__.get("forward") for module in bypassed}
    for module, forward in bypassed.items():
        module.forward = forward
    try:
        outputs = run(**kwargs)
    finally:
        for module, forward in kept.items():
            del module.forward
            if forward is not None:
                module.forward = forward
    return outputs, captured[0], labels


def _no_warning(input_ids: Tensor, attention_mask: Tensor | None) -> None:
    pass


def _logit_transform(model) -> tuple[float, float | None]:
    config = model.config
    if config.model_type in ("cohere", "cohere2"):
        return float(model.logit_scale), None
    if config.model_type == "granite":
        return 1.0 / config.logits_scaling, None
    if config.model_type in ("gemma2", "gemma3_text"):
        return 1.0, config.final_logit_softcapping
    return 1.0, None


def _why_full_logits(model, objective) -> str | None:
    """The reason why the head cannot be entered, None if it can."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    name, head = model.config.model_type, model.get_output_embeddings()
    if is_deepspeed_zero3_enabled():
        return "DeepSpeed ZeRO-3 shards the head"
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true"):
        return "FSDP shards the head"
    known = CAUSAL_MODELS if objective == "causal" else MASKED_HEADS
    if name not in known or (name.startswith("deberta") and not model.config.legacy):
        return f"the head of {name} is not known"
    if type(head) is not nn.Linear or type(head.weight) is not nn.Parameter:
        return f"the output embedding is a {type(head).__name__}, not a plain linear layer"
    return None
