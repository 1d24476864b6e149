"""The loss without full logits: same loss, gradients and counts as the full computation, for every architecture."""

import copy
import functools
import inspect
import os

import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32, extract_model_from_parallel
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from ports import reserved_port
from tiny_models import (
    CAUSAL,
    EXPERTS,
    MASKED,
    ODD,
    VOCABULARY,
    distance,
    gradients,
    make_batch,
    objective_of,
    tiny_model,
)
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import DefaultDeviceType
from transformers import AutoConfig, AutoModelForCausalLM, FNetConfig, FNetForMaskedLM, LlamaForCausalLM
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.modeling_outputs import CausalLMOutputWithPast

from gaudi_lm.architectures import ARCHITECTURES
from gaudi_lm.data.masked_token_budget import IGNORE_INDEX, default_budget, limit_predictions, select_targets
from gaudi_lm.device import run_script
from gaudi_lm.errors import UserError
from gaudi_lm.modeling import cross_entropy, patches
from gaudi_lm.modeling.cross_entropy import _highest, chunked_cross_entropy
from gaudi_lm.modeling.loss import TokenLossOutput, install_token_loss

torch.set_num_threads(1)


def aligned(logits, labels, objective):
    return (logits[:, :-1], labels[:, 1:]) if objective == "causal" else (logits, labels)


def exact_gradients(model, batch, objective):
    """Gradients of the full computation in double precision: what rounding is measured against."""
    exact = copy.deepcopy(model).double()
    torch.set_default_dtype(torch.float64)  # MPT fills its mask in the default type
    try:
        outputs = exact(**{name: value for name, value in batch.items() if name != "labels"})
    finally:
        torch.set_default_dtype(torch.float32)
    logits, labels = aligned(outputs.logits, batch["labels"], objective)
    loss = functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORE_INDEX)
    if outputs.get("aux_loss") is not None:
        loss = loss + exact.router_aux_loss_coef * outputs.aux_loss
    loss.backward()
    return gradients(exact)


def assert_same_gradients(ours, full, exact):
    """Within 2e-6 of the exact gradient, or not much farther from it than the full computation is.

    Both round, differently on each kind of processor, and where terms cancel, as in the biases of keys, rounding is
    much of what is left: 1.1e-6 with AVX-512.
    """
    assert ours.keys() == full.keys() == exact.keys()
    for name in full:
        allowed = max(2e-6 * exact[name].norm().item(), 3 * distance(full[name], exact[name]))
        assert distance(ours[name], exact[name]) <= allowed, name


def test_every_known_architecture_is_tested():
    assert set(CAUSAL) == {name for name, row in ARCHITECTURES.items() if row.causal_head}
    assert set(MASKED) == {name for name, row in ARCHITECTURES.items() if row.masked_head}


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        *(pytest.param(name, {}, id=name) for name in (*CAUSAL, *MASKED)),
        *(pytest.param(name, fields, id=f"{name}-odd") for name, fields in ODD.items()),
        *(pytest.param(name, {"output_router_logits": True}, id=f"{name}-routers") for name in EXPERTS),
    ],
)
def test_same_loss_gradients_and_counts(model_type, fields):
    objective = objective_of(model_type)
    batch = make_batch(objective)
    full = tiny_model(model_type, **fields)
    if "output_router_logits" in fields:
        patches.repair_router_loss(full)  # as `install_token_loss` does: there would be nothing to compare with
    ours = copy.deepcopy(full)
    line = install_token_loss(ours, objective, max_predictions_per_seq=12 if objective == "masked" else None)
    assert "without full logits" in line
    got, wanted = ours(**batch), full(**batch)
    parts = {"loss", "loss_sum", "correct", "count"} | ({"aux_loss"} if "output_router_logits" in fields else set())
    assert isinstance(got, TokenLossOutput) and set(got.keys()) == parts
    assert got.loss.item() == pytest.approx(wanted.loss.item(), rel=1e-6)
    logits, labels = aligned(wanted.logits, batch["labels"], objective)
    targets = labels != IGNORE_INDEX
    assert got.count.item() == targets.sum().item()
    assert got.correct.item() == ((logits.argmax(-1) == labels) & targets).sum().item()
    nll = functional.cross_entropy(logits[targets].double(), labels[targets], reduction="sum")
    assert got.loss_sum.item() == pytest.approx(nll.item(), rel=1e-6)
    got.loss.backward()
    wanted.loss.backward()
    assert_same_gradients(gradients(ours), gradients(full), exact_gradients(full, batch, objective))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "bert", "roberta"])
