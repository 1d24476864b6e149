"""A rank that waits, while one of the ranks does something: ``act.py RANK ACTION [deaf] [together=FILE]``.

A negative RANK counts from the last one. With ``deaf``, no rank heeds SIGINT, SIGTERM or SIGHUP. With ``together``,
the other ranks fail once that one has ended, as they would in a collective.
"""

import fcntl
import os
import signal
import subprocess
import sys
import time


def told(number, _):
    sys.stdout.write(f"rank {rank} got {signal.Signals(number).name}\n")
    sys.exit(0)


rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
chosen, action = int(sys.argv[1]) % world_size, sys.argv[2]
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN if "deaf" in sys.argv else told)
# A process of its own session, as a data loader that has gone astray would be.
subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"], start_new_session=True)
sys.stdout.write(f"rank {rank} is here\n")  # in one write: print would write the end of the line alone
[together] = [word.partition("=")[2] for word in sys.argv if word.startswith("together=")] or [None]
if together and rank != chosen:
    while not os.path.exists(together):
        time.sleep(0.01)
    fcntl.flock(os.open(together, os.O_RDWR), fcntl.LOCK_EX)
    time.sleep(0.2)  # a traceback
    os._exit(9)
if rank == chosen:
    if together:
        lock = os.open(f"{together}.new", os.O_RDWR | os.O_CREAT)
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.rename(f"{together}.new", together)
        time.sleep(1.0)  # until the others wait for the lock
    if action.startswith("exit"):
        sys.exit(int(action[4:]))
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "raise":
        raise RuntimeError("boom")
    if action == "killwatcher":
        os.kill(os.getppid(), signal.SIGKILL)
time.sleep(600)
