"""The models that optimum-habana patches, on the card, against the stock ones on the CPU."""

import pytest
import torch
from tiny_models import VOCABULARY, tiny_model

TOLERANCE = 1e-5
MODELS = ["gpt2", "gptj", "gpt_neox", "llama", "bert", "roberta", "distilbert", "albert", "mistral", "qwen2", "opt"]


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(3, VOCABULARY, (2, 16), generator=generator)
    mask = torch.ones_like(tokens)
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.clone()}


def loss_and_gradients(model: torch.nn.Module, inputs: dict) -> tuple[float, torch.Tensor, dict[str, torch.Tensor]]:
    outputs = model(**inputs)
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
        models = {name: tiny_model(name) for name in MODELS}
        return {name: (model.state_dict(), *loss_and_gradients(model, batch())) for name, model in models.items()}


@pytest.fixture(scope="module")
def patched(stock) -> None:
    from optimum.habana.transformers.modeling_utils import adapt_transformers_to_gaudi

    adapt_transformers_to_gaudi()


@pytest.mark.parametrize("name", MODELS)
def test_patched_model_equals_stock(name, stock, patched):
    state, wanted_loss, wanted_logits, wanted_gradients = stock[name]
    model = tiny_model(name)
    model.load_state_dict(state)
    model.to("hpu").tie_weights()
    inputs = {key: value.to("hpu") for key, value in batch().items()}
    loss, logits, gradients = loss_and_gradients(model, inputs)
    assert loss == pytest.approx(wanted_loss, abs=TOLERANCE)
    torch.testing.assert_close(logits, wanted_logits, rtol=TOLERANCE, atol=TOLERANCE)
    assert gradients.keys() == wanted_gradients.keys()
    for parameter, wanted in wanted_gradients.items():
        torch.testing.assert_close(gradients[parameter], wanted, rtol=TOLERANCE, atol=TOLERANCE, msg=parameter)
