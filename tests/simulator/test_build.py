"""The device is built once, by whoever comes first, and again when its source, PyTorch or the compiler changes."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from cards import card_environment
from running import environment

import gaudi_simulator

BUILD = "from habana_frameworks.torch._simulator import build\n"
# A compiler that takes its time, writes down that it ran, and leaves half a file for a while.
COMPILER = """#!/bin/sh
if [ "$1" = --version ]; then echo "$COMPILER_VERSION"; exit 0; fi
echo run >> "$COMPILER_LOG"
while [ "$1" != -o ]; do shift; done
printf half > "$2"; sleep 1; printf whole > "$2"
exit ${COMPILER_EXIT:-0}
"""


@pytest.fixture
def compiler(tmp_path) -> dict[str, str]:
    path = tmp_path / "compiler"
    path.write_text(COMPILER)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return {
        "CXX": str(path),
        "COMPILER_VERSION": "1",
        "COMPILER_LOG": str(tmp_path / "log"),
        "GAUDI_SIMULATOR_CACHE": str(tmp_path / "cache"),
    }


def start(code: str, env: dict[str, str]) -> subprocess.Popen:
    # Without GAUDI_SIMULATOR the package builds nothing by itself.
    env = environment(**{"PYTHONPATH": gaudi_simulator.STAND_IN, **env})
    return subprocess.Popen(
        [sys.executable, "-c", BUILD + code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )


def built(code: str, env: dict[str, str]) -> str:
    process = start(code, env)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out.strip()


PRINT = "path = build.library(); print(path, path.read_text())"


@pytest.mark.slow
def test_many_processes_build_once(compiler):
    processes = [start(PRINT, compiler) for _ in range(8)]
    answers = {process.communicate(timeout=600)[0] for process in processes}
    assert all(process.returncode == 0 for process in processes)
    assert len(answers) == 1 and answers.pop().split()[1] == "whole"
    assert Path(compiler["COMPILER_LOG"]).read_text().split() == ["run"]
    left = {path.suffix for path in Path(compiler["GAUDI_SIMULATOR_CACHE"]).iterdir()}
    assert left == {".so", ".lock"}, "nothing unfinished is left"


@pytest.mark.slow
def test_changes_build_anew(compiler):
    source = "import pathlib; build.SOURCE = pathlib.Path('{}'); " + PRINT
    first = built(PRINT, compiler)
    assert built(PRINT, compiler) == first
    changed = Path(compiler["COMPILER_LOG"]).with_name("device.cpp")
    changed.write_text("// another source")
    assert built(source.format(changed), compiler) != first
    assert built("import torch; torch.__version__ = '0'; " + PRINT, compiler) != first
    assert built(PRINT, {**compiler, "COMPILER_VERSION": "2"}) != first
    assert Path(compiler["COMPILER_LOG"]).read_text().split() == ["run"] * 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"PATH": "/nowhere", "CXX": ""}, "the simulated Gaudi needs a C++ compiler: install g++"),
        ({"GAUDI_SIMULATOR_CACHE": "/proc/nothing"}, "cannot be built in /proc/nothing"),
        ({"COMPILER_EXIT": "1"}, "could not compile the simulated Gaudi for torch"),
        ({"GAUDI_SIMULATOR_MEMORY_GB": "big"}, "GAUDI_SIMULATOR_MEMORY_GB is 'big'"),
    ],
    ids=["no compiler", "no cache", "compiler fails", "memory"],
)
def test_what_cannot_be_built_is_one_line(compiler, changes, message):
    env = environment(**{**card_environment(1), "PYTHONPATH": gaudi_simulator.STAND_IN, **compiler, **changes})
    result = subprocess.run(
        [sys.executable, "-c", "import habana_frameworks.torch"], capture_output=True, text=True, env=env, timeout=300
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and message in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(("name", "device"), [("cuda", "CUDA"), ("hip", "ROCm"), ("xpu", "XPU")])
def test_a_torch_that_is_built_for_other_devices_is_one_line(name, device):
    """What pip takes from PyPI on Linux is for CUDA; with it an error of PyTorch was traced."""
    code = f"import torch; torch.version.{name} = '13.0'; import habana_frameworks.torch"
    env = environment(**card_environment(1), PYTHONPATH=gaudi_simulator.STAND_IN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=300)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("error: ") and f"is built for {device}" in line
    assert "download.pytorch.org/whl/cpu" in line


@pytest.mark.slow
def test_without_cards_nothing_is_built(tmp_path):
    code = (
        "import torch, habana_frameworks.torch as ht, habana_frameworks.torch.core as htcore\n"
        "assert not hasattr(torch, 'hpu') and not ht.hpu.is_available() and torch.accelerator.device_count() == 0\n"
        "ht.hpu.random.manual_seed_all(1); htcore.mark_step(); print(ht.hpu.memory_stats()['InUse'])"
    )
    process = start(code, {"GAUDI_SIMULATOR_CACHE": str(tmp_path / "cache")})
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out, err) == (0, "0\n", "")
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_says_once_that_it_is_simulated():
    code = "import habana_frameworks.torch, habana_frameworks.torch.core"
    said = {}
    for rank in ("0", "1"):
        env = environment(**card_environment(2), PYTHONPATH=gaudi_simulator.STAND_IN, RANK=rank)
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=600)
        assert result.returncode == 0, result.stderr
        said[rank] = result.stderr
    assert said["0"].count("SIMULATED GAUDI: 2 cards") == 1 and "SPEED MEANS NOTHING" in said["0"]
    assert said["1"] == ""


def test_report():
    env = environment(PYTHONPATH="")
    result = subprocess.run(
        [sys.executable, "-m", "gaudi_simulator", "--report"], capture_output=True, text=True, env=env, timeout=300
    )
    assert result.returncode == 0, result.stderr
    for word in ("Simulated", "Not simulated", "graph", "memory", "autocast", "hccl", "speed"):
        assert word in result.stdout
