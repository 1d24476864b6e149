"""FSDP: a run on two cards writes weights that load elsewhere, and resumes exactly from its checkpoints."""

import ast
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import merge_fsdp_weights
from resuming import CARD, essence, script_flags, start, zero
from running import ROOT, log_history, results, run
from safetensors.torch import load_file
from simulator.cards import card_environment
from transformers import AutoModelForCausalLM, AutoTokenizer

from gaudi_lm.training.data_parallel import DataParallelTrainer
from gaudi_lm.training.fsdp import FSDPTrainer
from gaudi_lm.training.samples import NEW_TOKENS

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("two cards")]
LAYERS = {"run_clm.py": "gpt2", "run_lora_clm.py": "llama"}
COMPILED = ["--use_habana", "--use_lazy_mode", "False", "--torch_compile", "--torch_compile_backend", "hpu_backend"]


WHOLE, SHARDS = "FULL_STATE_DICT", "SHARDED_STATE_DICT"
PROMPT = "The statement"
# Training lowers the loss: what is to be loaded at the end is not what is there.
BEST_IS_FIRST = ["--metric_for_best_model", "eval_loss", "--greater_is_better", "True"]
MODES = {"lazy": (CARD, "1"), "compiled": (COMPILED, "0")}


def divided(script: str, kind: str, folder: Path, *assets, **settings) -> list:
    config = json.loads((ROOT / f"configs/fsdp/{LAYERS[script]}.json").read_text())
    (folder / f"{kind}.json").write_text(json.dumps({**config, "state_dict_type": kind, **settings}))
    return [*script_flags(script, *assets), "--fsdp", "full_shard auto_wrap", "--fsdp_config", folder / f"{kind}.json"]


def check_text(said: str, folder: Path) -> None:
    """transformers continues the prompt with the same text."""
    (text,) = re.findall(f"{PROMPT!r} -> (.*)", said)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=tokenizer.eos_token_id)
    assert tokenizer.decode(tokens[0], skip_special_tokens=True) == PROMPT + ast.literal_eval(text)


def check_weights(script: str, output: Path, flags: list, llama: Path) -> None:
    """One card without FSDP evaluates what was saved to the same loss, and merges an adapter into the same weights."""
    data = [flag for name in ("--train_file", "--validation_file") for flag in (name, flags[flags.index(name) + 1])]
    if "lora" in script:
        saved = ["--model_name_or_path", llama, "--adapter_name_or_path", output, "--max_seq_length", 128]
        saved += ["--pad_to_max_length", "--merge_adapter"]
    else:
        saved = ["--model_name_or_path", output, "--block_size", 32]
    alone = output.with_name("alone")
    more = ["--max_eval_samples", 4, "--do_eval", "--output_dir", alone]
    run(script, *saved, *data, *more, *CARD, env=card_environment(1))
    assert results(alone)["eval_loss"] == pytest.approx(results(output)["eval_loss"], rel=1e-5)
    if "lora" in script:
        merged, wanted = (load_file(one / "merged" / "model.safetensors") for one in (output, alone))
        torch.testing.assert_close(merged, wanted, rtol=0, atol=1e-6)
        assert {path.name for path in (output / "merged").iterdir()} == {
            path.name for path in (alone / "merged").iterdir()
        }


@pytest.mark.parametrize(
    ("script", "mode", "kind", "checkpointing"),
    [
        ("run_clm.py", "lazy", WHOLE, False),
        ("run_clm.py", "lazy", SHARDS, False),
        ("run_clm.py", "compiled", WHOLE, False),
        ("run_lora_clm.py", "lazy", WHOLE, False),
        ("run_lora_clm.py", "lazy", WHOLE, True),
        ("run_lora_clm.py", "compiled", SHARDS, False),
    ],
)
def test_an_interrupted_run_goes_on_exactly(
    assets, masked_assets, instructions, tmp_path, script, mode, kind, checkpointing
):
    if mode == "compiled":
        instructions = SimpleNamespace(**{**vars(instructions), "llama": instructions.shallow})
    card, lazy = MODES[mode]
    env = card_environment(2, PT_HPU_LAZY_MODE=lazy)
    settings = {"activation_checkpointing": True} if checkpointing else {}
    flags = [*divided(script, kind, tmp_path, assets, masked_assets, instructions, **settings), *card]
    flags += ["--generate", PROMPT, "--load_best_model_at_end", "--save_steps", 4, *BEST_IS_FIRST]
    flags += ["--merge_adapter"] if "lora" in script else []
    said = start(script, 2, tmp_path / "whole", *flags, env=env)[0]
    check_text(said, tmp_path / "whole" / ("merged" if "lora" in script else ""))
    fourth, eighth, best = (row["eval_loss"] for row in log_history(tmp_path / "whole") if "eval_loss" in row)
    assert fourth > eighth + 1e-3 and best == fourth
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    start(script, 2, tmp_path / "again", *flags, "--resume_from_checkpoint", checkpoint, env=env)
    assert essence(tmp_path / "again") == essence(tmp_path / "whole")
    check_weights(script, tmp_path / "whole", flags, instructions.llama)
    # No rank has gathered all weights for a checkpoint in shards; an adapter is small.
    assert (checkpoint / "model.safetensors").exists() == (kind == WHOLE and "lora" not in script)
    assert (checkpoint / "adapter_model.safetensors").exists() == ("lora" in script)


