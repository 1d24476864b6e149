"""Set-up of a distributed run, and the `hccl` backend of `torch.distributed`: gloo on the cards' memory."""

import os
import warnings

import torch.distributed as dist

from habana_frameworks.torch import _simulator


def initialize_distributed_hpu() -> tuple[int, int, int]:
    """World size, rank and local rank from the environment of mpirun, torchrun or DeepSpeed.

    The environment is completed with what `torch.distributed` reads.
    """
    env = os.environ.get
    world_size = int(env("OMPI_COMM_WORLD_SIZE", env("WORLD_SIZE", "1")))
    rank = int(env("OMPI_COMM_WORLD_RANK", env("RANK", "0")))
    local_rank = int(env("OMPI_COMM_WORLD_LOCAL_RANK", env("LOCAL_RANK", "0")))
    if world_size > 1:
        os.environ.update(WORLD_SIZE=str(world_size), RANK=str(rank), LOCAL_RANK=str(local_rank))
        os.environ.setdefault("MASTER_ADDR", "localhost")
        os.environ.setdefault("MASTER_PORT", "29500")
    return world_size, rank, local_rank


def _process_group(store, rank: int, size: int, timeout) -> dist.ProcessGroupGloo:
    """What does the work of `hccl`. The collectives of a card's tensors arrive here on the memory that they share."""
    return dist.ProcessGroupGloo(store, rank, size, timeout=timeout)


if _simulator.CARDS:
    # accelerate and DeepSpeed call collectives that torch 2.13 has other names for: a word in every rank.
    warnings.filterwarnings("ignore", r".*torch\.distributed\.\w+. is deprecated", FutureWarning)
    dist.Backend.register_backend("hccl", _process_group, devices=["hpu", "cpu"])
