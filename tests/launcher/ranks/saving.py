"""A rank that prints much on both streams between a signal and the file that it then writes: ``saving.py FOLDER``."""

import os
import signal
import sys
import time
from pathlib import Path


def save(*_):
    for number in range(40):
        for stream in (sys.stdout, sys.stderr):
            print(f"rank {rank} saves {number}", file=stream, flush=True)
        time.sleep(0.02)
    Path(sys.argv[1], rank).touch()
    sys.exit(0)


rank = os.environ["RANK"]
signal.signal(signal.SIGINT, save)
print(f"rank {rank} is here", flush=True)
time.sleep(600)
