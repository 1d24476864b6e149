"""Stand-in for Habana's PyTorch bridge. With `GAUDI_SIMULATOR=<n>` set, importing it adds n `hpu` cards to PyTorch."""

from . import _simulator, hpu

if _simulator.CARDS:
    _simulator.register(hpu)
    from ._simulator import operators  # noqa: F401  (torch.ops.hpu)

from . import distributed, hpex

__all__ = ["distributed", "hpex", "hpu"]
