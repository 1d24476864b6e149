"""Models under torch.compile: what is one graph, what it computes and what it holds."""

import pytest
import torch
from habana_frameworks.torch.hpu.metrics import metric_localcontext
from optimum.habana.transformers.modeling_utils import adapt_transformers_to_gaudi
from peft import LoraConfig, get_peft_model
from tiny_models import make_batch, objective_of, tiny_model

from gaudi_lm.modeling.loss import install_token_loss
from gaudi_lm.modeling.patches import patch_libraries

COMPILED = ["gpt2", "bert", "llama", "llama-lora", "falcon", "gemma2", "mistral", "qwen3"]
BROKEN = ["deberta", "gpt_oss", "granitemoe", "olmoe", "opt"]  # as docs/large_models.md says


@pytest.mark.parametrize("model_type", COMPILED)
def test_compiled_models(model_type):
    """Forward and backward are one graph each, with what this suite changes, and the results are the model's own."""
    adapt_transformers_to_gaudi()
    patch_libraries("hpu")
    model_type, _, adapted = model_type.partition("-")
    model = tiny_model(model_type)
    if adapted:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    limit = {"max_predictions_per_seq": 16} if objective_of(model_type) == "masked" else {}
    assert "in row chunks" in install_token_loss(model.to("hpu"), objective_of(model_type), **limit)
    tokens = torch.arange(3, 19)[None].to("hpu")
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}

    def train(run) -> list[torch.Tensor]:
        model.zero_grad()
        loss = run(**inputs).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    compiled = torch.compile(model, backend="hpu_backend", fullgraph=True)
    for got, wanted in zip(train(compiled), train(model), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    with metric_localcontext("graph_compilation") as metric:
        train(compiled)
        assert metric.stats()[0][1] == 0


def test_a_compiled_step_holds_no_full_logits():
    tokens = torch.randint(3, 9000, (4, 64)).to("hpu")
    peaks = {}
    for chunked in (False, True):
        model = tiny_model("gpt2", vocab_size=9000).to("hpu")
        install_token_loss(model, "causal", chunked=chunked)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="hpu_backend", fullgraph=True)
        compiled(input_ids=tokens, labels=tokens).loss.backward()  # gradients are there from now on
        before = torch.hpu.memory_allocated()
        torch.hpu.reset_peak_memory_stats()
        compiled(input_ids=tokens, labels=tokens).loss.backward()
        peaks[chunked] = torch.hpu.max_memory_allocated() - before
    logits = 4 * 64 * 9000 * 4
    assert peaks[False] > 2 * logits and peaks[True] < logits, peaks


@pytest.mark.parametrize("model_type", BROKEN)
def test_pytorch_breaks_the_graph(model_type):
    """The page would be wrong where this fails."""
    adapt_transformers_to_gaudi()
    patch_libraries("hpu")
    model = tiny_model(model_type, attn_implementation="eager").to("hpu")
    install_token_loss(model, objective_of(model_type))
    inputs = {name: value.to("hpu") for name, value in make_batch(objective_of(model_type)).items()}
    with torch._dynamo.error_on_graph_break(True), pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(model, backend="eager")(**inputs)
