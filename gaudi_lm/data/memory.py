"""What the process holds: pages of mapped files, and copies of what a card holds."""

import ctypes
import os
from collections.abc import Iterable

import torch

MADV_DONTNEED = 4  # of Linux's <sys/mman.h>


def forget_mapped_pages(files: Iterable[str]) -> None:
    """Let go of the pages of these files, where they are mapped for reading; what is used again is mapped again.

    They stay in the kernel's cache. But a dataset that is read from end to end would count as a whole as memory of
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
