"""Processes below this one, and the frames that launcher and ranks exchange."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import struct
import time

HEADER = struct.Struct("!cI")
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
LIBC = ctypes.CDLL(None)


def frame(kind: bytes, payload: bytes = b"") -> bytes:
    """One frame as bytes: kind, length, payload."""
    return HEADER.pack(kind, len(payload)) + payload


def take_frames(buffer: bytearray) -> list[tuple[bytes, bytes]]:
    """Remove the complete frames from the front of ``buffer`` and return them as (kind, payload)."""
    frames = []
    while len(buffer) >= HEADER.size:
        kind, length = HEADER.unpack_from(buffer)
        if len(buffer) < HEADER.size + length:
            break
        frames.append((kind, bytes(buffer[HEADER.size : HEADER.size + length])))
        del buffer[: HEADER.size + length]
    return frames


def keep_alive(connection: socket.socket, seconds: int = 30) -> None:
    """Let the kernel give up a connection whose other host is gone, about ``seconds`` after the last sign of it."""
    if connection.family == socket.AF_UNIX:
        return
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, seconds // 3),
        (socket.TCP_KEEPINTVL, seconds // 6),
        (socket.TCP_KEEPCNT, 4),
        (socket.TCP_USER_TIMEOUT, seconds * 1000),
        (socket.TCP_NODELAY, 1),
    ):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


def prctl(option: int, value: int) -> None:
    """Linux's prctl(2)."""
    LIBC.prctl(option, value, 0, 0, 0)


def descendants(pid: int) -> list[int]:
    """Process ids of all live processes below ``pid``, found in /proc."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            # A process may end between the listing and the reading.
            with contextlib.suppress(OSError), open(f"/proc/{entry}/stat", "rb") as file:
                state, parent = file.read().rpartition(b")")[2].split()[:2]
                if state not in (b"Z", b"X"):
                    children.setdefault(int(parent), []).append(int(entry))
    found, waiting = [], [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def kill_descendants(seconds: float = 5.0) -> None:
    """SIGKILL everything below this process, until nothing is left or ``seconds`` have passed."""
    deadline = time.monotonic() + seconds
    while (left := descendants(os.getpid())) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def signal_pipe(numbers: tuple[int, ...]) -> int:
    """A file descriptor that can be waited for and read: one byte, its number, for each of these signals that comes.

    SIGHUP stays ignored where nohup has set it so. SIGINT does not, though shells start background jobs so.
    """
    reading, writing = os.pipe()
    for end in (reading, writing):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in numbers:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
    return reading
