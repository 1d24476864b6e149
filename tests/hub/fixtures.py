"""Fixtures for every test that needs a hub; tests/conftest.py names them."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from hub.server import Hub


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The folder of generated repositories, made once for all test processes."""
    base = tmp_path_factory.getbasetemp()
    root = (base if worker_id == "master" else base.parent) / "stand-ins"
    with FileLock(f"{root}.lock"):
        if not (root / "complete").exists():
            # Imported here, as it takes seconds and most tests need none of it.
            from hub.stand_ins import write_stand_ins

            write_stand_ins(root)
            (root / "complete").touch()
    return root


def stand_in_hub(stand_ins: Path, **options) -> Hub:
    """A hub with the stand-ins; use it in a `with`."""
    from hub.stand_ins import GATED, MOVED

    return Hub(stand_ins, moved=dict(MOVED), gated={GATED}, tokens={"hf_reader"}, **options)


@pytest.fixture
def hub(stand_ins: Path) -> Iterator[Hub]:
    """A running hub on loopback, its log empty."""
    with stand_in_hub(stand_ins) as running:
        yield running
