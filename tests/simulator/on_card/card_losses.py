"""The loss without full logits, and packed rows, on the models that optimum-habana patches."""

import copy

import habana_frameworks.torch.core as htcore
import pytest
import torch
from data.test_packing import worst_difference
from habana_frameworks.torch.hpu import wrap_in_hpu_graph
from habana_frameworks.torch.hpu.metrics import metric_localcontext
from optimum.habana.transformers import gradient_checkpointing as lazy_mode
from optimum.habana.transformers.modeling_utils import adapt_transformers_to_gaudi
from tiny_models import distance, gradients, make_batch, objective_of, tiny_model

from gaudi_lm.architectures import ARCHITECTURES, is_patched, packable
from gaudi_lm.data.packing import PackedCollator
from gaudi_lm.device import UserError
from gaudi_lm.modeling.loss import install_token_loss
from gaudi_lm.modeling.patches import repair_gradient_checkpointing

adapt_transformers_to_gaudi()
MODELS = ["gpt2", "gptj", "gpt_neox", "llama", "mistral", "qwen2", "opt", "bert", "roberta", "distilbert", "albert"]


def on_card(model_type):
    model = tiny_model(model_type, attn_implementation="eager").to("hpu")
    model.tie_weights()
    return model, {name: value.to("hpu") for name, value in make_batch(objective_of(model_type)).items()}


def install(model, model_type):
    masked = objective_of(model_type) == "masked"
    line = install_token_loss(model, objective_of(model_type), max_predictions_per_seq=12 if masked else None)
    assert "without full logits" in line


@pytest.mark.parametrize("model_type", MODELS)
def test_same_loss_and_gradients(model_type):
    full, batch = on_card(model_type)
    ours = copy.deepcopy(full)
    install(ours, model_type)
    wanted = full(**batch).loss
    wanted.backward()
    htcore.mark_step()
    with metric_localcontext("host_sync") as waits:
        got = ours(**batch, num_items_in_batch=(batch["labels"][:, 1:] != -100).sum())
        got.loss.backward()
        htcore.mark_step()
        assert dict(waits.stats())["TotalNumber"] == 0
    assert got.loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    total = sum(g.norm().item() ** 2 for g in gradients(full).values()) ** 0.5
    for name, gradient in gradients(ours).items():
        assert distance(gradient.cpu(), gradients(full)[name].cpu()) <= 1e-5 * total, name


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "roberta"])
def test_autocast(model_type):
    full, batch = on_card(model_type)
    ours = copy.deepcopy(full)
    install(ours, model_type)
    with torch.autocast("hpu", dtype=torch.bfloat16):
        got, wanted = ours(**batch), full(**batch)
    assert got.loss.dtype is torch.float32
    assert got.loss.item() == pytest.approx(wanted.loss.item(), rel=3e-3)
    got.loss.backward()
    wanted.loss.backward()
    total = sum(g.norm().item() ** 2 for g in gradients(full).values()) ** 0.5
    for name, gradient in gradients(ours).items():
        assert torch.isfinite(gradient.cpu()).all()
        assert distance(gradient.cpu(), gradients(full)[name].cpu()) <= 2e-2 * total, name


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "roberta"])
def test_checkpointing_of_lazy_mode(model_type, monkeypatch):
    plain, batch = on_card(model_type)
    checkpointed = copy.deepcopy(plain)
    repair_gradient_checkpointing(checkpointed)
    monkeypatch.setattr("transformers.modeling_utils.checkpoint", lazy_mode.checkpoint)  # as GaudiTrainer does
    checkpointed.gradient_checkpointing_enable()
    for model in (plain, checkpointed):
        install(model, model_type)
        model(**batch).loss.backward()
    for name, gradient in gradients(plain).items():
        difference = distance(gradient.cpu(), gradients(checkpointed)[name].cpu())
        assert difference <= 1e-6 * gradient.norm().item() + 1e-8, name


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "bert", "roberta"])
def test_one_graph_whatever_the_labels(model_type):
    model, _ = on_card(model_type)
    install(model, model_type)
    compiled = []
    for seed in range(5):
        batch = {k: v.to("hpu") for k, v in make_batch(objective_of(model_type), seed=seed).items()}
        htcore.mark_step()
        with metric_localcontext("graph_compilation") as graphs:
            model(**batch).loss.backward()
            model.zero_grad()
            htcore.mark_step()
            compiled.append(dict(graphs.stats())["TotalNumber"])
    assert compiled[0] > 0 and not any(compiled[2:])


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "bert", "roberta"])
def test_evaluation_in_hpu_graphs(model_type):
    model, batch = on_card(model_type)
    install(model, model_type)
    model.eval()
    with torch.no_grad():
        wanted = [{k: v.item() for k, v in model(**part).items()} for part in (batch, batch)]
        graphed = wrap_in_hpu_graph(model)
        for plain in wanted:
            got = graphed(**batch)
            assert {name: value.item() for name, value in got.items()} == pytest.approx(plain, rel=1e-6)


MASKED = [name for name in packable(patched=False) if ARCHITECTURES[name].masked_head]


@pytest.mark.parametrize("model_type", sorted({*packable(patched=True), *MASKED}))
def test_each_packed_text_has_the_loss_it_has_alone(model_type):
    model = tiny_model(model_type, attn_implementation="eager")
    assert is_patched(model) == (model_type in packable(patched=True))
    assert worst_difference(model, "hpu") <= 1e-5


@pytest.mark.parametrize("model_type", ["gpt2", "gptj", "gpt_neox", "opt"])
def test_patched_models_that_cannot_are_refused(model_type):
    with pytest.raises(UserError, match=f"optimum-habana's {model_type} "):
        PackedCollator.for_model(tiny_model(model_type), 1, 40)
