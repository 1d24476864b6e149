"""Set-up of a distributed run, and the `hccl` backend of `torch.distributed`: gloo on the cards' memory."""

import os

import torch
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


def _host(tensors):
    """The same bytes as CPU tensors; lists of any depth."""
    if isinstance(tensors, torch.Tensor):
        return torch.ops.gaudi_simulator.host_view(tensors)
    return [_host(tensor) for tensor in tensors]


class ProcessGroupHCCL(dist.ProcessGroup):
    """Collectives by gloo. Each ends the graph that is being gathered, as a collective on a card does."""

    def __init__(self, store, rank: int, size: int, timeout):
        super().__init__(rank, size)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout=timeout)

    def getBackendName(self) -> str:
        return "hccl"

    def _run(self, collective: str, *arguments):
        _simulator.library.gaudi_mark_step()
        return getattr(self._gloo, collective)(*(argument for argument in arguments if argument is not None))

    def allreduce(self, tensors, opts=None):
        return self._run("allreduce", _host(tensors), opts)

    def allreduce_coalesced(self, tensors, opts=None):
        return self._run("allreduce_coalesced", _host(tensors), opts)

    def broadcast(self, tensors, opts=None):
        return self._run("broadcast", _host(tensors), opts)

    def reduce(self, tensors, opts=None):
        return self._run("reduce", _host(tensors), opts)

    def allgather(self, outputs, inputs, opts=None):
        return self._run("allgather", _host(outputs), _host(inputs), opts)

    def all_gather_single(self, output, input, opts=None):
        # The output's shape need not be the input's with one more dimension.
        return self._run("_allgather_base", _host(output).view(-1), _host(input).reshape(-1))

    _allgather_base = all_gather_single

    def allgather_coalesced(self, outputs, inputs, opts=None):
        return self._run("allgather_coalesced", _host(outputs), _host(inputs), opts)

    def allgather_into_tensor_coalesced(self, outputs, inputs, opts=None):
        return self._run("allgather_into_tensor_coalesced", _host(outputs), _host(inputs), opts)

    def reduce_scatter(self, outputs, inputs, opts=None):
        return self._run("reduce_scatter", _host(outputs), _host(inputs), opts)

    def reduce_scatter_single(self, output, input, opts=None):
        return self._run("_reduce_scatter_base", _host(output).view(-1), _host(input).reshape(-1), opts)

    _reduce_scatter_base = reduce_scatter_single

    def reduce_scatter_tensor_coalesced(self, outputs, inputs, opts=None):
        return self._run("reduce_scatter_tensor_coalesced", _host(outputs), _host(inputs), opts)

    def gather(self, outputs, inputs, opts=None):
        return self._run("gather", _host(outputs), _host(inputs), opts)

    def scatter(self, outputs, inputs, opts=None):
        return self._run("scatter", _host(outputs), _host(inputs), opts)

    def alltoall(self, outputs, inputs, opts=None):
        return self._run("alltoall", _host(outputs), _host(inputs), opts)

    def alltoall_base(self, output, input, output_sizes, input_sizes, opts=None):
        return self._run("alltoall_base", _host(output), _host(input), output_sizes, input_sizes, opts)

    def send(self, tensors, destination: int, tag: int = 0):
        return self._run("send", _host(tensors), destination, tag)

    def recv(self, tensors, source: int, tag: int = 0):
        return self._run("recv", _host(tensors), source, tag)

    def recv_anysource(self, tensors, tag: int = 0):
        return self._run("recv_anysource", _host(tensors), tag)

    def barrier(self, opts=None):
        return self._run("barrier")


if _simulator.CARDS:
    dist.Backend.register_backend("hccl", ProcessGroupHCCL, devices=["hpu", "cpu"])
