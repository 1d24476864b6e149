"""Run a script as a user does, and look at what it printed and wrote."""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
import unittest.mock
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pyte
import repeated
import warm

from gaudi_lm.device import _card_flags, expand_config_file
from gaudi_lm.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def load_script(name: str) -> ModuleType:
    """A script such as ``run_lora_clm`` as a module, for its functions; the tests' own environment stays as it is."""
    patch = unittest.mock.patch
    argv, hook = (
        patch.object(sys, "argv", [f"{name}.py", "--use_cpu"]),
        patch.object(sys, "excepthook", sys.excepthook),
    )
    with argv, hook, patch.dict(os.environ):
        return importlib.import_module(name)


def environment(**changes: str) -> dict[str, str]:
    """The environment of a run: offline, one thread, no card asked for, nothing of the tests' own."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTEST", "GAUDI_", "PT_HPU", "HF_", "OMPI_", "PMIX_")) and name != "PYTHONPATH"
    }
    return {**kept, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **changes}


def run(
    script: str | Path,
    *flags: object,
    env: dict[str, str] | None = None,
    code: int = 0,
    cwd: Path = ROOT,
    fresh: bool = False,
    seconds: float = 280,
) -> subprocess.CompletedProcess:
    """Run ``python script flags`` and check its exit code; ``stdout`` and ``stderr`` are text.

    Args:
        fresh: in a new process. Otherwise in a child of one that has done the imports already (:mod:`warm`).
    """
    argv, environ = [str(script), *map(str, flags)], environment(**(env or {}))
    if fresh or Path(script).name == "gaudi_spawn.py":
        result = subprocess.run(
            [sys.executable, *argv],
            capture_output=True, text=True, cwd=cwd, env=environ, timeout=seconds, check=False,
        )  # fmt: skip
    else:
        (result,) = warm.run(argv, environ, cwd, _card(argv[1:], environ), seconds)
    assert result.returncode == code, f"exit code {result.returncode}, not {code}:\n{result.stdout}\n{result.stderr}"
    return result


def run_in_terminal(columns: int, script: str | Path, *flags: object, env: dict[str, str] | None = None) -> list[str]:
    """Run a script to a good end in a terminal of so many columns; the lines that are on its screen then."""
    screen = pyte.Screen(columns, 100)
    stream, (ours, its) = pyte.ByteStream(screen), pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 100, columns, 0, 0))
    argv = [sys.executable, str(script), *map(str, flags)]
    with subprocess.Popen(argv, stdout=its, stderr=its, cwd=ROOT, env=environment(**(env or {}))) as process:
        os.close(its)
        with contextlib.suppress(OSError):  # the other end is closed
            while part := os.read(ours, 1 << 16):
                stream.feed(part)
    os.close(ours)
    lines = [line.rstrip() for line in screen.display]
    assert process.returncode == 0, "\n".join(lines)
    return lines


def run_ranks(
    ranks: int,
    script: str | Path,
    *flags: object,
    env: dict[str, str] | None = None,
    cwd: Path = ROOT,
    seconds: float = 280,
) -> list[subprocess.CompletedProcess]:
    """Run a script in several ranks at once, as a launcher would start them; each must end well."""
    argv, environ = [str(script), *map(str, flags)], environment(**(env or {}))
    found = warm.run(argv, environ, cwd, _card(argv[1:], environ), seconds, ranks)
    texts = "\n".join(f"rank {rank}: {one.returncode}\n{one.stderr[-4000:]}" for rank, one in enumerate(found))
    assert [one.returncode for one in found] == [0] * ranks, texts
    return found


def run_interrupted(
    ranks: int,
    script: str | Path,
    *flags: object,
    meanwhile: Callable[[list[int]], None],
    env: dict[str, str] | None = None,
    seconds: float = 280,
) -> list[subprocess.CompletedProcess]:
    """Run a script in one process (``ranks`` 0) or in several; ``meanwhile`` gets their ids. Any end will do."""
    argv, environ = [str(script), *map(str, flags)], environment(**(env or {}))
    return warm.run(argv, environ, ROOT, _card(argv[1:], environ), seconds, ranks, meanwhile)


def _card(flags: list[str], environ: dict[str, str]) -> dict[str, str]:
    """The variables that the card of a run reads when it is loaded; empty on the CPU."""
    try:
        chosen = _card_flags(expand_config_file(flags))
    except UserError:
        return {}
    if chosen.use_cpu or not chosen.use_habana or "GAUDI_SIMULATOR" not in environ:
        return {}
    compiled = bool(chosen.torch_compile or chosen.torch_compile_backend)
    lazy = not compiled if chosen.use_lazy_mode is None else chosen.use_lazy_mode
    own = {name: value for name, value in environ.items() if name.startswith(warm.CARD)}
    return {"PT_HPU_LAZY_MODE": "1" if lazy else "0", **own}


@dataclass
class End:
    """How a run ended; ``metrics`` is the ``all_results.json`` that it wrote, None where it failed or wrote none."""

    status: int
    log: str
    metrics: dict | None
    printed: str = ""


def run_several(script: str, runs: list[list], environ: dict[str, str] | None = None) -> list[End]:
    """Run a script such as ``run_clm`` once for each list of flags, one after the other, whatever their ends."""
    environ = environ or environment()
    ends = []
    for flags in runs:
        flags = [str(flag) for flag in flags]
        (done,) = warm.run([f"{script}.py", *flags], environ, ROOT, _card(flags, environ), 280)
        output = Path([value for flag, value in zip(flags, flags[1:], strict=False) if flag == "--output_dir"][-1])
        ends.append(End(done.returncode, done.stderr, None if done.returncode else results(output)))
    return ends


def run_repeatedly(script: str, runs: list[list[str]], environ: dict[str, str], folder: Path) -> list[End]:
    """Run the main function of a script such as ``run_clm`` with each list of flags, in one process (:mod:`repeated`).

    Args:
        folder: for the list of the runs.
    """
    path = folder / "runs.json"
    path.write_text(json.dumps(runs))
    argv = ["tests/support/repeated.py", script, str(path)]
    (done,) = warm.run(argv, environ, ROOT, _card(runs[0], environ), 280)
    assert done.returncode == 0, done.stderr
    printed, logged = done.stdout.split(repeated.MARK)[1:], done.stderr.split(repeated.MARK)[1:]
    ends = []
    for index, flags in enumerate(runs):
        status = int(printed[index + 1].split("\n", 1)[0])
        output = Path(flags[flags.index("--output_dir") + 1]) / "all_results.json"
        metrics = json.loads(output.read_text()) if not status and output.is_file() else None
        ends.append(End(status, logged[index], metrics, printed[index]))
    return ends


def run_many(script: str, cases: dict[str, list[str]], folder: Path) -> dict[str, tuple[int, str]]:
    """Run a script in ``folder`` with many lists of flags; for each case, the exit code and what went to stderr."""
    found = {}
    for name, flags in cases.items():
        argv = [str(ROOT / script), *map(str, flags)]
        (done,) = warm.run(argv, environment(), folder, _card(argv[1:], environment()), 280)
        found[name] = (done.returncode, done.stderr)
    return found


def check_refused(script: str, cases: dict[str, tuple[list, str]], more: list, folder: Path, output: Path) -> None:
    """Each case ends with exit code 2 and one line that has its words, and nothing is written into ``output``.

    Args:
        cases: flags and words by name.
        more: flags of all.
    """
    found = run_many(script, {name: [*flags, *more] for name, (flags, _) in cases.items()}, folder)
    for name, (code, stderr) in found.items():
        line = stderr.strip().splitlines()[-1]
        assert code == 2 and line.startswith("error: ") and cases[name][1] in line, f"{name}: {code} {stderr}"
        assert "Traceback" not in stderr
    assert not output.exists() or not list(output.iterdir())


def load_elsewhere(*cases: tuple[str, Path, Path | None]) -> None:
    """Load models and tokenizers by transformers and peft alone, and use them, in a process that has no gaudi_lm.

    Args:
        cases: the class of transformers, the folder, and that of the base model where the folder holds an adapter.
    """
    code = """
