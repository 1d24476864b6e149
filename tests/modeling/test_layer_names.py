"""Layers by name: the stacks of a model, and what FSDP divides it into."""

import os
from types import SimpleNamespace

import pytest
from peft import LoraConfig, get_peft_model
from tiny_models import CAUSAL, MASKED, tiny_model

from gaudi_lm.errors import UserError
from gaudi_lm.modeling.layer_names import classes_on_card, layer_classes
from gaudi_lm.training.fsdp import choose_layers


@pytest.mark.parametrize("model_type", [*CAUSAL, *MASKED])
def test_each_model_is_a_stack_of_layers_of_one_class(model_type):
    model = tiny_model(model_type)
    (name,) = layer_classes(model)
    known = (model._no_split_modules or []) if model_type in CAUSAL else [name]
    assert name in known and name.endswith(("Layer", "Block", "LayerGroup"))


def test_the_classes_of_a_card_go_by_those_of_transformers():
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.__class__ = type("GaudiLlamaDecoderLayer", (type(layer),), {})
    names = ["GaudiLlamaDecoderLayer", "LlamaDecoderLayer", "LlamaMLP"]
    assert classes_on_card(model, names) == [names[0], names[0], names[2]]
    with pytest.raises(UserError, match="^--fsdp_config: transformer_layer_cls_to_wrap GPT2Block: .* GaudiLlamaDecod"):
        classes_on_card(model, ["GPT2Block"])


def training_args(*options: str, weight_decay: float = 0.0, **config) -> SimpleNamespace:
    return SimpleNamespace(fsdp=list(options), fsdp_config={"min_num_params": 0, **config}, weight_decay=weight_decay)


def test_what_fsdp_divides_is_chosen_and_told_to_the_libraries(monkeypatch):
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "before")

    def told(model, *options, **config) -> str:
        args = training_args(*options, **config)
        choose_layers(model, args)
        found = os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"]
        assert args.fsdp_config.get("transformer_layer_cls_to_wrap") == (
            found.split(",") if found != "before" else None
        )
        return found

    model = tiny_model("gpt2")
    assert (
        told(model) == told(model, "full_shard") == told(get_peft_model(tiny_model("gpt2"), LoraConfig())) == "before"
    )
    assert told(model, "full_shard", "auto_wrap") == "GPT2Block"
    assert told(model, "auto_wrap", transformer_layer_cls_to_wrap=["GPT2MLP", "GPT2Attention"]) == (
        "GPT2MLP,GPT2Attention"
    )
    assert told(get_peft_model(model, LoraConfig()), "full_shard") == "GPT2Block"  # peft divides it in any case


def test_what_fsdp_would_train_otherwise_is_refused(monkeypatch):
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "before")
    tied, apart = tiny_model("gpt2"), tiny_model("llama")
    assert tied.config.tie_word_embeddings and not apart.config.tie_word_embeddings
    by_size = training_args("auto_wrap", min_num_params=9)
    choose_layers(apart, by_size)
    with pytest.raises(UserError, match="^--fsdp_config: min_num_params .* tied, .*: GPT2Block$"):
        choose_layers(tied, by_size)
    choose_layers(get_peft_model(tied, LoraConfig()), by_size)
    flat = training_args("auto_wrap", weight_decay=0.1, use_orig_params=False)
    with pytest.raises(UserError, match=r"^--weight_decay 0.1: with use_orig_params false in --fsdp_config"):
        choose_layers(apart, flat)
    choose_layers(apart, training_args("auto_wrap", weight_decay=0.1))
    choose_layers(apart, training_args("auto_wrap", use_orig_params=False))
    choose_layers(get_peft_model(apart, LoraConfig()), flat)  # which has neither


def test_settings_of_fsdp_that_are_not_used_are_named(monkeypatch, caplog):
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "before")
    llama, adapted = tiny_model("llama"), get_peft_model(tiny_model("llama"), LoraConfig())
    layers = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    for model, option, config, words in (
        (
            adapted,
            "auto_wrap",
            {"min_num_params": 9},
            "min_num_params changes nothing: an adapter is divided by layers",
        ),
        (llama, "full_shard", {"min_num_params": 9}, "min_num_params changes nothing: --fsdp has no auto_wrap"),
        (llama, "full_shard", layers, "transformer_layer_cls_to_wrap changes nothing: --fsdp has no auto_wrap"),
        (llama, "auto_wrap", {"min_num_params": 9}, ""),
        (llama, "auto_wrap", layers, ""),
        (adapted, "full_shard", layers, ""),
    ):
        caplog.clear()
        choose_layers(model, training_args(option, **config))
        assert caplog.messages == ([f"--fsdp_config: {words}"] if words else [])
