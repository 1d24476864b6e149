"""The names of `habana_frameworks` that installed packages use are there, or listed as absent."""

import ast
import json
import subprocess
import sys

import pytest
from cards import card_environment
from habana_names import names_in, used_names
from running import environment

import gaudi_simulator
from gaudi_simulator.absent import ABSENT

# Prints which of the names on stdin cannot be resolved: modules are imported, the rest are attributes.
RESOLVE = """
import importlib, json, sys
import habana_frameworks.torch as ht, torch
def resolve(name):
    parts = name.split(".")
    found = importlib.import_module(parts[0])
    for place, part in enumerate(parts[1:], 2):
        try:
            importlib.import_module(".".join(parts[:place]))
        except ImportError:
            pass
        found = getattr(found, part)
missing = {}
for name in json.load(sys.stdin):
    try:
        resolve(name)
    except AttributeError as error:
        missing[name] = str(error)
print(json.dumps(missing))
"""


@pytest.mark.slow
def test_every_name_is_there_or_listed_as_absent():
    used = used_names()
    assert len(used) > 80 and "habana_frameworks.torch.core.step_closure._mark_step_if_lazy" in used
    result = subprocess.run(
        [sys.executable, "-c", RESOLVE], input=json.dumps(list(used)), capture_output=True, text=True, check=False,
        env=environment(**card_environment(), PYTHONPATH=gaudi_simulator.STAND_IN),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    missing = json.loads(result.stdout)
    unknown = {name: sorted(used[name]) for name in missing if name not in ABSENT}
    assert not unknown, f"used here, and neither simulated nor listed in gaudi_simulator/absent.py: {unknown}"
    stale = set(ABSENT) - set(missing)
    assert not stale, f"listed as absent, but there, or used by nobody: {stale}"


def test_names_are_found_however_they_are_reached():
    text = """
import torch, habana_frameworks.torch.core as htcore
from habana_frameworks.torch.hpu import random as r
class A:
    def __init__(self):
        import habana_frameworks.torch.hpu as hpu
        self.hpu = hpu
        Kernel("habana_frameworks.torch.hpex.normalization", "FusedRMSNorm")
    def f(self):
        core = self.hpu
        core.Event()
        self.hpu.random.seed().item()
        htcore.step.mark(1).x
        r.other
        torch.hpu.synchronize()
        torch.ops.hpu.thing.default(2)
"""
    habana = "habana_frameworks.torch."
    found = names_in(ast.parse(text))
    for name in ("hpu.Event", "hpu.random.seed", "core.step.mark", "hpu.random.other", "hpu.synchronize", "core"):
        assert habana + name in found, (name, found)
    later = names_in(ast.parse("self.ht.core.x()"), {"self.ht": "habana_frameworks.torch"})
    assert habana + "core.x" in later, "put there by a base class in another file"
    assert {"torch.ops.hpu.thing.default", habana + "hpex.normalization.FusedRMSNorm"} <= found
