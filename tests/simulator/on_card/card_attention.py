"""Attention by `--attn_implementation`, in each architecture: what eager computes, or a refusal."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import transformers
from card_models import TOLERANCE, batch, loss_and_gradients
from data.test_packing import worst_difference
from habana_frameworks.torch.hpex.kernels import FusedSDPA
from optimum.habana.transformers.modeling_utils import adapt_transformers_to_gaudi
from optimum.habana.transformers.trainer import _get_input_update_settings
from tiny_models import CAUSAL, MASKED, ODD, tiny_model
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from gaudi_lm.architectures import ARCHITECTURES, is_patched, packable
from gaudi_lm.errors import UserError
from gaudi_lm.modeling.attention import check_attention, choose_attention, hand_over_flags
from gaudi_lm.modeling.patches import FLASH_ATTENTION, restore_own_model

ALL = [*CAUSAL, *MASKED]
ENCODERS = ["bert", "camembert", "roberta", "xlm-roberta", "xlm-roberta-xl"]
OWN = ["cohere", "cohere2", "gemma", "granite", "olmo", "olmo2", "phi3", "smollm3", "starcoder2"]
SDPA = [*OWN, *ENCODERS, "albert", "distilbert", "falcon", "granitemoe", "modernbert", "olmoe"]
FUSED = [*OWN, *ENCODERS, "llama", "qwen2"]
TAKEN = {"eager": ALL, "sdpa": SDPA, "gaudi_fused_sdpa": FUSED}
CASES = [(attention, name) for attention, names in TAKEN.items() for name in names]
OFF = dict.fromkeys((*FLASH_ATTENTION, "attn_softmax_bf16", "use_zero3_leaf_promotion"), False)


@pytest.fixture(scope="module", autouse=True)
def patched() -> None:
    adapt_transformers_to_gaudi()
    assert "gaudi_fused_sdpa" not in ALL_MASK_ATTENTION_FUNCTIONS, "drop the mask of choose_attention"


def asked_for(name: str, attention: str, *flags: str, **fields) -> tuple[torch.nn.Module, dict]:
    """A tiny model on a card with that attention, as a script loads it, and what GaudiTrainer adds to its inputs."""
    args = SimpleNamespace(
        attn_implementation=attention, chosen=["attn_implementation"], device=torch.device("hpu"), do_train=True,
        **OFF | dict.fromkeys(flags, True),
    )  # fmt: skip
    config = transformers.AutoConfig.for_model(name, **{**(CAUSAL | MASKED)[name], **fields})
    if ARCHITECTURES[name].unpatched(config):
        restore_own_model(name)
    try:
        model = tiny_model(name, attn_implementation=choose_attention(config, args), **fields)
    except (KeyError, ValueError):
        model = None
    check_attention(config, args, model)
    hand_over_flags(model, args, args)
    model.to("hpu").tie_weights()
    model.accelerator = model.base_model.accelerator = None
    return model, _get_input_update_settings(model)[1]


def batches() -> list[dict]:
    """Rows without a mask, with one of ones, and padded."""
    inputs = {key: value.to("hpu") for key, value in batch().items()}
    unmasked = {key: value for key, value in inputs.items() if key != "attention_mask"}
    padded = {key: value.clone() for key, value in inputs.items()}
    padded["attention_mask"][1, 5:] = 0  # more padding than a window has tokens
    padded["labels"][1, 5:] = -100
    return [unmasked, inputs, padded]


def dropping(name: str) -> dict:
    """Fields of a configuration with half of attention's probabilities dropped."""
    known = transformers.AutoConfig.for_model(name).to_dict()
    names = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
    fields: dict = {field: 0.5 for field in names if field in known} or {"attn_config": {"attn_pdrop": 0.5}}
    if name == "falcon":
        fields["alibi"] = True  # transformers drops nothing without
    return fields


def differs(model: torch.nn.Module, **added) -> bool:
    """Whether two passes over a batch differ."""
    if model.config.model_type in CAUSAL:
        added["use_cache"] = False
    with torch.no_grad():
        one, other = (model(**batches()[1], **added).logits for _ in range(2))
    return not torch.equal(one, other)


def test_what_optimum_habana_does_alone():
    """What this suite refuses or mends would be left as it is where these fail."""
    for name, attention, added in (
        ("mixtral", "eager", {}),
        ("bert", "sdpa", {}),
        ("llama", "gaudi_fused_sdpa", {"use_flash_attention": True}),
        ("qwen2", "gaudi_fused_sdpa", {"use_flash_attention": True}),
    ):
        assert not differs(tiny_model(name, attn_implementation=attention, **dropping(name)).to("hpu"), **added)
    with pytest.raises(AttributeError, match="transpose_for_scores"):
        differs(tiny_model("xlm-roberta", attn_implementation="sdpa").to("hpu"))


CHOSEN = [(attention, name, {}) for attention, name in CASES if attention != "eager"]
CHOSEN += [(attention, name, ODD[name]) for attention, name, _ in CHOSEN if name in OWN and name in ODD]


@pytest.mark.parametrize(
    "attention, name, fields", CHOSEN, ids=["-odd" * bool(c[2]) + "-".join(c[:2]) for c in CHOSEN]
)
def test_a_chosen_attention_computes_what_eager_does(attention, name, fields):
    model, added = asked_for(name, attention, **fields)
    eager, _ = asked_for(name, "eager", **fields)
    eager.load_state_dict(model.state_dict())
    for inputs in batches():
        for each in (model, eager):
            each.zero_grad()
        wanted, _, gradients = loss_and_gradients(eager, inputs)
        loss, _, found = loss_and_gradients(model, {**inputs, **added})
        assert loss == pytest.approx(wanted, abs=TOLERANCE)
        for parameter, gradient in gradients.items():
            torch.testing.assert_close(found[parameter], gradient, rtol=1e-4, atol=TOLERANCE, msg=parameter)


