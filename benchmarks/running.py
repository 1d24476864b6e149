"""The scripts as they are run: memory of an evaluation, start-up, graphs and waits on a simulated card, two ranks."""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .measure import MIB, write_report
from .preprocessing import make_tokenizer
from .workloads import paragraphs

ROOT = Path(__file__).parent.parent
TINY = "n_embd=64,n_layer=2,n_head=2,n_positions=512"


def _prepare(folder: str) -> list[str]:
    """A text file and a tokenizer in `folder`; the flags that name them."""
    make_tokenizer().save_pretrained(f"{folder}/tokenizer")
    Path(folder, "text.txt").write_text("\n".join(paragraphs() * 2))
    file = f"{folder}/text.txt"
    return ["--tokenizer_name", f"{folder}/tokenizer", "--train_file", file, "--validation_file", file]


def _environment(folder: str) -> dict[str, str]:
    """Offline, with one thread."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": f"{folder}/hub", "OMP_NUM_THREADS": "1"}


def _run(command: list[str], environment: dict[str, str], cores: set[int] | None = None) -> int:
    """Run a command to its good end; its peak resident memory in bytes."""
    pin = (lambda: os.sched_setaffinity(0, cores)) if cores else None
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, preexec_fn=pin)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            raise RuntimeError(f"{' '.join(command)}\n{log.read().decode()}")
    return usage.ru_maxrss * 1024


def eval_memory(blocks: int = 25, rounds: int = 3) -> None:
    """Peak memory of run_clm.py --do_eval, with ten times the data: medians, as the peak of one run varies by 5 %."""
    peaks = {blocks: [], 10 * blocks: []}
    with tempfile.TemporaryDirectory() as folder:
        flags = _prepare(folder)
        for _ in range(rounds):
            for count in peaks:
                command = [sys.executable, "run_clm.py", "--use_cpu", *flags, "--model_type", "gpt2"]
                command += ["--config_overrides", TINY, "--block_size", "512", "--do_eval"]
                command += ["--max_eval_samples", str(count), "--output_dir", f"{folder}/{count}"]
                peaks[count].append(_run(command, _environment(folder)))
                done = json.loads(Path(folder, str(count), "all_results.json").read_text())
                if done["eval_samples"] != count:
                    raise RuntimeError(f"{done['eval_samples']} blocks were evaluated, not {count}")
    small, large = (statistics.median(values) for values in peaks.values())
    ratio = large / small
    vocabulary = len(make_tokenizer())
    figures = {
        "blocks": blocks,
        "peak_mib": small / MIB,
        "ten_times_peak_mib": large / MIB,
        "spread_of_one_peak_mib": (max(peaks[blocks]) - min(peaks[blocks])) / MIB,
        "logits_of_ten_times_the_data_mib": 10 * blocks * 512 * vocabulary * 4 / MIB,
    }
    write_report("eval_memory", ratio, "<= 1.02", ratio <= 1.02, figures)


def _seconds_to(pattern: str, command: list[str], environment: dict[str, str]) -> float:
    """Seconds from the start of a command to the first line on stderr that matches; it is left to end by itself."""
    started = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        seconds, lines = None, []
        for line in process.stderr:
            lines.append(line)
            if seconds is None and re.search(pattern, line):
                seconds = time.perf_counter() - started
    if process.returncode or seconds is None:
        raise RuntimeError("".join(lines))
    return seconds


def startup(rounds: int = 3) -> None:
    """From the start of run_clm.py to its first step on the CPU, against importing all of optimum-habana alone."""
    imports = (
        "import sys; from gaudi_lm.device import choose_card; choose_card(['--use_cpu']);"
        "from optimum.habana import GaudiTrainer, GaudiTrainingArguments;"
        "from optimum.habana.transformers.modeling_utils import adapt_transformers_to_gaudi;"
        "adapt_transformers_to_gaudi(); print('imported', file=sys.stderr)"
    )
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "run_clm.py", "--use_cpu", *_prepare(folder), "--model_type", "gpt2"]
        command += ["--config_overrides", TINY, "--block_size", "512", "--do_train", "--max_steps", "1"]
        command += ["--logging_steps", "1", "--overwrite_output_dir", "--output_dir", f"{folder}/output"]
        environment = _environment(folder)
        for turn in range(rounds + 1):
            first_step = _seconds_to(r"step 1/1", command, environment)
            imported = _seconds_to("imported", [sys.executable, "-c", imports], environment)
            if turn:
                ours.append(first_step)
                theirs.append(imported)
    pairs = [a / b for a, b in zip(ours, theirs, strict=True)]
    ratio = statistics.median(pairs)
    figures = {
        "seconds_to_first_step": statistics.median(ours),
        "seconds_to_import": statistics.median(theirs),
    }
    write_report("startup", ratio, "<= 0.75", ratio <= 0.75, figures)


def answers(rounds: int = 3) -> None:
    """``--help``, a wrong flag and ``--dry_run`` of run_clm.py, against importing torch and transformers alone."""
    seconds: dict[str, list[float]] = {"import": [], "help": [], "wrong_flag": [], "dry_run": []}
    with tempfile.TemporaryDirectory() as folder:
        environment, script = _environment(folder), [sys.executable, "run_clm.py"]
        run = ["--use_cpu", *_prepare(folder), "--model_type", "gpt2", "--config_overrides", TINY, "--do_train"]
        run += ["--block_size", "512", "--output_dir", f"{folder}/output"]
        commands = {
            "import": ([sys.executable, "-c", "import torch, transformers"], 0),
            "help": ([*script, "--help"], 0),
            "wrong_flag": ([*script, *run, "--no_such_flag"], 2),
            "dry_run": ([*script, *run, "--dry_run"], 0),
        }
        for turn in range(rounds + 1):
            for name, (command, status) in commands.items():
                started = time.perf_counter()
                done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
                if done.returncode != status:
                    raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
                if turn:
                    seconds[name].append(time.perf_counter() - started)
    ratios = {
        name: statistics.median(a / b for a, b in zip(seconds[name], seconds["import"], strict=True))
        for name in ("help", "wrong_flag", "dry_run")
    }
    figures = {f"{name}_ratio": ratio for name, ratio in ratios.items()}
    figures |= {f"{name}_seconds": statistics.median(values) for name, values in seconds.items()}
    worst = max(ratios.values())
    write_report("answers", worst, "<= 1.2", worst <= 1.2, figures)


def simulator_overhead(rounds: int = 7) -> None:
    """The simulated card against plain CPU tensors, in a process that sees that card."""
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    command = [sys.executable, "-m", "benchmarks.simulator_overhead", "--steps", str(rounds)]
    subprocess.run(command, cwd=ROOT, env=environment | {"GAUDI_SIMULATOR": "1"}, check=True)


def weak_scaling(rounds: int = 3, steps: int = 6, warmup: int = 2) -> None:
    """Tokens per second per rank of a GPT-2 of 124 million parameters: two ranks on two cores against one on one."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise SystemExit("weak_scaling needs two cores")
    speeds = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        script = ["run_clm.py", "--use_cpu", *_prepare(folder), "--model_type", "gpt2", "--block_size", "512"]
        script += ["--do_train", "--max_steps", str(steps), "--throughput_warmup_steps", str(warmup)]
        script += ["--per_device_train_batch_size", "2", "--save_strategy", "no", "--save_last_ckpt", "False"]
        script += ["--overwrite_output_dir", "--output_dir", f"{folder}/output"]
        environment = _environment(folder)
        launched = [sys.executable, "gaudi_spawn.py", "--world_size", "2", *script]
        for turn in range(rounds + 1):
            for ranks, command in ((1, [sys.executable, *script]), (2, launched)):
                _run(command, environment, {cores[0]} if ranks == 1 else set(cores))
                results = json.loads(Path(folder, "output", "all_results.json").read_text())
                if turn:
                    speeds[ranks].append(results["train_tokens_per_second"] / ranks)
    pairs = [two / one for one, two in zip(speeds[1], speeds[2], strict=True)]
    ratio = statistics.median(pairs)
    figures = {
        "one_rank_tokens_per_second": statistics.median(speeds[1]),
        "two_ranks_tokens_per_second_each": statistics.median(speeds[2]),
    }
    write_report("weak_scaling", ratio, ">= 0.9", ratio >= 0.9, figures)


