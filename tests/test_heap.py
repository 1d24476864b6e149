"""Memory that a step frees is there for the next step, without new pages from the kernel."""

import subprocess
import sys

FAULTS = """
import resource, sys, torch
from gaudi_lm.heap import keep_freed_memory
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