@pytest.mark.parametrize("kind", [WHOLE, SHARDS])
def test_steps_are_counted_where_the_main_rank_has_none_of_the_norms(assets, instructions, tmp_path, kind):
    """FusedAdamW has a count for each group of weights, and the main rank's were saved: norms began at 1 again."""
    config = AutoModelForCausalLM.from_pretrained(instructions.llama).config
    config.tie_word_embeddings = True  # norms are the last weights then
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(instructions.llama).save_pretrained(tmp_path / "model")
    config = json.loads((ROOT / "configs/fsdp/llama.json").read_text())
    (tmp_path / "fsdp.json").write_text(json.dumps({**config, "state_dict_type": kind}))
    flags = ["--model_name_or_path", tmp_path / "model", "--train_file", assets.train, "--block_size", 32, *CARD]
    flags += ["--fsdp", "full_shard auto_wrap", "--fsdp_config", tmp_path / "fsdp.json", "--learning_rate", 1e-2]
    flags += ["--do_train", "--max_steps", 6, "--save_steps", 2, "--logging_steps", 1]
    start("run_clm.py", 2, tmp_path / "whole", *flags)
    for name, checkpoint in (("again", "whole/checkpoint-2"), ("third", "again/checkpoint-4")):
        start("run_clm.py", 2, tmp_path / name, *flags, "--resume_from_checkpoint", tmp_path / checkpoint)
        assert essence(tmp_path / name) == essence(tmp_path / "whole")


def test_shards_become_a_whole_model(assets, masked_assets, instructions, tmp_path):
    """As ``accelerate merge-weights`` makes one; beside them is what else a model is loaded with."""
    ours = ("run_clm.py", SHARDS, tmp_path, assets, masked_assets, instructions)
    start("run_clm.py", 2, tmp_path / "out", *divided(*ours), *CARD, "--max_steps", 3, "--eval_strategy", "no")
    checkpoint = tmp_path / "out" / "checkpoint-3"
    merge_fsdp_weights(str(checkpoint / "pytorch_model_fsdp_0"), str(tmp_path / "merged"))
    for file in checkpoint.glob("*.json"):
        shutil.copy(file, tmp_path / "merged")
    AutoTokenizer.from_pretrained(tmp_path / "merged")
    merged, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values())
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    torch.testing.assert_close(merged.state_dict(), wanted, rtol=0, atol=0)


def test_checkpoints_of_another_kind_are_refused(assets, masked_assets, instructions, tmp_path):
    script, env = "run_clm.py", card_environment(2, PT_HPU_LAZY_MODE="1")
    ours = (script, SHARDS, tmp_path, assets, masked_assets, instructions)
    start(script, 2, tmp_path / "whole", *divided(*ours), *CARD, "--max_steps", 3, env=env)
    resumed = ["--resume_from_checkpoint", tmp_path / "whole" / "checkpoint-3", *CARD]
    other, none = divided(script, WHOLE, *ours[2:]), script_flags(script, *ours[3:])
    for flags, said in ((other, "with --fsdp and FULL_STATE_DICT"), (none, "without --fsdp")):
        line = f"checkpoint-3: it was saved with --fsdp and SHARDED_STATE_DICT, this run is {said}; go on with the"
        with pytest.raises(AssertionError, match=line):
            start(script, 2, tmp_path / "again", *flags, *resumed, env=env)
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(("script", "named"), [("run_clm.py", ["GPT2Block"]), ("run_lora_clm.py", None)])
def test_layers_are_found_by_the_names_of_transformers(assets, masked_assets, instructions, tmp_path, script, named):
    ours, env = (script, WHOLE, tmp_path, assets, masked_assets, instructions), card_environment(2)
    short = [*CARD, "--gradient_checkpointing", "--max_steps", 2, "--eval_strategy", "no", "--save_strategy", "no"]
    short += ["--seed", 3]
    start(script, 2, tmp_path / "own", *divided(*ours), *short, env=env)
    start(script, 2, tmp_path / "theirs", *divided(*ours, transformer_layer_cls_to_wrap=named), *short, env=env)
    assert essence(tmp_path / "theirs") == essence(tmp_path / "own")


