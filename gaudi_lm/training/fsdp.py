"""What a GaudiTrainer saves and loads of a model that FSDP divides among ranks."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from torch import Tensor
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn import Embedding, Module
from transformers import TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_utils import FSDPOption

from gaudi_lm.errors import UserError
from gaudi_lm.modeling.layer_names import classes_on_card, layer_classes, plain_name
from gaudi_lm.training.data_parallel import DataParallelTrainer

logger = logging.getLogger("gaudi_lm")


def state_dict_type(training_args: TrainingArguments) -> str | None:
    """How checkpoints have the weights of a run with ``--fsdp``; None without it."""
    if not training_args.fsdp:
        return None
    default = os.environ.get("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT")
    return training_args.fsdp_config.get("state_dict_type", default)


def check_kind(checkpoint: Path, training_args: TrainingArguments) -> None:
    """Whether weights and optimizer of a checkpoint are divided in the way that a run divides them.

    Raises:
        UserError: they are not.
    """
    kinds = {"pytorch_model_fsdp.bin": "FULL_STATE_DICT", "pytorch_model_fsdp_0": "SHARDED_STATE_DICT"}
    found = next((kind for name, kind in kinds.items() if (checkpoint / name).exists()), None)
    wanted = state_dict_type(training_args)
    if found != wanted:
        said = [f"with --fsdp and {kind}" if kind else "without --fsdp" for kind in (found, wanted)]
        raise UserError(
            f"{checkpoint}: it was saved {said[0]}, this run is {said[1]}; go on with the --fsdp and the "
            "state_dict_type of --fsdp_config that it had, or begin in another --output_dir"
        )


def choose_layers(model: Module, training_args: TrainingArguments) -> None:
    """Which layers FSDP gathers one at a time, by ``transformer_layer_cls_to_wrap``, or else all in the model's lists.

    The setting then has the names that these classes have on a card.

    Raises:
        UserError: a class that is not there, or settings that train something else than a single card.
    """
    config, adapted = training_args.fsdp_config, isinstance(model, PeftModel)
    if not training_args.fsdp:
        return
    by_size = FSDPOption.AUTO_WRAP in training_args.fsdp and config["min_num_params"] > 0 and not adapted
    places = [id(weight) for _, weight in model.named_parameters(remove_duplicate=False)]
    if by_size and len(places) > len(set(places)):
        raise UserError(
            "--fsdp_config: min_num_params could part weights that are tied, such as embeddings; name layers in "
            f"transformer_layer_cls_to_wrap instead: {', '.join(layer_classes(model))}"
        )
    whole = str(config.get("use_orig_params", True)).lower() == "true"
    if not (whole or adapted) and training_args.weight_decay > 0:
        raise UserError(
            f"--weight_decay {training_args.weight_decay}: with use_orig_params false in --fsdp_config, biases and "
            "norms would decay too; leave that setting out"
        )
    by_name = adapted or (FSDPOption.AUTO_WRAP in training_args.fsdp and not by_size)
    reason = "an adapter is divided by layers" if adapted else "--fsdp has no auto_wrap"
    for setting, used in (("min_num_params", by_size), ("transformer_layer_cls_to_wrap", by_name)):
        if config.get(setting) and not used:
            logger.warning("--fsdp_config: %s changes nothing: %s", setting, reason)
    names = classes_on_card(model, config.get("transformer_layer_cls_to_wrap") or layer_classes(model))
    config["transformer_layer_cls_to_wrap"] = names if by_name else None
    if by_name:
        os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = ",".join(names)  # where accelerate and peft read it


class FSDPTrainer(DataParallelTrainer):
    """A trainer whose FSDP runs save what loads anywhere, and go on from their checkpoints.

    Checkpoints are whole (``FULL_STATE_DICT``) or in shards, a file for each rank (``SHARDED_STATE_DICT`` of
    https://docs.pytorch.org/docs/stable/distributed.checkpoint.html); the result of a run is always whole.
    """

    model: Any

    def create_accelerator_and_postprocess(self):
        if kind := state_dict_type(self.args):  # the one setting that transformers 4.55 does not pass on in this way
            os.environ["FSDP_STATE_DICT_TYPE"] = kind
        super().create_accelerator_and_postprocess()

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._tied: dict[str, str] = {}  # names of weights that have gone by another one before
        first: dict[int, str] = {}
        for name, weight in self.model.named_parameters(remove_duplicate=False):
            if (other := first.setdefault(id(weight), name)) != name:
                self._tied[name] = other
        embeddings = {id(one.weight) for one in self.model.modules() if isinstance(one, Embedding)}
        weights = {id(weight): getattr(weight, "ds_numel", weight.numel()) for weight in self.model.parameters()}
        self._whole_weights = sum(number for one, number in weights.items() if one not in embeddings)

    def _move_model_to_device(self, model, device):
        """As it is: what GaudiTrainer ties anew may have come apart by an adapter, and ties that break are mended."""
        names: dict[int, list[str]] = {}
        for name, weight in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(weight), []).append(name)
        model.to(device)
        for first, *others in names.values():
            for layer, _, attribute in (name.rpartition(".") for name in others):
                setattr(model.get_submodule(layer), attribute, model.get_parameter(first))

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """By transformers' estimate, 6 for a token and a weight, embeddings left out; of whole weights."""
        if not (self.is_fsdp_enabled or is_deepspeed_zero3_enabled()):
            return super().floating_point_ops(inputs)
        return 6 * self.plain_model.estimate_tokens(inputs) * self._whole_weights

    @property
    def plain_model(self) -> Module:
        """The model without what runs it on several cards or compiles it; FSDP's layers stay where they are."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)  # True would change the model

    @property
    def computing_model(self) -> Module:
        """The model to compute with: without compilation, and with what gathers the weights that FSDP divides."""
        return getattr(self.model, "_orig_mod", self.model) if self.is_fsdp_enabled else self.plain_model

    @property
    def _divides_adapter(self) -> bool:
        return self.is_fsdp_enabled and isinstance(self.plain_model, PeftModel)

    @property
    def saves_shards(self) -> bool:
        """Whether checkpoints have the weights in shards alone."""
        return state_dict_type(self.args) == "SHARDED_STATE_DICT"

    def save_model(self, output_dir=None, _internal_call=False):
        if not self.saves_shards:
            return super().save_model(output_dir, _internal_call)
        state_dict = self.accelerator.get_state_dict(self.model)
        if self.args.should_save:
            self._save(output_dir, state_dict=state_dict)

    def save_weights_of_checkpoint(self, folder: Path) -> None:
        """Adapter or model, by names that load elsewhere; only its configuration where shards have the weights."""
        if not self.saves_shards or self._divides_adapter:
            self.save_model(str(folder), _internal_call=True)
        elif self.args.should_save:
            self.plain_model.config.save_pretrained(folder)
            self.processing_class.save_pretrained(folder)

    @contextlib.contextmanager
    def whole_model(self) -> Iterator[Module]:
        """The model with its undivided weights, in host memory where FSDP divides them, for the main rank to read."""
        if not isinstance(divided := self.computing_model, FullyShardedDataParallel):
            yield self.plain_model
            return
        with FullyShardedDataParallel.summon_full_params(
            divided, writeback=False, rank0_only=True, offload_to_cpu=True
        ):
            yield self.plain_model

    def _save(self, output_dir=None, state_dict=None):
        if self.is_fsdp_enabled:
            state_dict = {plain_name(name): value for name, value in state_dict.items()}
        for name, other in self._tied.items() if state_dict else ():
            # Gathered apart, a tied weight would be written twice.
            if name in state_dict and other in state_dict and torch.equal(state_dict[name], state_dict[other]):
                state_dict[name] = state_dict[other]
        super()._save(output_dir, state_dict)

    @contextlib.contextmanager
    def _without_compile(self) -> Iterator[None]:
        """accelerate 1.10 finds neither weights nor states in a compiled model."""
        compiled = self.model
        self.model = getattr(compiled, "_orig_mod", compiled)
        yield
        self.model = compiled

    def load_divided_adapter(self, checkpoint: str) -> None:
        """Load an adapter that FSDP is going to divide; before it does."""
        if self._divides_adapter:
            set_peft_model_state_dict(self.model, load_peft_weights(checkpoint, device="cpu"))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        # peft 0.21 finds no names of an adapter in the state of an FSDP model on other ranks than the first.
        if not self._divides_adapter:
            super()._load_from_checkpoint(resume_from_checkpoint, getattr(model, "_orig_mod", model))

    def _load_optimizer_and_scheduler(self, checkpoint):
        with self._without_compile():
            if checkpoint is None or not self.saves_shards:
                super()._load_optimizer_and_scheduler(checkpoint)
            else:
                # accelerate 1.10 saves shards by the names of weights, looks for their numbers, and loads nothing.
                state = {"optimizer": get_optimizer_state_dict(self.model, self.optimizer)}
                distributed_checkpoint.load(state, checkpoint_id=Path(checkpoint, "optimizer_0"))
                set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"])
                self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, "scheduler.pt"), weights_only=True))
        if checkpoint is not None and self.is_fsdp_enabled:
            # FusedAdamW counts the steps of a group of weights where a rank has a part of one: the main rank, whose
            # groups are saved, may have none of the norms.
            groups = self.optimizer.param_groups
            if steps := max(group.get("step", 0) for group in groups):
                for group in groups:
                    group["step"] = steps

    def _load_best_model(self):
        if self._divides_adapter:
            return self._load_into_shards(load_peft_weights(self.state.best_model_checkpoint, device="cpu"))
        with self._without_compile():
            super()._load_best_model()

    @torch.no_grad()
    def _load_into_shards(self, adapter: dict[str, Tensor]) -> None:
        """Load whole weights, by their names in peft's files, into an adapter that FSDP divides, layer by layer."""
        divided = self.computing_model
        named = (*divided.named_parameters(), *divided.named_buffers())
        tensors = {plain_name(name): tensor for name, tensor in named}
        saved = {id(tensor): name for name, tensor in get_peft_model_state_dict(self.plain_model, tensors).items()}
        loaded = {name: adapter[saved[id(tensor)]] for name, tensor in tensors.items() if id(tensor) in saved}
        for prefix, layer in divided.named_modules():
            if isinstance(layer, FullyShardedDataParallel):
                with FullyShardedDataParallel.summon_full_params(layer, recurse=False):
                    for name, weight in layer.named_parameters(prefix=prefix):
                        whole = loaded.get(plain_name(name))
                        if whole is not None and weight.shape == whole.shape:  # those of layers within are in parts
                            weight.copy_(whole)
