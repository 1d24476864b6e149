"""Damaged and foreign models: one line that names the file, exit code 2, before anything is written."""

import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from running import run, run_many, run_several
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BartConfig, Exaone4Config, GenerationConfig, PretrainedConfig

from gaudi_lm.arguments.model_files import check_config, check_model_folders
from gaudi_lm.errors import UserError
from gaudi_lm.modeling.loaded import check_weights_of_files, repair_generation_config
from gaudi_lm.training.custom_parts import check_weights

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


def config(**changes):
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def content(name: str, data: bytes | float):
    """Replace a file's content, or keep only a share of it."""

    def change(folder: Path) -> None:
        file = folder / name
        whole = file.read_bytes()
        file.write_bytes(data if isinstance(data, bytes) else whole[: int(len(whole) * data)])

    return change


def pickled(share: float = 1.0, data: bytes | None = None):
    def change(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save(weights, folder / "pytorch_model.bin")
        content("pytorch_model.bin", share if data is None else data)(folder)

    return change


class Hostile:
    """What a pickle may do to who loads it."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def hostile(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"x": Hostile()}, folder / "pytorch_model.bin")


def shards(folder: Path) -> None:
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00002.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def indexed(**changes):
    """One shard, and an index of it with changes."""

    def change(folder: Path) -> None:
        shards(folder)
        file = folder / "model.safetensors.index.json"
        index = json.loads(file.read_text())
        save_file({}, folder / "model-00001-of-00002.safetensors", {"format": "pt"})
        file.write_text(json.dumps({name: value for name, value in (index | changes).items() if value is not None}))

    return change


def weights(change_one):
    """Change the name and the value of each tensor."""

    def change(folder: Path) -> None:
        file = folder / "model.safetensors"
        save_file(dict(change_one(*one) for one in load_file(file).items()), file, {"format": "pt"})

    return change


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "the/base"}')


def gguf(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "model.safetensors").rename(folder / "tiny.gguf")


def longest_text(length: object):
    def change(folder: Path) -> None:
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": length}))

    return change


DAMAGE = {
    "weights cut": (content("model.safetensors", 0.5), ["model.safetensors", "cut or damaged"]),
    "weights without their last byte": (content("model.safetensors", 0.99999), ["model.safetensors", "cut"]),
    "weights empty": (content("model.safetensors", b""), ["model.safetensors", "cut or damaged"]),
    "weights a page": (content("model.safetensors", b"<html>not found</html>"), ["model.safetensors", "damaged"]),
    "weights a pointer": (content("model.safetensors", POINTER), ["model.safetensors", "Git-LFS", "git lfs pull"]),
    "weights missing": (lambda folder: (folder / "model.safetensors").unlink(), ["model.safetensors"]),
    "pickle cut": (pickled(0.5), ["pytorch_model.bin"]),
    "pickle a pointer": (pickled(data=POINTER), ["pytorch_model.bin", "git lfs pull"]),
    "pickle hostile": (hostile, ["pytorch_model.bin"]),
    "shard missing": (shards, ["model-00001-of-00002.safetensors is missing", "model.safetensors.index.json"]),
    "index without files": (indexed(weight_map=None), ["model.safetensors.index.json has no weight_map"]),
    "index of a list": (indexed(weight_map=["a"]), ["model.safetensors.index.json has no weight_map"]),
    "index of numbers": (indexed(weight_map={"a": 1}), ["model.safetensors.index.json has no weight_map"]),
    "index without metadata": (indexed(metadata=None), ["model.safetensors.index.json has no metadata"]),
    "tensors in no shard": (indexed(), ["is in none of the files"]),
    "names of a wrapper": (weights(lambda name, value: (f"module.{name}", value)), ["no weight of GPT2LMHeadModel"]),
    "weights in fp8": (weights(lambda name, value: (name, value.to(torch.float8_e4m3fn))), ["float8_e4m3fn"]),
    "adapter": (adapter, ["adapter_config.json", "the/base", "--adapter_name_or_path"]),
    "configuration missing": (lambda folder: (folder / "config.json").unlink(), ["there is no config.json"]),
    "GGUF": (gguf, ["there is no config.json", "tiny.gguf is not read"]),
    "length of texts a text": (longest_text("128"), ["model_max_length is '128'"]),
    "length of texts no number": (longest_text(math.nan), ["model_max_length is nan"]),
    "length of texts zero": (longest_text(0), ["model_max_length is 0"]),
    "tokenizer cut": (content("tokenizer.json", 0.5), ["tokenizer.json is cut or damaged"]),
    "tokenizer empty": (content("tokenizer.json", b""), ["tokenizer.json is cut or damaged"]),
    "tokenizer a pointer": (content("tokenizer.json", POINTER), ["tokenizer.json", "git lfs pull"]),
    "tokenizer a list": (content("tokenizer.json", b"[]"), ["tokenizer.json is cut or damaged"]),
    "tokenizer settings": (content("tokenizer_config.json", b"{"), ["tokenizer_config.json is not valid JSON"]),
    "configuration cut": (content("config.json", 0.5), ["config.json is not valid JSON"]),
    "configuration a list": (content("config.json", b"[]"), ["config.json holds a list"]),
    "configuration without type": (content("config.json", b"{}"), ["model_type"]),
    "type unknown": (config(model_type="nonsense"), ["nonsense"]),
    "type of images": (config(model_type="vit"), ["AutoModelForCausalLM"]),
    "no layers": (config(n_layer=0), ["n_layer is 0"]),
    "minus one layer": (config(n_layer=-1), ["n_layer is -1"]),
    "width zero": (config(n_embd=0), ["n_embd is 0"]),
    "width text": (config(n_embd="x"), ["n_embd is 'x'"]),
    "width half": (config(n_embd=32.5), ["n_embd is 32.5"]),
    "heads zero": (config(n_head=0), ["n_head is 0"]),
    "heads three": (config(n_head=3), ["divisible"]),
    "vocabulary endless": (config(vocab_size=10**12), ["vocab_size is 1000000000000"]),
    "positions a text": (config(n_positions="128"), ["n_positions is the text '128'", "a number"]),
    "epsilon a text": (config(layer_norm_epsilon="1e-5"), ["layer_norm_epsilon is the text '1e-5'", "a number"]),
    "switch a text": (
        config(tie_word_embeddings="false"),
        ["tie_word_embeddings is the text 'false'", "true or false"],
    ),
    "positions negative": (config(n_positions=-5), ["--model_name_or_path", "negative"]),
    "wider than its weights": (config(n_embd=64), ["sizes in the configuration", "size mismatch"]),
    "activation unknown": (config(activation_function="nonsense"), ["nonsense"]),
    "dropout two": (config(resid_pdrop=2.0), ["dropout", "2.0"]),
    "dtype unknown": (config(torch_dtype="nonsense"), ["nonsense"]),
    "quantized by bitsandbytes": (
        config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        ["pip install bitsandbytes"],
    ),
    "quantized by gptq": (config(quantization_config={"quant_method": "gptq", "bits": 4}), ["pip install gptqmodel"]),
    "quantized by awq": (config(quantization_config={"quant_method": "awq", "bits": 4}), ["pip install autoawq"]),
    "quantized by nobody": (config(quantization_config={"quant_method": "nobody"}), ["nobody", "unknown", "gptq"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", [*DAMAGE, "script"])
def test_one_line_names_the_file(case, assets, tmp_path):
    flags = ["--use_cpu", "--do_train", "--block_size", 32, "--output_dir", "out", "--max_train_samples", 8]
    shutil.copytree(assets.gpt2, tmp_path / "model")
    if case == "script":
        (tmp_path / "script").mkdir()
        (tmp_path / "script" / "script.py").write_text("import datasets\n")
        data, words = ["--dataset_name", tmp_path / "script"], ["--dataset_name", "script", "--train_file"]
    else:
        change, words = DAMAGE[case]
        change(tmp_path / "model")
        data = ["--train_file", assets.train]
    cases = {case: [*flags, *data, "--model_name_or_path", tmp_path / "model"]}
    ((code, stderr),) = run_many("run_clm.py", cases, tmp_path).values()
    assert code == 2 and "Traceback" not in stderr, stderr
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and stderr.splitlines()[-1] == lines[0]
    for word in words:
        assert word in lines[0]
    assert not (tmp_path / "out").exists(), "a refused run wrote something"
    assert not (tmp_path / "executed").exists(), "a pickle was executed"


ADAPTERS = {
    "cut": (content("adapter_model.safetensors", 0.5), "adapter_model.safetensors is cut or damaged"),
    "a pointer": (content("adapter_model.safetensors", POINTER), "git lfs pull"),
    "settings": (content("adapter_config.json", b"{"), "adapter_config.json is not valid JSON"),
    "settings a list": (content("adapter_config.json", b"[]"), "adapter_config.json holds a list"),
    "alpha text": (
        lambda folder: (folder / "adapter_config.json").write_text(
            (folder / "adapter_config.json").read_text().replace('"lora_alpha": 8', '"lora_alpha": "x"')
        ),
        "--adapter_name_or_path",
    ),
}


@pytest.mark.slow
def test_damaged_adapters(instructions, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(instructions.llama)
    get_peft_model(model, LoraConfig(lora_alpha=8, task_type="CAUSAL_LM")).save_pretrained(tmp_path / "whole")
    base = ["--use_cpu", "--do_train", "--output_dir", "out", "--train_file", instructions.train]
    base += ["--model_name_or_path", instructions.llama, "--max_train_samples", 4, "--adapter_name_or_path"]
    cases = {}
    for name, (change, _) in ADAPTERS.items():
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        change(tmp_path / name)
        cases[name] = [*base, tmp_path / name]
    for name, (code, stderr) in run_many("run_lora_clm.py", cases, tmp_path).items():
        assert code == 2 and "Traceback" not in stderr, stderr
        assert ADAPTERS[name][1] in stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_file_is_no_folder_of_a_model(tmp_path):
    file = tmp_path / "tiny.gguf"
    file.touch()
    for flag, word in (("model_name_or_path", "GGUF is not read"), ("tokenizer_name", "a file, not the folder")):
        with pytest.raises(UserError, match=word):
            check_model_folders({flag: str(file)})
    check_model_folders({"config_name": str(file)})


def test_weights_that_are_not_loaded_need_not_be_there(assets, tmp_path):
    """As after `hf download --exclude "*.bin"`, which leaves the index, or of the JSON files alone."""
    index = json.dumps({"metadata": {}, "weight_map": {"a": "pytorch_model-00001-of-00002.bin"}})
    for name in ("both", "pickled", "json"):
        shutil.copytree(assets.gpt2, tmp_path / name)
        (tmp_path / name / "pytorch_model.bin.index.json").write_text(index)
    check_model_folders({"model_name_or_path": str(tmp_path / "both")})
    (tmp_path / "pickled" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="pytorch_model-00001-of-00002.bin is missing"):
        check_model_folders({"model_name_or_path": str(tmp_path / "pickled")})
    (tmp_path / "json" / "model.safetensors").write_bytes(POINTER)
    check_model_folders({"model_name_or_path": str(tmp_path / "pickled"), "dry_run": True})
    check_model_folders(dict.fromkeys(("config_name", "tokenizer_name"), str(tmp_path / "json")))


@pytest.mark.parametrize(
    "config",
    [
        Exaone4Config(sliding_window_pattern="LLLG", layer_types=["full_attention"], num_hidden_layers=1),
        BartConfig(early_stopping="never"),
    ],
    ids=lambda config: config.model_type,
)
def test_words_beside_numbers_and_switches_are_taken(config):
    check_config("--model_name_or_path", "model", config)


@pytest.mark.slow
def test_a_path_that_names_a_type_makes_no_configuration(assets, tmp_path):
    shutil.copytree(assets.gpt2, tmp_path / "gpt2")
    (tmp_path / "gpt2" / "config.json").unlink()
    flags = ["--use_cpu", "--do_eval", "--output_dir", "out", "--validation_file", assets.train]
    ((code, stderr),) = run_many("run_clm.py", {"": [*flags, "--model_name_or_path", "gpt2"]}, tmp_path).values()
    assert code == 2 and stderr.splitlines()[-1].endswith("gpt2: there is no config.json")


@pytest.mark.slow
def test_what_could_not_be_saved_of_a_generation_configuration(assets, instructions, tmp_path):
    for name, base in (("whole", assets.gpt2), ("adapted", instructions.llama)):
        shutil.copytree(base, tmp_path / name)
        (tmp_path / name / "generation_config.json").write_text('{"temperature": 0.9, "early_stopping": true}')
    flags = ["--use_cpu", "--do_train", "--max_steps", 1, "--per_device_train_batch_size", 1, "--output_dir"]
    done = run(
        "run_clm.py", *flags, tmp_path / "out", "--model_name_or_path", tmp_path / "whole",
        "--train_file", assets.train, "--block_size", 32,
    )  # fmt: skip
    assert "do_sample is set to true, for temperature" in done.stderr
    run(
        "run_lora_clm.py", *flags, tmp_path / "tuned", "--model_name_or_path", tmp_path / "adapted",
        "--train_file", instructions.train, "--merge_adapter",
    )  # fmt: skip
    for folder in (tmp_path / "out", tmp_path / "tuned" / "merged"):
        saved = json.loads((folder / "generation_config.json").read_text())
        assert (saved["temperature"], saved["do_sample"]) == (0.9, True) and "early_stopping" not in saved


def test_weights_in_float16_are_trained_by_deepspeed_alone(assets):
    """By FSDP on a card they are not, with --bf16 neither: optimum-habana leaves them in float16."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(assets.gpt2, torch_dtype="float16")
    args = SimpleNamespace(do_train=True, save_safetensors=True, deepspeed=None, fsdp="full_shard")
    with pytest.raises(UserError, match="float16 weights round to 0"):
        check_weights(model, args)
    args.deepspeed = "zero_2.json"
    check_weights(model, args)


@pytest.mark.slow
def test_weights_in_float16_are_not_trained(assets, tmp_path):
    shutil.copytree(assets.gpt2, tmp_path / "model")
    config(torch_dtype="float16")(tmp_path / "model")
    flags = ["--use_cpu", "--output_dir", "out", "--train_file", assets.train, "--block_size", 32, "--torch_dtype"]
    flags += ["auto", "--validation_file", assets.train, "--max_eval_samples", 2, "--model_name_or_path", "model"]
    found = run_many("run_clm.py", {flag: [*flags, flag] for flag in ("--do_train", "--do_eval")}, tmp_path)
    assert found["--do_train"][0] == 2 and "give float32" in found["--do_train"][1].splitlines()[-1]
    assert found["--do_eval"][0] == 0


def test_weights_in_fp8_belong_to_a_quantized_model(assets):
    """As those of compressed-tensors, which keeps the scales beside them."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(assets.gpt2, torch_dtype="auto")
    model.transformer.wpe.to(torch.float8_e4m3fn)
    with pytest.raises(UserError, match="transformer.wpe.weight is torch.float8_e4m3fn, and no quantization_config"):
        check_weights_of_files(model, "model", [])
    model.config.quantization_config = {"quant_method": "compressed-tensors"}
    check_weights_of_files(model, "model", [])


def test_numbers_in_quotes_of_a_generation_configuration_are_refused():
    """They ended a run after training, when it went on with a prompt."""
    for name, value in (("num_beams", "4"), ("do_sample", "true")):
        model = SimpleNamespace(generation_config=GenerationConfig(**{name: value}), config=PretrainedConfig())
        with pytest.raises(UserError, match=f"{name} is the text '{value}'"):
            repair_generation_config(model)


@pytest.mark.parametrize(
    ("loaded", "repaired"),
    [
        ({"temperature": 0.9, "top_k": 10}, {"temperature": 0.9, "top_k": 10, "do_sample": True}),
        ({"temperature": 0.0, "top_p": 0.5, "do_sample": False}, {}),  # generate() refuses to sample with 0
        ({"num_beams": 4, "temperature": 0.7}, {"num_beams": 4}),
        ({"penalty_alpha": 0.6, "top_k": 4, "temperature": 0.7}, {"penalty_alpha": 0.6, "top_k": 4}),
        (
            {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5, "temperature": 0.7},
            {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
        ),
    ],
)
def test_a_generation_configuration_is_repaired_to_what_it_means(loaded, repaired):
    model = SimpleNamespace(generation_config=GenerationConfig(**loaded), config=PretrainedConfig())
    repair_generation_config(model)
    found = model.generation_config.to_diff_dict()
    found.pop("transformers_version")
    assert found == repaired


@pytest.mark.slow
def test_an_adapter_is_evaluated_where_its_configuration_is_given(assets, tmp_path):
    """By transformers, which loads the base model of it: as the same two merged."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(assets.gpt2),
        LoraConfig(lora_alpha=2048, init_lora_weights=False, fan_in_fan_out=True),
    )
    model.peft_config["default"].base_model_name_or_path = str(assets.gpt2)
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    flags = ["--tokenizer_name", assets.gpt2, "--validation_file", assets.validation, "--use_cpu", "--do_eval"]
    configured = ["--config_name", assets.gpt2]
    ends = run_several("run_clm", [
        ["--model_name_or_path", tmp_path / "adapter", *configured, *flags, "--output_dir", tmp_path / "one"],
        ["--model_name_or_path", tmp_path / "merged", *flags, "--output_dir", tmp_path / "other"],
        ["--model_name_or_path", assets.gpt2, *flags, "--output_dir", tmp_path / "base"],
    ])  # fmt: skip
    assert [end.status for end in ends] == [0] * 3, [end.log[-2000:] for end in ends]
    adapted, merged, base = (end.metrics["eval_loss"] for end in ends)
    assert adapted == pytest.approx(merged, rel=1e-5) and adapted != pytest.approx(base, rel=1e-3)
    more = [
        "--train_file",
        assets.train,
        "--output_dir",
        tmp_path / "out",
        "--model_name_or_path",
        tmp_path / "adapter",
    ]
    (end,) = run_several("run_lora_clm", [[*more, *configured, *flags]])
    assert end.status == 2 and "makes it an adapter" in end.log.splitlines()[-1], end.log
