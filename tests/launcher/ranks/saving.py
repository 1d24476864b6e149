"""A rank that prints more than a pipe holds between a signal and the file that it writes: ``saving.py FOLDER``.

With ``slow``, rank 0 takes two seconds longer than rank 1.
"""

import os
import signal
import sys
import time
from pathlib import Path


def save(*_):
    for number in range(40):
        for stream in (sys.stdout, sys.stderr):
            print(f"rank {rank} saves {number}", "." * 1000, file=stream, flush=True)
        time.sleep(0.02)
    if "slow" in sys.argv and rank == "0":
        while not Path(sys.argv[1], "1").exists():
            time.sleep(0.02)
        time.sleep(2)
    Path(sys.argv[1], rank).touch()
    sys.exit(0)


rank = os.environ["RANK"]
signal.signal(signal.SIGINT, save)
sys.stdout.write(f"rank {rank} is here\n")  # in one write: print would write the end of the line alone
time.sleep(600)
