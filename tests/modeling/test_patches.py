"""Each patch of a library is needed: a test that fails here says that the library has mended what the patch is for.

The libraries' own code is read where the fault shows on a card alone.
"""

import ast
import importlib
import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import accelerate.utils.other
import pytest
import torch
import torch.utils.checkpoint
import transformers.modeling_utils
from accelerate import Accelerator
from optimum.habana import GaudiTrainer
from optimum.habana.accelerate import GaudiAccelerator
from optimum.habana.transformers.trainer import _get_input_update_settings
from peft import AdaLoraConfig, AdaptionPromptConfig, LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners import tuners_utils
from peft.tuners.adalora import SVDLinear
from peft.tuners.adaption_prompt import AdaptedAttention
from running import ROOT
from tiny_models import tiny_model
from transformers import GenerationConfig, Trainer
from transformers.safetensors_conversion import auto_conversion
from transformers.utils import import_utils

from gaudi_lm.modeling import patches, releases

HABANA = Path(next(iter(importlib.util.find_spec("optimum.habana").submodule_search_locations)))


def definition(file: str, name: str) -> str:
    """The source of a class or function of optimum-habana, unimported: its models want a card's packages."""
    source = (HABANA / file).read_text()
    found = [node for node in ast.parse(source).body if getattr(node, "name", None) == name]
    return ast.get_source_segment(source, found[0])


def load_stock(module: ModuleType) -> ModuleType:
    """A second copy of a module, as it is in its file."""
    spec = importlib.util.spec_from_file_location(module.__name__, module.__file__)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy


@pytest.fixture
def unpatched(monkeypatch):
    """transformers as it comes, whatever other tests have patched in this process."""
    for name in ("attn_softmax_bf16", "use_flash_attention", *patches.FLASH_ATTENTION):
        monkeypatch.delattr(GenerationConfig, name, raising=False)
    monkeypatch.setattr(transformers.modeling_utils, "auto_conversion", auto_conversion)
    default = torch.utils.checkpoint.DefaultDeviceType.get_device_type()
    yield
    torch.utils.checkpoint.DefaultDeviceType.set_device_type(default)


@pytest.mark.slow
def test_importing_the_suite_patches_nothing():
    modules = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "gaudi_lm" / "modeling").glob("[a-z]*.py")]
    code = [
        "import torch, transformers.modeling_utils, peft",
        "attention, layer = peft.tuners.adaption_prompt.AdaptedAttention, peft.tuners.adalora.SVDLinear",
        "import peft.tuners.tuners_utils",
        "places = [torch.nn.functional, transformers.modeling_utils, transformers.GenerationConfig, attention, layer]",
        "places.append(peft.tuners.tuners_utils)",
        "before = [dict(vars(place)) for place in places]",
        *(f"import {'.'.join(module.parts)}" for module in modules),
        "for place, names in zip(places, before):",
        "    changed = [name for name, value in names.items() if vars(place)[name] is not value]",
        "    assert not changed, (place, changed)",
        "    assert vars(place).keys() == names.keys(), place",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(code)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_patch_is_left_out_with_another_release(unpatched, monkeypatch):
    for release, applied in (("4.55.4", True), ("4.55", True), ("4.550.1", False), ("4.56.0", False)):
        monkeypatch.setattr(transformers.modeling_utils, "auto_conversion", auto_conversion)
        monkeypatch.setattr(releases, "version", {"transformers": release}.__getitem__)
        patches.keep_pickled_weights()
        assert (transformers.modeling_utils.auto_conversion is not auto_conversion) == applied, release


def test_no_setting_keeps_weights_from_being_converted(unpatched):
    source = inspect.getsource(transformers.modeling_utils)
    assert "target=auto_conversion" in source and "DISABLE_SAFETENSORS_CONVERSION" not in source
    patches.keep_pickled_weights()
    assert transformers.modeling_utils.auto_conversion("a/model", revision="main") == (None, None, None)


@pytest.mark.parametrize("name", patches.LEFT_OUT)
def test_what_was_left_out_is_found_when_it_is_called(monkeypatch, name):
    module, (origin, function) = importlib.import_module(name), patches.LEFT_OUT[name]
    assert f"\n    from {origin} import {function}\n" in inspect.getsource(module)
    flag = f"_{origin.partition('.')[0]}_available"
    for holder, attribute in ((module, function), (import_utils, flag)):
        monkeypatch.setattr(holder, attribute, False, raising=False)
    delattr(module, function)
    patches.find_scikit_learn()
    assert getattr(import_utils, flag)
    if function == "roc_curve":
        assert module.roc_curve([0, 1], [0.1, 0.9])[1].tolist() == [0, 1, 1]
    else:
        assert [one.tolist() for one in module.linear_sum_assignment([[2, 1], [1, 2]])] == [[0, 1], [1, 0]]


def test_deepspeed_is_looked_for_where_it_is_imported(monkeypatch):
    source = inspect.getsource(accelerate.utils.other.extract_model_from_parallel)
    assert "    if is_deepspeed_available():\n        from deepspeed import DeepSpeedEngine\n" in source
    monkeypatch.setattr(accelerate.utils.other, "is_deepspeed_available", None)
    patches.leave_out_deepspeed()
    monkeypatch.delitem(sys.modules, "deepspeed", raising=False)
    model = torch.nn.Linear(2, 2)
    assert Accelerator().unwrap_model(model) is model and "deepspeed" not in sys.modules
    engine = type("DeepSpeedEngine", (torch.nn.Module,), {})()
    engine.module = model
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(DeepSpeedEngine=type(engine)))
    assert Accelerator().unwrap_model(engine) is model


