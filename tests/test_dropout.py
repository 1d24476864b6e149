"""Dropout of a CPU against the plain formula with the same noise, and PyTorch's own wherever nothing is dropped."""

import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from gaudi_lm.modeling import dropout as module
from gaudi_lm.modeling.dropout import (
    BLOCK_ROWS,
    _Noise,
    _Weights,
    dropout,
    install_dropout,
    scaled_dot_product_attention,
)

BATCH, HEADS, LENGTH, WIDTH = 2, 3, BLOCK_ROWS + 45, 8


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(functional, "scaled_dot_product_attention", functional.scaled_dot_product_attention)
    monkeypatch.setattr(functional, "dropout", functional.dropout)
    install_dropout()


def noise_of_all(probability: float, weights: _Weights) -> tuple[torch.Tensor, float]:
    """What a call after `torch.manual_seed(0)` keeps, as one matrix, and its gain."""
    torch.manual_seed(0)
    noise_of = _Noise(probability)
    kept = torch.zeros(BATCH, HEADS, LENGTH, weights.key.shape[2], dtype=torch.bool)
    for item, rows, keys in weights.blocks():
        kept[item, :, rows, keys] = noise_of(torch.Size((HEADS, rows.stop - rows.start, keys.stop - keys.start)))
    return kept, noise_of.gain


def random_mask(*shape: int) -> torch.Tensor:
    mask = torch.rand(shape) < 0.6
    mask[..., 3, :] = False  # a row that sees nothing
    return mask


def lowest(mask: torch.Tensor) -> torch.Tensor:
    """The same mask in the form of transformers: added to the scores."""
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)


MASKS = {
    "none": lambda: None,
    "causal": lambda: None,
    "cross": lambda: None,
    "bool": lambda: random_mask(BATCH, 1, LENGTH, LENGTH),
    "of_all_items": lambda: random_mask(1, 1, LENGTH, LENGTH),
    "of_two_dimensions": lambda: random_mask(LENGTH, LENGTH),
    "padding": lambda: torch.arange(LENGTH)[None, None, None] < torch.tensor([LENGTH, 70])[:, None, None, None],
    "packed": lambda: (torch.arange(LENGTH)[:, None] // 70 == torch.arange(LENGTH) // 70)[None, None],
    "lowest_numbers": lambda: lowest(random_mask(BATCH, 1, LENGTH, LENGTH)),
    "lowest_numbers_of_one_head": lambda: lowest(
        torch.arange(HEADS)[None, :, None, None] != torch.zeros(1, 1, LENGTH, LENGTH)
    ),
    "lowest_numbers_of_packed_rows": lambda: lowest(MASKS["packed"]()),
    "bias_of_each_head": lambda: torch.randn(BATCH, HEADS, LENGTH, LENGTH, dtype=torch.float64),
}


@pytest.mark.parametrize("case", MASKS)
@pytest.mark.parametrize("scale", (None, 0.3))
def test_attention_equals_the_formula(case, scale):
    keys = 61 if case == "cross" else LENGTH
    torch.manual_seed(1)
    # The layout of the models: heads behind positions.
    query, key = (torch.randn(BATCH, n, HEADS, WIDTH, dtype=torch.float64).transpose(1, 2) for n in (LENGTH, keys))
    value = torch.randn(BATCH, HEADS, keys, 5, dtype=torch.float64)
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    mask, probability = MASKS[case](), 0.3

    scores = query @ key.transpose(2, 3) * (WIDTH**-0.5 if scale is None else scale)
    if case == "causal":
        scores = scores.masked_fill(torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1), -torch.inf)
    elif mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    full = None if mask is None else mask.expand(-1, -1, LENGTH, keys) if mask.dim() == 4 else mask[None, None]
    if case == "causal":
        full = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    kept, gain = noise_of_all(probability, _Weights(query, key, full, 1.0))
    expected = (torch.softmax(scores, 3).nan_to_num(0.0) * kept * gain) @ value

    torch.manual_seed(0)
    options = {"attn_mask": mask, "dropout_p": probability, "is_causal": case == "causal", "scale": scale}
    got = scaled_dot_product_attention(query, key, value, **options)
    torch.testing.assert_close(got, expected)
    grad = torch.randn_like(got)
    for ours, theirs in zip(
        torch.autograd.grad(got, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs.nan_to_num(0.0))


def test_dropout_keeps_the_expected_share_and_the_mean():
    ones = torch.ones(1000, 1001, requires_grad=True)
    torch.manual_seed(3)
    dropped = dropout(ones, 0.1)
    kept = dropped != 0
    assert kept.float().mean() == pytest.approx(0.9, abs=0.002)  # 6 standard deviations
    assert dropped.mean().item() == pytest.approx(1, abs=0.003)
    assert dropped.max().item() == pytest.approx(1 / 0.9, rel=1e-4)
    dropped.sum().backward()
    assert torch.equal(ones.grad, dropped.detach())
    # Neighbours are independent: both of a pair stay as often as chance says.
    for neighbour in (kept[:, 1:], kept.roll(1, 0)[:, 1:]):
        assert (kept[:, :-1] & neighbour).float().mean() == pytest.approx(0.81, abs=0.003)
    torch.manual_seed(3)
    assert torch.equal(dropout(ones, 0.1), dropped)
    assert not torch.equal(dropout(ones, 0.1), dropped)


@pytest.mark.parametrize(
    "options", ({"p": 0.0}, {"p": 0.5, "training": False}, {"p": 1.0}, {"p": 0.5, "inplace": True}, {"p": 1e-9})
)
def test_the_rest_is_left_to_pytorch(options, monkeypatch):
    monkeypatch.setattr(module._Dropout, "apply", None)
    assert dropout(torch.ones(5), **options).shape == (5,)


def test_attention_without_dropout_is_left_to_pytorch(monkeypatch):
    monkeypatch.setattr(module._DropoutAttention, "apply", None)
    query = torch.randn(1, 4, 5, 8)
    got = scaled_dot_product_attention(query, query, query, is_causal=True)
    assert torch.equal(got, functional.scaled_dot_product_attention(query, query, query, is_causal=True))
    # Fewer heads of keys, half precision and autocast.
    scaled_dot_product_attention(query, query[:, :2], query[:, :2], dropout_p=0.5, enable_gqa=True)
    half = query.bfloat16()
    scaled_dot_product_attention(half, half, half, dropout_p=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        assert scaled_dot_product_attention(query, query, query, dropout_p=0.5).dtype == torch.bfloat16


@pytest.mark.parametrize("reentrant", (True, False))
def test_gradient_checkpointing_repeats_the_draws(installed, reentrant):
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 101, "n_positions": 64}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **sizes), attn_implementation="sdpa").train()
    ids = torch.arange(64).view(1, 64)

    def gradients():
        torch.manual_seed(0)
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for again, first in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(again, first)


