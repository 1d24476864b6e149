"""Mistakes that a user can mend."""

from __future__ import annotations

import difflib
import errno
import hashlib
import logging
import os
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

# Names the folder in which the ranks that gaudi_spawn.py starts on a host note what one of them has printed for all.
SAID_VARIABLE = "GAUDI_SPAWN_SAID"

# Of the system, on a path that a user gave: whatever asks first whether it is there gets these.
_OF_PATHS = (errno.EACCES, errno.ENAMETOOLONG)
# Of PyTorch's messages where a Gaudi, a simulated one too, or the host is out of memory.
_NO_MEMORY = ("Allocation failed for size", "can't allocate memory")


class UserError(Exception):
    """Something the user can mend: one line that names the flag or the file, and the way out."""

    status = 2

    def __init__(self, message: str):
        # A process that loads data sends its error as a text that begins with a traceback.
        super().__init__(message.rpartition("UserError: ")[2].strip() if "Original Traceback" in message else message)


class MemoryLimit(UserError):
    """A card or the host is out of memory."""

    status = 1


@contextmanager
def memory_errors(way_out: str = "--dry_run shows what a training step needs, and which flags save most"):
    """Raise :class:`MemoryLimit` where PyTorch is out of memory, with the rank: the others may have enough."""
    try:
        yield
    except RuntimeError as error:
        lines = [line for line in str(error).splitlines() if any(words in line for words in _NO_MEMORY)]
        if not lines:
            raise
        logging.getLogger("gaudi_lm").debug("the error of PyTorch", exc_info=error)
        rank = f"rank {os.environ['RANK']}: " if os.environ.get("WORLD_SIZE", "1") != "1" else ""
        raise MemoryLimit(f"{rank}out of memory: {lines[0].strip()}; {way_out}") from error


@contextmanager
def user_errors():
    """Print a :class:`UserError` as one line on stderr and end with its exit code, without a traceback.

    So it does a path that may not be looked at or has too long a name, and Ctrl-C.
    """
    try:
        yield
    except UserError as error:
        print_once(f"error: {' '.join(str(error).split())}")
        sys.exit(error.status)
    except OSError as error:
        if error.errno not in _OF_PATHS or error.filename is None:
            raise
        logging.getLogger("gaudi_lm").debug("the error of the system", exc_info=error)
        print_once(f"error: {error.filename}: {error.strerror}")
        sys.exit(UserError.status)
    except KeyboardInterrupt:
        why = "no training was running, or --save_on_signal is False"
        print_once(f"interrupted: nothing more was saved: {why}")
        sys.exit(130)


def print_line(text: str) -> None:
    """A line on stderr in one write, as other ranks print there as well: `print` writes the end of a line alone."""
    if sys.stderr is not None:  # as with 2>&-
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def print_once(text: str) -> None:
    """:func:`print_line`, from one alone of the ranks on a host that have the same to say before they end.

    The others return when it has been printed: at the end of one rank, a backend kills those that still print. What a
    rank starts, one process after another, may have the same to say again, and prints it.
    """
    rank = f"rank {os.environ.get('RANK', '')}"
    name = hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
    mark = Path(os.environ.get(SAID_VARIABLE) or os.devnull, name)
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        end = time.monotonic() + 2.0
        with suppress(FileNotFoundError):  # the job is over
            while time.monotonic() < end:
                if said := mark.read_text():
                    if said == rank:
                        break
                    return
                time.sleep(0.02)
    except OSError:  # no folder
        pass
    print_line(text)
    with suppress(OSError):
        mark.write_text(rank)


def warn(message: str) -> None:
    """One line on stderr, from the main rank, before there is a log."""
    if os.environ.get("RANK", os.environ.get("OMPI_COMM_WORLD_RANK", "0")) == "0":
        print_line(f"warning: {message}")


def nearest(name: str, known: list[str]) -> str:
    """``; did you mean a, b?`` for the known names most like ``name``, or an empty string."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def unknown(name: str, known: list[str]) -> str:
    """``unknown; did you mean a?``, or else all known names."""
    return f"unknown{nearest(name, known) or '; known are ' + ', '.join(known)}"
