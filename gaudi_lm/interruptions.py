"""Signals outside of training, which end a process, also where Python would go on.

An exception that a signal raises while a process is forked, or while an object is let go, is printed and forgotten. A
library that tidies up may raise another one in its place.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial


def end_on_signals() -> None:
    """End at once on SIGTERM and SIGUSR1; training has handlers of its own."""
    # What starts a run may have blocked them.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP))
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, partial(_end_at_once, os.getpid()))
    sys.unraisablehook = partial(_raise_again, sys.unraisablehook)


def end_by_default() -> None:
    """From here on signals end the process as they do any program: of exit handlers Python forgets what one raises."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Raise what a signal has raised, where a library has raised another error while it tidied up.

    `datasets` does so (5.0, ``iflatmap_unordered``) where several processes tokenise: a TimeoutError.
    """
    try:
        yield
    except Exception as error:
        first: BaseException | None = error
        while first is not None and not _is_end(first):
            first = first.__context__
        if first is None:
            raise
        raise first from None


def end_children() -> None:
    """Kill processes that load or tokenise data, for which Python would wait: they may survive signals.

    Of those of `multiprocess`, which `datasets` uses, one that has only begun is waited for without end.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch would take their end for a failure
    for module in filter(None, map(sys.modules.get, ("multiprocessing", "multiprocess"))):
        for child in module.active_children():
            child.kill()


def _is_end(error: BaseException) -> bool:
    by_status = isinstance(error, SystemExit) and isinstance(error.code, int) and error.code > 128
    return by_status or isinstance(error, KeyboardInterrupt)


def _end_at_once(process: int, number: int, frame) -> None:
    """On a signal that saves nothing: no traceback, and the status that the signal means."""
    signal.signal(number, signal.SIG_DFL)
    if os.getpid() == process:
        why = "no training was running, or --save_on_signal is False"
        with suppress(OSError):  # nobody reads any more
            os.write(2, f"{signal.Signals(number).name}: ended, nothing more was saved: {why}\n".encode())
        sys.excepthook = lambda *error: None  # of threads that talk to processes which load data
        sys.exit(128 + number)
    os.kill(os.getpid(), number)  # a process of a library's own, which has inherited this


def _raise_again(before: Callable[[sys.UnraisableHookArgs], object], lost: sys.UnraisableHookArgs) -> None:
    """For ``sys.unraisablehook``: raise what ends this process a moment later, where it is not lost."""
    ends = issubclass(lost.exc_type, (SystemExit, KeyboardInterrupt))
    if not ends or threading.current_thread() is not threading.main_thread():
        before(lost)
        return
    again = lost.exc_type(*lost.exc_value.args) if lost.exc_value else lost.exc_type()

    def end(number: int, frame) -> None:
        raise again

    signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