def test_tied_and_untied_heads(model_type, tied):
    objective = objective_of(model_type)
    batch = make_batch(objective)
    full = tiny_model(model_type, tie_word_embeddings=tied)
    assert (full.get_output_embeddings().weight is full.get_input_embeddings().weight) == tied
    ours = copy.deepcopy(full)
    install_token_loss(ours, objective)
    ours(**batch).loss.backward()
    full(**batch).loss.backward()
    assert_same_gradients(gradients(ours), gradients(full), exact_gradients(full, batch, objective))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    vocabulary=st.integers(2, 70),
    chunk=st.integers(1, 48),
    ignored=st.floats(0, 1),
    bias=st.booleans(),
    scale=st.sampled_from([1.0, 0.0625, 3.0]),
    softcap=st.sampled_from([None, 0.5, 30.0]),
    smoothing=st.sampled_from([0.0, 0.1, 0.7]),
    frozen=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_chunked_cross_entropy(rows, vocabulary, chunk, ignored, bias, scale, softcap, smoothing, frozen, seed):
    torch.manual_seed(seed)
    hidden = torch.randn(rows, 16, requires_grad=True)
    weight = torch.randn(vocabulary, 16).requires_grad_(not frozen)
    offset = torch.randn(vocabulary, requires_grad=True) if bias else None
    labels = torch.randint(vocabulary, (rows,)).masked_fill(torch.rand(rows) < ignored, IGNORE_INDEX)
    loss, correct = chunked_cross_entropy(
        hidden, weight, labels, bias=offset, scale=scale, softcap=softcap, smoothing=smoothing, chunk_rows=chunk
    )
    (loss / 7).backward()

    exact = [None if t is None else t.detach().double().requires_grad_() for t in (hidden, weight, offset)]
    logits = scale * functional.linear(*exact)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    wanted = functional.cross_entropy(
        logits, labels, ignore_index=IGNORE_INDEX, reduction="sum", label_smoothing=smoothing
    )
    (wanted / 7).backward()
    assert loss.dtype is torch.float32
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6, abs=1e-6)
    best = logits.topk(2, dim=1).values
    clear = best[:, 0] - best[:, 1] > 1e-5  # else rounding decides which of two logits is the larger
    surely = ((logits.argmax(1) == labels) & (labels != IGNORE_INDEX) & clear).sum().item()
    assert surely <= correct.item() <= surely + (~clear).sum().item()
    assert (weight.grad is None) == frozen
    # Softmax minus one-hot cancels where a target is certain: rounding is then a share of 1, not of what is left.
    floor = 1e-7 * scale * rows
    for ours, reference in zip((hidden, weight, offset), exact, strict=True):
        if ours is not None and ours.requires_grad:
            assert distance(ours.grad, reference.grad) <= 1e-6 * reference.grad.norm().item() + floor


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(2, 50), st.integers(0, 2**16))
def test_argmax_takes_the_first_of_equals(classes, rows, values, seed):
    logits = torch.randint(values, (classes, rows), generator=torch.Generator().manual_seed(seed)).float()
    wanted = (logits == logits.amax(0)).int().argmax(0)
    for highest, index in (_highest(logits, 0, group=4), _highest(logits.t().contiguous(), 1)):
        assert torch.equal(index, wanted)
        assert torch.equal(highest, logits.amax(0))


