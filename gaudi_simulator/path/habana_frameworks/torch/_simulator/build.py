"""Compile the device, once per source, PyTorch and compiler, into a cache that any number of processes may share."""

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("device.cpp")
FLAGS = ["-std=c++20", "-O2", "-fPIC", "-shared", "-w"]


class BuildError(Exception):
    """The device cannot be built: one line that says what to do."""


def cache_folder() -> Path:
    """`$GAUDI_SIMULATOR_CACHE`, or the folder `gaudi-lm` in the user's cache."""
    chosen = os.environ.get("GAUDI_SIMULATOR_CACHE")
    if chosen:
        return Path(chosen).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gaudi-lm"


def compiler() -> str:
    """The path of a C++ compiler: `$CXX`, else g++ or c++.

    Raises:
        BuildError: there is none.
    """
    for name in (os.environ.get("CXX"), "g++", "c++"):
        path = name and shutil.which(name)
        if path:
            return path
    raise BuildError(
        "the simulated Gaudi needs a C++ compiler: install g++ (Debian: apt-get install g++), or set CXX to one"
    )


def library() -> Path:
    """The shared library of the device, built if it is not in the cache.

    Raises:
        BuildError: no compiler, a cache that cannot be written to, or a compiler that fails.
    """
    command = [compiler(), *FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"]
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True).stdout
    key = hashlib.sha256()
    for part in (SOURCE.read_text(), torch.__version__, str(torch.version.git_version), version, " ".join(command)):
        key.update(part.encode() + b"\0")
    folder = cache_folder()
    built = folder / f"device-{key.hexdigest()[:20]}.so"
    if built.exists():
        return built
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(built.with_suffix(".lock"), os.O_CREAT | os.O_WRONLY)
    except OSError as error:
        raise BuildError(
            f"the simulated Gaudi cannot be built in {folder} ({error.strerror}): set GAUDI_SIMULATOR_CACHE to another"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            _compile(command, built)
    finally:
        os.close(lock)
    return built


def _compile(command: list[str], built: Path) -> None:
    root = Path(torch.__file__).parent
    # A name of its own, renamed when complete: no process ever loads half a library.
    descriptor, unfinished = tempfile.mkstemp(suffix=".so", dir=built.parent)
    os.close(descriptor)
    command = [
        *command,
        *("-o", unfinished, str(SOURCE)),
        *("-I", str(root / "include"), "-I", str(root / "include/torch/csrc/api/include")),
        *("-L", str(root / "lib"), "-lc10", "-ltorch_cpu"),
    ]
    try:
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            log = built.with_suffix(".log")
            log.write_text(" ".join(command) + "\n" + result.stderr)
            raise BuildError(
                f"{command[0]} could not compile the simulated Gaudi for torch {torch.__version__}: see {log}"
            )
        os.replace(unfinished, built)
    finally:
        Path(unfinished).unlink(missing_ok=True)
