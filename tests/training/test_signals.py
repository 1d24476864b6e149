"""A signal ends a run with a checkpoint, the next start resumes from it, and nothing of it is seen in the result."""

import functools
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from resuming import CARD, CPU, batch, essence, script_flags, start, zero
from running import ROOT, environment, results, run_interrupted
from simulator.cards import card_environment

pytestmark = [pytest.mark.slow]
STEPS, WAIT_FOR = 60, 12
LONG = ["--max_steps", STEPS, "--save_steps", WAIT_FOR, "--eval_strategy", "no", "--save_total_limit", 2]


def when_training(output: Path, send) -> None:
    """Wait for the first checkpoint, then call ``send``."""
    deadline = time.monotonic() + 120
    while not (output / f"checkpoint-{WAIT_FOR}").exists():
        assert time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.005)
    send()


# A run that waits in the midst of its steps until the signals have been sent, or they might come after the last one.
WAITING = """
import runpy, sys, time
from pathlib import Path
from transformers.trainer_callback import CallbackHandler

def on_step_begin(self, args, state, control):
    while state.global_step == {step} and not Path({sent!r}).exists():
        time.sleep(0.005)
    return begin(self, args, state, control)

begin, CallbackHandler.on_step_begin = CallbackHandler.on_step_begin, on_step_begin
sys.path[0] = {root!r}
runpy.run_path({script!r}, run_name="__main__")
"""


def interrupted(script: str, ranks: int, output: Path, flags: list, *numbers: int, to: int = 0):
    """Run until the signals end it; they go to one rank, or to all where ``to`` is -1."""
    sent, waiting = output.with_name(f"{output.name} sent"), output.with_name(f"waiting_{script}")
    where = {"step": STEPS - 10, "sent": str(sent), "root": str(ROOT), "script": str(ROOT / script)}
    waiting.write_text(WAITING.format(**where))

    def send(pids: list[int]) -> None:
        for number in numbers:
            for pid in pids if to == -1 else [pids[to]]:
                os.kill(pid, number)
        sent.touch()

    flags = [*flags, *batch(ranks), "--output_dir", output]
    env = card_environment(ranks) if "--use_habana" in flags else {}
    alone = ranks == 1 and "--deepspeed" not in flags
    return run_interrupted(
        0 if alone else ranks,
        waiting,
        *flags,
        env=env,
        meanwhile=lambda pids: when_training(output, lambda: send(pids)),
    )


@pytest.mark.parametrize(
    ("script", "ranks", "card", "number", "to"),
    [
        ("run_clm.py", 1, CPU, signal.SIGTERM, 0),
        ("run_mlm.py", 1, CPU, signal.SIGUSR1, 0),
        ("run_lora_clm.py", 1, CPU, signal.SIGINT, 0),
        ("run_clm.py", 2, CPU, signal.SIGTERM, 1),
        ("run_mlm.py", 2, CPU, signal.SIGINT, -1),
        ("run_clm.py", 2, CARD, signal.SIGUSR1, 1),
        ("run_mlm.py", 2, CPU, signal.SIGHUP, -1),
        ("run_lora_clm.py", 2, [*CARD, *zero(2)], signal.SIGTERM, 0),
    ],
    ids=lambda value: (
        "-".join(str(part).strip("-").split("/")[-1] for part in value) if isinstance(value, list) else None
    ),
)
def test_a_signal_saves_and_ends(script, ranks, card, number, to, assets, masked_assets, instructions, tmp_path):
    flags = [*script_flags(script, assets, masked_assets, instructions), *LONG, *card]
    start(script, ranks, tmp_path / "whole", *flags)
    output = tmp_path / "out"
    ends = interrupted(script, ranks, output, flags, number, to=to)
    texts = [end.stderr for end in ends]
    assert [end.returncode for end in ends] == [128 + number] * ranks, texts
    assert "Traceback" not in "".join(texts)
    (said,) = re.findall(r"training ends after step (\d+); the checkpoint is (\S+)", texts[0])
    step, folder = int(said[0]), Path(said[1])
    assert WAIT_FOR < step < STEPS and folder == output / f"checkpoint-{step}" and folder.is_dir()
    assert not (output / "trainer_state.json").exists()
    resumed = start(script, ranks, output, *flags)
    assert f"Resuming from {folder}" in resumed[0]
    assert essence(output) == essence(tmp_path / "whole")
    if "--use_habana" in card:
        assert "--deepspeed" in card or results(tmp_path / "whole")["host_syncs_per_step"] == 0


