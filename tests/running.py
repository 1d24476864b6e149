"""Run a script as a user does, in a process of its own, and look at what it printed and wrote."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def environment(**changes: str) -> dict[str, str]:
    """The environment of a run: offline, one thread, no card asked for, nothing of the tests' own."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTEST", "GAUDI_", "PT_HPU", "HF_", "OMPI_", "PMIX_")) and name != "PYTHONPATH"
    }
    return {**kept, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **changes}


def run(
    script: str | Path, *flags: object, env: dict[str, str] | None = None, code: int = 0, cwd: Path = ROOT
) -> subprocess.CompletedProcess:
    """Run ``python script flags`` and check its exit code; ``stdout`` and ``stderr`` are text."""
    result = subprocess.run(
        [sys.executable, str(script), *map(str, flags)],
        capture_output=True, text=True, cwd=cwd, env=environment(**(env or {})), timeout=900, check=False,
    )  # fmt: skip
    assert result.returncode == code, f"exit code {result.returncode}, not {code}:\n{result.stdout}\n{result.stderr}"
    return result


def run_many(script: str, cases: dict[str, list[str]], tmp_path: Path) -> dict[str, tuple[int, str]]:
    """Run one script with many lists of flags in one process, as imports take most of the time of a short run.

    Returns:
        For each case, the exit code and what went to stderr.
    """
    driver = (
        "import contextlib, io, json, sys\n"
        "sys.argv[:] = sys.argv[:1]\n"
        f"import {Path(script).stem} as script\n"
        "from gaudi_lm.runtime import choose_card, user_errors\n"
        "results = {}\n"
        "for name, argv in json.load(sys.stdin).items():\n"
        "    stderr, code = io.StringIO(), 0\n"
        "    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):\n"
        "        try:\n"
        "            choose_card(argv)\n"
        "            with user_errors():\n"
        "                script.main(argv)\n"
        "        except SystemExit as end:\n"
        "            code = end.code\n"
        "        except Exception as error:\n"
        "            code, _ = 1, stderr.write(f'{type(error).__name__}: {error}')\n"
        "    results[name] = (code, stderr.getvalue())\n"
        "print('RESULTS' + json.dumps(results))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", driver], input=json.dumps(cases), capture_output=True, text=True,
        cwd=tmp_path, env=environment(PYTHONPATH=str(ROOT)), timeout=900, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.rsplit("RESULTS", 1)[1])


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
    """Flags and defaults that users of such scripts already type, by script, from tests/data/flags.json."""
    return json.loads((ROOT / "tests" / "data" / "flags.json").read_text())[script]


def copy_elsewhere(script: str, folder: Path) -> Path:
    """A copy of a script in a folder that has nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(ROOT / script, folder / f"my_{script}"))


def help_flags(text: str) -> set[str]:
    """The flags in a help text."""
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_]*", text))
