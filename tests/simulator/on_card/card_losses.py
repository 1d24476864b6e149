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
from tiny_models import CAUSAL, EXPERTS, distance, gradients, make_batch, objective_of, tiny_model
from transformers.modeling_layers import GradientCheckpointingLayer

from gaudi_lm.architectures import ARCHITECTURES, _always, is_patched, packable
from gaudi_lm.data.packing import PackedCollator
from gaudi_lm.errors import UserError
from gaudi_lm.modeling.loss import install_token_loss
from gaudi_lm.modeling.patches import repair_gradient_checkpointing, restore_own_model

adapt_transformers_to_gaudi()
OWN = [name for name, row in ARCHITECTURES.items() if row.causal_head and row.unpatched is _always]
for name in OWN:
    restore_own_model(name)
READING = ["gpt_oss", "granitemoe", "olmoe"]  # which expert gets how many tokens, in each layer, as transformers does
MODELS = [*CAUSAL, "bert", "roberta", "distilbert", "albert"]


def on_card(model_type):
    model = tiny_model(model_type, attn_implementation="eager").to("hpu")
    model.tie_weights()
    model.accelerator = model.base_model.accelerator = None  # GaudiTrainer sets it, and optimum-habana's BLOOM asks
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
    wanted = full(**batch, **({"use_cache": False} if model_type in CAUSAL else {})).loss
    wanted.backward()
    htcore.mark_step()
    with metric_localcontext("host_sync") as waits:
        got = ours(**batch, num_items_in_batch=(batch["labels"][:, 1:] != -100).sum())
        got.loss.backward()
        htcore.mark_step()
        assert bool(dict(waits.stats())["TotalNumber"]) == (model_type in READING), dict(waits.stats())
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


@pytest.mark.parametrize("model_type", [*CAUSAL, "roberta"])
def test_checkpointing_of_lazy_mode(model_type, monkeypatch):
    plain, batch = on_card(model_type)
    checkpointed = copy.deepcopy(plain)
    repair_gradient_checkpointing(checkpointed)
    layers = [module for module in checkpointed.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert len(layers) == 2
    kind = type(layers[0])
    assert all(type(layer) is kind for layer in layers), "FSDP wraps those of one class"
    assert kind.__name__ in {type(module).__name__ for module in plain.modules()}
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


@pytest.mark.parametrize("model_type", sorted({*packable(patched=True), *packable(patched=False)}))
def test_each_packed_text_has_the_loss_it_has_alone(model_type):
    model = tiny_model(model_type, attn_implementation="eager")
    if model_type in packable(is_patched(model)):
        assert worst_difference(model, "hpu") <= 1e-5
    else:
        with pytest.raises(UserError, match=f"optimum-habana's {model_type} "):
            PackedCollator.for_model(model, 1, 40)


@pytest.mark.parametrize("model_type", EXPERTS)
def test_routers_are_balanced_or_it_is_said_that_they_are_not(model_type):
    model = tiny_model(model_type, attn_implementation="eager", output_router_logits=True).to("hpu")
    batch = {name: value.to("hpu") for name, value in make_batch("causal").items()}
    if is_patched(model) and model_type != "qwen2_moe":
        with pytest.raises(UserError, match=f"optimum-habana's {model_type} has no loss that balances"):
            install_token_loss(model, "causal")
        return
    wanted = model(**batch).loss
    install_token_loss(model, "causal")
    got = model(**batch)
    assert got.aux_loss.item() > 0
    assert got.loss.item() == pytest.approx(wanted.item(), rel=1e-5)