@settings(max_examples=12, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 3), min_size=2, max_size=4),
    model_type=st.sampled_from(["gpt2", "bert", "distilbert", "albert", "roberta", "llama"]),
    seed=st.integers(0, 100),
)
def test_accumulation_is_one_large_batch(sizes, model_type, seed):
    objective = objective_of(model_type)
    batch = make_batch(objective, rows=sum(sizes), length=11, seed=seed)
    whole, parts = tiny_model(model_type), tiny_model(model_type)
    for model in (whole, parts):
        install_token_loss(model, objective)
    output = whole(**batch)
    output.loss.backward()
    start, total = 0, 0.0
    for size in sizes:
        part = {name: value[start : start + size] for name, value in batch.items()}
        loss = parts(**part, num_items_in_batch=output.count).loss
        loss.backward()
        total += loss.item()
        start += size
    assert total == pytest.approx(output.loss.item(), rel=1e-5, abs=1e-7)
    whole_gradients = gradients(whole)
    scale = max(g.norm().item() for g in whole_gradients.values())
    for name, gradient in gradients(parts).items():
        assert distance(gradient, whole_gradients[name]) <= 1e-5 * scale, name


@pytest.mark.parametrize("num_items", [None, 0, torch.tensor(0)])
@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("model_type", ["gpt2", "bert"])
def test_no_targets_is_zero_loss(model_type, chunked, num_items):
    model = tiny_model(model_type)
    install_token_loss(model, objective_of(model_type), chunked=chunked)
    input_ids = torch.randint(3, VOCABULARY, (2, 9))
    output = model(input_ids=input_ids, labels=torch.full_like(input_ids, -100), num_items_in_batch=num_items)
    output.loss.backward()
    assert output.loss.item() == 0.0 and output.count.item() == 0 and output.correct.item() == 0
    assert all(not g.any() for g in gradients(model).values())


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "qwen2"])
def test_unpadded_rows_need_no_attention_mask(model_type, monkeypatch):
    """Without a cache, transformers 4.55 builds one of shape (batch, 1, length, length), and SDPA cannot skip half."""
    masks, attend = [], functional.scaled_dot_product_attention

    def record(*args, attn_mask=None, **options):
        masks.append(attn_mask)
        return attend(*args, attn_mask=attn_mask, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", record)
    model = tiny_model(model_type)
    input_ids = torch.randint(3, VOCABULARY, (2, 20))
    wanted = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss.item()
    assert len(masks) == 2 and all(mask.shape == (2, 1, 20, 20) for mask in masks)
    masks.clear()
    install_token_loss(model, "causal")
    assert model(input_ids=input_ids, labels=input_ids).loss.item() == pytest.approx(wanted, rel=1e-6)
    assert masks == [None, None]


def test_a_model_without_attention_needs_no_attention_mask():
    config = FNetConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, intermediate_size=16)
    model, batch = FNetForMaskedLM(config).eval(), make_batch("masked")
    wanted = model(input_ids=batch["input_ids"]).logits
    assert "tokens see padding" in install_token_loss(model, "masked")
    loss = functional.cross_entropy(wanted.transpose(1, 2), batch["labels"])
    torch.testing.assert_close(model(**batch).loss, loss)
    assert torch.equal(model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits, wanted)


