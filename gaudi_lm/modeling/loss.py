"""The loss of language modelling, its accuracy and its counts, in front of any model's own `forward`.

`install_token_loss` replaces a model's forward by one that, given labels, returns sums over target tokens and keeps no
logits. The model's own code still runs: only its output embedding is bypassed for the duration of the call, and hands
over the hidden states that it would have projected to `gaudi_lm.modeling.cross_entropy`. A masked language model runs
its whole head on the masked positions only. Nothing in a forward pass reads a value back from the card, and shapes
never depend on values.
"""

import inspect
import os
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.utils import ModelOutput

from gaudi_lm.architectures import architecture_of, is_patched
from gaudi_lm.data.masked_token_budget import IGNORE_INDEX, select_targets
from gaudi_lm.errors import UserError
from gaudi_lm.modeling.cross_entropy import chunked_cross_entropy, full_cross_entropy
from gaudi_lm.modeling.patches import ignore_missing_mask, repair_router_loss

# What models are given that some do not take: FNet has no attention, and classes of one's own may know tokens alone.
OPTIONAL = ("attention_mask", "cache_position", "return_dict", "token_type_ids", "use_cache")


class _NoLogits(UserError, AttributeError, KeyError):
    """As an attribute or a key that is not there is looked for, it must be such an error too."""

    def __init__(self):
        super().__init__(
            "outputs.logits: a model that is given labels makes its loss without; take the labels out of the inputs "
            "first, or give build_trainer a loss_func"
        )

    __str__ = Exception.__str__  # a KeyError quotes its message


