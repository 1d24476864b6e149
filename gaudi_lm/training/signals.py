"""A signal that asks a run to end: it finishes its step, saves a checkpoint and ends with status 128 + n.

Slurm and cloud providers send SIGTERM or SIGUSR1 some time before they take a machine; a user presses Ctrl-C, or the
terminal is gone with its connection (SIGHUP).
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import select
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from gaudi_lm.interruptions import end_children
from gaudi_lm.training.agreement import Vote

logger = logging.getLogger("gaudi_lm")

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


def begin_loading(stopping, worker: int) -> None:
    """For a process that loads data: a signal to all processes, as Slurm sends it, leaves it at work for a last step.

    Args:
        stopping: a shared number, not 0 where the main process has got a signal too and ends this one by SIGKILL;
            None leaves signals as they are.
        worker: its number among those processes.
    """
    # The threads of tokenizers are not there after a fork, and a call that wants them would wait for ever.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if stopping is None:
        return
    for number in (signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # Only this process may be meant, by the main one at its end: that shows a moment later.
    signal.signal(signal.SIGTERM, lambda *_: signal.setitimer(signal.ITIMER_REAL, 0.5))
    signal.signal(signal.SIGALRM, lambda *_: None if stopping.value else os._exit(0))


def drop_lost_streams() -> None:
    """Write to nowhere instead of to a terminal that is gone or a pipe that nobody reads, where it is an error."""
    for stream in (1, 2):
        state = select.poll()
        state.register(stream, 0)
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in state.poll(0)):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream)
            os.close(nowhere)


class SaveOnSignal(TrainerCallback):
    """Ends training with a checkpoint where a rank has got a signal; use :meth:`watching` around training.

    All ranks end after the same step: they vote while the optimizer works, hosts among hosts, so that no card is
    waited for.
    """

    def __init__(self, main_rank: bool):
        self.main_rank = main_rank
        self.received = 0
        self.decided = 0
        self._vote = Vote()
        self._watching = False
        self._process = os.getpid()
        self.stopping = multiprocessing.RawValue("b", 0)  # seen by the processes that load data

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Take the signals here; only a main thread can, elsewhere they do what they did before."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        # nohup has a run ignore SIGHUP.
        heeded = [one for one in SIGNALS if one != signal.SIGHUP or signal.getsignal(one) != signal.SIG_IGN]
        before = {number: signal.signal(number, self._take) for number in heeded}
        self._watching = True
        try:
            yield
        finally:
            self._watching = False
            if not self.decided:  # else the process ends now, and nothing more is to come in between
                for number, handler in before.items():
                    signal.signal(number, handler)

    def _take(self, number: int, frame) -> None:
        if os.getpid() != self._process:
            return  # a process that loads data: Ctrl-C reaches it as well, and its data are still wanted
        if number == signal.SIGINT:
            # The second one is the kernel's: it does not wait until Python's turn comes.
            signal.signal(number, signal.SIG_DFL)
        drop_lost_streams()  # Ctrl-C ends a `tee` as well
        if self.received:
            return
        self.received = number
        self.stopping.value = 1
        if self.main_rank:
            again = "; Ctrl-C again ends at once" if number == signal.SIGINT else ""
            line = f"{signal.Signals(number).name}: finishing the step and saving a checkpoint{again}\n"
            with contextlib.suppress(OSError):
                os.write(2, line.encode())  # a signal may have come while sys.stderr was being written to

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self._watching:
            self._vote.cast(self.received)

    def on_step_end(self, args, state, control, **kwargs):
        if self._watching:
            self._settle(control)

    def on_evaluate(self, args, state, control, **kwargs):
        if self._watching:
            self._vote.cast(self.received)
            self._settle(control)

    def _settle(self, control) -> None:
        self.decided = self.decided or self._vote.settle()
        control.should_save = control.should_save or bool(self.decided)

    def on_save(self, args, state, control, **kwargs):
        # Not by control.should_training_stop: the end of the epoch would then be logged and evaluated in its middle.
        if self._watching and self.decided:
            name = signal.Signals(self.decided).name
            folder = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
            drop_lost_streams()
            logger.info("%s: training ends after step %d; the checkpoint is %s", name, state.global_step, folder)
            end_children()
            raise SystemExit(128 + self.decided)

    def end_after_training(self, folder: Path) -> None:
        """Once everything that was trained is in ``folder``: end for a signal that came too late for a last step."""
        self._vote.cast(self.received)
        if number := self._vote.settle():
            logger.info("%s: training was over; the model is in %s", signal.Signals(number).name, folder)
            raise SystemExit(128 + number)
