"""FP8 against bf16 on a real pretrained model, SmolLM2-135M: not their time, which a simulated card cannot tell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo.lora import pairs, unpack_model

from .measure import write_report
from .workloads import paragraphs

ROOT = Path(__file__).parent.parent
COMMON = (
    "--use_habana --use_lazy_mode --bf16 True --do_train --logging_steps 1 --lr_scheduler_type constant_with_warmup"
)
COMMON += " --warmup_steps 10 --save_strategy no --save_last_ckpt False"
# LoRA on instructions is what the documented FP8 commands do; all weights, on single short rows, are the harder case.
TASKS = {
    "lora": "run_lora_clm.py --chat_prompt --train_on_inputs False --max_seq_length 128 --lora_target_modules"
    " all-linear --lora_dropout 0 --learning_rate 5e-4 --per_device_train_batch_size 2",
    "full": "run_clm.py --block_size 128 --learning_rate 2e-5 --per_device_train_batch_size 1",
}


NOISE = 0.01  # of a weight, one standard deviation


def _with_noise(folder: Path) -> Path:
    """The model with noise on each weight, so that none lies exactly halfway between two numbers of FP8."""
    model = AutoModelForCausalLM.from_pretrained(unpack_model())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1 + NOISE * torch.randn(weight.shape, generator=generator))
    model.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(unpack_model()).save_pretrained(folder / "model")
    return folder / "model"


def _losses(task: str, model: Path, folder: Path, steps: int, *flags: str) -> list[float]:
    """The loss of each step on a simulated card."""
    data = folder / ("pairs.jsonl" if task == "lora" else "text.txt")
    with tempfile.TemporaryDirectory(dir=folder) as output:
        command = [sys.executable, *TASKS[task].split(), *COMMON.split(), *flags, "--max_steps", str(steps)]
        command += ["--model_name_or_path", str(model), "--train_file", str(data), "--output_dir", output]
        threads = str(len(os.sched_getaffinity(0)))
        environment = {**os.environ, "GAUDI_SIMULATOR": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": threads}
        if subprocess.run(command, cwd=ROOT, env=environment, stdout=sys.stderr, check=False).returncode:
            raise RuntimeError(" ".join(command))
        history = json.loads((Path(output) / "trainer_state.json").read_text())["log_history"]
    return [row["loss"] for row in history if "loss" in row]


def _figures(task: str, model: Path, folder: Path, steps: int) -> dict[str, float]:
    plain, rounded = (_losses(task, model, folder, steps, *flags) for flags in ([], ["--fp8", "True"]))
    return {
        f"{task}_ratio": sum(rounded) / sum(plain),
        f"{task}_ratio_of_first_step": rounded[0] / plain[0],
        f"{task}_ratio_of_last_ten": sum(rounded[-10:]) / sum(plain[-10:]),
        f"{task}_bf16_last_ten": sum(plain[-10:]) / 10,
        f"{task}_fp8_last_ten": sum(rounded[-10:]) / 10,
    }


def fp8(steps: int = 50) -> None:
    """The mean loss with ``--fp8`` over that without, of the same rows in the same order.

    `fp8` starts with the weights as unpacked, of which many lie exactly halfway between two numbers of FP8, and
    `fp8_noise`, of all weights, with noise on them.
    """
    note = "On the simulated card, whose FP8 rounds to E4M3 and E5M2."
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text.txt").write_text("\n".join(paragraphs()))
        (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs())))
        noise = _figures("full", _with_noise(folder), folder, steps)
        figures: dict[str, float] = {"steps": steps}
        for task in TASKS:
            figures |= _figures(task, unpack_model(), folder, steps)
    ratio = noise["full_ratio"]
    write_report("fp8_noise", ratio, "0.98 to 1.02", 0.98 <= ratio <= 1.02, {"steps": steps, **noise}, note)
    ratio = max((figures[f"{task}_ratio"] for task in TASKS), key=lambda found: abs(found - 1))
    note += " The ratio is the one further from 1."
    write_report("fp8", ratio, "0.98 to 1.02", 0.98 <= ratio <= 1.02, figures, note)
