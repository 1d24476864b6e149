"""Patches are for the releases of a library that they were written for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.metadata import version


def needed_in(package: str, release: str) -> Callable[[Callable], Callable]:
    """The decorated patch does nothing unless the installed version of ``package`` begins with ``release``."""

    def decorate(patch: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(patch)
        def applied(*args) -> None:
            if f"{version(package)}.".startswith(f"{release}."):
                patch(*args)

        return applied

    return decorate
