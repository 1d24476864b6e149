"""Every kind of adapter that can be trained can be evaluated, trained further, resumed and merged."""

import contextlib
import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from running import ROOT, losses, run, run_many
from safetensors.torch import load_file
from short_runs import ADAPTERS, common
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from gaudi_lm.arguments.adapters import AdapterArguments
from gaudi_lm.arguments.deepspeed_configs import check_saved_form
from gaudi_lm.errors import UserError
from gaudi_lm.modeling.adapters import adapter_config, add_adapter

DATA = ("--train_on_inputs", "False", "--dataset_concatenation", "--chat_prompt", "--pad_to_max_length")
STEPS = ["--max_steps", 8, "--learning_rate", 0.01]
CARDS = {"cpu": (["--use_cpu"], {}), "card": (["--use_habana", "--use_lazy_mode"], {"GAUDI_SIMULATOR": "1"})}
KINDS = [
    pytest.param(kind, card, marks=pytest.mark.slow if card == "card" else []) for kind in ADAPTERS for card in CARDS
]


def paths(instructions, output) -> list:
    """The flags of `common`, with the output folder as a path."""
    flags = common(instructions, output)
    flags[flags.index("--output_dir") + 1] = output
    return flags


def evaluation(*flags, card: str) -> dict:
    output = flags[flags.index("--output_dir") + 1]
    run("run_lora_clm.py", *flags, "--do_eval", *CARDS[card][0], env=CARDS[card][1])
    return json.loads((output / "all_results.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "card"), KINDS)
def test_a_saved_adapter_is_evaluated_trained_further_and_merged(instructions, tmp_path, kind, card):
    flags, env = CARDS[card]
    data = [flag for flag in ADAPTERS[kind] if flag in DATA]
    merge = [] if kind == "llama-adapter" else ["--merge_adapter"]
    train = ["--do_train", "--do_eval", *flags, *STEPS]
    dropout = ["--lora_dropout", 0] if kind in ("lora", "adalora", "vera") else []
    first = common(
        instructions, tmp_path / "first", *train, "--peft_type", kind, *dropout, *ADAPTERS[kind], "--logging_steps", 1
    )
    run("run_lora_clm.py", *first, env=env)
    trained = json.loads((tmp_path / "first" / "all_results.json").read_text())
    before = (tmp_path / "first" / "adapter_model.safetensors").read_bytes()

    saved = [*data, "--adapter_name_or_path", tmp_path / "first"]
    again = evaluation(*paths(instructions, tmp_path / "again"), *saved, *merge, card=card)
    assert again["eval_loss"] == pytest.approx(trained["eval_loss"], rel=1e-4)
    if merge:
        merged = paths(instructions, tmp_path / "of merged")
        merged[merged.index("--model_name_or_path") + 1] = tmp_path / "again" / "merged"
        assert evaluation(*merged, *data, card=card)["eval_loss"] == pytest.approx(trained["eval_loss"], rel=1e-3)

    further = [*paths(instructions, tmp_path / "further"), *saved, *train]
    run("run_lora_clm.py", *further, env=env)
    assert len(losses(tmp_path / "further")) == 8
    assert sum(losses(tmp_path / "further")) < sum(losses(tmp_path / "first"))
    assert (tmp_path / "first" / "adapter_model.safetensors").read_bytes() == before
    then = json.loads((tmp_path / "further" / "all_results.json").read_text())
    last = ["--adapter_name_or_path", tmp_path / "further", *data]
    found = evaluation(*paths(instructions, tmp_path / "last"), *last, card=card)
    assert found["eval_loss"] == pytest.approx(then["eval_loss"], rel=1e-4)


ADALORA = ["--do_train", "--use_cpu", "--peft_type", "adalora", "--adalora_init_r", 6, "--adalora_target_r", 2]


def test_the_layers_of_gpt2_are_nothing_to_warn_of():
    size = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 16, "n_positions": 8}
    args = AdapterArguments(lora_target_modules=["c_attn"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        add_adapter(GPT2LMHeadModel(GPT2Config(**size)), adapter_config(args), args, tokenizer=None)


def ranks(folder) -> list[int]:
    return [
        len(tensor) for name, tensor in load_file(folder / "adapter_model.safetensors").items() if "lora_E" in name
    ]


@pytest.mark.slow
def test_adalora_keeps_the_ranks_that_it_has_chosen(instructions, tmp_path):
    """The saved adapter has them alone; training further keeps them; resuming in the midst gives the same bits."""
    schedule = ["--adalora_tinit", 2, "--adalora_tfinal", 3, "--adalora_delta_t", 2, "--max_steps", 10]
    whole = paths(instructions, tmp_path / "whole")
    run("run_lora_clm.py", *whole, *ADALORA, *schedule, "--save_steps", 5)
    layers = len(ranks(tmp_path / "whole"))
    assert sum(ranks(tmp_path / "whole")) == 2 * layers and layers == 4
    assert set(ranks(tmp_path / "whole" / "checkpoint-5")) == {6}
    config = json.loads((tmp_path / "whole" / "adapter_config.json").read_text())
    assert (config["tinit"], config["tfinal"], config["total_step"]) == (2, 3, 10)
    assert all(len(kept) == 6 for kept in config["rank_pattern"].values())

    again = [*paths(instructions, tmp_path / "again"), *ADALORA, *schedule, "--save_steps", 5]
    run("run_lora_clm.py", *again, "--resume_from_checkpoint", tmp_path / "whole" / "checkpoint-5")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

    further = [*paths(instructions, tmp_path / "further"), "--do_train", "--use_cpu", "--max_steps", 3]
    done = run("run_lora_clm.py", *further, "--adapter_name_or_path", tmp_path / "whole")
    assert "AdaLoRA: the ranks stay as they were saved" in done.stderr
    assert ranks(tmp_path / "further") == ranks(tmp_path / "whole")
    changed = load_file(tmp_path / "further" / "adapter_model.safetensors")
    assert any(
        not torch.equal(tensor, changed[name])
        for name, tensor in load_file(tmp_path / "whole" / "adapter_model.safetensors").items()
    )


@pytest.mark.slow
@pytest.mark.parametrize("steps", [4, 60])
def test_too_few_steps_for_adalora_are_said_and_the_adapter_can_be_used(instructions, tmp_path, steps):
    """The defaults want more than 150 steps; peft refused to read what was saved by a shorter run."""
    output = paths(instructions, tmp_path / "short")
    done = run("run_lora_clm.py", *output, *ADALORA, "--do_eval", "--max_steps", steps)
    assert f"no rank is reduced: {steps} steps are not more than --adalora_tinit 50 and" in done.stderr
    assert set(ranks(tmp_path / "short")) == {6}
    trained = json.loads((tmp_path / "short" / "all_results.json").read_text())
    config = json.loads((tmp_path / "short" / "adapter_config.json").read_text())
    config |= {"total_step": steps, "tfinal": 0}  # as GaudiTrainer alone would leave it
    (tmp_path / "short" / "adapter_config.json").write_text(json.dumps(config))
    again = paths(instructions, tmp_path / "again")
    found = evaluation(*again, "--adapter_name_or_path", tmp_path / "short", card="cpu")
    assert found["eval_loss"] == pytest.approx(trained["eval_loss"], rel=1e-5)


def test_what_cannot_be_merged_is_said_before_training(instructions, tmp_path):
    llama = paths(instructions, tmp_path / "prompt")
    run("run_lora_clm.py", *llama, "--do_train", "--use_cpu", "--max_steps", 1, "--peft_type", "llama-adapter",
        *ADAPTERS["llama-adapter"])  # fmt: skip
    cases = {
        "new": (["--do_train", "--peft_type", "llama-adapter"], "a part of attention"),
        "saved": (["--do_train", "--adapter_name_or_path", tmp_path / "prompt"], "a part of attention"),
        "none": (["--do_eval"], "--merge_adapter: no adapter"),
        "nowhere": (["--do_eval", "--adapter_name_or_path", tmp_path / "nowhere"], "no adapter there"),
    }
    runs = {
        name: [*paths(instructions, tmp_path / name), "--use_cpu", "--merge_adapter", *flags]
        for name, (flags, _) in cases.items()
    }
    for name, (status, log) in run_many("run_lora_clm.py", runs, tmp_path).items():
        assert status == 2 and cases[name][1] in log, (name, log)
        assert "error: --" in log and "Traceback" not in log and not (tmp_path / name).exists()


@pytest.mark.slow
def test_adalora_under_deepspeed_is_refused(instructions, tmp_path):
    """Under ZeRO-2 the gradients are gone when ranks are chosen, and masks are overwritten by DeepSpeed's own copy."""
    flags = [*paths(instructions, tmp_path / "out"), "--do_train", "--max_steps", 1, "--use_habana", "--use_lazy_mode"]
    card = {"GAUDI_SIMULATOR": "1", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    flags += ["--deepspeed", ROOT / "configs" / "deepspeed" / "zero_2.json", "--peft_type", "adalora"]
    done = run("run_lora_clm.py", *flags, env={**card, "MASTER_PORT": "29791"}, code=2)
    assert "error: --peft_type adalora: DeepSpeed hides the gradients" in done.stderr
    assert not (tmp_path / "out").exists()


GATHER = {"stage3_gather_16bit_weights_on_model_save": True}


@pytest.mark.parametrize(
    ("zero", "flags", "found"),
    [
        ({"stage": 3}, {"peft_type": "lora"}, "refused"),
        ({"stage": 3}, {}, "warned"),
        ({"stage": 3}, {"peft_type": "lora", "save_last_ckpt": False}, None),
        ({"stage": 3, **GATHER}, {"peft_type": "lora"}, None),
        ({"stage": 2}, {}, None),
    ],
)
def test_an_adapter_that_zero_3_would_save_empty_is_refused(zero, flags, found, caplog):
    """Without the setting transformers writes a file of no tensors; of a whole model, what each card has."""
    args = SimpleNamespace(
        hf_deepspeed_config=HfDeepSpeedConfig({"zero_optimization": zero}),
        save_strategy="no",
        do_train=True,
        flags=flags,
    )
    with (
        pytest.raises(UserError, match="^--deepspeed: ZeRO-3 .*stage3_gather_16bit")
        if found == "refused"
        else (contextlib.nullcontext())
    ):
        check_saved_form(args)
    assert ("no model.safetensors is saved" in caplog.text) == (found == "warned")