def test_keys_that_a_block_may_not_see_are_left_out():
    length = 4 * BLOCK_ROWS
    query = torch.zeros(1, 1, length, 1)
    text = torch.arange(length) // (2 * BLOCK_ROWS)
    mask = torch.ones(length, length, dtype=torch.bool).tril() & (text[:, None] == text)
    ends = [(keys.start, keys.stop) for _, _, keys in _Weights(query, query, mask[None, None], 1.0).blocks()]
    assert ends == [(BLOCK_ROWS * start, BLOCK_ROWS * stop) for start, stop in ((0, 1), (0, 2), (2, 3), (2, 4))]


def test_a_blind_row_hides_no_nan():
    query = torch.randn(1, 1, 4, 8)
    query[0, 0, 0] = torch.nan
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[3] = False
    got = scaled_dot_product_attention(query, torch.ones_like(query), torch.ones_like(query), mask, 0.1)
    assert got[0, 0, 0].isnan().all()
    assert not got[0, 0, 1:].isnan().any() and not got[0, 0, 3].any()


def test_shapes_that_pytorch_allows_or_refuses():
    query, none = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 0, 8)
    assert not scaled_dot_product_attention(query, none, none, torch.ones(4, 0, dtype=torch.bool), 0.1).any()
    assert scaled_dot_product_attention(none, none, none, dropout_p=0.1, is_causal=True).shape == none.shape
    assert dropout(none, 0.1).shape == none.shape
    with pytest.raises(RuntimeError):
        scaled_dot_product_attention(query, query[:, :, :2], query, dropout_p=0.1)
    torch.func.vmap(lambda row: dropout(row, 0.5), randomness="different")(query)


def test_what_was_installed_can_be_taken_out(installed):
    assert functional.dropout is dropout
    install_dropout(False)
    assert functional.dropout is module._stock_dropout
    assert functional.scaled_dot_product_attention is module._stock_attention
