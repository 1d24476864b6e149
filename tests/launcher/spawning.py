"""Start gaudi_spawn.py as users do, and find whatever of it is still there."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
RANKS = Path(__file__).parent / "ranks"
BACKENDS = {"torch": [], "mpi": ["--use_mpi"], "deepspeed": ["--use_deepspeed"]}
MARK = "MY_LAUNCH_MARK"
SMALL = "n_embd=32,n_layer=2,n_head=2,n_positions=64,resid_pdrop=0.0,embd_pdrop=0.0,attn_pdrop=0.0"
# Option names of the backends and the launcher.
OPTIONS = [
    "--bind-to", "--mca", "--map-by", "--rank-by", "--runtime-options", "--prtemca", "--pmixmca", "--gomca", "--omca",
    "-n", "-np", "-x", "--host", "--hostfile", "--output", "--display", "--allow-run-as-root", "--oversubscribe",
    "--nproc_per_node", "--nnodes=3", "--master_port", "--log-dir", "--no_python", "--tee", "-m", "--np",
    "--world_info", "--node_rank", "--bind_cores_to_rank", "--enable_each_rank_log", "--module", "--save_pid", "-q",
    "--world_size", "--use_mpi", "--use_deepspeed", "--dry_run", "--env", "--log_dir", "--grace", "--help", "-h",
]  # fmt: skip
HOSTILE = [
    "a b",
    "",
    " ",
    "'",
    '"',
    'it\'s "so"',
    "$HOME",
    "${HOME}",
    "$(id)",
    "`id`",
    ";",
    "; id",
    "&&",
    "|",
    ">",
    "*",
    "?",
    "[a-z]*",
    "~",
    "!",
    "!!",
    "#",
    "\\",
    "\\n",
    "a\nb",
    "\n",
    "\t",
    "\r\n",
    "{}",
    "{a,b}",
    "%s",
    "%h",
    "%n",
    ":",
    "::",
    ":::",
    "--",
    "-",
    "-x",
    "-n",
    "--n",
    "--help",
    "-h",
    "--world_size",
    "--nnodes=3",
    "--log",
    "--use_mpi",
    "@file",
    "a=b",
    "--a=b c",
    "ünï",
    "名前",
    "\U0001f600",
    os.fsdecode(b"\xff\xfe"),
    "x" * 60_000,
] + ["y" * 400] * 100


def heed_signals() -> None:
    """What started the tests, such as nohup or a background job, may ignore these; a user's terminal does not."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Launch:
    """A running launcher and everything that it has started, which carries a mark in its environment."""

    begun_here: list[Launch] = []

    def __init__(self, *options: str, inside: list[str] | None = None, environ: dict | None = None, **popen) -> None:
        self.mark = uuid.uuid4().hex
        own = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], MARK: self.mark, **(environ or {})}
        command = [*(inside or []), sys.executable, str(ROOT / "gaudi_spawn.py"), "--env", MARK, *options]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **popen}
        self.process = subprocess.Popen(command, env=own, preexec_fn=heed_signals, **pipes)
        self.begun_here.append(self)

    def wait_for(self, text: bytes, lines: int = 1) -> None:
        """Read standard output up to as many lines that have ``text``."""
        self._read(self.process.stdout, text, lines)

    def wait_for_error(self, text: bytes) -> None:
        """Read standard error up to a line that has ``text``."""
        self._read(self.process.stderr, text, 1)

    def _read(self, stream, text: bytes, lines: int) -> None:
        for line in stream:
            lines -= text in line
            if not lines:
                return
        raise AssertionError(f"{text!r} was not printed; {self.process.stderr.read().decode(errors='replace')}")

    def finish(self, seconds: float = 120.0) -> subprocess.CompletedProcess:
        """Wait for the end; ``stdout`` and ``stderr`` as text."""
        try:
            out, err = self.process.communicate(timeout=seconds)
        finally:
            self.process.kill()
        code = self.process.returncode
        return subprocess.CompletedProcess(self.process.args, code, *(os.fsdecode(text or b"") for text in (out, err)))

    def survivors(self, seconds: float = 0.0) -> list[str]:
        """What still runs of this launch after at most ``seconds``, as command lines."""
        deadline = time.monotonic() + seconds
        while (found := self._survivors()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return found

    def _survivors(self) -> list[str]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(shlex.join(process.cmdline()))
            except psutil.Error:
                continue
        return found


def spawn(*options: str, **how) -> subprocess.CompletedProcess:
    """Run gaudi_spawn.py to its end; nothing of it may be left."""
    launch = Launch(*options, **how)
    done = launch.finish(600)
    assert launch.survivors(1.0) == []
    return done


def last_line(done: subprocess.CompletedProcess) -> str:
    return done.stderr.rstrip("\n").rpartition("\n")[2]


def dumped(text: str) -> dict:
    """What a dump.py has printed: its arguments as bytes, its environment, ..."""
    what = json.loads([line for line in text.splitlines() if line.startswith("{")][-1])
    what["arguments"] = [bytes.fromhex(word) for word in what["arguments"]]
    return what


def log_of(folder: Path, rank: int) -> str:
    """What the backend has kept of a rank's output: files of torchrun, DeepSpeed or mpirun."""
    patterns = (f"*/attempt_0/{rank}/std*.log", f"*_rank{rank}.log", f"*/rank.{rank}/*")
    found = [path for pattern in patterns for path in sorted(folder.glob(pattern), reverse=True)]
    return "".join(path.read_text(errors="surrogateescape") for path in found)


def clm_flags(assets, output, batch: int, *more: str) -> list[str]:
    """Twelve steps of a small GPT-2 from scratch, in fp32 and without dropout; the ranks' batches make 8."""
    text = (
        f"--model_type gpt2 --tokenizer_name {assets.tokenizer} --config_overrides {SMALL} "
        f"--train_file {assets.train} --output_dir {output} --per_device_train_batch_size {batch} --block_size 64 "
        "--logging_steps 1 --max_steps 12 --learning_rate 1e-3 --lr_scheduler_type constant --save_strategy no "
        "--do_train"
    )
    return [*text.split(), *more]
