"""Random numbers, autocast, bf16 products, and the fused parts, each against its definition."""

import copy

import pytest
import torch
import torch.nn.functional as F
from habana_frameworks.torch import _simulator
from habana_frameworks.torch.hpex import kernels
from habana_frameworks.torch.hpex.normalization import FusedClipNorm, FusedRMSNorm
from habana_frameworks.torch.hpex.optimizers import FusedAdamW
from torch.utils.checkpoint import checkpoint


def test_random_numbers_are_the_cards_own():
    torch.hpu.manual_seed_all(5)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = torch.randn(10, device="hpu")
    assert torch.equal(torch.get_rng_state(), state), "the CPU's generator is not touched"
    torch.hpu.random.manual_seed_all(5)
    assert torch.equal(torch.randn(10, device="hpu"), first)
    assert not torch.equal(torch.randn(10, device="hpu"), first)
    assert torch.equal(torch.randn(10, device="hpu:1").cpu(), first.cpu()), "each card has a generator"
    assert torch.hpu.random.initial_seed() == 5
    for draw in (torch.rand, torch.randn):
        assert draw(100, device="hpu").unique().numel() > 90


def test_random_state_is_saved_and_restored():
    states = torch.hpu.get_rng_state_all()
    assert [state.device.type for state in states] == ["cpu", "cpu"]
    first = F.dropout(torch.ones(50, device="hpu"))
    state = torch.hpu.get_rng_state("hpu:0")
    second = F.dropout(torch.ones(50, device="hpu"))
    torch.hpu.random.set_rng_state_all(states)
    assert torch.equal(F.dropout(torch.ones(50, device="hpu")), first)
    torch.hpu.set_rng_state(state)
    assert torch.equal(F.dropout(torch.ones(50, device="hpu")), second)
    with torch.random.fork_rng(devices=[0], device_type="hpu"):
        torch.randn(5, device="hpu")
    torch.hpu.set_rng_state(state)
    assert torch.equal(F.dropout(torch.ones(50, device="hpu")), second)


def test_generators():
    generator = torch.Generator(device="hpu").manual_seed(9)
    first = torch.randperm(20, device="hpu", generator=generator)
    assert torch.equal(torch.randperm(20, device="hpu", generator=generator.manual_seed(9)), first)
    copy = torch.Generator(device="hpu")
    copy.set_state(generator.get_state())
    draws = [torch.empty(5, device="hpu").normal_(generator=each) for each in (generator, copy)]
    assert torch.equal(*draws)
    with pytest.raises(RuntimeError, match="Expected a 'hpu' device type for generator"):
        torch.empty(3, device="hpu").normal_(generator=torch.Generator())


def test_checkpointed_dropout_is_redrawn_alike():
    layer = torch.nn.Linear(16, 16).to("hpu")
    x = torch.randn(4, 16, device="hpu")

    def gradient(run):
        torch.hpu.manual_seed(3)
        layer.zero_grad()
        run(lambda inputs: F.dropout(layer(inputs), 0.5)).pow(2).sum().backward()
        return layer.weight.grad.clone()

    plain = gradient(lambda block: block(x))
    assert torch.equal(gradient(lambda block: checkpoint(block, x, use_reentrant=False)), plain)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.3, 0.5, 1.0])