def _documented(folder: str) -> dict[str, dict]:
    """Run every documented single-card command on a simulated card; their figures, by the name of the file."""
    sys.path.insert(0, str(ROOT / "tests"))
    from hub.server import Hub
    from hub.stand_ins import GATED, MOVED, write_stand_ins

    write_stand_ins(Path(folder, "stand-ins"))
    text = "\n".join(paragraphs())
    for name in ("train", "validation"):
        Path(folder, f"{name}.txt").write_text(text)
    scripts = {"clm": "run_clm.py", "mlm": "run_mlm.py", "lora": "run_lora_clm.py"}
    found = {}
    with Hub(Path(folder, "stand-ins"), moved=dict(MOVED), gated={GATED}, tokens=set()) as hub:
        environment = hub.environment(Path(folder, "home")) | {"GAUDI_SIMULATOR": "1", "OMP_NUM_THREADS": "1"}
        for file in sorted((ROOT / "configs").glob("*.json")):
            settings = json.loads(file.read_text())
            if re.search(r"\d_cards", file.stem) or "n_layer=48" in settings.get("config_overrides", ""):
                continue
            command = [sys.executable, scripts[file.stem.split("_")[0]], f"configs/{file.name}"]
            command += ["--output_dir", f"{folder}/{file.stem}"]
            if "train_file" in settings:
                command += ["--train_file", f"{folder}/train.txt", "--validation_file", f"{folder}/validation.txt"]
            _run(command, environment)
            found[file.stem] = json.loads(Path(folder, file.stem, "all_results.json").read_text())
    return found


def graphs() -> None:
    """Graphs compiled after warm-up on a simulated card, over the documented commands; the same runs answer syncs."""
    with tempfile.TemporaryDirectory() as folder:
        found = _documented(folder)
    compiled = {name: results["graph_compilations_after_warmup"] for name, results in found.items()}
    note = "Multi-card commands differ from these in the number of ranks only, and are left out."
    write_report("graphs", sum(compiled.values()), "0", not any(compiled.values()), compiled, note)
    waits = {name: results.get("host_syncs_per_step", 0.0) for name, results in found.items()}
    write_report("syncs", max(waits.values()), "0", not any(waits.values()), waits, note)