def test_lora_gives_the_same_adapter_gradients_and_none_for_the_head():
    batch = make_batch("causal")
    adapters = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    full = get_peft_model(tiny_model("llama"), adapters)
    ours = copy.deepcopy(full)
    line = install_token_loss(ours, "causal")
    assert "frozen head" in line
    got, wanted = ours(**batch), full(**batch)
    assert got.loss.item() == pytest.approx(wanted.loss.item(), rel=1e-6)
    with Operations() as operations:
        got.loss.backward()
    wanted.loss.backward()
    assert ours.get_base_model().lm_head.weight.grad is None
    assert not any(shape == (VOCABULARY, 32) for shape in operations.shapes)
    for name, gradient in gradients(ours).items():
        assert distance(gradient, gradients(full)[name]) <= 1e-6 * gradients(full)[name].norm().item()


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "bert", "roberta"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(model_type, reentrant, monkeypatch):
    # Other tests import optimum-habana, which sets this to hpu; the scripts' set-up sets it back.
    monkeypatch.setattr(DefaultDeviceType, "_default_device_type", "cpu")
    objective = objective_of(model_type)
    batch = make_batch(objective)
    plain = tiny_model(model_type)
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for model in (plain, checkpointed):
        install_token_loss(model, objective)
        model(**batch).loss.backward()
    for name, gradient in gradients(plain).items():
        assert torch.equal(gradient, gradients(checkpointed)[name]), name


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "roberta"])
def test_autocast(model_type):
    """In bfloat16 the distance to the exact gradient is no more than the full computation's own."""
    objective = objective_of(model_type)
    batch = make_batch(objective)
    full = tiny_model(model_type)
    ours = copy.deepcopy(full)
    install_token_loss(ours, objective)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, wanted = ours(**batch), full(**batch)
    assert got.loss.dtype is torch.float32
    assert got.loss.item() == pytest.approx(wanted.loss.item(), rel=1e-3)
    got.loss.backward()
    wanted.loss.backward()
    exact = exact_gradients(full, batch, objective)
    total = sum(g.norm().item() ** 2 for g in exact.values()) ** 0.5
    for name, gradient in gradients(ours).items():
        assert gradient.dtype is torch.float32
        assert distance(gradient, exact[name]) <= 1.5 * distance(gradients(full)[name], exact[name]) + 1e-4 * total


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "bert", "distilbert"])
def test_evaluation_gives_the_same_figures(model_type):
    objective = objective_of(model_type)
    batch = make_batch(objective)
    model = tiny_model(model_type)
    install_token_loss(model, objective)
    training = model(**batch)
    with torch.no_grad():
        evaluation = model.eval()(**batch)
    assert not evaluation.loss.requires_grad
    assert {k: v.item() for k, v in evaluation.items()} == {k: v.item() for k, v in training.items()}


class Operations(TorchDispatchMode):
    """Records what is computed, and refuses what makes a card wait or gives it a shape that depends on values."""

    REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "equal.default", "item")

    def __init__(self, refuse=False):
        super().__init__()
        self.refuse = refuse
        self.elements, self.shapes = 0, []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if self.refuse:
            assert not any(name in str(operation) for name in self.REFUSED), operation
            if str(operation).startswith("aten.index"):
                indices = [i for i in args[1] if i is not None] if isinstance(args[1], list | tuple) else [args[2]]
                assert all(i.dtype not in (torch.bool, torch.uint8) for i in indices), operation
        result = operation(*args, **(kwargs or {}))
        for value in result if isinstance(result, list | tuple) else [result]:
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
                self.shapes.append(tuple(value.shape))
        return result


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "bert", "roberta", "distilbert", "albert"])
def test_no_host_synchronisation(model_type, masked, monkeypatch):
    monkeypatch.setattr(cross_entropy, "_targets_alone", lambda hidden, labels: (hidden, labels))  # for the CPU alone
    objective = objective_of(model_type)
    # With SDPA, transformers itself looks into the mask; on a card the attention is another.
    model = tiny_model(model_type, attn_implementation="eager")
    install_token_loss(model, objective, max_predictions_per_seq=5 if objective == "masked" else None)
    batch = make_batch(objective)
    if not masked:
        del batch["attention_mask"]
    with Operations(refuse=True):
        model(**batch, num_items_in_batch=torch.tensor(9)).loss.backward()


