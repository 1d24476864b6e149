"""A rank that waits, while one of the ranks does something: ``act.py RANK ACTION [deaf]``.

A negative RANK counts from the last one. With ``deaf``, no rank heeds SIGINT, SIGTERM or SIGHUP.
"""

import os
import signal
import subprocess
import sys
import time


def told(number, _):
    print(f"rank {rank} got {signal.Signals(number).name}", flush=True)
    sys.exit(0)


rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
chosen, action = int(sys.argv[1]) % world_size, sys.argv[2]
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN if "deaf" in sys.argv else told)
# A process of its own session, as a data loader that has gone astray would be.
subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"], start_new_session=True)
print(f"rank {rank} is here", flush=True)
if rank == chosen:
    if action.startswith("exit"):
        sys.exit(int(action[4:]))
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "raise":
        raise RuntimeError("boom")
    if action == "killwatcher":
        os.kill(os.getppid(), signal.SIGKILL)
time.sleep(600)