def test_a_copy_with_compiled_regions_calls_what_it_was_copied_from():
    model = tiny_model("gpt2").eval()
    model.forward = model.forward  # as the loss of this suite does
    copy = accelerate.utils.other.compile_regions(model, backend=lambda *_: pytest.fail("compiled"))
    copy(input_ids=torch.tensor([[1, 2, 3]]))


def test_checkpointing_looks_for_a_card(unpatched):
    source = (HABANA / "transformers" / "gradient_checkpointing.py").read_text()
    assert '    DefaultDeviceType.set_device_type("hpu")' in source
    patches.set_checkpoint_device("cpu")
    assert torch.utils.checkpoint.DefaultDeviceType.get_device_type() == "cpu"


def test_the_trainer_reads_settings_that_are_not_there(unpatched):
    model = tiny_model("llama")
    with pytest.raises(AttributeError):
        _get_input_update_settings(model)
    patches.complete_generation_config()
    assert not _get_input_update_settings(model)[0]
    assert "use_flash_attention" not in model.generation_config.to_dict()


def test_a_token_sees_one_more_than_its_window(monkeypatch):
    masks = importlib.import_module("optimum.habana.transformers.modeling_attn_mask_utils")
    converters = masks.GaudiAttentionMaskConverter, masks.AttentionMaskConverter
    for converter in converters:
        monkeypatch.setattr(converter, "_make_causal_mask", staticmethod(converter._make_causal_mask))

    def seen(converter) -> list[int]:
        made = converter(is_causal=True, sliding_window=2)
        mask = made.to_4d(torch.ones(1, 4), 4, torch.float32, key_value_length=4)
        return (mask[0, 0] == 0).sum(1).tolist()

    assert [seen(converter) for converter in converters] == [[1, 2, 3, 3]] * 2
    for _ in range(2):
        patches.narrow_windows()
        assert [seen(converter) for converter in converters] == [[1, 2, 2, 2]] * 2


def test_adapter_layers_are_not_those_of_a_card():
    assert "* scaling / ranknum" in inspect.getsource(SVDLinear)
    assert "pre_attn_forward" not in inspect.getsource(AdaptedAttention)
    assert "pre_attn_forward" in (HABANA / "transformers" / "models" / "llama" / "modeling_llama.py").read_text()
    assert not [path for path in HABANA.rglob("*.py") if "SVDLinear.forward = " in path.read_text()]


def test_some_models_of_optimum_habana_are_wrong():
    """tests/simulator/on_card/card_models.py shows that these and others are, and that transformers' own are not."""
    models = "transformers/models"
    block = definition(f"{models}/codegen/modeling_codegen.py", "gaudi_codegen_block_forward")
    assert "attn_outputs, attn_weights = self.attn(" in block  # a tuple and weights
    assert "attn_outputs + feed_forward_hidden_states" in block
    layer = definition(f"{models}/cohere/modeling_cohere.py", "GaudiCohereDecoderLayer")
    model = definition(f"{models}/cohere/modeling_cohere.py", "gaudi_cohere_model_forward")
    assert "output_attentions" not in layer and "hidden_states = decoder_layer(" in model
    attention = definition(f"{models}/starcoder2/modeling_starcoder2.py", "GaudiStarcoder2Attention")
    assert "input_shape=" not in attention
    gemma = definition(f"{models}/gemma/modeling_gemma.py", "GaudiGemmaDecoderLayer")
    norm, added = "self.post_attention_layernorm(", "hidden_states + residual"
    assert gemma.index(norm) < gemma.index(added)
    scores = definition(f"{models}/phi/modeling_phi.py", "gaudi_eager_attention_forward")
    assert "repeat_kv(" in scores and "key_states.transpose(2, 3)" in scores  # of five dimensions, not the last two


@pytest.mark.parametrize("model_type", ["granitemoe", "olmoe", "qwen2_moe"])
def test_routers_are_balanced_on_a_numbered_device_alone(model_type, monkeypatch):
    model = tiny_model(model_type, output_router_logits=True)
    module = importlib.import_module(type(model).__module__)
    monkeypatch.setattr(module, "load_balancing_loss_func", load_stock(module).load_balancing_loss_func)
    ids = torch.tensor([[3, 4, 5]])
    with pytest.raises(TypeError, match="NoneType"):
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    patches.repair_router_loss(model)
    assert model(input_ids=ids, attention_mask=torch.ones_like(ids)).aux_loss > 0