@pytest.mark.parametrize("form", ["FSDP", "ZeRO-1"])
def test_a_tied_head_is_saved_once(assets, masked_assets, instructions, tmp_path, form):
    """As on one card; gathered weights have no storage in common, by which transformers would know."""
    ours = ("run_clm.py", WHOLE, tmp_path, assets, masked_assets, instructions)
    flags = divided(*ours) if form == "FSDP" else [*script_flags("run_clm.py", *ours[3:]), *zero(1)]
    start("run_clm.py", 2, tmp_path / "out", *flags, *CARD, "--max_steps", 3, "--eval_strategy", "no")
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-3"):
        assert "lm_head.weight" not in load_file(folder / "model.safetensors")
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()) and model.lm_head.weight is model.transformer.wte.weight


def test_weights_that_have_come_apart_are_saved_apart(monkeypatch):
    saved = {}
    monkeypatch.setattr(DataParallelTrainer, "_save", lambda self, folder, state_dict: saved.update(state_dict))
    trainer = object.__new__(FSDPTrainer)
    trainer.is_fsdp_enabled, trainer._tied = False, {"head": "embeddings", "decoder": "embeddings", "absent": "head"}
    first, equal, other = torch.ones(2), torch.ones(2), torch.zeros(2)
    trainer._save("out", {"embeddings": first, "head": equal, "decoder": other})
    assert saved["head"] is saved["embeddings"] is first and saved["decoder"] is other


@pytest.mark.parametrize("planned", [False, True])
def test_layers_that_are_not_there_are_refused(assets, masked_assets, instructions, tmp_path, planned):
    ours = ("run_clm.py", WHOLE, tmp_path, assets, masked_assets, instructions)
    flags = [*divided(*ours, transformer_layer_cls_to_wrap=["GPTBlock"]), *CARD, *["--dry_run"] * planned]
    line = "error: --fsdp_config: transformer_layer_cls_to_wrap GPTBlock: .* its layers are GaudiGPT2Block"
    with pytest.raises(AssertionError, match=line):
        start("run_clm.py", 2, tmp_path / "out", *flags, env=card_environment(2))
    assert not (tmp_path / "out").exists()


def test_a_divided_model_fills_no_masks(assets, masked_assets, instructions, tmp_path):
    flags = [*script_flags("run_mlm.py", assets, masked_assets, instructions), *CARD, "--fsdp", "full_shard auto_wrap"]
    with pytest.raises(AssertionError, match="error: --generate: not with --fsdp, which divides the weights"):
        start("run_mlm.py", 2, tmp_path / "out", *flags, "--generate", "the [MASK]")
    assert not (tmp_path / "out").exists()


def test_evaluation_alone(assets, tmp_path):
    """In shards, and on one card in bf16: transformers leaves the model in host memory for its own evaluation."""
    flags = ["--model_name_or_path", assets.gpt2, "--validation_file", assets.validation, "--block_size", 32]
    flags += ["--max_eval_samples", 6, "--do_eval", "--per_device_eval_batch_size", 1, *CARD]
    divide = ["--fsdp", "full_shard auto_wrap", "--fsdp_config", ROOT / "configs/fsdp/gpt2.json"]
    found = {}
    for name, ranks, more in (("one", 1, []), ("half", 1, ["--bf16_full_eval"]), ("shards", 2, divide)):
        start("run_clm.py", ranks, tmp_path / name, *flags, *more, env=card_environment(ranks, PT_HPU_LAZY_MODE="1"))
        found[name] = results(tmp_path / name)["eval_loss"]
    assert found["shards"] == pytest.approx(found["one"], rel=1e-6)
    assert found["one"] != found["half"] == pytest.approx(found["one"], rel=0.01)
