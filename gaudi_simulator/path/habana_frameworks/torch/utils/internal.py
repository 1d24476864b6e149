"""Which mode the bridge runs in."""

import os
from collections.abc import Callable


def is_lazy() -> bool:
    return os.environ.get("PT_HPU_LAZY_MODE", "1") != "0"


def lazy_only(function: Callable[..., None]) -> Callable[..., None]:
    """In eager mode, as when this is called, nothing in place of ``function``: torch.compile traces through it.

    As the bridge's (`utils/internal.py`, github.com/HabanaAI/gaudi-pytorch-bridge), which models call in each forward.
    """

    def nothing(*_args, **_kwargs) -> None:
        pass

    return function if is_lazy() else nothing
