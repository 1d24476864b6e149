"""Processes that have imported what the scripts import, and fork a child for each run of a script.

Most of the time of a short run is imports. A child is what a new process would be after them: it has arguments, an
environment, a working folder and streams of its own, runs the file as ``__main__``, and ends as Python ends. What is
read while importing must be there before: one warm process serves one card and one set of such variables.

    python tests/support/warm.py FD --use_cpu       (started by `run`, which talks to it over the socket FD)
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("run_clm", "run_mlm", "run_lora_clm")
# What every run imports after it has begun, and what one on a card does.
LATER = ("deepspeed", "matplotlib.backends.backend_agg", "matplotlib.figure")
ON_CARD = ("optimum.habana.transformers.modeling_utils",)
# Variables that change while a process runs, and from one run to the next; all others count before imports.
LATE = ("RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "GROUP_", "ACCELERATE_", "WANDB_", "MLFLOW_", "TMPDIR", "PWD")
MOST = 4  # warm processes at a time; each holds about a gigabyte, most of it shared with its children
_warm: dict[tuple, Warm] = {}


class Warm:
    """A warm process, seen from the tests."""

    def __init__(self, environment: dict[str, str], card: tuple[str, ...]):
        self.socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with other:
            self.process = subprocess.Popen(
                [sys.executable, __file__, str(other.fileno()), *card],
                env=environment, cwd=ROOT, pass_fds=[other.fileno()], stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip

    def close(self) -> None:
        self.socket.close()
        self.process.wait(60)
        self.process.stderr.close()

    def receive(self, seconds: float) -> list:
        self.socket.settimeout(seconds)
        try:
            answer = self.socket.recv(1 << 16)
        except ConnectionResetError:
            answer = b""
        if not answer:
            raise RuntimeError(f"the warm process ended: {self.process.stderr.read()[-4000:]}")
        return json.loads(answer)

    def run(
        self, runs: list[dict], seconds: float, meanwhile: Callable[[list[int]], None] | None = None
    ) -> list[subprocess.CompletedProcess]:
        """Run all of ``runs`` at the same time, each ``{"argv", "cwd", "env"}``."""
        with tempfile.TemporaryFile() as streams:
            files = [tempfile.TemporaryFile() for _ in range(2 * len(runs))]  # noqa: SIM115
            streams.write(json.dumps(runs).encode())
            streams.flush()
            socket.send_fds(self.socket, [b"run"], [streams.fileno(), *(file.fileno() for file in files)])
            pids = self.receive(120)
            try:
                if meanwhile is not None:
                    meanwhile(pids)
                statuses = self.receive(seconds)
            except BaseException:
                for pid in pids:
                    os.killpg(pid, signal.SIGKILL)
                self.receive(60)
                raise
            texts = []
            for file in files:
                file.seek(0)
                texts.append(file.read().decode(errors="replace"))
                file.close()
        return [
            subprocess.CompletedProcess(run["argv"], status, texts[2 * index], texts[2 * index + 1])
            for index, (run, status) in enumerate(zip(runs, statuses, strict=True))
        ]


def run(
    argv: list[str],
    environment: dict[str, str],
    cwd: Path,
    card: tuple[str, ...],
    seconds: float,
    ranks: int = 0,
    meanwhile: Callable[[list[int]], None] | None = None,
) -> list[subprocess.CompletedProcess]:
    """Run a script in a child of a warm process, or in one for each of ``ranks``, which find one another.

    Args:
        argv: the script and its flags.
        environment: the whole environment of the run.
        card: flags that choose the card, such as ``("--use_cpu",)``.
        seconds: after so many, all children are killed and ``TimeoutError`` is raised.
        meanwhile: called with the process ids while they run.
    """
    late = {name: value for name, value in environment.items() if name.startswith(LATE)}
    early = {name: value for name, value in environment.items() if name not in late}
    key = (card, *sorted(early.items()))
    warm = _warm.pop(key, None) or Warm(early, card)
    _warm[key] = warm  # the last one is the one used last
    while len(_warm) > MOST:
        _warm.pop(next(iter(_warm))).close()
    runs = [{"argv": argv, "cwd": str(cwd), "env": late}]
    if ranks:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
        meeting["LOCAL_WORLD_SIZE"] = str(ranks)
        places = [{**late, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
        runs = [{**runs[0], "env": environ} for environ in places]
    return warm.run(runs, seconds, meanwhile)


@atexit.register
def _close_all() -> None:
    while _warm:
        _warm.popitem()[1].close()


def _begin(run: dict, stdout: int, stderr: int) -> None:
    """Make this child what a new process for the run would be."""
    os.setsid()
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    for signal_number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(signal_number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(run["cwd"])
    os.environ.update(run["env"])
    sys.argv[:] = run["argv"]
    sys.path.insert(0, str(Path(run["cwd"], run["argv"][0]).resolve().parent))


def _serve(connection: socket.socket) -> dict | None:
    """Fork a child for each run that is asked for; returns None at the end, and in a child the run."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(connection, 16, 64)
        if not message:
            return None
        with open(descriptors[0], "rb") as file:
            file.seek(0)
            runs = json.load(file)
        pids = []
        for index, run in enumerate(runs):
            pid = os.fork()
            if not pid:
                connection.close()
                _begin(run, *descriptors[1 + 2 * index : 3 + 2 * index])
                for descriptor in descriptors[1:]:
                    os.close(descriptor)
                return run
            pids.append(pid)
        for descriptor in descriptors[1:]:
            os.close(descriptor)
        connection.send(json.dumps(pids).encode())
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        connection.send(json.dumps(statuses).encode())


def main() -> None:
    connection = socket.socket(fileno=int(sys.argv[1]))
    sys.argv[1:] = sys.argv[2:]
    sys.path[0] = str(ROOT)
    for script in SCRIPTS:
        importlib.import_module(script)
        del sys.modules[script]
    for module in LATER if "--use_cpu" in sys.argv else LATER + ON_CARD:
        importlib.import_module(module)
    del sys.path[0]
    gc.collect()
    gc.freeze()  # children share these pages, as long as nobody writes into them
    run = _serve(connection)
    if run is not None:
        runpy.run_path(run["argv"][0], run_name="__main__")


if __name__ == "__main__":
    main()