@pytest.mark.parametrize("name", FUSED)
def test_the_fused_kernel_is_called_once_in_each_layer(name, monkeypatch):
    model, added = asked_for(name, "gaudi_fused_sdpa")
    calls, attend = [], FusedSDPA.apply
    monkeypatch.setattr(FusedSDPA, "apply", staticmethod(lambda *args: calls.append(args) or attend(*args)))
    loss_and_gradients(model, {**batches()[2], **added})
    assert len(calls) == model.config.num_hidden_layers


@pytest.mark.parametrize("name, fields", [(name, ODD.get(name, {}) if name in OWN else {}) for name in FUSED])
def test_the_fused_kernel_under_autocast_has_no_infinite_mask(name, fields):
    model, added = asked_for(name, "gaudi_fused_sdpa", **fields)
    eager, _ = asked_for(name, "eager", **fields)
    eager.load_state_dict(model.state_dict())
    inputs = batches()[2]
    with torch.autocast("hpu", torch.bfloat16):
        wanted, _, _ = loss_and_gradients(eager, inputs)
        loss, _, found = loss_and_gradients(model, {**inputs, **added})
    assert loss == pytest.approx(wanted, abs=0.03)
    assert all(gradient.isfinite().all() for gradient in found.values())


@pytest.mark.parametrize("fields", [{}, {"is_decoder": True}])
def test_what_the_fused_kernel_cannot_do_is_left_to_the_model(fields):
    model, _ = asked_for("roberta", "gaudi_fused_sdpa", **fields)
    eager, _ = asked_for("roberta", "eager", **fields)
    eager.load_state_dict(model.state_dict())
    found, wanted = (each(**batches()[2], output_attentions=not fields) for each in (model, eager))
    torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-4, atol=TOLERANCE)
    for one, other in zip(found.attentions or (), wanted.attentions or (), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=TOLERANCE)
    half = torch.tensor([1.0, 0, 1, 0], device="hpu")
    masked = (each(**batches()[2], head_mask=half).logits for each in (model, eager))
    torch.testing.assert_close(*masked, rtol=1e-4, atol=TOLERANCE)


@pytest.mark.parametrize("name", FUSED)
def test_a_fast_softmax_that_is_recomputed_is_for_causal_masks_alone(name):
    both = ("flash_attention_fast_softmax", "flash_attention_recompute")
    with pytest.raises(UserError, match="--flash_attention_fast_softmax"):
        asked_for(name, "gaudi_fused_sdpa", *both)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "olmo2"])
@pytest.mark.parametrize("flag", FLASH_ATTENTION)
def test_flags_of_the_fused_kernel_are_not_for_eager_attention(flag, name):
    with pytest.raises(UserError, match=f"^--{flag}: it is for --attn_implementation gaudi_fused_sdpa"):
        asked_for(name, "eager", flag)


@pytest.mark.parametrize("name", ["bert", "modernbert", "roberta"])
@pytest.mark.parametrize("flag", ["attn_softmax_bf16", "flash_attention_causal_mask", "flash_attention_fp8"])
def test_flags_that_no_masked_model_takes_are_refused(flag, name):
    attention = "gaudi_fused_sdpa" if name in ENCODERS and flag in FLASH_ATTENTION else "eager"
    with pytest.raises(UserError, match=f"^--{flag}: "):
        asked_for(name, attention, flag)


@pytest.mark.parametrize("name", ENCODERS)
def test_positions_that_are_not_absolute_are_refused(name):
    with pytest.raises(
        UserError, match=f"--attn_implementation sdpa: {name} has position_embedding_type relative_key"
    ):
        asked_for(name, "sdpa", position_embedding_type="relative_key")


@pytest.mark.parametrize("attention, name", [case for case in CASES if case[0] != "eager"])
def test_packed_texts_do_not_see_each_other(attention, name):
    model, added = asked_for(name, attention)
    model.forward = partial(model.forward, **added)
    if name in packable(is_patched(model)):
        assert worst_difference(model, "hpu") <= 1e-5
    else:
        with pytest.raises(UserError, match="--pack_sequences: "):
            worst_difference(model, "hpu")


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("attention", ["sdpa", "gaudi_fused_sdpa"])
def test_an_attention_that_a_model_does_not_have_is_refused_by_name(attention, name):
    if name in TAKEN[attention]:
        assert asked_for(name, attention)
    else:
        with pytest.raises(UserError, match=rf"--attn_implementation {attention}: .*{name}"):
            asked_for(name, attention)


@pytest.mark.parametrize("attention, name", CASES)
def test_attention_drops_where_the_configuration_says_so(attention, name):
    """In a model that drops nothing else."""
    fields = dropping(name)
    if attention == "gaudi_fused_sdpa" and name in ("llama", "qwen2"):
        with pytest.raises(
            UserError, match=f"{name} has no dropout in it, and the configuration an attention dropout"
        ):
            asked_for(name, attention, **fields)
        return
    model, added = asked_for(name, attention, **fields)
    for training in (True, False):
        assert differs(model.train(training), **added) == training
