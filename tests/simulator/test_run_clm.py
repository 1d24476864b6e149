"""run_clm.py on simulated cards: the losses of the CPU, no graph compiled after warm-up, resumed and shared runs."""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from cards import card_environment
from running import ROOT, environment, log_history, losses, results, run, run_several
from safetensors.torch import load_file

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("cards")]

STEPS, WARMUP = 8, 3
ON_CARD = ["--use_habana", "--use_lazy_mode", "--use_hpu_graphs_for_inference", "--throughput_warmup_steps", WARMUP]
LLAMA = ",".join(
    f"{name}={value}"
    for name, value in {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }.items()
)


def flags(assets, output: Path, *more) -> list[str]:
    """A short run of the tiny GPT-2, which has no dropout."""
    return [
        str(flag)
        for flag in (
            "--model_name_or_path", assets.gpt2, "--train_file", assets.train, "--validation_file", assets.validation,
            "--output_dir", output, "--block_size", 64, "--max_train_samples", 4 * STEPS, "--max_eval_samples", 16,
            "--per_device_train_batch_size", 4, "--per_device_eval_batch_size", 2, "--max_steps", STEPS,
            "--learning_rate", 1e-3, "--logging_steps", 1, "--do_train", "--do_eval", *more,
        )
    ]  # fmt: skip


@pytest.fixture(scope="module")
def runs(assets, tmp_path_factory) -> dict[str, Path]:
    """Output directories by name; `<name>.log` beside each."""
    root = tmp_path_factory.mktemp("runs")
    llama = ["--model_type", "llama", "--tokenizer_name", assets.tokenizer, "--config_overrides", LLAMA]
    dropout = ["--model_type", "gpt2", "--tokenizer_name", assets.tokenizer]
    dropout += ["--config_overrides", "n_embd=32,n_layer=2,n_head=2,n_positions=128", "--save_steps", 4]

    def case(name: str, *more) -> list[str]:
        made = flags(assets, root / name, *ON_CARD, *more)
        if "--model_type" in more:
            at = made.index("--model_name_or_path")
            del made[at : at + 2]
        return made

    cases = {
        "fp32": case("fp32"),
        "bf16": case("bf16", "--bf16", "--gaudi_config_name", ROOT / "gaudi_lm/arguments/bundled/Habana/gpt2"),
        "llama": case("llama", *llama),
        "checkpointed_llama": case("checkpointed_llama", *llama, "--gradient_checkpointing"),
        "checkpointed_fp32": case("checkpointed_fp32", "--gradient_checkpointing"),
        "dropout": case("dropout", *dropout),
    }
    cases = {name: [str(flag) for flag in case] for name, case in cases.items()}
    cases["resumed"] = [
        *cases["dropout"],
        *("--output_dir", str(root / "resumed")),
        *("--resume_from_checkpoint", str(root / "dropout" / "checkpoint-4")),
    ]
    ends = run_several("run_clm", list(cases.values()), environment(**card_environment()))
    for name, end in zip(cases, ends, strict=True):
        assert end.status == 0, f"{name}: {end.log[-8000:]}"
        (root / f"{name}.log").write_text(end.log)
    return {name: root / name for name in cases}


def test_losses_are_those_of_the_cpu(runs, assets, tmp_path):
    run("run_clm.py", *flags(assets, tmp_path / "cpu", "--use_cpu"))
    on_cpu, on_card = losses(tmp_path / "cpu"), losses(runs["fp32"])
    assert len(on_cpu) == STEPS and on_cpu[-1] < on_cpu[0]
    assert on_card == pytest.approx(on_cpu, abs=1e-5)
    assert results(runs["fp32"])["eval_loss"] == pytest.approx(results(tmp_path / "cpu")["eval_loss"], abs=1e-5)
    assert "graph_compilations" not in results(tmp_path / "cpu")


def test_nothing_is_compiled_after_warmup(runs):
    for name in ("fp32", "bf16", "llama", "checkpointed_llama", "checkpointed_fp32"):
        figures = results(runs[name])
        assert figures["graph_compilations"] > 0 and figures["graph_compilations_after_warmup"] == 0, name
        assert figures["host_syncs_per_step"] == 0, name
        assert 0 < figures["peak_device_memory_gb"] < 1, name
    log = runs["fp32"].with_suffix(".log").read_text()
    assert re.search(r"  graph_compilations_after_warmup +0\n", log) and "memory_allocated" not in log
    assert log.count("peak_device_memory_gb") == 1 and "compiled after warm-up" not in log


def test_bf16(runs):
    narrow, wide = losses(runs["bf16"]), losses(runs["fp32"])
    assert narrow != wide and narrow == pytest.approx(wide, abs=0.01)
    weights = load_file(runs["bf16"] / "model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())


@pytest.mark.parametrize("name", ["llama", "fp32"])
def test_gradient_checkpointing(runs, name):
    plain, checkpointed = runs[name], runs[f"checkpointed_{name}"]
    assert losses(checkpointed) == pytest.approx(losses(plain), abs=1e-6)
    assert results(checkpointed)["peak_device_memory_gb"] < results(plain)["peak_device_memory_gb"]


def test_resume_goes_on_exactly(runs):
    """Dropout too: the card's random state is in the checkpoint."""
    assert losses(runs["resumed"]) == losses(runs["dropout"])
    assert [row["step"] for row in log_history(runs["resumed"]) if "loss" in row] == list(range(1, STEPS + 1))
    weights = [load_file(runs[name] / "model.safetensors") for name in ("dropout", "resumed")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    state = torch.load(runs["dropout"] / "checkpoint-4" / "rng_state.pth", weights_only=False)
    assert not torch.equal(state["hpu"], state["cpu"])


@pytest.mark.parametrize("launcher", [[], ["--use_mpi"]], ids=["torch.distributed", "mpi"])
def test_two_cards_equal_one_with_twice_the_batch(runs, assets, tmp_path, launcher):
    output = tmp_path / "two"
    script = ["run_clm.py", *flags(assets, output, *ON_CARD, "--per_device_train_batch_size", 2)]
    env = card_environment(2, PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    run("gaudi_spawn.py", "--world_size", 2, *launcher, *script, env=env)
    assert losses(output) == pytest.approx(losses(runs["fp32"]), abs=1e-5)
    one, two = (results(folder) for folder in (runs["fp32"], output))
    assert two["eval_loss"] == pytest.approx(one["eval_loss"], abs=1e-5)
    assert two["eval_tokens"] == one["eval_tokens"]
    assert two["graph_compilations_after_warmup"] == 0


def test_changing_shapes_are_found(assets, tmp_path):
    """Blocks of a length that changes in the middle of a run: the figure counts them, a line names the first."""
    script = tmp_path / "my_clm.py"
    shutil.copy(ROOT / "run_clm.py", script)
    text = script.read_text()
    wanted = "np.stack([row[name] for row in rows])"
    assert text.count(wanted) == 1
    text = text.replace(wanted, f"{wanted}[:, : next(cuts)]")
    main = 'if __name__ == "__main__":'
    script.write_text(text.replace(main, f"cuts = iter([64] * 6 + [63] + [64] * 99)\n\n{main}"))
    output = tmp_path / "out"
    result = run(script, *flags(assets, output, *ON_CARD), env=card_environment(), fresh=True)
    assert result.stderr.count("SIMULATED GAUDI") == 1
    assert results(output)["graph_compilations_after_warmup"] > 0
    assert re.search(r"compiled after warm-up: training step \d+: copy from host\(\[4, 63\] Long\)", result.stderr)
