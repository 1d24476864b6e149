"""The flags of adapters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from gaudi_lm.errors import UserError

ADAPTERS = ("lora", "adalora", "ia3", "vera", "ln_tuning", "llama-adapter")
VIRTUAL_TOKENS = ("prompt_tuning", "prefix_tuning", "p_tuning")
# Of each flag below: its name in peft's configurations, empty where they do not keep it, and whom it serves.
SETTINGS: dict[str, tuple[str, tuple[str, ...]]] = {
    "lora_rank": ("r", ("lora",)),
    "lora_alpha": ("lora_alpha", ("lora", "adalora")),
    "lora_dropout": ("lora_dropout", ("lora", "adalora", "vera")),
    "lora_target_modules": ("target_modules", ("lora", "adalora")),
    "adalora_init_r": ("init_r", ("adalora",)),
    "adalora_target_r": ("target_r", ("adalora",)),
    "adalora_tinit": ("tinit", ("adalora",)),
    "adalora_tfinal": ("tfinal", ("adalora",)),
    "adalora_delta_t": ("deltaT", ("adalora",)),
    "adalora_orth_reg_weight": ("orth_reg_weight", ("adalora",)),
    "ia3_target_modules": ("target_modules", ("ia3",)),
    "feedforward_modules": ("feedforward_modules", ("ia3",)),
    "adapter_layers": ("adapter_layers", ("llama-adapter",)),
    "adapter_len": ("adapter_len", ("llama-adapter",)),
    "num_virtual_tokens": ("num_virtual_tokens", VIRTUAL_TOKENS),
    "encoder_hidden_size": ("encoder_hidden_size", ("p_tuning",)),
    "prompt_tuning_init_text": ("", ("prompt_tuning",)),
    "vera_target_modules": ("target_modules", ("vera",)),
    "ln_target_modules": ("target_modules", ("ln_tuning",)),
}


def check_adapter_flags(values: dict[str, object], is_given: Callable[[str], bool]) -> None:
    """Refuse settings of other kinds of adapter than the new one; a saved adapter is not known here.

    Args:
        values: by the name of the flag.
        is_given: whether a flag has another value than its default.

    Raises:
        UserError: the first of them.
    """
    if values.get("adapter_name_or_path"):
        return
    kind = values.get("peft_type")
    for name, (_, kinds) in SETTINGS.items():
        if is_given(name) and kind not in kinds:
            raise UserError(f"--{name}: only with --peft_type {' or '.join(kinds)}, and not with {kind}")


@dataclass
class AdapterArguments:
    """Which adapter, and its settings."""

    peft_type: str = field(
        default="lora",
        metadata={
            "help": "Kind of adapter.",
            "choices": [*ADAPTERS, *VIRTUAL_TOKENS],
        },
    )
    lora_rank: int = field(default=8, metadata={"help": "Rank of LoRA's matrices."})
    lora_alpha: int = field(default=16, metadata={"help": "LoRA's output is scaled by alpha / rank."})
    lora_dropout: float = field(
        default=0.05, metadata={"help": "Dropout probability before the matrices of LoRA, AdaLoRA and VeRA."}
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Layers that LoRA or AdaLoRA adapt: names, a regular expression for the whole name of a layer, or "
            "all-linear; by default peft's for the model."
        },
    )
    adalora_init_r: int = field(default=12, metadata={"help": "AdaLoRA: initial rank of each matrix."})
    adalora_target_r: int = field(default=4, metadata={"help": "AdaLoRA: target average rank."})
    adalora_tinit: int = field(default=50, metadata={"help": "AdaLoRA: steps of warm-up before ranks are reduced."})
    adalora_tfinal: int = field(
        default=100, metadata={"help": "AdaLoRA: steps of fine-tuning after the last reduction."}
    )
    adalora_delta_t: int = field(default=10, metadata={"help": "AdaLoRA: steps between two reductions."})
    adalora_orth_reg_weight: float = field(
        default=0.5, metadata={"help": "AdaLoRA: weight of the orthogonality term in the loss."}
    )
    ia3_target_modules: list[str] | None = field(default=None, metadata={"help": "IA3: layers that it scales."})
    feedforward_modules: list[str] | None = field(
        default=None, metadata={"help": "IA3: those of these layers whose input is scaled, not their output."}
    )
    adapter_layers: int = field(
        default=30, metadata={"help": "llama-adapter: number of layers with a learned prompt, from the top."}
    )
    adapter_len: int = field(default=10, metadata={"help": "llama-adapter: number of tokens of each prompt."})
    num_virtual_tokens: int = field(
        default=8, metadata={"help": "Prompt, prefix and P-tuning: learned tokens before each text."}
    )
    encoder_hidden_size: int = field(
        default=1024, metadata={"help": "P-tuning: hidden size of the network that makes the virtual tokens."}
    )
    prompt_tuning_init_text: str | None = field(
        default=None,
        metadata={"help": "Prompt tuning: a text to begin from; by default tokens drawn from the vocabulary."},
    )
    vera_target_modules: list[str] | None = field(default=None, metadata={"help": "VeRA: layers that it adapts."})
    ln_target_modules: list[str] | None = field(
        default=None, metadata={"help": "ln_tuning: norm layers that are trained."}
    )
