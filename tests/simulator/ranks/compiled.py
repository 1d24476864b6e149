"""Collectives, DDP and FSDP under torch.compile with hpu_backend, on two ranks; prints `rank N done`."""

import functools

import habana_frameworks.torch as ht
import torch
import torch.distributed as dist
from habana_frameworks.torch.distributed.hccl import initialize_distributed_hpu
from habana_frameworks.torch.hpu.metrics import compilations, metric_localcontext
from torch.distributed import _functional_collectives as functional
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

compiled = functools.partial(torch.compile, backend="hpu_backend")
STEPS, ROWS, WIDTH = 3, 8, 16


def check_collectives(rank: int) -> None:
    pair, alone = dist.group.WORLD, [dist.new_group([one]) for one in range(2)][rank]

    @functools.partial(compiled, fullgraph=True)
    def by_function(x):
        total = functional.all_reduce(x * 2, "sum", pair)
        own = functional.all_reduce(x, "sum", alone)
        gathered = functional.all_gather_tensor(x + 1, 0, pair)
        return total, own, gathered, functional.reduce_scatter_tensor(gathered, "sum", 0, pair)

    @functools.partial(compiled, fullgraph=True)
    def in_place(x):
        x = x + 1
        dist.all_reduce(x)
        whole = torch.empty(4, device=x.device)
        dist.all_gather_into_tensor(whole, x * (dist.get_rank() + 1))
        return whole * 2

    for _ in range(2):
        x = torch.full((2,), rank + 1.0, device="hpu")
        found = [result.tolist() for result in by_function(x)]
        assert found == [[6, 6], [rank + 1.0] * 2, [2, 2, 3, 3], [[4, 4], [6, 6]][rank]], found
        assert in_place(x).tolist() == [10, 10, 20, 20]


class Block(torch.nn.Module):
    """As attention does: heads beside one another, permuted, and flattened again."""

    def __init__(self):
        super().__init__()
        self.to_heads = torch.nn.Linear(WIDTH, WIDTH)
        self.out = torch.nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        heads = self.to_heads(x).unflatten(-1, (2, -1)).transpose(-2, -3)
        heads = heads * torch.rsqrt(heads.pow(2).mean(-1, keepdim=True) + 1)
        heads = torch.tanh(heads).flatten(0, 1).unflatten(0, (-1, 2))  # as products of attention see them
        return x + self.out(heads.transpose(-2, -3).flatten(-2))


def net() -> torch.nn.Module:
    torch.manual_seed(4)
    return torch.nn.Sequential(Block(), Block(), torch.nn.Linear(WIDTH, 1)).to("hpu")


def losses(model: torch.nn.Module, ranks: int, rank: int) -> torch.Tensor:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    found = []
    for batch in torch.randn(STEPS, ROWS, 3, WIDTH, generator=torch.Generator().manual_seed(5)):
        loss = model(batch.chunk(ranks)[rank].to("hpu")).pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        if ranks > 1:
            dist.all_reduce(total)
        found.append(total.item() / ranks)
    return torch.tensor(found)


def check_data_parallel(rank: int) -> None:
    wanted = losses(net(), 1, 0)
    # Small buckets: dynamo cuts the graph where one is full, so that it is reduced while the rest is computed.
    dist._DEFAULT_FIRST_BUCKET_BYTES = 256
    buckets = DistributedDataParallel(net(), bucket_cap_mb=0.0005)
    sharded = FullyShardedDataParallel(
        net(), auto_wrap_policy=ModuleWrapPolicy({Block}), use_orig_params=True, device_id=torch.device("hpu", 0)
    )
    for name, model in (("DDP", buckets), ("FSDP", sharded)):
        torch._dynamo.reset()
        first = len(compilations())
        found = losses(compiled(model), 2, rank)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
        traced = [graph for graph in compilations(first) if graph["operations"] > 3]
        assert len(traced) > 2, f"{name}: several graphs forward, and several backward: {traced}"
        with metric_localcontext("graph_compilation") as metric:
            losses(compiled(model), 2, rank)
        assert metric.stats()[0][1] == 0, f"{name}: the same steps compile nothing anew"


def main() -> None:
    world_size, rank, _ = initialize_distributed_hpu()
    assert world_size == 2
    dist.init_process_group("hccl", rank=rank, world_size=world_size)
    assert ht.hpu.device_count() == 2
    assert type(dist.group.WORLD) is dist.ProcessGroup and dist.group.WORLD.group_name
    check_collectives(rank)
    check_data_parallel(rank)
    dist.destroy_process_group()
    print(f"rank {rank} done", flush=True)


main()