def test_checkpointing_of_lazy_mode_loses_inputs():
    called = inspect.signature(torch.utils.checkpoint._checkpoint_without_reentrant_generator).parameters
    own = definition("transformers/gradient_checkpointing.py", "checkpoint")
    assert "early_stop" in called
    assert "function, preserve, context_fn, determinism_check, debug, *args, **kwargs" in own
    files = {
        "GPT2Block": "gpt2",
        "OPTDecoderLayer": "opt",
        "PhiDecoderLayer": "phi",
        "StableLmDecoderLayer": "stablelm",
    }
    for name, model in files.items():
        layer = definition(f"transformers/models/{model}/modeling_{model}.py", f"Gaudi{name}")
        assert layer.startswith(f"class Gaudi{name}(torch.nn.Module):")
    big_code = "transformers/models/gpt_bigcode/modeling_gpt_bigcode.py"
    assert "checkpointing" not in definition(big_code, "gaudi_gpt_bigcode_model_forward")


def test_ranks_on_the_cpu_are_left_alone():
    source = inspect.getsource(GaudiAccelerator.prepare_model)
    assert "DistributedType.MULTI_HPU" in source and "MULTI_CPU" not in source


def test_the_warning_reads_the_card():
    """On the device `meta`, nothing can be read back."""
    model, input_ids = tiny_model("roberta"), torch.ones(2, 3, dtype=torch.long, device="meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        model.base_model.warn_if_padding_and_no_attention_mask(input_ids, None)
    patches.ignore_missing_mask(model)
    model.base_model.warn_if_padding_and_no_attention_mask(input_ids, None)


def test_a_llama_adapter_keeps_an_old_forward():
    adapted = get_peft_model(
        tiny_model("llama"), AdaptionPromptConfig(adapter_len=2, adapter_layers=1, task_type="CAUSAL_LM")
    )
    old = adapted.base_model.model.forward
    adapted.base_model.model.forward = lambda *args, **kwargs: "new"
    assert adapted.base_model.forward == old
    patches.complete_adapter(adapted)
    assert adapted.base_model.forward() == "new"


def test_adalora_has_no_name_outside_of_training():
    config = AdaLoraConfig(
        init_r=4, target_r=2, total_step=9, target_modules=["q_proj"], task_type="CAUSAL_LM", inference_mode=True
    )
    adapted = get_peft_model(tiny_model("llama"), config)
    batch = {name: torch.tensor([[3, 4, 5]]) for name in ("input_ids", "labels")}
    with pytest.raises(AttributeError, match="trainable_adapter_name"):
        adapted(**batch)
    patches.complete_adapter(adapted)
    assert torch.isfinite(adapted(**batch).loss)


def test_ranks_are_reduced_after_each_batch():
    """What :class:`gaudi_lm.modeling.adalora.RankReduction` mends."""
    assert "self.model.base_model.update_and_allocate(self.state.global_step)" in inspect.getsource(
        GaudiTrainer.training_step
    )


def test_bf16_on_the_cpu_is_turned_off_again():
    """What the constructor of LMTrainer mends: that of transformers comes after what GaudiTrainer has set."""
    source = inspect.getsource(GaudiTrainer.__init__)
    assert source.index("self.use_cpu_amp = True") < source.index("super().__init__(")
    assert "self.use_cpu_amp = False" in inspect.getsource(Trainer.__init__)


@pytest.mark.parametrize("inside", ["_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_an_adapter_in_layers_that_fsdp_wraps_is_saved_empty(monkeypatch, inside):
    found = inspect.unwrap(tuners_utils._get_tuner_state_dict_key_prefixes)
    monkeypatch.setattr(tuners_utils, "_get_tuner_state_dict_key_prefixes", found)
    adapted = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"]))
    state = adapted.state_dict()
    layers = adapted.get_base_model().model.layers
    for index, layer in enumerate(layers):
        layers[index] = torch.nn.Module()  # as FSDP does, whose state has the names from before
        layers[index].add_module(inside, layer)
    assert not get_peft_model_state_dict(adapted, state)
    patches.find_adapters_in_shards()
    patches.find_adapters_in_shards()
    assert len(get_peft_model_state_dict(adapted, state)) == 2 * len(layers)


def test_deepspeed_takes_a_step_before_the_first():
    """What comes of it, and of its absence, is shown by the losses in tests/simulator/test_large_models.py."""
    source = Path(importlib.util.find_spec("deepspeed").origin).parent / "runtime/fp16/fused_optimizer.py"
    (made,) = (
        one
        for one in ast.walk(ast.parse(source.read_text()))
        if getattr(one, "name", "") == "initialize_optimizer_states"
    )
    assert "self.optimizer.step()" in ast.unparse(made)
