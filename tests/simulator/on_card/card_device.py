"""Tensors of a card: memory, views, lists, files, processes. The cards have 64 MB (see test_card.py)."""

import copy
import gc
import io
import multiprocessing
import pickle

import habana_frameworks.torch as ht
import pytest
import torch
from habana_frameworks.torch import _simulator
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, TensorDataset

MB = 2**20


def on_card(*shape, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """The same values on the CPU and on a card."""
    host = torch.randn(shape).to(dtype)
    return host, host.to("hpu")


def test_is_the_accelerator():
    assert torch.accelerator.current_accelerator() == torch.device("hpu")
    assert torch.hpu is ht.hpu and torch.hpu.is_available() and torch.hpu.is_initialized()
    assert torch.hpu.device_count() == torch.accelerator.device_count() == 2
    assert torch.get_device_module("hpu") is ht.hpu
    assert torch.empty(1, device="hpu").device == torch.device("hpu:0")
    with torch.hpu.device(1):
        assert torch.empty(1, device="hpu").device == torch.device("hpu:1") and torch.hpu.current_device() == 1
    assert torch.hpu.current_device() == 0
    with torch.device("hpu:1"):
        assert torch.zeros(2).device.index == 1
    with pytest.raises(RuntimeError, match="hpu:2 does not exist"):
        torch.empty(1, device="hpu:2")


VIEWS = {
    "transpose": lambda x: x.t(),
    "slice": lambda x: x[1:, ::2],
    "select": lambda x: x[2],
    "view": lambda x: x.view(-1),
    "expand": lambda x: x[None].expand(3, 4, 6),
    "unfold": lambda x: x.unfold(1, 2, 2),
    "as_strided": lambda x: x.as_strided((2, 2), (6, 1), 7),
    "diagonal": lambda x: x.diagonal(),
    "chunk": lambda x: x.chunk(2, dim=1)[1],
    "unbind": lambda x: x.unbind(0)[3],
    "split": lambda x: x.split([1, 3])[1],
    "detach": lambda x: x.detach(),
    "permute": lambda x: x.view(2, 2, 6).permute(2, 0, 1),
    "view as complex": lambda x: torch.view_as_complex(x.view(4, 3, 2)).real,
    "dtype": lambda x: x.view(torch.int32).view(torch.float32),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_share_memory(name):
    host, card = on_card(4, 6)
    on_host, view = VIEWS[name](host), VIEWS[name](card)
    assert view.shape == on_host.shape and view.stride() == on_host.stride()
    assert view.storage_offset() == on_host.storage_offset()
    assert view.untyped_storage().data_ptr() == card.untyped_storage().data_ptr()
    if name != "expand":
        view.mul_(2)
        on_host.mul_(2)
    else:
        card.mul_(2)
        host.mul_(2)
    assert torch.equal(card.cpu(), host) and torch.equal(view.cpu(), on_host)


def test_views_carry_gradients():
    host, card = on_card(4, 6)
    for x in (host.requires_grad_(), card.requires_grad_()):
        y = x * 1
        y[1:3].mul_(3)
        y.t()[0].zero_()
        (y**2).sum().backward()
    assert torch.equal(card.grad.cpu(), host.grad)
    assert card.grad.device == card.device


def test_in_place_returns_the_tensor_itself():
    _, x = on_card(3)
    assert x.add_(1) is x and torch.mul(x, 2, out=x) is x
    version = x._version
    x.clamp_(min=0)
    assert x._version == version + 1


def test_outputs_are_resized():
    a, x = on_card(3, 4)
    before = torch.hpu.memory_allocated()
    out = torch.empty(0, device="hpu")
    torch.add(x, x, out=out)
    assert out.shape == (3, 4) and torch.equal(out.cpu(), a + a)
    assert torch.hpu.memory_allocated() - before == out.untyped_storage().nbytes() == 48
    alias = out.view(-1)
    out.resize_(5, 4)
    assert out.untyped_storage().nbytes() == 80 and torch.equal(out.view(-1)[:12].cpu(), (a + a).view(-1))
    out.fill_(7)
    assert torch.equal(alias.cpu(), torch.full((12,), 7.0)), "a view follows the storage that was resized"
    values, indices = torch.empty(0, device="hpu"), torch.empty(0, dtype=torch.int64, device="hpu")
    torch.max(x, 1, out=(values, indices))
    assert torch.equal(values.cpu(), a.max(1).values) and torch.equal(indices.cpu(), a.max(1).indices)


def test_set_and_swap_of_storage():
    a, x = on_card(6)
    y = torch.empty(0, device="hpu").set_(x.untyped_storage(), 2, (2, 2), (2, 1))
    assert torch.equal(y.cpu(), a[2:6].view(2, 2)) and y.data_ptr() == x.data_ptr() + 8
    y.data = torch.ones(3, device="hpu")
    assert y.shape == (3,) and torch.equal(x.cpu(), a)


def test_lists_and_optional_tensors():
    hosts, cards = zip(*(on_card(3, 2) for _ in range(3)), strict=True)
    assert torch.equal(torch.cat(cards).cpu(), torch.cat(hosts))
    assert torch.equal(torch.stack(cards, 1).cpu(), torch.stack(hosts, 1))
    factors = [1.0, 2.0, 3.0]
    for got, wanted in zip(torch._foreach_mul(cards, factors), torch._foreach_mul(hosts, factors), strict=True):
        assert got.device.type == "hpu" and torch.equal(got.cpu(), wanted)
    torch._foreach_add_(cards, cards, alpha=0.5)
    torch._foreach_add_(hosts, hosts, alpha=0.5)
    assert all(torch.equal(card.cpu(), host) for card, host in zip(cards, hosts, strict=True))
    a, x = on_card(4, 5, 6)
    index = torch.tensor([3, 1])
    assert torch.equal(x[:, None, index.to("hpu")].cpu(), a[:, None, index])
    assert torch.equal(x[index].cpu(), a[index]), "an index may stand in host memory"
    x[index.to("hpu"), :, 0] = 5.0
    a[index, :, 0] = 5.0
    assert torch.equal(x.cpu(), a)
    x[x > 0] = 1
    a[a > 0] = 1
    assert torch.equal(x.cpu(), a) and torch.equal(x[x < 0].cpu(), a[a < 0])
    layer = torch.nn.functional.layer_norm
    assert torch.equal(layer(x, (6,)).cpu(), layer(a, (6,)))
    assert torch.equal(torch.einsum("ijk,ljk->il", x, x).cpu(), torch.einsum("ijk,ljk->il", a, a))


def test_scalars_and_numbers():
    a, x = on_card(3)
    assert torch.equal((2.5 * x + torch.tensor(1.5)).cpu(), 2.5 * a + 1.5)
    assert (x.int() + 1.5).dtype == torch.float32 and (x.bfloat16() * 2.0).dtype == torch.bfloat16
    assert x.sum().item() == a.sum().item() and float(x[0]) == float(a[0]) and bool(x[0] == x[0])
    assert x.tolist() == a.tolist() and repr(x.round())[:6] == "tensor"
    assert torch.arange(2, 11, 3, device="hpu").tolist() == [2, 5, 8]
    assert torch.full((2,), 3, device="hpu").dtype == torch.int64
    assert torch.linspace(0, 1, 3, device="hpu").tolist() == [0, 0.5, 1]


def test_devices_are_not_mixed():
    a, x = on_card(3)
    with pytest.raises(RuntimeError, match="same device, but found at least two devices, hpu:0 and cpu"):
        x + a
    with pytest.raises(RuntimeError, match="same device"):
        a.add_(x)
    with pytest.raises(RuntimeError, match="same device, but found at least two devices, hpu:0 and hpu:1"):
        x + x.to("hpu:1")
    with pytest.raises(RuntimeError, match="sparse"):
        x.to_sparse()
    assert torch.equal(x.to("hpu:1").cpu(), a) and torch.equal(x.to("hpu:1").to("hpu:0").cpu(), a)


def test_memory_figures():
    gc.collect()
    torch.hpu.reset_peak_memory_stats()
    before = torch.hpu.memory_stats()
    assert before["Limit"] == 64 * MB and before["MaxInUse"] == before["InUse"] == torch.hpu.memory_allocated()
    x = torch.empty(MB, device="hpu")
    y = x + 1
    z = x[5:]
    stats = torch.hpu.memory_stats()
    assert stats["InUse"] - before["InUse"] == 8 * MB, "a view takes nothing"
    assert stats["NumAllocs"] - before["NumAllocs"] == 2 and stats["ActiveAllocs"] - before["ActiveAllocs"] == 2
    assert torch.hpu.memory_stats("hpu:1")["InUse"] == 0
    del y, x
    assert torch.hpu.memory_allocated() - before["InUse"] == 4 * MB, "a view keeps its memory"
    del z
    assert torch.hpu.memory_allocated() == before["InUse"]
    assert torch.hpu.max_memory_allocated() - before["InUse"] == 8 * MB
    torch.hpu.reset_peak_memory_stats()
    assert torch.hpu.max_memory_allocated() == before["InUse"]
    assert torch.hpu.mem_get_info() == (64 * MB - before["InUse"], 64 * MB)
    other = torch.empty(MB, device="hpu:1")
    assert torch.hpu.memory_allocated("hpu:1") == torch.hpu.memory_allocated(1) == other.nbytes
    assert torch.hpu.memory_allocated() == before["InUse"]


def test_out_of_memory():
    gc.collect()
    before = torch.hpu.memory_allocated()
    with pytest.raises(torch.OutOfMemoryError, match="GAUDI_SIMULATOR_MEMORY_GB"):
        torch.empty(17 * MB, device="hpu")
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(2**40, device="hpu")
    x = torch.zeros(10 * MB, device="hpu")
    with pytest.raises(torch.OutOfMemoryError, match="40 MB of 64 MB in use"):
        x + 1
    assert torch.hpu.memory_allocated() - before == 40 * MB, "what did not fit is not counted"
    y = x[: 5 * MB] + 1
    assert float(y.sum()) == 5 * MB


def test_files(tmp_path):
    a, x = on_card(3, 4)
    buffer = io.BytesIO()
    torch.save({"x": x, "view": x[1:]}, buffer)
    loaded = torch.load(io.BytesIO(buffer.getvalue()))
    assert loaded["x"].device == x.device and torch.equal(loaded["x"].cpu(), a)
    loaded["view"].zero_()
    assert torch.equal(loaded["x"][1:].cpu(), torch.zeros(2, 4)), "a saved view still shares memory"
    for device in ("cpu", "hpu:1"):
        moved = torch.load(io.BytesIO(buffer.getvalue()), map_location=device)["x"]
        assert moved.device == torch.device(device) and torch.equal(moved.cpu(), a)
    torch.save(a, tmp_path / "host.pt")
    assert torch.equal(torch.load(tmp_path / "host.pt", map_location="hpu").cpu(), a)
    save_file({"x": x}, tmp_path / "x.safetensors")
    for device in ("cpu", "hpu"):
        back = load_file(tmp_path / "x.safetensors", device=device)["x"]
        assert back.device.type == device and torch.equal(back.cpu(), a)
    assert torch.equal(pickle.loads(pickle.dumps(x)).cpu(), a)


def test_copies_of_modules():
    layer = torch.nn.Linear(3, 4).to("hpu")
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        layer.weight.zero_()
    assert twin.weight.device == layer.weight.device and float(twin.weight.detach().abs().sum()) > 0
    x = torch.ones(2, 3, device="hpu")
    assert torch.equal(copy.deepcopy(x), x) and torch.equal(x.clone(), x)
    restored = torch.nn.Linear(3, 4, device="hpu")
    restored.load_state_dict(twin.state_dict())
    assert torch.equal(restored.weight, twin.weight)
    assert layer.cpu().weight.device.type == "cpu"


def test_pinned_memory():
    a = torch.randn(1000)
    pinned = a.pin_memory()
    assert pinned.is_pinned() and pinned[10:].is_pinned() and not a.is_pinned()
    assert torch.equal(pinned.to("hpu", non_blocking=True).cpu(), a)
    loader = DataLoader(TensorDataset(torch.arange(12)), batch_size=4, num_workers=2, pin_memory=True)
    batches = [batch for (batch,) in loader]
    assert all(batch.is_pinned() for batch in batches)
    assert torch.cat([batch.to("hpu") for batch in batches]).tolist() == list(range(12))


def test_streams_and_events():
    stream = torch.hpu.Stream()
    start, end = (torch.hpu.Event(enable_timing=True) for _ in range(2))
    assert stream != torch.hpu.current_stream() == torch.hpu.default_stream()
    with torch.hpu.stream(stream):
        assert torch.hpu.current_stream() == stream
        start.record()
        x = torch.ones(4, device="hpu") * 2
        x.record_stream(stream)
        end.record()
    assert torch.hpu.current_stream() == torch.hpu.default_stream()
    torch.hpu.current_stream().wait_stream(stream)
    end.synchronize()
    torch.hpu.synchronize()
    assert end.query() and start.elapsed_time(end) > 0


def test_host_waits_are_counted():
    x = torch.tensor([1.0, 0.0, 2.0], device="hpu")

    def waits(action) -> dict[str, int]:
        before = _simulator.host_syncs()
        action()
        after = _simulator.host_syncs()
        return {name: after[name] - before.get(name, 0) for name in after if after[name] != before.get(name, 0)}

    assert waits(lambda: x.sum().item()) == {"item": 1}
    assert waits(lambda: x.cpu()) == {"copy to host": 1}
    assert waits(lambda: x.to("cpu", non_blocking=True)) == {}
    assert waits(lambda: x.nonzero()) == {"nonzero": 1}
    assert waits(lambda: x[x > 0]) == {"index": 1}
    assert waits(lambda: torch.equal(x, x)) == {"equal": 1}
    assert waits(lambda: torch.hpu.synchronize()) == {"synchronize": 1}
    assert waits(lambda: (x + 1).mul_(2).sum()) == {}
    assert waits(lambda: torch.ones(3).to("hpu")) == {}


def _in_child(connection, seed: int) -> None:
    torch.hpu.manual_seed(seed)
    x = torch.randn(5, device="hpu")
    connection.send((x * 2).cpu().tolist())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes(method):
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    child = context.Process(target=_in_child, args=(theirs, 3))
    child.start()
    assert ours.poll(120), "the child sent nothing"
    received = ours.recv()
    child.join(60)
    torch.hpu.manual_seed(3)
    assert child.exitcode == 0 and received == (torch.randn(5, device="hpu") * 2).tolist()