def test_no_tensor_of_the_size_of_the_logits():
    vocabulary, rows, length = 50_000, 4, 128
    model = tiny_model("gpt2", vocab_size=vocabulary)
    input_ids = torch.randint(vocabulary, (rows, length))
    with Operations() as full:
        model(input_ids=input_ids, labels=input_ids).loss.backward()
    assert full.elements >= rows * length * vocabulary
    install_token_loss(model, "causal")
    with Operations() as ours:
        model(input_ids=input_ids, labels=input_ids).loss.backward()
    assert ours.elements <= rows * length * vocabulary / 3


def test_masked_head_runs_on_a_fixed_number_of_rows():
    model = tiny_model("roberta")
    install_token_loss(model, "masked", max_predictions_per_seq=lambda batch, length: 10)
    shapes = []
    for seed in range(3):
        batch = make_batch("masked", seed=seed)
        batch["labels"] = limit_predictions(batch["input_ids"], batch["labels"], batch["input_ids"], 10)[1]
        with Operations() as operations:
            output = model(**batch)
        assert output.count.item() == (batch["labels"] != IGNORE_INDEX).sum().item()
        shapes.append(operations.shapes)
    assert (10, VOCABULARY) in shapes[0] and (63, VOCABULARY) not in shapes[0]
    assert shapes[0] == shapes[1] == shapes[2]


def test_the_model_is_otherwise_unchanged(tmp_path):
    model = tiny_model("gpt2").eval()
    keys, logits = list(model.state_dict()), model(make_batch("causal")["input_ids"]).logits
    prompt = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    generated = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    signature = inspect.signature(model.forward)
    install_token_loss(model, "causal")
    install_token_loss(model, "causal")  # once more does no harm
    batch = make_batch("causal")
    assert model(**batch).loss.item() == pytest.approx(tiny_model("gpt2")(**batch).loss.item(), rel=1e-6)
    assert list(model.state_dict()) == keys
    assert torch.equal(model(batch["input_ids"]).logits, logits)
    assert torch.equal(model.generate(**prompt, max_new_tokens=5, do_sample=False), generated)
    assert set(signature.parameters) - {"kwargs"} <= set(inspect.signature(model.forward).parameters)
    kinds = [p.kind for p in inspect.signature(tiny_model_with_loss("bert").forward).parameters.values()]
    assert inspect.Parameter.VAR_KEYWORD in kinds  # from which the trainer learns that num_items_in_batch is taken
    model.save_pretrained(tmp_path)
    restored = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(restored(batch["input_ids"]).logits, logits)


def tiny_model_with_loss(model_type):
    model = tiny_model(model_type)
    install_token_loss(model, objective_of(model_type))
    return model


def test_a_copy_runs_on_its_own_weights():
    model = tiny_model_with_loss("gpt2")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.transformer.ln_f.weight.mul_(3)
    batch = make_batch("causal")
    twin(**batch).loss.backward()
    assert gradients(twin) and not gradients(model)
    assert twin(**batch).loss.item() != model(**batch).loss.item()


def test_positional_arguments_and_return_dict():
    model = tiny_model_with_loss("bert")
    batch = make_batch("masked")
    wanted = model(**batch).loss
    assert torch.equal(model(batch["input_ids"], batch["attention_mask"], labels=batch["labels"]).loss, wanted)
    assert torch.equal(model(**batch, return_dict=False).loss, wanted)


def test_accelerate_wraps_and_unwraps_it():
    """As `Accelerator.prepare` does for mixed precision, and `unwrap_model` before saving."""
    model = tiny_model_with_loss("gpt2")
    batch = make_batch("causal")
    wanted = model(**batch).loss
    model._original_forward = model.forward
    wrapped = convert_outputs_to_fp32(torch.autocast("cpu", dtype=torch.bfloat16)(model.forward.__func__))
    model.forward = type(model._original_forward)(wrapped, model)
    output = model(**batch)
    assert isinstance(output, TokenLossOutput) and output.loss.dtype is torch.float32
    assert output.loss.item() != wanted.item()
    plain = extract_model_from_parallel(model, keep_fp32_wrapper=False)
    assert torch.equal(plain(**batch).loss, wanted)


