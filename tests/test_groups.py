"""Tests of a group run in one worker, one after the other: they share what is slow to make, or need all processors."""

import subprocess
import sys

GROUP = """
import pytest

@pytest.mark.xdist_group("a group")
@pytest.mark.parametrize("number", range(4))
def test(number):
    pass
"""


def test_pytest_forms_groups(tmp_path):
    (tmp_path / "test_group.py").write_text(GROUP)
    command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadgroup", "-v", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=100)
    assert done.stdout.count("test_group.py::test[") == done.stdout.count("]@a group") > 0, done.stdout
