"""ZeRO stages 0 to 3 on two ranks give the weights of one process; prints `rank N done`."""

import deepspeed
import habana_frameworks.torch.hpu  # noqa: F401
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from gaudi_lm.device import run_script

STEPS, ROWS, WIDTH = 3, 8, 16


def net() -> torch.nn.Module:
    torch.manual_seed(4)
    return torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.GELU(), torch.nn.Linear(WIDTH, 1, bias=False))


def batches() -> torch.Tensor:
    return torch.randn(STEPS, ROWS, WIDTH, generator=torch.Generator().manual_seed(5))


def alone() -> list[float]:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    losses = []
    for batch in batches():
        optimizer.zero_grad()
        loss = model(batch).pow(2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def sharded(stage: int) -> list[float]:
    rank = dist.get_rank()
    config = {
        "train_micro_batch_size_per_gpu": ROWS // 2,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    assert engine.device.type == "hpu"
    losses = []
    for batch in batches():
        loss = engine(batch.chunk(2)[rank].to(engine.device)).pow(2).mean()
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / 2)
    return losses


def main() -> None:
    assert get_accelerator().device_name() == "hpu" and get_accelerator().communication_backend_name() == "hccl"
    deepspeed.init_distributed()
    assert dist.get_backend() == "hccl" and dist.get_world_size() == 2
    wanted = torch.tensor(alone())
    for stage in range(4):
        torch.testing.assert_close(torch.tensor(sharded(stage)), wanted, rtol=1e-5, atol=1e-6, msg=f"ZeRO-{stage}")
    print(f"rank {dist.get_rank()} done", flush=True)


run_script(main)
