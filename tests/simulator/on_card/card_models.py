"""The models that a card runs, most of them optimum-habana's, against those of transformers on the CPU."""

import sys

import pytest
import torch
import transformers
from tiny_models import CAUSAL, ODD, VOCABULARY, tiny_model

from gaudi_lm.architectures import ARCHITECTURES, is_patched
from gaudi_lm.modeling.patches import (
    keep_width_of_heads,
    narrow_windows,
    restore_own_model,
    scale_positions_once,
)
from gaudi_lm.training.samples import most_probable_tokens

TOLERANCE = 1e-5
NEW_TOKENS = 8
MODELS = [(name, {}) for name in (*CAUSAL, "bert", "roberta", "distilbert", "albert")]
MODELS += [(name, fields) for name, fields in ODD.items()]
IDS = [name + "-odd" * bool(fields) for name, fields in MODELS]
LINEAR = {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}
MODELS += [(name, LINEAR) for name in ("llama", "mistral", "mixtral")]
IDS += [f"{name}-linear" for name, _ in MODELS[len(IDS) :]]
STOCK = ["cohere2", "granite", "granitemoe", "olmo", "olmo2", "olmoe", "phi3", "smollm3"]  # optimum-habana has none


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(3, VOCABULARY, (2, 16), generator=generator)
    mask = torch.ones_like(tokens)
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.clone()}


def without_lazy_names() -> None:
    """Let transformers' packages forget which classes they were asked for: later ones are those of a card."""
    for name, module in sys.modules.items():
        if name.startswith("transformers.models.") and name.count(".") == 2:
            for kept in [kept for kept, value in vars(module).items() if isinstance(value, type)]:
                delattr(module, kept)


def loss_and_gradients(model: torch.nn.Module, inputs: dict) -> tuple[float, torch.Tensor, dict[str, torch.Tensor]]:
    outputs = model(**inputs, **({"use_cache": False} if model.config.model_type in CAUSAL else {}))
    outputs["loss"].backward()
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return outputs["loss"].item(), outputs["logits"].detach().cpu(), gradients


@pytest.fixture(scope="module")
def stock() -> dict:
    """Computed before the patches, which change the classes for good."""
    from transformers.models.gptj import modeling_gptj

    # optimum-habana rotates GPT-J's queries and keys in bf16, whatever the model's dtype.
    rotate = modeling_gptj.apply_rotary_pos_emb

    def rotate_rounded(tensor, sin, cos):
        return rotate(tensor, sin.bfloat16(), cos.bfloat16()).bfloat16().float()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_gptj, "apply_rotary_pos_emb", rotate_rounded)
        found = {}
        for key, (name, fields) in zip(IDS, MODELS, strict=True):
            model = tiny_model(name, attn_implementation="eager", **fields)
            found[key] = model.state_dict(), *loss_and_gradients(model, batch())
            if name in CAUSAL:
                inputs = {field: batch()[field][:1, :6] for field in ("input_ids", "attention_mask")}
                made = model.eval().generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
                found["text", key] = made[0, 6:].tolist()
        without_lazy_names()
        return found


@pytest.fixture(scope="module")
def patched(stock) -> None:
    from optimum.habana.transformers.modeling_utils import adapt_transformers_to_gaudi

    adapt_transformers_to_gaudi()
    assert transformers.AutoConfig.for_model("llama", head_dim=24).head_dim != 24, "drop keep_width_of_heads"
    for _ in range(2):
        keep_width_of_heads()
        narrow_windows()
        scale_positions_once()


def compare(model: torch.nn.Module, state: dict, wanted_loss: float, wanted_logits, wanted_gradients: dict) -> None:
    """The model on a card, with these weights, has this loss, these logits and gradients."""
    model.load_state_dict(state)
    model.to("hpu").tie_weights()
    model.accelerator = model.base_model.accelerator = None  # GaudiTrainer sets it, and optimum-habana's BLOOM asks
    inputs = {key: value.to("hpu") for key, value in batch().items()}
    loss, logits, gradients = loss_and_gradients(model, inputs)
    assert loss == pytest.approx(wanted_loss, abs=TOLERANCE)
    torch.testing.assert_close(logits, wanted_logits, rtol=TOLERANCE, atol=TOLERANCE)
    assert gradients.keys() == wanted_gradients.keys()
    for parameter, wanted in wanted_gradients.items():
        torch.testing.assert_close(gradients[parameter], wanted, rtol=TOLERANCE, atol=TOLERANCE, msg=parameter)


@pytest.mark.parametrize("key", IDS)
def test_the_model_of_a_card_computes_what_stock_does(key, stock, patched):
    name, fields = MODELS[IDS.index(key)]
    config = transformers.AutoConfig.for_model(name, **{**CAUSAL.get(name, {}), **fields})
    own = ARCHITECTURES[name].unpatched(config)
    if own:
        wrong = tiny_model(name, attn_implementation="eager", **fields)
        if is_patched(wrong):  # no test before this one has mended it
            with pytest.raises((AssertionError, KeyError, RuntimeError, TypeError)):
                compare(wrong, *stock[key])
        restore_own_model(name)
    model = tiny_model(name, attn_implementation="eager", **fields)
    if name in CAUSAL:
        assert is_patched(model) == (not own and name not in STOCK)
    compare(model, *stock[key])
    if name in CAUSAL:
        tokens = most_probable_tokens(model.eval(), batch()["input_ids"][0, :6].tolist(), NEW_TOKENS, [2])
        assert tokens == [token for token in stock["text", key] if token != 2]
