"""Ranks that end right after collectives, while the threads of gloo get little of a processor; prints the statuses.

python ending.py LAST ROUNDS FOLDER

LAST is what the ranks do last: `gather`, or `backward` of a model in DistributedDataParallel, which then holds the
process group, and which both leave work to the threads of gloo; or `refuse`, which one rank comes to later.
"""

import gc
import json
import os
import sys
import threading
import time

import torch
import torch._dynamo  # here, or each rank would do it
import torch.distributed as dist
from ports import reserved_port
from torch.nn.parallel import DistributedDataParallel

from gaudi_lm.device import run_script
from gaudi_lm.errors import UserError

RANKS = 2


def starve_other_threads() -> None:
    dist.barrier()
    for thread in map(int, os.listdir("/proc/self/task")):
        if thread != threading.get_native_id():
            os.setpriority(os.PRIO_PROCESS, thread, 19)  # a thread of its own, in Linux


def gather() -> None:
    starve_other_threads()
    dist.all_gather([torch.empty(10) for _ in range(RANKS)], torch.ones(10))


def backward() -> DistributedDataParallel:
    model = DistributedDataParallel(
        torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(4))), bucket_cap_mb=1e-4
    )
    starve_other_threads()
    model(torch.ones(2, 8)).sum().backward()
    return model


def refuse() -> None:
    if dist.get_rank():
        time.sleep(0.5)
        dist.distributed_c10d._get_default_store().add("answers", 1)  # as long as the other rank is there
    raise UserError("a flag that all ranks have")


def rank_body() -> None:
    kept = {"gather": gather, "backward": backward, "refuse": refuse}[sys.argv[1]]()
    if sys.argv[1] == "gather" and dist.get_rank() == 0:
        threading.Thread(target=speak_later).start()  # it would give the threads of gloo time to end in all ranks
    print("last words", end=" ")  # without a line's end they wait in the stream
    del kept


def speak_later() -> None:
    time.sleep(0.2)
    print("of a thread", end=" ")


def one_round(meeting_place: str, port: int) -> list[int]:
    ranks = []
    for rank in range(RANKS):
        process = os.fork()
        if process == 0:
            torch.set_num_threads(1)
            store = (
                dist.FileStore(meeting_place, RANKS)
                if sys.argv[1] != "refuse"
                else dist.TCPStore("127.0.0.1", port, RANKS, rank == 0)
            )
            dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
            run_script(rank_body)
        ranks.append(process)
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in ranks]


gc.freeze()
with reserved_port() as port:
    print("\n" + json.dumps([one_round(f"{sys.argv[3]}/{number}", port) for number in range(int(sys.argv[2]))]))
