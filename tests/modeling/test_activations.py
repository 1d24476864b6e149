"""Fused activations: the same model, with less kept for the backward pass."""

import copy

import pytest
import torch
from tiny_models import VOCABULARY, tiny_model

from gaudi_lm.modeling.activations import COMPOSED, fuse_activations


@pytest.mark.parametrize("model_type, modules", [("gpt2", 2), ("gptj", 2), ("albert", 2), ("gpt_neo", 2), ("bert", 0)])
def test_same_loss_and_gradients(model_type, modules):
    composed = tiny_model(model_type)
    fused = copy.deepcopy(composed)
    assert fuse_activations(fused) == modules
    assert not any(type(module) in COMPOSED for module in fused.modules())
    assert list(fused.state_dict()) == list(composed.state_dict())
    input_ids = torch.randint(3, VOCABULARY, (2, 17))
    kept = []
    losses = []
    for model in (composed, fused):
        sizes = 0

        def keep(tensor):
            nonlocal sizes
            sizes += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            losses.append(model(input_ids=input_ids, labels=input_ids).loss)
        losses[-1].backward()
        kept.append(sizes)
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-6)
    total = sum(p.grad.norm() ** 2 for p in composed.parameters() if p.grad is not None) ** 0.5
    for one, other in zip(composed.parameters(), fused.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or (one.grad - other.grad).norm() <= 1e-6 * total
    assert (kept[1] < kept[0]) == (modules > 0)
