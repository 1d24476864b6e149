"""One rank: what every backend starts in place of the script, without arguments.

Script, arguments and environment are in a file that only its owner can read: no backend reads, splits or shows them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from gaudi_lm.launcher import processes


def main() -> int:
    """Run the script as one rank; its exit status, 128+n for signal n. What was stopped is reported as no success."""
    where = os.environ.pop(processes.JOB_VARIABLE)
    job = json.loads(Path(where, "job").read_text())
    rank = int(os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ["RANK"])
    name = f"rank {rank} on host {job['host']}"
    if not 0 <= rank - job["first_rank"] < job["slots"]:
        sys.exit(f"the backend has started {name}, against the hostfile")
    os.environ.update(job["environ"], RANK=str(rank), LOCAL_RANK=str(rank - job["first_rank"]))
    os.environ.update(WORLD_SIZE=str(job["world_size"]), LOCAL_WORLD_SIZE=str(job["slots"]))
    command = [sys.executable, "-u", *job["script"]]  # -u, so that a log shows what was printed up to a crash
    watched = {*processes.STOP_SIGNALS, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    processes.adopt_orphans()
    processes.die_with_parent()
    processes.report(where, name)

    def set_up() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a shell's background job ignores
        signal.pthread_sigmask(signal.SIG_UNBLOCK, watched)
        processes.die_with_parent()

    script = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=set_up)
    ended, stopped = {}, False
    while script.pid not in ended:
        number = signal.sigwait(watched)
        if number == signal.SIGCHLD:
            ended = processes.reap()
        else:
            processes.report(where, name, stopped=(stopped := True))  # before a backend kills this process too
            # To the script alone: its data loaders would otherwise die under a script that wants to save first.
            os.kill(script.pid, number)
    script.returncode, when = (status := ended[script.pid]), time.monotonic()
    processes.kill_descendants()
    what = f"{name} {'was stopped from outside,' if stopped else 'failed with'} {processes.named(status)}{job['logs']}"
    processes.report(where, name, time=when, status=status or int(stopped), what=what, stopped=stopped)
    return 0 if stopped else status  # at a failure of one, a backend kills the others, which may still save
