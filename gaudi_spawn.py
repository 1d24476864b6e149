#!/usr/bin/env python
"""Run a training script on one card or many, on one host or several.

    python gaudi_spawn.py --world_size 8 --use_mpi run_clm.py --model_name_or_path gpt2 ...
    python gaudi_spawn.py --world_size 8 --use_deepspeed run_clm.py --deepspeed configs/deepspeed/zero_2.json ...
    python gaudi_spawn.py --hostfile hosts --world_size 16 --use_deepspeed run_clm.py ...

Without --use_mpi and --use_deepspeed, torch.distributed starts the ranks. Options before the script's name are the
launcher's; everything after it is the script's, and reaches every rank as it was typed.
"""

import signal

# Until a job takes it over: KeyboardInterrupt in the middle of an import may be swallowed, and the signal with it.
signal.signal(signal.SIGINT, signal.SIG_DFL)
# What started this may ignore the ends of processes, or block signals: nobody would learn how the ranks end.
signal.signal(signal.SIGCHLD, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_SETMASK, ())

import sys

from gaudi_lm.launcher.launch import main

if __name__ == "__main__":
    sys.exit(main(__doc__))
