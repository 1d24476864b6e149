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


@pytest.fixture
def hub(stand_ins: Path) -> Iterator[Hub]:
    """A running hub with the stand-ins, its log empty."""
    from hub.stand_ins import GATED, MOVED

    with Hub(stand_ins, moved=dict(MOVED), gated={GATED}, tokens={"hf_reader"}) as running:
        yield running