@dataclass
class TokenLossOutput(ModelOutput):
    """What a model with an installed token loss returns when it is given labels. Every tensor is 0-dimensional.

    loss: float32, `(loss_sum + count * aux_loss) / num_items_in_batch`, or `/ count` where that was not given: what is
        added weighs as the batch's share of the step. 0 without targets.
    loss_sum: float32, detached: the sum of the negative log-likelihoods of this batch's target tokens, in nats.
    correct: int64: targets that are the argmax of their logits.
    count: int64: target tokens, that is (shifted, for causal models) labels other than -100.
    aux_loss: float32, detached: what the routers of a mixture of experts add, times the configured coefficient.
    """

    loss: Tensor | None = None
    loss_sum: Tensor | None = None
    correct: Tensor | None = None
    count: Tensor | None = None
    aux_loss: Tensor | None = None

    def __getattr__(self, name: str):
        if name == "logits":
            raise _NoLogits
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __getitem__(self, name):
        if name == "logits":
            raise _NoLogits
        return super().__getitem__(name)

    def get(self, name, default=None):
        # Examples of a `compute_loss` ask so, and would go on with None.
        return self[name] if name == "logits" or name in self else default


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

    Raises:
        UserError: a mixture of experts that is to balance its routers, as optimum-habana wrote it, and cannot.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(base.config, "output_router_logits", False):
        if is_patched(base) and not architecture_of(base.config).patched_router_loss:
            raise UserError(
                f"output_router_logits: optimum-habana's {base.config.model_type} has no loss that balances its "
                "routers; set it to false in the model's configuration"
            )
        repair_router_loss(base)
    reason = _why_full_logits(base, objective) if chunked else "--chunked_loss False, or compiled on the CPU"
    entry = architecture_of(base.config).masked_head if objective == "masked" and not reason else None

    # The function, not the bound method: a copy of the model must run on its own parameters.
    original = getattr(base.forward, "__func__", base.forward)
    original = getattr(original, "token_loss_original", original)
    takes_self = inspect.ismethod(base.forward)
    parameters = dict(inspect.signature(base.forward).parameters)
    any_name = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    idle = set() if any_name else set(OPTIONAL) - parameters.keys()

    def forward(self, *args, **kwargs):
        run = partial(original, self) if takes_self else original
        if args:
            kwargs.update(zip(parameters, args, strict=False))
        num_items = kwargs.pop("num_items_in_batch", None)
        if not any_name:
            names = [name for name, value in kwargs.items() if value is not None or name in parameters]
            kwargs = {name: kwargs[name] for name in names if name not in idle}
        if kwargs.get("labels") is None:
            return run(**kwargs)
        labels = kwargs.pop("labels")
        kwargs.pop("return_dict", None)
        if "use_cache" in parameters and kwargs.get("past_key_values") is None:
            kwargs["use_cache"] = False
        if objective == "causal":
            inputs = kwargs["input_ids"] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
            # A part of a row comes with the first label of the next part.
            labels = functional.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1 : 1 + inputs.shape[1]]
            unpadded = kwargs.get("attention_mask") is None and kwargs.get("position_ids") is None
            if unpadded and labels.device.type == "cpu" and "attention_mask" in parameters:
                # Without one, transformers 4.55 treats each row as packed, and SDPA gets a mask instead of is_causal.
                kwargs["attention_mask"] = torch.ones_like(labels)
        smoothing = label_smoothing if self.training else 0.0
        if reason:
            with _uncompiled(self.config):
                outputs = run(**kwargs)
            loss_sum, correct = full_cross_entropy(logits_of(self, outputs), labels, smoothing)
        else:
            rows = None
            if entry and max_predictions_per_seq is not None:
                limit = max_predictions_per_seq
                rows = limit(*labels.shape) if callable(limit) else limit * labels.shape[0]
            with _uncompiled(self.config):
                outputs, hidden, labels = _run_without_head(self, run, kwargs, labels, entry, rows)
            head = self.get_output_embeddings()
            scale, softcap = architecture_of(self.config).logit_transform(self)
            loss_sum, correct = chunked_cross_entropy(
                hidden, head.weight, labels, bias=head.bias, scale=scale, softcap=softcap, smoothing=smoothing
            )
        count = (labels != IGNORE_INDEX).sum()
        loss, added = loss_sum, _router_loss(self, outputs)
        if added is not None:
            loss, added = loss + count * added.to(loss.device), added.detach()
        items = count if num_items is None else num_items
        loss = loss / (items.to(loss.device).clamp(min=1) if torch.is_tensor(items) else max(items, 1))
        return TokenLossOutput(loss=loss, loss_sum=loss_sum.detach(), correct=correct, count=count, aux_loss=added)

    # The keyword arguments tell the trainer that the loss is normalised here, also for models that cannot do it.
    forward.token_loss_original = original  # type: ignore[attr-defined]
    extra = inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)
    listed = [p for p in parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    forward.__signature__ = inspect.Signature([itself, *listed, extra])  # type: ignore[attr-defined]
    base.forward = MethodType(forward, base)
    ignore_missing_mask(base)

    if reason:
        blind = objective == "masked" and "attention_mask" in idle
        unseen = "; it takes no mask: tokens see padding" if blind else ""
        return f"Loss of {objective} language modelling from the full logits: {reason}{unseen}"
    head = base.get_output_embeddings()
    for module in [head, *([base.get_submodule(entry)] if entry else [])]:
        module.forward = module.forward  # as each step leaves it: torch.compile would trace the second step again
    frozen = "" if head.weight.requires_grad else ", no gradient for the frozen head"
    where = " on masked positions only" if entry and max_predictions_per_seq is not None else ""
    return f"Loss of {objective} language modelling in row chunks{where}, without full logits{frozen}"


def logits_of(model: nn.Module, outputs: object) -> Tensor:
    """The logits that a model's forward has returned, by name.

    Raises:
        UserError: it has returned none.
    """
    if not isinstance(outputs, dict) or not torch.is_tensor(outputs.get("logits")):
        raise UserError(
            f"{type(model).__name__}.forward made a {type(outputs).__name__} without logits: return them by name, as "
            "CausalLMOutput(logits=logits) of transformers"
        )
    return outputs["logits"]


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
    kept = {module: module.forward for module in bypassed}
    for module, forward in bypassed.items():
        module.forward = forward
    try:
        outputs = run(**kwargs)
    finally:
        for module, forward in kept.items():
            module.forward = forward
    return outputs, captured[0], labels


@contextmanager
def _uncompiled(config):
    """ModernBERT's own compilation off for the moment: its head would be one function, which cannot be entered.

    Not for good, as the configuration is saved with the model.
    """
    if not hasattr(config, "reference_compile"):
        yield
        return
    wanted, config.reference_compile = config.reference_compile, False
    try:
        yield
    finally:
        config.reference_compile = wanted


def _router_loss(model, outputs) -> Tensor | None:
    """What a mixture of experts adds to its loss so that its routers share out the tokens evenly."""
    balance = outputs.get("aux_loss")
    if not torch.is_tensor(balance):
        return None
    for name in ("router_aux_loss_coef", "aux_loss_coef", "moe_loss_weight"):  # most; JetMoE; DBRX
        coefficient = getattr(model, name, getattr(model.config, name, None))
        if coefficient is not None:
            return coefficient * balance.float()
    raise UserError(
        f"output_router_logits: the weight of {model.config.model_type}'s loss that balances its routers has no name "
        "that is known; set it to false in the model's configuration"
    )


def _why_full_logits(model, objective) -> str | None:
    """The reason why the head cannot be entered, None if it can."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    name, head = model.config.model_type, model.get_output_embeddings()
    if is_deepspeed_zero3_enabled():
        return "DeepSpeed ZeRO-3 shards the head"
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true"):
        return "FSDP shards the head"
    # The function's module: that of optimum-habana, where it is patched, and a subclass may leave it as it is.
    if type(model).forward.__module__.partition(".")[0] not in ("transformers", "optimum", "gaudi_lm"):
        return f"{type(model).__name__} has a forward of its own, which may change its logits"
    row = architecture_of(model.config)
    known = row.causal_head if objective == "causal" else row.masked_head
    if not known or (name.startswith("deberta") and not model.config.legacy):
        return f"the head of {name} is not known"
    if type(head) is not nn.Linear or type(head.weight) is not nn.Parameter:
        return f"the output embedding is a {type(head).__name__}, not a plain linear layer"
    return None
