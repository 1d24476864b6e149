"""What the process holds: the C library's heap, pages of mapped files, and copies of what a card holds."""

import ctypes
import os
from collections.abc import Iterable

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's <malloc.h>
MADV_DONTNEED = 4  # of Linux's <sys/mman.h>


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed for the next time: a training step frees and takes the same blocks again.

    By default each large block is a mapping of its own, given back to the kernel when it is freed and mapped and
    zeroed page by page when it is taken again: a tenth of the time of a GPT-2 step. The peak stays about the same;
    what changes is that the process keeps it between steps.

    Returns: whether the C library has such a setting.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        return False
    return bool(library.mallopt(M_MMAP_MAX, 0) and library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def forget_mapped_pages(files: Iterable[str]) -> None:
    """Let go of the pages of these files, where they are mapped for reading; what is used again is mapped again.

    They stay in the kernel's cache. But a data set that is read from end to end would count as a whole as memory of
    this process, for which a job scheduler may end it.
    """
    library, wanted = ctypes.CDLL(None), set(map(os.path.realpath, files))
    with open("/proc/self/maps", errors="surrogateescape") as mappings:
        for line in mappings:
            span, permissions, *_, path = line.rstrip("\n").split(maxsplit=5) if "/" in line else (line, "", "")
            if path in wanted and "w" not in permissions:
                start, end = (int(address, 16) for address in span.split("-"))
                library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_DONTNEED)


def host_copies(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights, made with ``state_dict(keep_vars=True)``, in host memory; tied ones stay tied, and count once."""
    copies = {id(weight): weight.detach().cpu() for weight in weights.values()}
    return {name: copies[id(weight)] for name, weight in weights.items()}
