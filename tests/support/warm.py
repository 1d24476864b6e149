"""Processes that have imported what the scripts import, and fork a child for each run of a script.

Most of the time of a short run is imports. A child is what a new process would be after them: it has arguments, an
environment, a working folder and streams of its own, and runs the file as ``__main__``. What is read while importing
must be there before. Imports therefore grow like a tree: one process imports what reads no variables of Hugging Face,
its children the scripts, one for each set of these variables, and their children what depends on the card.

    python tests/support/warm.py FD       (started by `run`, which talks to it over the socket FD)
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

from ports import reserved_port

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = (
    *("torch", "torch.distributed.tensor", "torch._dynamo", "pandas", "pyarrow.dataset"),
    *("aiohttp", "matplotlib.backends.backend_agg", "matplotlib.figure"),
)
SCRIPTS = ("run_clm", "run_mlm", "run_lora_clm")
# What most runs import after they have begun, and what one on a card does.
LATER = ("deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer", "deepspeed.module_inject.auto_ep_layer")
LATER += tuple(f"transformers.models.{name}.modeling_{name}" for name in ("gpt2", "llama", "roberta"))
ADAPTED = "albert blip deepseek_v2 deepseek_v3 detr owlvit table_transformer vision_encoder_decoder vit xlm_roberta"
ON_CARD = (
    "optimum.habana.transformers.modeling_utils",
    *(f"transformers.models.{name}.modeling_{name}" for name in ADAPTED.split()),
)
# Variables that change while a process runs, and from one run to the next; all others count before imports.
LATE = ("RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "GROUP_", "ACCELERATE_", "WANDB_", "MLFLOW_", "TMPDIR", "PWD")
LATE += ("PYTORCH_NVML_",)  # of CUDA; libraries set it in the tests' own process, some time
HUB = ("HF_", "http", "HTTP", "no_proxy", "NO_PROXY")  # libraries other than Hugging Face's read none while imported
CARD = ("GAUDI_", "PT_HPU_", "PT_TE_")  # the scripts read none while imported, but the device does
MOST = 6  # processes that runs fork from at a time; each holds some hundred megabytes of its own
_warm: dict[tuple, Warm] = {}


class Warm:
    """A warm process, seen from the tests."""

    def __init__(self, environment: dict[str, str], stage: str, parent: Warm | None = None):
        self.socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.process, self.stderr = None, tempfile.TemporaryFile()  # noqa: SIM115
        with other:
            if parent is None:
                self.process = subprocess.Popen(
                    [sys.executable, __file__, str(other.fileno())],
                    env=environment, cwd=ROOT, pass_fds=[other.fileno()], stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL, stderr=self.stderr,
                )  # fmt: skip
            else:
                message = json.dumps({"stage": stage, "environment": environment}).encode()
                socket.send_fds(parent.socket, [message], [other.fileno(), self.stderr.fileno()])

    @property
    def closed(self) -> bool:
        return self.socket.fileno() == -1

    def close(self) -> None:
        self.socket.close()
        self.stderr.close()

    def receive(self, seconds: float) -> list:
        self.socket.settimeout(seconds)
        try:
            answer = self.socket.recv(1 << 16)
        except ConnectionResetError:
            answer = b""
        if not answer:
            self.stderr.seek(0)
            raise RuntimeError(f"the warm process ended: {self.stderr.read().decode(errors='replace')[-4000:]}")
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
            try:
                pids = self.receive(280)  # after all imports
                if meanwhile is not None:
                    meanwhile(pids)
                self.socket.send(b"wait")
                statuses = self.receive(seconds)
            except BaseException:
                # Its runs end with it. The next run would take an answer of theirs for its own ids, and 0 is a status:
                # a signal to process 0 reaches everything that started the tests.
                self.close()
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
    card: dict[str, str],
    seconds: float,
    ranks: int = 0,
    meanwhile: Callable[[list[int]], None] | None = None,
) -> list[subprocess.CompletedProcess]:
    """Run a script in a child of a warm process, or in one for each of ``ranks``, which find one another.

    Args:
        argv: the script and its flags.
        environment: the whole environment of the run.
        card: the variables that the simulated card reads; empty on the CPU.
        seconds: after so many, all children are killed and ``TimeoutError`` is raised.
        meanwhile: called with the process ids while they run. No other process gets one of them before it returns.
    """
    late = {name: value for name, value in environment.items() if name.startswith(LATE + CARD)}
    early = {name: value for name, value in environment.items() if name not in late}
    warm = _grow(early, card)
    one = {"argv": argv, "cwd": str(cwd), "env": late}
    if not ranks:
        return warm.run([one], seconds, meanwhile)
    with reserved_port() as port:
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
        meeting["LOCAL_WORLD_SIZE"] = str(ranks)
        places = [{**late, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
        return warm.run([{**one, "env": environ} for environ in places], seconds, meanwhile)


def _grow(early: dict[str, str], card: dict[str, str]) -> Warm:
    """The process that runs with these variables fork from, and what it grows from."""
    libraries = {name: value for name, value in early.items() if not name.startswith(HUB)}
    stages = {"libraries": libraries, "scripts": early, "card" if card else "cpu": early | card}
    warm = None
    for stage, variables in stages.items():
        key = (stage, *sorted(variables.items()))
        kept = _warm.pop(key, None)
        warm = Warm(variables, stage, warm) if kept is None or kept.closed else kept
        _warm[key] = warm  # the last one is the one used last
    leaves = [key for key in _warm if key[0] in ("card", "cpu")]
    for key in leaves[:-MOST]:
        _warm.pop(key).close()
    return warm


@atexit.register
def _close_all() -> None:
    for warm in _warm.values():
        warm.close()
    for warm in _warm.values():
        if warm.process is not None:
            warm.process.wait(60)  # which waits for what grew from it


def _begin(run: dict, stdout: int, stderr: int) -> None:
    """Make this child what a new process for the run would be."""
    os.setsid()
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    for signal_number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(signal_number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(run["cwd"])
    for name in [name for name in os.environ if name.startswith(CARD)]:
        del os.environ[name]
    os.environ.update(run["env"])
    sys.argv[:] = run["argv"]
    sys.path.insert(0, str(Path(run["cwd"], run["argv"][0]).resolve().parent))


def _serve(connection: socket.socket) -> dict | None:
    """Fork a child for each run and each stage that is asked for; returns None at the end, and in a child the run."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(connection, 1 << 17, 64)
        if not message:
            with contextlib.suppress(ChildProcessError):
                while True:
                    os.wait()
            return None
        if message != b"run":
            if not os.fork():
                connection.close()
                os.dup2(descriptors[1], 2)
                os.close(descriptors[1])
                return _import(json.loads(message), socket.socket(fileno=descriptors[0]))
            for descriptor in descriptors:
                os.close(descriptor)
            continue
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
        statuses = _wait(pids, connection)
        with contextlib.suppress(BrokenPipeError):
            connection.send(json.dumps(statuses).encode())