@pytest.mark.parametrize(
    "ask",
    [lambda outputs: outputs.logits, lambda outputs: outputs["logits"], lambda outputs: outputs.get("logits")],
    ids=["attribute", "key", "get"],
)
def test_logits_that_are_not_there_are_a_user_error(ask):
    """Each way in which a `compute_loss` asks for them; the last would be None, and a traceback further on."""
    outputs = tiny_model_with_loss("gpt2")(**make_batch("causal"))
    with pytest.raises(UserError, match="^outputs.logits: .* take the labels out of the inputs first"):
        ask(outputs)
    assert not hasattr(outputs, "logits") and "logits" not in outputs
    assert outputs.get("loss") is outputs["loss"] is outputs[0] and outputs.get("hidden_states", 3) == 3


def _fsdp(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    return tiny_model("gpt2"), "FSDP"


def _zero3(monkeypatch):
    model = tiny_model("gpt2")
    model.keep_alive = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    return model, "ZeRO-3"


def _unknown(monkeypatch):
    config = AutoConfig.for_model(
        "biogpt", vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config), "biogpt"


def _adapted_head(monkeypatch):
    adapters = LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(tiny_model("llama"), adapters), "output embedding"


def _own_forward(monkeypatch):
    plain = tiny_model("llama")

    class CappedLlama(LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, attention_mask=None, position_ids=None, **kwargs):
            hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)[0]
            logits = torch.tanh(self.lm_head(hidden) / 3) * 3
            loss = None if labels is None else self.loss_function(logits, labels, self.vocab_size)
            return CausalLMOutputWithPast(loss=loss, logits=logits)

    model = CappedLlama(plain.config).train()
    model.load_state_dict(plain.state_dict())
    return model, "CappedLlama has a forward of its own"


def _own_forward_in_peft(monkeypatch):
    model, reason = _own_forward(monkeypatch)
    adapters = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(model, adapters), reason


def test_the_head_of_a_newer_deberta_is_not_entered():
    line = install_token_loss(tiny_model("deberta-v2", legacy=False), "masked")
    assert "from the full logits: the head of deberta-v2 is not known" in line


def test_the_weight_of_a_router_loss_must_be_known():
    model = tiny_model("mixtral", output_router_logits=True)
    install_token_loss(model, "causal")
    del model.router_aux_loss_coef, model.config.router_aux_loss_coef
    with pytest.raises(UserError, match="output_router_logits: the weight of mixtral's loss .* set it to false"):
        model(**make_batch("causal"))


@pytest.mark.parametrize("make", [_fsdp, _zero3, _unknown, _adapted_head, _own_forward, _own_forward_in_peft])
def test_full_logits_where_the_head_cannot_be_entered(make, monkeypatch):
    model, reason = make(monkeypatch)
    batch = make_batch("causal")
    wanted = model(**batch).loss
    line = install_token_loss(model, "causal")
    assert "full logits" in line and reason in line
    output = model(**batch)
    assert output.loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert "logits" not in output
    output.loss.backward()
    assert gradients(model)
    unset_hf_deepspeed_config()


def test_a_class_of_ones_own_that_leaves_forward_alone_has_no_full_logits():
    class CountingLlama(LlamaForCausalLM):
        def count(self):
            return sum(parameter.numel() for parameter in self.parameters())

    assert "without full logits" in install_token_loss(CountingLlama(tiny_model("llama").config), "causal")


def test_full_logits_when_asked_for():
    batch = make_batch("causal")
    chunked, full = tiny_model("gpt2"), tiny_model("gpt2")
    install_token_loss(chunked, "causal")
    assert "--chunked_loss False" in install_token_loss(full, "causal", chunked=False)
    for name, value in full(**batch).items():
        assert value.item() == pytest.approx(chunked(**batch)[name].item(), rel=1e-6)


def _rank(rank, port, folder):
    run_script(functools.partial(_save_gradients, rank, port, folder))


