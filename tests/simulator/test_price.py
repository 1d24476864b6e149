"""What steps of the scripts take on simulated cards is what benchmarks/results/price.json says, within 1 %."""

import json

import pytest
from cards import card_environment
from running import ROOT, run, run_ranks

from benchmarks.price import WORKLOADS, environment, figures_of, write_inputs

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("heavy")]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("price")
    write_inputs(folder)
    return folder


@pytest.mark.parametrize("name", list(WORKLOADS))
def test_counts(name, inputs, tmp_path):
    workload = WORKLOADS[name]
    output, counts = tmp_path / "output", tmp_path / "counts"
    command = workload.command("ours", inputs, output, counts)
    env = card_environment(workload.cards, **environment(workload))
    if workload.cards == 1:
        run(*command, env=env)
    else:
        run_ranks(workload.cards, *command, env=env)
    committed = json.loads((ROOT / "benchmarks" / "results" / "price.json").read_text())["figures"][name]
    found = figures_of(workload, counts, output)
    assert found == {name: pytest.approx(committed[name]["ours"], rel=0.01) for name in found}
