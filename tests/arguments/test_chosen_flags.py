"""What was asked for by name is what runs, or is refused; nothing takes its place without a word."""

import os

import pytest
import torch
from running import losses, run, run_many
from safetensors.torch import load_file

from gaudi_lm.arguments.definitions import LMTrainingArguments

SMALL = {
    "gpt2": "n_embd=32,n_layer=1,n_head=2,n_positions=64,resid_pdrop=0.0,embd_pdrop=0.0,attn_pdrop=0.0",
    "gptj": "n_embd=32,n_layer=1,n_head=2,n_positions=64,rotary_dim=4",
    "gemma2": "hidden_size=32,intermediate_size=48,num_hidden_layers=1,num_attention_heads=2,num_key_value_heads=2,"
    "head_dim=16",
    "llama": "hidden_size=32,intermediate_size=48,num_hidden_layers=1,num_attention_heads=2",
}


def flags(assets, output, model_type: str, *more) -> list[str]:
    chosen = [
        "--model_type", model_type, "--config_overrides", SMALL[model_type], "--tokenizer_name", assets.tokenizer,
        "--train_file", assets.train, "--do_train", "--max_steps", 2, "--block_size", 32, "--logging_steps", 1,
        "--per_device_train_batch_size", 2, "--output_dir", output, *more,
    ]  # fmt: skip
    return list(map(str, chosen))


@pytest.mark.slow
def test_an_attention_that_the_model_lacks_is_refused(assets, tmp_path):
    cases = {
        "chosen": flags(assets, tmp_path / "chosen", "gptj", "--use_cpu", "--attn_implementation", "sdpa"),
        "default": flags(assets, tmp_path / "default", "gptj", "--use_cpu"),
        "there": flags(assets, tmp_path / "there", "gpt2", "--use_cpu", "--attn_implementation", "sdpa"),
        "capped": flags(assets, tmp_path / "capped", "gemma2", "--use_cpu", "--attn_implementation", "sdpa"),
        "default, capped": flags(assets, tmp_path / "default, capped", "gemma2", "--use_cpu"),
    }
    ends = run_many("run_clm.py", cases, tmp_path)
    assert ends["chosen"][0] == 2
    assert (
        "error: --attn_implementation sdpa: gptj does not have it; leave the flag out, or choose eager"
        in (ends["chosen"][1])
    )
    assert ends["default"][0] == 0 and "attention: eager, since gptj has no sdpa" in ends["default"][1]
    assert ends["there"][0] == 0, ends["there"][1]
    said = "--attn_implementation sdpa: gemma2 has attn_logit_softcapping 50, which only eager attention knows"
    assert ends["capped"][0] == 2 and said in ends["capped"][1]
    said = "attention: eager, since gemma2 has attn_logit_softcapping"
    assert ends["default, capped"][0] == 0 and said in ends["default, capped"][1], ends["default, capped"][1]


@pytest.mark.slow
def test_on_a_card_optimizer_and_attention_are_those_asked_for(assets, tmp_path):
    card = {"env": {"GAUDI_SIMULATOR": "1"}}
    on_card = ["--use_habana", "--use_lazy_mode"]
    refused = flags(assets, tmp_path / "x", "llama", *on_card, "--attn_implementation", "sdpa")
    assert "--attn_implementation sdpa: optimum-habana's llama does not have it" in (
        run("run_clm.py", *refused, **card, code=2).stderr
    )
    rate = ["--learning_rate", 0.5, "--lr_scheduler_type", "constant"]
    found = {}
    for name, more in {"cpu": ["--use_cpu"], "card": on_card, "own": on_card}.items():
        chosen = [] if name == "own" else ["--optim", "sgd"]
        done = run("run_clm.py", *flags(assets, tmp_path / name, "gpt2", *more, *rate, *chosen), **card)
        assert ("--optim sgd overrides the fused AdamW" in done.stderr) == (name == "card"), done.stderr
        found[name] = losses(tmp_path / name)
    assert found["card"] == pytest.approx(found["cpu"], rel=1e-3)
    assert found["own"][1] != pytest.approx(found["cpu"][1], rel=1e-2)


@pytest.mark.parametrize("given", [{"torch_compile": True}, {"torch_compile_mode": "default"}])
def test_the_backend_of_a_cpu_is_not_that_of_the_card(given, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))  # they tell accelerate by variables
    args = LMTrainingArguments(output_dir=str(tmp_path), use_cpu=True, do_train=True, **given)
    assert args.torch_compile and args.torch_compile_backend == "inductor"
    card = {"torch_compile_backend": "hpu_backend", **given}
    args = LMTrainingArguments(output_dir=str(tmp_path), use_cpu=True, do_train=True, **card)
    assert args.torch_compile_backend == "inductor" and "--torch_compile_backend hpu_backend" in args.overridden_flags
    own = {**given, "torch_compile_backend": "aot_eager"}
    args = LMTrainingArguments(output_dir=str(tmp_path), use_cpu=True, do_train=True, **own)
    assert args.torch_compile_backend == "aot_eager" and not args.overridden_flags


@pytest.mark.slow
def test_a_compiled_model_trains_on_the_cpu_as_the_plain_one_does(assets, tmp_path):
    for name, more in {"plain": [], "compiled": ["--torch_compile"]}.items():
        chosen = flags(assets, tmp_path / name, "gpt2", "--use_cpu", "--do_eval", "--max_eval_samples", 2, *more)
        run("run_clm.py", *chosen)
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
    plain, compiled = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "compiled"))
    for name, weight in plain.items():
        torch.testing.assert_close(compiled[name], weight, rtol=1e-3, atol=1e-4)