import json, sys
sys.modules.update(dict.fromkeys(("gaudi_lm", "gaudi_simulator", "optimum", "habana_frameworks")))  # not importable
import torch, transformers
from peft import PeftModel
for kind, folder, base in json.loads(sys.argv[1]):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model, info = getattr(transformers, kind).from_pretrained(base or folder, output_loading_info=True)
    assert not any(info.values()), (folder, info)
    plain = model.get_input_embeddings().weight.shape
    model = PeftModel.from_pretrained(model, folder) if base else model
    inputs = tokenizer("Explain the for statement.", return_tensors="pt")
    logits = model(**inputs).logits
    assert logits.isfinite().all() and len(tokenizer) <= plain[0], folder
"""
    words = json.dumps([[kind, str(folder), base and str(base)] for kind, folder, base in cases])
    done = subprocess.run(
        [sys.executable, "-c", code, words], cwd=cases[0][1], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def log_history(output: Path) -> list[dict]:
    """What the trainer logged."""
    return json.loads((output / "trainer_state.json").read_text())["log_history"]


def losses(output: Path) -> list[float]:
    """The training losses, in the order of the steps."""
    return [row["loss"] for row in log_history(output) if "loss" in row]


def results(output: Path) -> dict[str, float]:
    """``all_results.json``."""
    return json.loads((output / "all_results.json").read_text())


def documented_flags(script: str) -> dict[str, str]:
    """Flags and defaults that users of such scripts already type, by script, from tests/specification/flags.json."""
    return json.loads((ROOT / "tests/specification/flags.json").read_text())[script]


def copy_elsewhere(script: str, folder: Path) -> Path:
    """A copy of a script in a folder that has nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(ROOT / script, folder / f"my_{script}"))


def help_flags(text: str) -> set[str]:
    """The flags in a help text."""
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_]*", text))
