"""A rank that prints what reached it: arguments as hex, chosen variables, CPUs, whether its output is a terminal."""

import json
import os
import sys

NAMES = [
    "RANK",
    "OMPI_COMM_WORLD_RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "OMP_NUM_THREADS",
    "PYTHONPATH",
]
PREFIXES = ("PT_", "HCCL_", "HABANA_", "HF_", "MY_", "GAUDI_")

found = {name: value for name, value in os.environ.items() if name in NAMES or name.startswith(PREFIXES)}
what = {
    "arguments": [os.fsencode(word).hex() for word in sys.argv[1:]],
    "environment": found,
    "cpus": sorted(os.sched_getaffinity(0)),
    "terminal": [sys.stdout.isatty(), sys.stderr.isatty()],
    "host": os.uname().nodename,
}
sys.stdout.write(json.dumps(what) + "\n")
