"""Runs of the three scripts that are interrupted and go on, and what must be equal in the end."""

from __future__ import annotations

import hashlib
from pathlib import Path

from running import ROOT, log_history, run, run_ranks
from simulator.cards import card_environment
from small_models import SMALL

TIMES = ("runtime", "per_second", "total_flos", "memory", "padding", "graph_", "host_syncs")
CPU, CARD = ["--use_cpu"], ["--use_habana", "--use_lazy_mode"]
GPT2 = "n_embd=16,n_layer=1,n_head=2,n_positions=64"


def script_flags(script: str, assets, masked_assets, instructions) -> list:
    """A short run with dropout and a second epoch: random state and the order of the data matter."""
    if script == "run_clm.py":
        data = [assets.train, assets.validation]
        own = ["--model_type", "gpt2", "--tokenizer_name", assets.tokenizer, "--config_overrides", GPT2]
        own += ["--block_size", 32]
    elif script == "run_mlm.py":
        data = [assets.train, assets.validation]
        own = masked_assets.scratch("bert", dropout=True)
        own[own.index(SMALL["bert"])] = SMALL["bert"].replace("num_hidden_layers=2", "num_hidden_layers=1")
        own += ["--max_seq_length", 32]
    else:
        data = [instructions.train, instructions.validation]
        own = ["--model_name_or_path", instructions.llama, "--lora_dropout", 0.1, "--max_seq_length", 128]
        own += ["--pad_to_max_length", "--lora_rank", 2]
    return [
        *own, "--train_file", data[0], "--validation_file", data[1], "--max_train_samples", 20,
        "--max_eval_samples", 4, "--per_device_eval_batch_size", 4, "--do_train", "--do_eval", "--learning_rate", 1e-2,
        "--max_steps", 8, "--save_steps", 3, "--logging_steps", 2, "--eval_strategy", "steps", "--eval_steps", 4,
    ]  # fmt: skip


def batch(ranks: int) -> list:
    """Rows of a step are the same on one rank and on two; an epoch has five steps."""
    return ["--per_device_train_batch_size", 4 // ranks]


def start(script: str, ranks: int, output: Path, *flags, env: dict[str, str] | None = None) -> list[str]:
    """Run to the end, which must be a good one; what each rank said."""
    flags = [*flags, *batch(ranks), "--output_dir", output]
    env = env or (card_environment(ranks) if "--use_habana" in flags else {})
    if ranks == 1 and "--deepspeed" not in flags:
        return [run(script, *flags, env=env).stderr]
    return [done.stderr for done in run_ranks(ranks, script, *flags, env=env)]


def essence(output: Path) -> tuple[dict[str, str], list[dict]]:
    """The checksums of weights at the top of a folder, and the log without what depends on the time it took."""
    weights = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in output.glob("*.safetensors")}
    rows = [
        {name: value for name, value in row.items() if not any(word in name for word in TIMES)}
        for row in log_history(output)
    ]
    assert weights
    return weights, rows


def zero(stage: int) -> list:
    return ["--deepspeed", ROOT / "configs" / "deepspeed" / f"zero_{stage}.json"]
