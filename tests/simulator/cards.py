"""Run things on simulated cards, in a process of their own: PyTorch cannot lose a device that it has been given."""

import os

import pytest.__main__
import warm
from running import ROOT, environment

FILES = ROOT / "tests" / "simulator" / "on_card"


def card_environment(cards: int = 1, **changes: str) -> dict[str, str]:
    """The environment of a run on simulated cards, which are built into the cache that this process has."""
    cache = {name: os.environ[name] for name in ("GAUDI_SIMULATOR_CACHE",) if name in os.environ}
    return {"GAUDI_SIMULATOR": str(cards), "PT_HPU_LAZY_MODE": "1", **cache, **changes}


def test_on_card(file: str, **changes: str) -> None:
    """Run the tests of a file in `on_card`, on two cards."""
    argv = [
        *(pytest.__main__.__file__, str(FILES / file), "-q", "-p", "no:cacheprovider", "-p", "no:xdist"),
        *("-o", "python_files=card_*.py", "-o", "addopts=--strict-markers"),
        *("-p", "no:logging"),  # would format each record of torch.compile's trace
    ]
    card = card_environment(2, **changes)
    (result,) = warm.run(argv, environment(**card), ROOT, card, 280)
    assert result.returncode == 0, f"{result.stdout[-20000:]}\n{result.stderr[-4000:]}"
    assert " passed" in result.stdout and "skipped" not in result.stdout


test_on_card.__test__ = False
