"""FP8 against bf16 on a real pretrained model, SmolLM2-135M: not their time, which a simulated card cannot tell."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

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


def _losses(task: str, folder: Path, steps: int, *flags: str) -> list[float]:
    """The loss of each step on a simulated card."""
    output = folder / "-".join((task, *flags)).replace(" ", "")
    data = folder / ("pairs.jsonl" if task == "lora" else "text.txt")
    command = [sys.executable, *TASKS[task].split(), *COMMON.split(), *flags, "--max_steps", str(steps)]
    command += ["--model_name_or_path", str(unpack_model()), "--train_file", str(data), "--output_dir", str(output)]
    threads = str(len(os.sched_getaffinity(0)))
    environment = {**os.environ, "GAUDI_SIMULATOR": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": threads}
    if subprocess.run(command, cwd=ROOT, env=environment, stdout=sys.stderr, check=False).returncode:
        raise RuntimeError(" ".join(command))
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [row["loss"] for row in history if "loss" in row]


def fp8(steps: int = 50) -> None:
    """The mean loss with ``--fp8`` over that without, of the same rows in the same order."""
    figures: dict[str, float] = {"steps": steps}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text.txt").write_text("\n".join(paragraphs()))
        (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs())))
        for task in TASKS:
            plain, rounded = _losses(task, folder, steps), _losses(task, folder, steps, "--fp8", "True")
            figures[f"{task}_ratio"] = sum(rounded) / sum(plain)
            figures[f"{task}_ratio_of_first_step"] = rounded[0] / plain[0]
            figures[f"{task}_ratio_of_last_ten"] = sum(rounded[-10:]) / sum(plain[-10:])
            figures[f"{task}_bf16_last_ten"] = sum(plain[-10:]) / 10
            figures[f"{task}_fp8_last_ten"] = sum(rounded[-10:]) / 10
    ratio = max((figures[f"{task}_ratio"] for task in TASKS), key=lambda found: abs(found - 1))
    note = "On the simulated card, whose FP8 rounds to E4M3 and E5M2. The ratio is the one further from 1."
    write_report("fp8", ratio, "0.98 to 1.02", 0.98 <= ratio <= 1.02, figures, note)
