"""Memory that a step frees is there for the next step; a file that was read is not held."""

import subprocess
import sys

import numpy as np
import pyarrow as pa

from gaudi_lm.data.memory import forget_mapped_pages

FAULTS = """
import resource, sys, torch
from gaudi_lm.data.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
torch.set_num_threads(1)
def step():
    for _ in range(4):
        torch.ones(2**23)  # 32 MiB
for _ in range(4):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_freed_memory_is_kept():
    def faults(how: str) -> int:
        run = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
        return int(run.stdout)

    pages = 4 * 2**25 // 4096
    assert faults("default") >= pages
    assert faults("keep") < pages / 100


def held_of_files() -> int:
    """Resident bytes of this process that belong to files."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssFile:")) * 1024


def test_pages_of_a_file_are_let_go(tmp_path):
    size = 2**26
    path = tmp_path / "a file, with spaces"
    path.write_bytes(np.arange(size // 4, dtype=np.int32).tobytes())
    with pa.memory_map(str(path)) as mapped:
        tokens = np.frombuffer(mapped.read_buffer(), np.int32)
        before = held_of_files()
        total = int(tokens.sum(dtype=np.int64))
        assert held_of_files() - before > 0.9 * size
        forget_mapped_pages([str(tmp_path / "another file")])
        assert held_of_files() - before > 0.9 * size
        forget_mapped_pages([str(path)])
        assert held_of_files() - before < 0.1 * size
        assert int(tokens.sum(dtype=np.int64)) == total == (size // 4 - 1) * (size // 4) // 2
        del tokens