def _save_gradients(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    model = tiny_model_with_loss("gpt2")
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    batch = make_batch("causal", rows=8)
    items = (batch["labels"][:, 1:] != IGNORE_INDEX).sum()
    for micro in range(2):
        start = 4 * rank + 2 * micro
        part = {name: value[start : start + 2] for name, value in batch.items()}
        parallel.require_backward_grad_sync = micro == 1  # what `no_sync` sets
        # DDP averages over ranks what must be summed.
        (parallel(**part, num_items_in_batch=items).loss * 2).backward()
    torch.save(gradients(model), f"{folder}/{rank}.pt")


@pytest.mark.xdist_group("cards")
@pytest.mark.slow
def test_data_parallel_with_accumulation(tmp_path):
    with reserved_port() as port:
        torch.multiprocessing.spawn(_rank, (port, str(tmp_path)), nprocs=2)
    model = tiny_model_with_loss("gpt2")
    model(**make_batch("causal", rows=8)).loss.backward()
    scale = max(g.norm().item() for g in gradients(model).values())
    for rank in range(2):
        for name, gradient in torch.load(tmp_path / f"{rank}.pt").items():
            assert distance(gradient, gradients(model)[name]) <= 1e-6 * scale, name


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 20), st.integers(0, 150), st.floats(0, 1), st.integers(0, 2**16))
def test_select_targets(batch, length, rows, share, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(9, (batch, length), generator=generator)
    labels[torch.rand(batch, length, generator=generator) > share] = IGNORE_INDEX
    positions, targets = select_targets(labels, rows)
    wanted = (labels.reshape(-1) != IGNORE_INDEX).nonzero().squeeze(1)[:rows]
    assert len(positions) == len(targets) == min(rows, batch * length)
    assert torch.equal(positions[: len(wanted)], wanted)
    assert torch.equal(targets[: len(wanted)], labels.reshape(-1)[wanted])
    assert (targets[len(wanted) :] == IGNORE_INDEX).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 20), st.integers(0, 60), st.integers(0, 2**16))
def test_limit_predictions(batch, length, limit, seed):
    generator = torch.Generator().manual_seed(seed)
    original = torch.randint(5, 99, (batch, length), generator=generator)
    chosen = torch.rand(batch, length, generator=generator) < 0.5
    labels = original.masked_fill(~chosen, IGNORE_INDEX)
    masked = original.masked_fill(chosen, 4)
    before = masked.clone(), labels.clone()
    ids, kept, undone = limit_predictions(masked, labels, original, limit, generator)
    assert torch.equal(masked, before[0]) and torch.equal(labels, before[1])
    assert undone == max(0, int(chosen.sum()) - limit)
    assert (kept != IGNORE_INDEX).sum().item() == int(chosen.sum()) - undone
    assert torch.equal(ids == 4, kept != IGNORE_INDEX)
    assert torch.equal(ids[kept == IGNORE_INDEX], original[kept == IGNORE_INDEX])


def test_limit_predictions_favours_no_sequence():
    original = torch.full((8, 100), 7)
    kept = torch.zeros(8)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        kept += (limit_predictions(original, original, original, 80, generator)[1] != IGNORE_INDEX).sum(1)
    assert kept.min() > 0.9 * kept.mean() and kept.max() < 1.1 * kept.mean()


@pytest.mark.parametrize("batch, length, probability", [(1, 16, 0.15), (8, 128, 0.4), (32, 512, 0.15), (2, 8, 0.9)])
def test_the_default_budget_is_the_smallest_that_overflows_once_in_a_million(batch, length, probability):
    rows, tokens = default_budget(batch, length, probability), batch * length
    pmf = torch.distributions.Binomial(tokens, torch.tensor(probability, dtype=torch.float64)).log_prob(
        torch.arange(tokens + 1, dtype=torch.float64)
    )
    assert pmf[rows + 1 :].exp().sum() < 1e-6
    assert pmf[rows:].exp().sum() >= 1e-6