def _wait(pids: list[int], connection: socket.socket) -> list[int]:
    """How children end; they are killed where the other side closes the connection before."""
    with contextlib.suppress(ConnectionResetError):
        connection.recv(8)  # until then, what has ended is a zombie, and keeps its id
    running = {os.pidfd_open(pid): pid for pid in pids}
    while running:
        ready, _, _ = select.select([connection, *running], [], [])
        for pid in running.values() if connection in ready else ():
            os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):  # no session yet
                os.killpg(pid, signal.SIGKILL)
        for descriptor in running.keys() & ready:
            os.close(descriptor)
            del running[descriptor]
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def _import(wanted: dict, connection: socket.socket) -> dict | None:
    """Import what belongs to a stage, with its environment, then serve."""
    from gaudi_lm.device import choose_card

    stage = wanted["stage"]
    os.environ.clear()
    os.environ.update(wanted["environment"])
    choose_card({"cpu": ["--use_cpu"], "card": ["--use_habana"]}.get(stage, []))
    modules = {"libraries": LIBRARIES, "scripts": SCRIPTS, "cpu": LATER, "card": LATER + ON_CARD}[stage]
    for module in modules:
        importlib.import_module(module)
        if module in SCRIPTS:
            del sys.modules[module]
    # Undone when a process ends, in each of its children: a twentieth of the time of a short run.
    for finalizer in weakref.finalize._registry:
        finalizer.atexit = finalizer.atexit and finalizer.peek()[1] is not sys.modules["torch.library"]._del_library
    # For a line of a debug log, torch.compile writes 256 MB at each graph: a sixth of the time of a run that compiles.
    sys.modules["torch._dynamo.guards"].profile_guard_manager = lambda *_: 0.0
    gc.collect()
    gc.freeze()  # children share these pages, as long as nobody writes into them
    return _serve(connection)


def _run(run: dict) -> None:
    """Run a script and end the process, without tearing the interpreter down where all is well.

    That would write into every page which is shared until then: as much time as a short run takes.
    """
    try:
        runpy.run_path(run["argv"][0], run_name="__main__")
        status = None
    except SystemExit as end:
        status = end.code
        if status is not None and not isinstance(status, int):
            raise
    threading._shutdown()
    atexit._run_exitfuncs()
    gc.collect()  # closes forgotten files
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):
        status = status or 120
    os._exit(status or 0)


def main() -> None:
    connection = socket.socket(fileno=int(sys.argv.pop()))
    sys.path[0] = str(ROOT)
    run = _import({"stage": "libraries", "environment": dict(os.environ)}, connection)
    if run is not None:
        _run(run)


if __name__ == "__main__":
    main()