def test_what_a_signal_saves_is_whole(assets, masked_assets, instructions, tmp_path):
    """With --save_only_model the other checkpoints cannot be resumed from, which is all that this one is for."""
    flags = [*script_flags("run_clm.py", assets, masked_assets, instructions), *LONG, *CPU, "--save_only_model"]
    (done,) = interrupted("run_clm.py", 1, tmp_path / "out", flags, signal.SIGTERM)
    assert done.returncode == 128 + signal.SIGTERM
    saved = re.search(r"the checkpoint is (\S+)", done.stderr)[1]
    (said,) = start("run_clm.py", 1, tmp_path / "out", *flags)
    assert f"Resuming from {saved}" in said
    start("run_clm.py", 1, tmp_path / "whole", *flags)
    assert essence(tmp_path / "out") == essence(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_run_whose_output_nobody_reads(number, assets, masked_assets, instructions, tmp_path):
    """Its terminal is gone, which is the signal, or the `tee` behind it is, which Ctrl-C ends as well."""
    flags = [*script_flags("run_clm.py", assets, masked_assets, instructions), *LONG, *CPU, "--max_steps", 100_000]
    terminal, output = number == signal.SIGHUP, tmp_path / "out"
    ours, its = pty.openpty() if terminal else os.pipe()
    command = [sys.executable, "run_clm.py", *flags, *batch(1), "--output_dir", output]
    command = ["setsid", "--ctty", *command] if terminal else command
    streams = {"stdin": its if terminal else subprocess.DEVNULL, "stdout": its, "stderr": its}
    heed = functools.partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)  # also where nohup runs the tests
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment(), preexec_fn=heed, **streams)
    try:
        os.close(its)
        reader = [ours]
        reading = threading.Thread(target=lambda: read_until_gone(reader))
        reading.start()
        when_training(output, reader.clear)
        reading.join()
        if not terminal:
            process.send_signal(number)
        process.wait(60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 128 + number
    newest = max(output.glob("checkpoint-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))
    assert newest.name != f"checkpoint-{WAIT_FOR}" and (newest / "manifest.json").is_file()


def read_until_gone(reader: list[int]) -> None:
    """Read what a run writes until the reader is taken off the list, then close it."""
    (ours,) = reader
    while reader:
        if select.select([ours], [], [], 0.05)[0]:
            os.read(ours, 1 << 16)
    os.close(ours)


def test_a_second_interrupt_ends_at_once(assets, masked_assets, instructions, tmp_path):
    flags = [*script_flags("run_clm.py", assets, masked_assets, instructions), *LONG, *CPU, "--max_steps", 100_000]
    output = tmp_path / "out"
    # A step that does not end meanwhile, as an epoch of a stream does not: the second signal must not wait for it.
    flags += ["--gradient_accumulation_steps", 50_000, "--streaming"]
    (end,) = run_interrupted(
        0, "run_clm.py", *flags, *batch(1), "--output_dir", output, meanwhile=lambda pids: twice(pids[0])
    )
    assert end.returncode in (130, -signal.SIGINT)
    assert "Traceback" not in end.stderr
    assert "SIGINT: finishing the step" in end.stderr and "Ctrl-C again ends at once" in end.stderr


def twice(pid: int) -> None:
    wait_for_handler(pid, signal.SIGHUP)  # the last one that training sets
    os.kill(pid, signal.SIGINT)
    wait_for_words(pid, "finishing the step")
    os.kill(pid, signal.SIGINT)


def wait_for_words(pid: int, words: str) -> None:
    """Until a process has written them into the file that is its stderr."""
    deadline = time.monotonic() + 120
    while words not in Path(f"/proc/{pid}/fd/2").read_text():
        assert time.monotonic() < deadline, f"{words!r} was not logged"
        time.sleep(0.05)


def test_signals_can_be_left_alone(assets, masked_assets, instructions, tmp_path):
    flags = [*script_flags("run_clm.py", assets, masked_assets, instructions), *LONG, *CPU]
    output = tmp_path / "out"
    (end,) = interrupted("run_clm.py", 1, output, [*flags, "--save_on_signal", "False"], signal.SIGTERM)
    assert end.returncode == 128 + signal.SIGTERM and "Traceback" not in end.stderr
    assert (
        "SIGTERM: ended, nothing more was saved: no training was running, or --save_on_signal is False" in end.stderr
    )
    assert {path.name for path in output.glob("checkpoint-*")} <= {f"checkpoint-{step}" for step in range(12, 61, 12)}


def test_a_signal_outside_of_training(assets, masked_assets, instructions, tmp_path):
    """While data are read, or a model is evaluated: nothing is lost, nothing is traced."""
    flags = [*script_flags("run_clm.py", assets, masked_assets, instructions), "--do_train", "False"]
    # An evaluation that takes a while, row by row.
    flags += ["--eval_strategy", "no", "--validation_file", assets.train, "--max_eval_samples", 100_000]
    flags += ["--per_device_eval_batch_size", 1]
    for number, words in (
        (signal.SIGTERM, "SIGTERM: ended"),
        (signal.SIGUSR1, "SIGUSR1: ended"),
        (signal.SIGINT, "interrupted"),
    ):
        (end,) = run_interrupted(
            0, "run_clm.py", *flags, *CPU, *batch(1), "--output_dir", tmp_path / "out",
            meanwhile=lambda pids, number=number: signal_in_the_midst(pids[0], number),
        )  # fmt: skip
        assert end.returncode == 128 + number, end.stderr
        assert "Traceback" not in end.stderr and words in end.stderr


SWALLOWING = """
import os, signal, sys, time
import multiprocess
from gaudi_lm.device import run_script

class Freed:
    def __del__(self):
        signal.raise_signal(number)

def main():
    if where == "freed":
        Freed()
    elif where == "with a child":
        multiprocess.get_context("fork").Process(target=time.sleep, args=(100,)).start()
        signal.raise_signal(number)
    elif where == "tidied up":
        try:
            signal.raise_signal(number)
        finally:
            [][0]
    else:
        os.register_at_fork(**{where: lambda: signal.raise_signal(number)})
        os.fork() or os._exit(0)
    time.sleep(20)
    print("went on")

where, number = sys.argv[1], int(sys.argv[2])
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores
run_script(main)
"""


@pytest.mark.parametrize("where", ["before", "after_in_parent", "freed", "tidied up", "with a child"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_that_python_swallows(number, where):
    """In hooks of fork and destructors what a handler raises was forgotten: "ended", and the run went on.

    Where a library tidies up and raises another error, that was traced; what it had just started was waited for.
    """
    done = subprocess.run(
        [sys.executable, "-c", SWALLOWING, where, str(int(number))],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (128 + number, ""), done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_exit_handlers_is_no_success(number):
    """All is saved by then. What a handler raises there is forgotten: "ended", and the status was 0."""
    code = (
        "import atexit, signal; from gaudi_lm.device import run_script; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); "
        f"atexit.register(signal.raise_signal, {int(number)}); "
        "run_script(lambda: None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (-number, b"")


def test_a_signal_to_a_run_whose_output_is_closed():
    """With ``>&-`` it ended in a traceback, and several ranks did so at their end."""
    code = "from gaudi_lm.device import run_script; run_script(lambda: __import__('sys').exit(143))"
    command = ["sh", "-c", 'exec "$0" -c "$1" >&-', sys.executable, code]
    done = subprocess.run(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (143, b"")


def signal_in_the_midst(pid: int, number: int) -> None:
    wait_for_handler(pid, signal.SIGUSR1)  # which Python leaves alone: the script has begun
    time.sleep(0.3)
    os.kill(pid, number)


def wait_for_handler(pid: int, number: int) -> None:
    """Until the kernel lists a signal as caught by a process."""
    deadline = time.monotonic() + 120
    while not int(re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())[1], 16) >> number - 1 & 1:
        assert time.monotonic() < deadline, f"{number!r} has no handler"
        time.sleep(0.005)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_processes_that_load_data_outlive_a_signal_to_all(number, assets, masked_assets, instructions, tmp_path):
    """Ctrl-C and Slurm reach them too; they go on until the step is over and the checkpoint saved."""
    flags = [*script_flags("run_clm.py", assets, masked_assets, instructions), *LONG, *CPU, *batch(1)]
    output = tmp_path / "out"
    flags += ["--dataloader_num_workers", 2, "--output_dir", output, "--max_steps", 100_000]
    group = []

    def signal_all(pids: list[int]) -> None:
        group.extend(pids)
        when_training(output, lambda: os.killpg(pids[0], number))

    (end,) = run_interrupted(0, "run_clm.py", *flags, meanwhile=signal_all)
    assert end.returncode == 128 + number and "Traceback" not in end.stderr, end.stderr
    assert end.stderr.count(": finishing the step") == 1
    assert "training ends after step" in end.stderr
    with pytest.raises(ProcessLookupError):
        os.killpg(group[0], 0)


def test_signals_that_were_blocked_at_the_start_are_heeded():
    """A mask goes along to whatever a process starts: SIGTERM did not reach such a run, which so saved nothing."""
    code = """
import os, signal
from gaudi_lm.interruptions import end_on_signals
end_on_signals()
os.kill(os.getpid(), signal.SIGTERM)
"""
    blocked = functools.partial(signal.pthread_sigmask, signal.SIG_BLOCK, (signal.SIGTERM,))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, preexec_fn=blocked, stderr=subprocess.PIPE)
    assert done.returncode == 143, done.stderr
