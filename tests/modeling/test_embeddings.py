"""Embeddings are enlarged to the vocabulary of the tokenizer, with the head, or one line says why not."""

import pytest
import torch
from tiny_models import tiny_model
from transformers import AutoConfig, AutoModelForMaskedLM

from gaudi_lm.errors import UserError
from gaudi_lm.modeling.embeddings import enlarge_embeddings
from gaudi_lm.training.fsdp import FSDPTrainer

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
FIELDS = {
    "bert": {},
    "esm": {"position_embedding_type": "absolute", "mask_token_id": 4},
    "mobilebert": {"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 32},
    "modernbert": {"reference_compile": False},
}
LATENTS = {"d_latents": 32, "num_latents": 4, "d_model": 32, "num_blocks": 1, "num_self_attends_per_block": 1}


def make(kind: str, **fields):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=50, pad_token_id=1, **SMALL | fields)
    return AutoModelForMaskedLM.from_config(config).eval()


@pytest.mark.parametrize("kind", FIELDS)
def test_known_tokens_keep_their_logits(kind, tmp_path):
    model = make(kind, **FIELDS[kind])
    model.base_model.bias = torch.nn.Parameter(torch.zeros(()))  # of something else, and a number
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    tokens = torch.randint(5, 50, (2, 8))
    before = model(tokens, attention_mask=torch.ones_like(tokens)).logits
    enlarge_embeddings(model, 57)
    after = model(tokens, attention_mask=torch.ones_like(tokens)).logits
    assert after.shape == (2, 8, 57)
    torch.testing.assert_close(after[..., :50], before)
    model.save_pretrained(tmp_path)
    again = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(tokens, attention_mask=torch.ones_like(tokens)).logits, after)
    enlarge_embeddings(model, 40)
    assert model.get_input_embeddings().num_embeddings == 57


def test_one_line_where_that_cannot_be():
    with pytest.raises(UserError, match="ibert: its 50 embeddings cannot be made the tokenizer's 57"):
        enlarge_embeddings(make("ibert"), 57)
    with pytest.raises(UserError, match="perceiver: a model without a table of token embeddings"):
        enlarge_embeddings(make("perceiver", **LATENTS, num_self_attention_heads=2, num_cross_attention_heads=2), 57)


@pytest.mark.parametrize("tied", [True, False])
def test_a_device_takes_tied_weights_as_they_are(tied):
    """PyTorch makes new ones there, each for itself; what an adapter has parted stays so."""
    model = tiny_model("gpt2")
    head, embeddings = model.lm_head, model.transformer.wte
    assert head.weight is embeddings.weight
    if not tied:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    FSDPTrainer._move_model_to_device(None, model, "meta")
    assert {weight.device.type for weight in model.parameters()} == {"meta"}
    assert (head.weight is embeddings.weight) == tied
