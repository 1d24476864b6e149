"""Every collective of the hccl backend, on two ranks; prints `rank N done`."""

import habana_frameworks.torch as ht
import habana_frameworks.torch.core as htcore
import torch
import torch.distributed as dist
from habana_frameworks.torch.distributed.hccl import initialize_distributed_hpu
from habana_frameworks.torch.hpu.metrics import collectives, metric_localcontext
from torch.nn.parallel import DistributedDataParallel

from gaudi_lm.device import run_script


def filled(value: float, *shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.full(shape, value, dtype=dtype, device="hpu")


def check_collectives(rank: int) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        x = filled(rank + 1, 3, dtype=dtype)
        dist.all_reduce(x)
        assert x.tolist() == [3, 3, 3] and x.device.type == "hpu"
        dist.all_reduce(x.copy_(filled(rank + 1, 3, dtype=dtype)), op=dist.ReduceOp.MAX)
        assert x.tolist() == [2, 2, 2]
    view = filled(rank, 2, 4)
    work = dist.all_reduce(view[:, 1].contiguous(), async_op=True)
    work.wait()
    dist.broadcast(view, src=1)
    assert view.eq(1).all()
    parts = [filled(0, 2) for _ in range(2)]
    dist.all_gather(parts, filled(rank + 5, 2))
    assert [part.tolist() for part in parts] == [[5, 5], [6, 6]]
    for shape in ((4,), (2, 2)):  # in a row, and stacked
        whole = filled(0, *shape)
        dist.all_gather_into_tensor(whole, filled(rank + 5, 2))
        assert whole.view(-1).tolist() == [5, 5, 6, 6]
    piece = filled(0, 2)
    dist.reduce_scatter_tensor(piece, torch.arange(4.0, device="hpu") * (rank + 1))
    assert piece.tolist() == [[0, 3], [6, 9]][rank]
    dist.reduce_scatter(piece, [filled(1, 2), filled(2, 2)])
    assert piece.tolist() == [[2, 2], [4, 4]][rank]
    x = filled(rank + 1, 2)
    dist.reduce(x, dst=0)
    assert rank == 1 or x.tolist() == [3, 3]
    parts = [filled(0, 2) for _ in range(2)] if rank == 0 else None
    dist.gather(filled(rank, 2), parts, dst=0)
    assert rank == 1 or [part.tolist() for part in parts] == [[0, 0], [1, 1]]
    piece = filled(9, 2)
    dist.scatter(piece, [filled(7, 2), filled(8, 2)] if rank == 0 else None, src=0)
    assert piece.tolist() == [7 + rank] * 2
    swapped = filled(0, 2)
    dist.all_to_all_single(swapped, torch.tensor([rank * 10, rank * 10 + 1.0], device="hpu"))
    assert swapped.tolist() == [rank, 10 + rank]
    if rank == 0:
        dist.send(filled(4, 3), dst=1)
    else:
        x = filled(0, 3)
        dist.recv(x, src=0)
        assert x.tolist() == [4, 4, 4]
    objects = [None, None]
    dist.all_gather_object(objects, {"rank": rank})
    assert objects == [{"rank": 0}, {"rank": 1}]
    host = torch.tensor([rank])
    dist.all_reduce(host)
    assert host.tolist() == [1], "tensors in host memory take part as well"
    dist.barrier()
    assert dist.get_backend() == "hccl"


def check_graphs_end_at_collectives() -> None:
    def work() -> None:
        x = filled(1, 37) * 3
        dist.all_reduce(x)
        x + 1
        htcore.mark_step()

    htcore.mark_step()
    for expected in (2, 0):
        with metric_localcontext("graph_compilation") as metric, metric_localcontext("host_sync") as waits:
            work()
            assert metric.stats()[0][1] == expected and waits.stats()[0][1] == 0


def check_data_parallel(rank: int) -> None:
    torch.manual_seed(3)
    alone = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)).to("hpu")
    torch.manual_seed(3 + rank)  # the ranks start apart: wrapping makes them alike
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)).to("hpu")
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
    rows = torch.randn(3, 8, 6, generator=torch.Generator().manual_seed(9)).to("hpu")
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (alone, parallel)]
    for batch in rows:
        for net, part, optimizer in zip(
            (alone, parallel), (batch, batch[4 * rank : 4 * rank + 4]), optimizers, strict=True
        ):
            optimizer.zero_grad()
            net(part).pow(2).mean().backward()
            optimizer.step()
    for got, wanted in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    calls, size = collectives()["allreduce_"]
    parallel(rows[0]).sum().backward()
    after = collectives()["allreduce_"]
    assert after[0] > calls and after[1] - size == 4 * sum(p.numel() for p in model.parameters())


def main() -> None:
    world_size, rank, local_rank = initialize_distributed_hpu()
    assert world_size == 2 and local_rank == rank
    dist.init_process_group("hccl", rank=rank, world_size=world_size)
    assert ht.hpu.device_count() == 2
    check_collectives(rank)
    check_graphs_end_at_collectives()
    check_data_parallel(rank)
    print(f"rank {rank} done", flush=True)


run_script(main)
