"""AdaLoRA: which ranks are kept, in training, in checkpoints, and in a saved adapter."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from peft import AdaLoraConfig, PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from transformers import PreTrainedModel, TrainerCallback
from transformers.integrations.deepspeed import deepspeed_config

from gaudi_lm.arguments.model_files import first_line
from gaudi_lm.errors import UserError

logger = logging.getLogger("gaudi_lm")

STATE = "rank_reduction.pt"


class SavedConfig(PeftConfig):
    """Reads the configuration of a saved adapter, also of an AdaLoRA that was trained for too few steps.

    GaudiTrainer (optimum-habana 1.21.2) writes the length of the run into it, and peft then refuses to read a schedule
    that leaves no step to reduce ranks in.
    """

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs) -> dict:
        values = super().from_json_file(path_json_file, **kwargs)
        if values.get("peft_type") == "ADALORA":
            least = values.get("tinit", 0) + values.get("tfinal", 0) + 1
            values["total_step"] = max(values.get("total_step") or 0, least)
        return values


def refuse_deepspeed() -> None:
    """DeepSpeed takes its step within the backward pass, and writes its own copy of the weights over what is masked.

    Raises:
        UserError: this run is one of DeepSpeed.
    """
    if deepspeed_config() is not None:
        raise UserError(
            "--peft_type adalora: DeepSpeed hides the gradients that ranks are chosen by; leave --deepspeed out, or "
            "train another kind of adapter"
        )


def saved_config(name: str) -> PeftConfig:
    """The configuration of a saved adapter of any kind: a folder or a hub name.

    Raises:
        UserError: there is none.
    """
    try:
        return SavedConfig.from_pretrained(name)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, HfHubHTTPError, HFValidationError) as error:
        raise UserError(f"--adapter_name_or_path {name}: no adapter there ({first_line(error)})") from error


def load_adalora(
    model: PreTrainedModel, config: AdaLoraConfig, weights: dict[str, torch.Tensor], trainable: bool
) -> PeftModel:
    """Put a saved AdaLoRA on the model, with all its ranks again; those that had been dropped are masked.

    Training goes on with matrices of one size: peft's own loader makes smaller ones, which neither a checkpoint nor a
    second save can tell from those of another adapter.

    Args:
        weights: as saved, by the names that the file has.

    Raises:
        RuntimeError, ValueError, KeyError: the adapter does not fit the model.
    """
    kept, config.rank_pattern = config.rank_pattern, None
    config.inference_mode = not trainable
    adapted = get_peft_model(model, config)
    masks = {_matrix(name): torch.tensor(mask).view(-1) for name, mask in (kept or {}).items()}
    whole = adapted.state_dict()
    full = {}
    for name, tensor in weights.items():
        mask = masks.get(_matrix(name.removeprefix("base_model.model.")))
        if mask is not None:
            layer, kind = name.rsplit(".", 1)
            larger = whole[f"{layer}.{kind}.{adapted.active_adapter}"].detach().cpu().clone()
            if kind == "lora_B":
                larger[:, mask] = tensor
            else:
                larger[mask] = tensor
                if kind == "lora_E":
                    larger[~mask] = 0
            tensor = larger
        full[name] = tensor
    unlike = set_peft_model_state_dict(adapted, full).unexpected_keys
    if unlike:
        raise KeyError(unlike[0])
    config.rank_pattern = kept
    return adapted


def _matrix(name: str) -> str:
    """The layer of a name such as ``model.layers.0.q_proj.lora_E`` or ``....lora_E.default``."""
    return name[: name.index(".lora_")]


class RankReduction(TrainerCallback):
    """Reduces the ranks once in an optimizer step, by the gradients of all its batches and of all ranks.

    GaudiTrainer (optimum-habana 1.21.2) calls `update_and_allocate` after each batch: before the gradients of others
    are there, so that cards choose differently, and before the optimizer moves what has just been masked. Here it is
    called where peft's documentation has it. While training lasts, every matrix keeps its size: a reduction may be
    undone later, and a checkpoint holds what that takes. The final adapter has the ranks that are left.

    Args:
        model: with an AdaLoRA; one that was saved reduced (a `rank_pattern` in its configuration) keeps those ranks.
    """

    def __init__(self, model: PeftModel):
        self.tuner = model.base_model
        self.config: AdaLoraConfig = model.active_peft_config
        self._update = self.tuner.update_and_allocate
        self.tuner.update_and_allocate = _nothing
        self.schedule = (self.config.tinit, self.config.tfinal, self.config.total_step)
        self.kept, self.config.rank_pattern = self.config.rank_pattern, None
        self.fixed = self.kept is not None
        self.reduces = False

    def on_train_begin(self, args, state, control, **kwargs):
        tinit, tfinal, _ = self.schedule
        self.reduces = not self.fixed and tinit < state.max_steps - tfinal
        if self.fixed:
            logger.info("AdaLoRA: the ranks stay as they were saved")
        elif not self.reduces:
            logger.warning(
                "AdaLoRA: no rank is reduced: %d steps are not more than --adalora_tinit %d and --adalora_tfinal %d",
                *(state.max_steps, tinit, tfinal),
            )

    def on_epoch_begin(self, args, state, control, **kwargs):
        # GaudiTrainer has put in a schedule of its own by now, which the flags did not ask for.
        self.config.tinit, self.config.tfinal, self.config.total_step = self.schedule
        if self.reduces:
            self.config.total_step = state.max_steps

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self.reduces:
            self.config.rank_pattern = self.kept
            self._update(state.global_step)
            self.kept, self.config.rank_pattern = self.config.rank_pattern, None
        elif self.fixed:
            self.mask()

    def on_train_end(self, args, state, control, **kwargs):
        if self.kept:
            self.mask()
            self.config.rank_pattern = self.kept

    def mask(self) -> None:
        """Make the singular values of dropped ranks zero."""
        self.tuner.rankallocator.mask_using_rank_pattern(self.tuner.model, self.kept)

    def save(self, folder: str | Path) -> None:
        """Into a checkpoint: which ranks are kept, and the running means of how important each weight is."""
        allocator = self.tuner.rankallocator
        torch.save(
            {"kept": self.kept, "importance": allocator.exp_avg_ipt, "uncertainty": allocator.exp_avg_unc},
            Path(folder) / STATE,
        )

    def load(self, folder: str | Path) -> None:
        """From a checkpoint, if it has that."""
        path = Path(folder) / STATE
        if not path.is_file():
            logger.warning("AdaLoRA: %s has no %s, the importance of ranks is measured anew", folder, STATE)
            return
        saved = torch.load(path, weights_only=True, map_location="cpu")
        device = next(self.tuner.parameters()).device
        allocator = self.tuner.rankallocator
        self.kept = saved["kept"]
        for name in saved["importance"]:
            allocator.exp_avg_ipt[name] = saved["importance"][name].to(device)
            allocator.exp_avg_unc[name] = saved["uncertainty"][name].to(device)
            allocator.ipt[name] = torch.zeros_like(allocator.exp_avg_ipt[name])


def _nothing(global_step: int) -> None:
    pass
