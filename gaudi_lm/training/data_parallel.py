"""Gradients that ranks average, where neither DeepSpeed nor FSDP divides the model among them."""

from __future__ import annotations

import torch
from accelerate.utils import DistributedType
from optimum.habana.transformers.trainer import GaudiTrainer
from optimum.utils.logging import disable_default_handler
from torch import distributed
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector


class DataParallelTrainer(GaudiTrainer):
    """A GaudiTrainer whose CPU ranks train one model, and whose ``--distribution_strategy fast_ddp`` is exact."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        disable_default_handler()  # which GaudiTrainer has added, beside that of all libraries
        # With it, optimum-habana 1.21 reads sums of gradients that may still be on their way, and rounds them to bf16.
        self._averages_at_once = self.args.distribution_strategy == "fast_ddp" and self.args.world_size > 1
        self.args.distribution_strategy = "ddp"
        if self.accelerator.distributed_type == DistributedType.MULTI_CPU:
            self._wrap_on_cpu()

    def _wrap_on_cpu(self) -> None:
        """Let the accelerator wrap models in DistributedDataParallel on the CPU too.

        GaudiAccelerator (optimum-habana 1.21) wraps them on cards alone: each rank would train a model of its own on
        its part of the data, and nothing would say so.
        """
        accelerator, prepare_alone = self.accelerator, self.accelerator.prepare_model

        def prepare_model(model: Module, device_placement: bool | None = None, evaluation_mode: bool = False):
            model = prepare_alone(model, device_placement, evaluation_mode)
            if evaluation_mode:
                return model
            handler = accelerator.ddp_handler  # which the trainer sets before it trains
            return DistributedDataParallel(model, **(handler.to_kwargs() if handler else {}))

        accelerator.prepare_model = prepare_model

    def training_step(self, model, *args, **kwargs):
        loss = super().training_step(model, *args, **kwargs)
        if self._averages_at_once and self.accelerator.sync_gradients:
            average_gradients(model)
        return loss


@torch.no_grad()
def average_gradients(model: Module) -> None:
    """Replace each gradient by its mean over ranks, all in one message; their memory stays where it is.

    A weight that a rank has not used, as of an expert without tokens, has a gradient of zero there.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in weights:
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
    gradients = [weight.grad for weight in weights]
    vector = parameters_to_vector(gradients) / distributed.get_world_size()
    distributed.all_reduce(vector)
    for gradient, part in zip(gradients, vector.split([one.numel() for one in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
