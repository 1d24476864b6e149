"""FSDP: a run on two cards writes weights that load elsewhere, and resumes exactly from its checkpoints."""

from pathlib import Path

import pytest
from resuming import CARD, essence, script_flags, start
from running import ROOT, results, run
from simulator.cards import card_environment

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("two cards")]
LAYERS = {"run_clm.py": "gpt2", "run_lora_clm.py": "llama"}
COMPILED = ["--use_habana", "--use_lazy_mode", "False", "--torch_compile", "--torch_compile_backend", "hpu_backend"]


def sharded(script: str, *assets) -> list:
    layers = ROOT / f"configs/fsdp/{LAYERS[script]}.json"
    return [*script_flags(script, *assets), "--fsdp", "full_shard auto_wrap", "--fsdp_config", layers]


def check_weights(script: str, output: Path, flags: list, llama: Path) -> None:
    """One card without FSDP evaluates what was saved to the same loss."""
    data = [flag for name in ("--train_file", "--validation_file") for flag in (name, flags[flags.index(name) + 1])]
    if "lora" in script:
        saved = ["--model_name_or_path", llama, "--adapter_name_or_path", output, "--max_seq_length", 128]
        saved += ["--pad_to_max_length"]
    else:
        saved = ["--model_name_or_path", output, "--block_size", 32]
    alone = output.with_name("alone")
    more = ["--max_eval_samples", 4, "--do_eval", "--output_dir", alone]
    run(script, *saved, *data, *more, *CARD, env=card_environment(1))
    assert results(alone)["eval_loss"] == pytest.approx(results(output)["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("script", LAYERS)
def test_an_interrupted_run_goes_on_exactly(assets, masked_assets, instructions, tmp_path, script):
    flags = [*sharded(script, assets, masked_assets, instructions), *CARD]
    start(script, 2, tmp_path / "whole", *flags)
    start(script, 2, tmp_path / "again", *flags, "--resume_from_checkpoint", tmp_path / "whole" / "checkpoint-3")
    assert essence(tmp_path / "again") == essence(tmp_path / "whole")
    check_weights(script, tmp_path / "whole", flags, instructions.llama)


@pytest.mark.parametrize("script", LAYERS)
def test_a_compiled_run_saves_its_weights_and_cannot_be_resumed(assets, masked_assets, instructions, tmp_path, script):
    flags = [*sharded(script, assets, masked_assets, instructions), *COMPILED, "--max_steps", 3]
    env = card_environment(2, PT_HPU_LAZY_MODE="0")
    start(script, 2, tmp_path / "whole", *flags, env=env)
    check_weights(script, tmp_path / "whole", flags, instructions.llama)
    resumed = [*flags, "--resume_from_checkpoint", tmp_path / "whole" / "checkpoint-3", "--max_steps", 6]
    with pytest.raises(AssertionError, match="error: --resume_from_checkpoint .*: a compiled FSDP model"):
        start(script, 2, tmp_path / "again", *resumed, env=env)
