"""What steps of the scripts take on simulated cards is what benchmarks/results/price.json says, within 1 %."""

import json

import pytest
from cards import card_environment
from running import ROOT, results, run, run_ranks

from benchmarks.price import WORKLOADS, environment, figures_of, write_inputs

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("price")]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("price")
    write_inputs(folder)
    return folder


def test_counts_are_those_of_a_run_that_multiplies(assets, tmp_path):
    found = []
    for name, variables in {"without": environment(WORKLOADS["clm"]), "with": {}}.items():
        output, counts = tmp_path / name, tmp_path / f"{name}.counts"
        flags = ["--model_name_or_path", assets.gpt2, "--train_file", assets.train, "--block_size", 32]
        flags += ["--do_train", "--max_steps", 5, "--use_habana", "--use_lazy_mode", "--output_dir", output]
        run("benchmarks/counting.py", counts, "run_clm.py", *flags, env={**variables, **card_environment(2)})
        found.append(json.loads(counts.read_text()))
    assert found[0] == found[1] and found[0]["flop_per_token"] > 0
    assert results(tmp_path / "without")["train_loss"] != results(tmp_path / "with")["train_loss"]


@pytest.mark.parametrize("name", list(WORKLOADS))
def test_counts(name, inputs, tmp_path):
    workload = WORKLOADS[name]
    output, counts = tmp_path / "output", tmp_path / "counts"
    command = workload.command("ours", inputs, output, counts)
    env = {**environment(workload), **card_environment(2)}  # a second card changes nothing for one rank
    if workload.cards == 1:
        run(*command, env=env)
    else:
        run_ranks(workload.cards, *command, env=env)
    committed = json.loads((ROOT / "benchmarks" / "results" / "price.json").read_text())["figures"][name]
    found = figures_of(workload, counts, output)
    assert found == {name: pytest.approx(committed[name]["ours"], rel=0.01) for name in found}
