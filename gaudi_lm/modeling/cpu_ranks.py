"""Several ranks on the CPU: what GaudiAccelerator does for ranks on cards only."""

from __future__ import annotations

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel


def average_gradients(accelerator: Accelerator) -> None:
    """Let ``accelerator`` wrap models in DistributedDataParallel when its ranks are CPU processes.

    GaudiAccelerator (optimum-habana 1.21.2) wraps them on cards alone: on the CPU, each rank would train a model
    of its own on its part of the data, and nothing would say so.
    """
    if accelerator.distributed_type != DistributedType.MULTI_CPU:
        return
    prepare_alone = accelerator.prepare_model

    def prepare_model(model: Module, device_placement: bool | None = None, evaluation_mode: bool = False) -> Module:
        model = prepare_alone(model, device_placement, evaluation_mode)
        if evaluation_mode:
            return model
        handler = accelerator.ddp_handler
        return DistributedDataParallel(model, **(handler.to_kwargs() if handler else {}))

    accelerator.prepare_model = prepare_model
