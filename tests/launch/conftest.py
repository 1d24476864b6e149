"""Nothing that a test of the launcher starts outlives it, not even when the test fails."""

import pytest

from launch.spawning import Launch


@pytest.fixture(autouse=True)
def no_launch_left():
    yield
    while Launch.begun_here:
        process = Launch.begun_here.pop().process
        process.kill()
        process.wait()
