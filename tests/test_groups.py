"""Tests of a group run in one worker, one after the other: they share what is slow to make, or need all processors."""

import pytest


@pytest.mark.xdist_group("a group")
def test_groups_are_formed(request):
    if "loadgroup" not in " ".join(getattr(request.config, "workerinput", {}).get("mainargv", [])):
        pytest.skip("not with --dist loadgroup")
    assert request.node.nodeid.endswith("@a group"), "pytest-xdist does not know this pytest"