def test_dropout_is_that_of_the_cpu_and_leaves_a_mask_of_bytes(p):
    """The CPU leaves noise of the input's dtype to backward."""
    values = torch.randn(64, 100, generator=torch.Generator().manual_seed(1))
    found = []
    for device in ("cpu", "hpu"):
        leaf = values.clone().to(device).requires_grad_()
        torch.manual_seed(7)
        torch.hpu.manual_seed(7)
        before = torch.hpu.memory_allocated()
        dropped = F.dropout(leaf * 1, p)
        held = torch.hpu.memory_allocated() - before
        dropped.backward(torch.arange(6400.0).view(64, 100).to(device))
        found.append([dropped.cpu(), leaf.grad.cpu()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    # The result, and the mask.
    assert held == 6400 * 4 + (6400 if 0 < p < 1 else 0)
    assert torch.equal(F.dropout(values.to("hpu"), p, training=False).cpu(), values)
    with pytest.raises(RuntimeError, match="between 0 and 1, but got 1.5"):
        torch.dropout(values.to("hpu"), 1.5, True)


def test_autocast_lists():
    x = torch.randn(4, 4, device="hpu")
    narrow = x.bfloat16()
    with torch.autocast("hpu", torch.bfloat16):
        assert torch.hpu.is_autocast_hpu_enabled() and torch.hpu.get_autocast_hpu_dtype() == torch.bfloat16
        for product in (x @ x, F.linear(x, x), torch.einsum("ij,jk->ik", x, x), torch.addmm(x, x, x), torch.mm(x, x)):
            assert product.dtype == torch.bfloat16
        q = torch.randn(1, 2, 4, 8, device="hpu")
        assert F.scaled_dot_product_attention(q, q, q).dtype == torch.bfloat16
        for wide in (F.softmax(narrow, -1), narrow.exp(), F.layer_norm(narrow, (4,)), narrow.sum(), narrow.norm()):
            assert wide.dtype == torch.float32
        assert F.cross_entropy(narrow, torch.zeros(4, dtype=torch.int64, device="hpu")).dtype == torch.float32
        assert narrow.sum(dtype=torch.bfloat16).dtype == torch.bfloat16
        assert torch.cat((x, narrow)).dtype == torch.float32
        assert (narrow + narrow).dtype == torch.bfloat16 and (x + 1).dtype == torch.float32
        assert (x.double() @ x.double()).dtype == torch.float64
        with pytest.raises(RuntimeError, match="unsafe to autocast"):
            F.binary_cross_entropy(x.sigmoid(), x.sigmoid())
        with torch.autocast("hpu", enabled=False):
            assert (x @ x).dtype == torch.float32
    assert (x @ x).dtype == torch.float32
    with torch.autocast("hpu", torch.float16):
        assert (x @ x).dtype == torch.float16


def test_autocast_gradients_are_those_of_the_parameters():
    layer = torch.nn.Linear(8, 8).to("hpu")
    with torch.autocast("hpu", torch.bfloat16):
        loss = layer(torch.randn(3, 8, device="hpu")).float().pow(2).sum()
    loss.backward()
    assert layer.weight.grad.dtype == torch.float32


def test_autocast_lists_from_the_environment(monkeypatch, tmp_path):
    (tmp_path / "narrow.txt").write_text("add\niadd\nsoftmax\n")
    (tmp_path / "wide.txt").write_text("matmul\n")
    x = torch.randn(4, 4, device="hpu")
    monkeypatch.setenv("PT_HPU_AUTOCAST_LOWER_PRECISION_OPS_LIST", str(tmp_path / "narrow.txt"))
    monkeypatch.setenv("PT_HPU_AUTOCAST_FP32_OPS_LIST", str(tmp_path / "wide.txt"))
    _simulator.register_autocast_lists()
    with torch.autocast("hpu", torch.bfloat16):
        assert (x + x).dtype == F.softmax(x, -1).dtype == torch.bfloat16
        assert (x.bfloat16() @ x.bfloat16()).dtype == torch.float32
        assert F.linear(x, x).dtype == torch.float32, "linear is in neither list"
    monkeypatch.undo()
    _simulator.register_autocast_lists()
    with torch.autocast("hpu", torch.bfloat16):
        assert (x + x).dtype == torch.float32 and (x @ x).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_products_are_computed_wide_and_rounded_once(dtype):
    a, b, c = (torch.randn(2, 33, 33).to(dtype) for _ in range(3))
    x, y, z = (each.to("hpu") for each in (a, b, c))
    wide = [each.float() for each in (a, b, c)]
    for got, wanted in (
        (x @ y, wide[0] @ wide[1]),
        (x[0] @ y[0], wide[0][0] @ wide[1][0]),
        (torch.addmm(z[0], x[0], y[0]), torch.addmm(wide[2][0], wide[0][0], wide[1][0])),
        (torch.baddbmm(z, x, y), torch.baddbmm(*(wide[i] for i in (2, 0, 1)))),
        (F.linear(x, y[0]), F.linear(wide[0], wide[1][0])),
        (torch.mm(x[0], y[0], out=torch.empty_like(x[0])), wide[0][0] @ wide[1][0]),
        (x[0] @ y[0, 0], wide[0][0] @ wide[1][0, 0]),
    ):
        assert got.dtype == dtype and torch.equal(got.cpu(), wanted.to(dtype))
    q = torch.randn(1, 2, 16, 8).to(dtype)
    got = F.scaled_dot_product_attention(*[q.to("hpu").requires_grad_()] * 3)
    wanted = F.scaled_dot_product_attention(*[q.float()] * 3)
    assert torch.equal(got.cpu(), wanted.to(dtype))
    got.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_of_two_types_are_refused_as_on_the_cpu(dtype):
    narrow, wide = torch.ones(1, 2, 2, dtype=dtype, device="hpu"), torch.ones(1, 2, 2, device="hpu")
    for product in (torch.matmul, torch.bmm, lambda a, b: F.linear(a, b[0]), lambda a, b: torch.baddbmm(b, a, a)):
        for factors in ((narrow, wide), (wide, narrow)):
            with pytest.raises(RuntimeError, match="dtype|scalar type"):
                product(*factors).cpu()


def test_attention_is_the_cpus():
    q, k, v = (torch.randn(2, 3, 20, 8, requires_grad=True) for _ in range(3))
    mask = torch.randn(2, 1, 20, 20)
    for options in ({}, {"is_causal": True}, {"attn_mask": mask}, {"scale": 0.3}):
        cards = [each.detach().to("hpu").requires_grad_() for each in (q, k, v)]
        wanted = F.scaled_dot_product_attention(q, k, v, **options)
        got = F.scaled_dot_product_attention(
            *cards, **{name: value.to("hpu") if name == "attn_mask" else value for name, value in options.items()}
        )
        assert torch.equal(got.cpu(), wanted)
        wanted_gradients = torch.autograd.grad(wanted.pow(2).sum(), (q, k, v))
        for x, y in zip(torch.autograd.grad(got.pow(2).sum(), cards), wanted_gradients, strict=True):
            assert torch.equal(x.cpu(), y)


def test_convolution():
    layer = torch.nn.Conv1d(4, 6, 3, padding=1)
    x = torch.randn(2, 4, 9, requires_grad=True)
    card, y = torch.nn.Conv1d(4, 6, 3, padding=1).to("hpu"), x.detach().to("hpu").requires_grad_()
    card.load_state_dict(layer.state_dict())
    layer(x).pow(2).sum().backward()
    card(y).pow(2).sum().backward()
    for got, wanted in ((y.grad, x.grad), (card.weight.grad, layer.weight.grad), (card.bias.grad, layer.bias.grad)):
        torch.testing.assert_close(got.cpu(), wanted)


@pytest.mark.parametrize("bias_correction", [True, False])
def test_fused_adamw(bias_correction):
    """Against the definition, in double precision, with a learning rate that changes."""
    lr, beta1, beta2, eps, decay = 0.01, 0.9, 0.99, 1e-4, 0.1
    start, targets = torch.randn(7, dtype=torch.float64), torch.randn(4, 7, dtype=torch.float64)
    p = torch.nn.Parameter(start.to("hpu"))
    optimizer = FusedAdamW([p], lr, (beta1, beta2), eps, decay, bias_correction)
    w, m, v = start.clone(), torch.zeros(7, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)
    for t, target in enumerate(targets, 1):
        optimizer.param_groups[0]["lr"] = lr / t
        optimizer.zero_grad()
        (p - target.to("hpu")).pow(2).sum().backward()
        optimizer.step()
        gradient = 2 * (w - target)
        m, v = beta1 * m + (1 - beta1) * gradient, beta2 * v + (1 - beta2) * gradient**2
        first, second = (1 - beta1**t, 1 - beta2**t) if bias_correction else (1.0, 1.0)
        w = w - lr / t * decay * w
        w = w - lr / t / first * m / ((v / second).sqrt() + eps)
        torch.testing.assert_close(p.detach().cpu(), w, rtol=1e-6, atol=1e-8)


def test_fused_adamw_resumes():
    def run(steps: int, optimizer, p) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            p.pow(2).sum().backward()
            optimizer.step()

    p = torch.nn.Parameter(torch.ones(5, device="hpu"))
    optimizer = FusedAdamW([p])
    run(2, optimizer, p)
    q = torch.nn.Parameter(p.detach().clone())
    resumed = FusedAdamW([q])
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(3, optimizer, p)
    run(3, resumed, q)
    assert torch.equal(p, q)


def test_fused_clip_norm():
    p = torch.nn.Parameter(torch.zeros(3, device="hpu"))
    for gradient, scale in ((torch.tensor([3.0, 4.0, 0.0]), 2 / 5), (torch.tensor([0.3, 0.4, 0.0]), 1.0)):
        p.grad = gradient.to("hpu")
        norm = FusedClipNorm([p], 2.0).clip_norm([p])
        assert norm.device.type == "hpu" and float(norm) == pytest.approx(float(gradient.norm()))
        torch.testing.assert_close(p.grad.cpu(), gradient * scale, rtol=1e-5, atol=1e-6)


def held_until_backward(make, *leaves: torch.Tensor) -> tuple[int, list[torch.Tensor]]:
    """Bytes that a card holds between the passes beside results and leaves; the result and the leaves' gradients."""
    leaves = [leaf.detach().to("hpu").requires_grad_() for leaf in leaves]
    made = [leaf * 1 for leaf in leaves]  # whose memory is counted if they are kept
    torch.hpu.synchronize()
    before = torch.hpu.memory_allocated() - sum(each.numel() * each.element_size() for each in made)
    result = make(*made)
    del made
    torch.hpu.synchronize()
    held = torch.hpu.memory_allocated() - before - result.numel() * result.element_size()
    result.backward(torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view(result.shape).to("hpu"))
    return held, [result.detach().cpu(), *(leaf.grad.cpu() for leaf in leaves)]


def gradients_of(make, *leaves: torch.Tensor) -> list[torch.Tensor]:
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    result = make(*leaves)
    result.backward(torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view(result.shape))
    return [result.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_rms_norm_keeps_its_input_and_a_number_for_each_row(dtype):
    x, weight = torch.randn(2, 50, 64).to(dtype), torch.randn(64).to(dtype)
    held, found = held_until_backward(lambda x, weight: FusedRMSNorm.apply(x, weight, 1e-5), x, weight)
    assert held == (x.numel() + weight.numel()) * x.element_size() + 100 * 4
    assert found[0].dtype == dtype
    wanted = gradients_of(lambda x, weight: F.rms_norm(x, (64,), weight, eps=1e-5), x.float(), weight.float())
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.2}
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.float(), other, **close)


def test_rotary_embedding():
    """A rotation of pairs by angles: the product of two rotated heads depends on the distance of positions alone."""
    width, positions = 8, 16
    frequencies = 1 / 100 ** (torch.arange(0, width, 2) / width)
    angles = torch.arange(positions)[:, None] * frequencies
    q = torch.randn(1, 1, positions, width)
    position_ids = torch.arange(positions)[None]
    halves = torch.cat((angles, angles), -1)
    cos, sin = (each[None, None].to("hpu") for each in (halves.cos(), halves.sin()))
    rotate = kernels.RotaryPosEmbeddingHelperV2.apply
    turned = torch.complex(q[..., : width // 2], q[..., width // 2 :]) * torch.polar(torch.ones_like(angles), angles)
    got = rotate(q.to("hpu"), cos, sin, position_ids.to("hpu")).cpu()
    torch.testing.assert_close(got, torch.cat((turned.real, turned.imag), -1))
    shifted = rotate(q.to("hpu"), cos, sin, position_ids.flip(1).to("hpu")).cpu()
    torch.testing.assert_close(shifted[..., -1, :], q[..., -1, :])  # position 0 turns nothing

    # Only the tables are kept, and a rotation's gradient is rotated back.
    held, (_, gradient) = held_until_backward(lambda p: rotate(p, cos, sin, position_ids.to("hpu")), q)
    assert held == position_ids.numel() * 8
    back = torch.linspace(-1, 1, q.numel()).view(q.shape).to("hpu")
    torch.testing.assert_close(gradient, rotate(back, cos, -sin, position_ids.to("hpu")).cpu())

    # ChatGLM's: neighbours, of the first part of a head.
    table = torch.stack((angles.cos(), angles.sin()), -1)[:, None].to("hpu")
    wide = torch.randn(positions, 2, 3, width + 4)
    neighbours = torch.view_as_complex(wide[..., :width].unflatten(-1, (-1, 2)))
    turned = neighbours * torch.polar(torch.ones_like(angles), angles)[:, None, None]
    wanted = torch.cat((torch.view_as_real(turned).flatten(-2), wide[..., width:]), -1)
    torch.testing.assert_close(kernels.RotaryPosEmbeddingHelperV3.apply(wide.to("hpu"), table).cpu(), wanted)
    cos, sin = halves.cos(), halves.sin()
    first = kernels.RotaryPosEmbeddingHelperV1.apply(q[..., :4, :], cos, sin, 3)
    ids = torch.arange(3, 7)[None]
    torch.testing.assert_close(
        first, kernels.RotaryPosEmbeddingHelperV2.apply(q[..., :4, :], cos[None, None], sin[None, None], ids)
    )


def test_fused_attention():
    """Against softmax(q k^T / sqrt(width) + mask) v, with fewer key heads, masks, causality, lengths."""
    q = torch.randn(2, 4, 6, 8, device="hpu")
    k, v = (torch.randn(2, 2, 6, 8, device="hpu") for _ in range(2))
    added = torch.randn(2, 1, 6, 6, device="hpu")
    allowed = torch.rand(2, 1, 6, 6, device="hpu") > 0.3
    allowed[..., 0] = True
    allowed[0, 0, 2] = False  # a row that sees nothing sees all alike
    causal = torch.ones(6, 6, dtype=torch.bool, device="hpu").tril()
    lengths = torch.tensor([6, 3], device="hpu")
    right = (torch.arange(6, device="hpu") < lengths[:, None])[:, None, None]

    def definition(bias, scale=8**-0.5):
        scores = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * scale + bias
        return scores.softmax(-1) @ v.repeat_interleave(2, 1)

    def bias(mask):
        return torch.zeros(mask.shape, device="hpu").masked_fill(~mask, torch.finfo(torch.float32).min)

    apply = kernels.FusedSDPA.apply
    for recompute in (False, True):
        for got, wanted in (
            (apply(q, k, v, None, 0.0, False, None, "None", recompute), definition(0)),
            (apply(q, k, v, added, 0.0, False, None, "None", recompute), definition(added)),
            (apply(q, k, v, allowed, 0.0, False, None, "None", recompute), definition(bias(allowed))),
            (apply(q, k, v, None, 0.0, True, 0.5, "fast", recompute), definition(bias(causal), 0.5)),
            (apply(q, k, v, added, 0.0, True, None, "None", recompute), definition(added + bias(causal))),
            (apply(q, k, v, allowed, 0.0, True, None, "None", recompute), definition(bias(allowed & causal))),
            (apply(q, k, v, None, 0.0, False, None, "None", recompute, lengths, "right"), definition(bias(right))),
            (
                apply(q, k, v, None, 0.0, True, None, "None", recompute, lengths, "right"),
                definition(bias(right & causal)),
            ),
        ):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("recompute", [False, True])
def test_fused_attention_keeps_its_probabilities_unless_it_recomputes(recompute, dropout):
    q, k, v = torch.randn(2, 4, 32, 8), torch.randn(2, 2, 32, 8), torch.randn(2, 2, 32, 8)
    mask = torch.randn(2, 1, 32, 32)
    on_card = mask.to("hpu")

    def fused(q, k, v):
        return kernels.FusedSDPA.apply(q, k, v, on_card, dropout, False, None, "None", recompute)

    torch.hpu.manual_seed(5)
    held, found = held_until_backward(fused, q, k, v)
    rows = 2 * 4 * 32
    kept = rows * 32 * (4 * (not recompute) + bool(dropout))
    assert held == 4 * (q.numel() + k.numel() + v.numel()) + (kept or rows * 4)

    torch.hpu.manual_seed(5)
    left = torch.empty(2, 4, 32, 32, dtype=torch.bool, device="hpu").bernoulli_(1 - dropout).cpu()

    def definition(q, k, v):
        scores = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 8**-0.5 + mask
        return (scores.softmax(-1) * left / (1 - dropout)) @ v.repeat_interleave(2, 1)

    for one, other in zip(found, gradients_of(definition, q, k, v), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_fast_softmax_is_recomputed_for_causal_attention_alone():
    q = torch.randn(2, 4, 8, 8, device="hpu", requires_grad=True)
    assert kernels.FusedSDPA.apply(q, q, q, None, 0.0, True, None, "fast", True).requires_grad
    with pytest.raises(AssertionError, match="is_causal alone"):
        kernels.FusedSDPA.apply(q, q, q, None, 0.0, False, None, "fast", True)
    assert kernels.FusedSDPA.apply(*[q.detach()] * 3, None, 0.0, False, None, "fast", True).shape == q.shape


@pytest.mark.parametrize("recompute", [False, True])
def test_causal_attention_is_for_as_many_keys_as_queries(recompute):
    q, k = torch.randn(2, 4, 4, 8, device="hpu"), torch.randn(2, 4, 6, 8, device="hpu")
    with pytest.raises(NotImplementedError, match="4 queries and 6 keys"):
        kernels.FusedSDPA.apply(q, k, k, None, 0.0, True, None, "None", recompute)
    narrow = k[..., :5]
    wanted = (q @ k.transpose(-1, -2) * 8**-0.5).softmax(-1) @ narrow
    found = kernels.FusedSDPA.apply(q, k, narrow, None, 0.0, False, None, "None", recompute)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_attention_is_told_to_recompute_by_the_context():
    q = torch.randn(2, 4, 32, 8)

    def fused(q):
        return kernels.FusedSDPA.apply(q, q, q)

    plain = held_until_backward(fused, q)[0]
    with torch.hpu.sdp_kernel(enable_recompute=True):
        assert held_until_backward(fused, q)[0] < plain
    assert held_until_backward(fused, q)[0] == plain
