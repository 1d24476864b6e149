"""What all benchmarks need: contenders that take turns, the machine's matrix-product rate, memory, the report.

Every contender is a process of its own, with its own model, and does a step only when it is told to. So the steps of
two contenders alternate, whatever else slows the machine slows both, and the ratio of a pair means something.
"""

import ctypes
import gc
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
MIB = 2**20


def resident(field: str = "VmRSS") -> int:
    """Bytes of a line of this process's /proc/PID/status: VmRSS, VmHWM (its peak), RssAnon, ..."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def forget_peak() -> None:
    """Give free memory back and let VmHWM start anew from what is resident now."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


class Pace:
    """A contender's end of the line: it calls `lap` at the end of each step and is held there until its next turn."""

    def __init__(self, connection):
        self.connection = connection
        self.started = None

    def lap(self, **figures) -> None:
        """Report the step that ends here with `figures`, wait for the next turn. The first call reports nothing."""
        if self.started is None:
            self.connection.send(None)
        else:
            seconds, cpu = time.perf_counter() - self.started, time.process_time() - self.started_cpu
            memory = {"peak": resident("VmHWM"), "before": self.before}
            self.connection.send({"seconds": seconds, "cpu_seconds": cpu, **memory, **figures})
        turn = self.connection.recv()
        if turn == "stop":
            raise SystemExit
        if turn == "memory":  # a step that starts without any free memory in hand is slower: it is not timed
            forget_peak()
        self.before = resident()
        self.started, self.started_cpu = time.perf_counter(), time.process_time()


def _contend(contender, arguments, connection, threads):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    contender(Pace(connection), **arguments)


def race(contenders: dict[str, tuple[Callable, dict]], rounds: int) -> dict[str, list[dict]]:
    """Let contenders take turns: one step each per round.

    Args:
        contenders: by name, a module-level function that calls `pace.lap()` after each step, for ever, and its other
            arguments. Its set-up lies before the first call.
        rounds: turns that count, after one to warm up and one for the memory.

    Returns: by name, the figures of each counted turn: `seconds`; `cpu_seconds` of all threads, which others on the
    machine disturb less; what was passed to `lap`; and `added_memory`, bytes of resident memory that a step needs at
    its peak beyond what the contender holds between steps.
    """
    threads = len(os.sched_getaffinity(0))
    os.environ["OMP_NUM_THREADS"] = str(threads)
    context = multiprocessing.get_context("spawn")
    lines, processes = {}, []
    for name, (contender, arguments) in contenders.items():
        lines[name], end = context.Pipe()
        processes.append(context.Process(target=_contend, args=(contender, arguments, end, threads)))
        processes[-1].start()
        end.close()
        lines[name].recv()  # set up one after the other, so that none slows another's first step
    turns = {name: [] for name in contenders}
    added_memory = {}
    for turn in ["warm up", "memory"] + ["time"] * rounds:
        for name, line in lines.items():
            line.send(turn)
            figures = line.recv()
            if turn == "memory":
                added_memory[name] = figures["peak"] - figures["before"]
            elif turn == "time":
                turns[name].append(figures | {"added_memory": added_memory[name]})
    for line in lines.values():
        line.send("stop")
    for process in processes:
        process.join()
    return turns


def sgemm(pace: Pace, size: int = 2048) -> None:
    """A contender: one single-precision product of two square matrices; the limit that the others are held against."""
    left, right, out = (torch.randn(size, size) for _ in range(3))
    while True:
        pace.lap(flop=2 * size**3 * 8)
        for _ in range(8):
            torch.mm(left, right, out=out)


def median(turns: list[dict], name: str = "seconds") -> float:
    return statistics.median(turn[name] for turn in turns)


def paired_ratio(over: list[dict], under: list[dict], name: str = "seconds") -> float:
    """The median over rounds of over[name] / under[name]."""
    return statistics.median(a[name] / b[name] for a, b in zip(over, under, strict=True))


def machine() -> dict:
    """The machine and the versions that a result was measured with."""
    described = dict(
        (part.strip() for part in line.split(":", 1))
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if ":" in line
    )
    flags = described.get("flags", "").split()
    return {
        "processor": described.get("model name", platform.machine()),
        "vector_unit": next((name for name in ("avx512f", "avx2", "avx") if name in flags), "none"),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_at_start": round(LOAD_AT_START, 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


LOAD_AT_START = os.getloadavg()[0]


def write_report(name: str, ratio: float, target: str, met: bool, figures: dict, note: str = "") -> None:
    """Print a Markdown table of a benchmark's figures and write benchmarks/results/NAME.json."""
    result = {
        "name": name,
        "ratio": round(ratio, 4),
        "target": target,
        "met": bool(met),
        "figures": {key: round(value, 6) if isinstance(value, float) else value for key, value in figures.items()},
        "note": note,
        "machine": machine(),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"### {name}\n\n| figure | value |\n|---|---|")
    print(f"| **ratio** | **{ratio:.3f}** (target {target}: {'met' if met else 'not met'}) |")
    for key, value in result["figures"].items():
        if not isinstance(value, dict):
            print(f"| {key.replace('_', ' ')} | {value:.4g} |" if isinstance(value, float) else f"| {key} | {value} |")
    print(f"| machine | {', '.join(f'{key} {value}' for key, value in result['machine'].items())} |\n")
    if note:
        print(note + "\n")
