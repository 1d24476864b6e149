"""What `run_clm.py` makes of the hub's answers: the flags for it, and one line for what cannot be had."""

from pathlib import Path

import pytest
from running import End, run_several

from hub.server import Cut, Hub
from hub.stand_ins import GATED

pytestmark = pytest.mark.slow

TEXTS = ["--dataset_name", "wikitext", "--dataset_config_name", "wikitext-2-raw-v1"]
MODEL = ["--model_name_or_path", "gpt2"]


def evaluate(hub: Hub, home: Path, *runs: list[str], **environment: str) -> list[End]:
    """Evaluate on the CPU, once for each list of flags, one after the other, the nth into `home/<n>`."""
    common = ["--do_eval", "--max_eval_samples", "2", "--use_cpu"]
    flags = [[*run, *common, "--output_dir", str(home / str(number))] for number, run in enumerate(runs)]
    return run_several("run_clm", flags, hub.environment(home / "cache") | environment)


def test_revision_token_and_offline(hub: Hub, tmp_path: Path):
    main, v2, gated = evaluate(
        hub,
        tmp_path,
        [*TEXTS, *MODEL],
        [*TEXTS, *MODEL, "--model_revision", "v2"],
        [*TEXTS, "--model_name_or_path", GATED, "--token", "hf_reader"],
    )
    assert [main.status, v2.status, gated.status] == [0, 0, 0], [main, v2, gated]
    assert main.metrics["eval_loss"] != v2.metrics["eval_loss"]
    # The gated model has the weights of gpt2.
    assert main.metrics["eval_loss"] == gated.metrics["eval_loss"]
    assert "hf_reader" not in gated.log
    assert hub.escapes == []

    asked = len(hub.log)
    (offline,) = evaluate(hub, tmp_path, [*TEXTS, *MODEL], HF_HUB_OFFLINE="1")
    assert offline.status == 0, offline.log
    assert offline.metrics["eval_loss"] == main.metrics["eval_loss"]
    assert len(hub.log) == asked


def test_refusals_are_one_line(hub: Hub, tmp_path: Path):
    cases = {
        "stand-in/gated-gpt2: no configuration (gated": [*TEXTS, "--model_name_or_path", GATED],
        "gpt2: 401, the hub refuses the token": [*TEXTS, *MODEL, "--token", "hf_wrong"],
        "--model_name_or_path nobody/nothing": [*TEXTS, "--model_name_or_path", "nobody/nothing"],
        "v9": [*TEXTS, *MODEL, "--model_revision", "v9"],
        "--dataset_name nobody/texts": ["--dataset_name", "nobody/texts", *MODEL],
        "wikitext-9": [*TEXTS[:3], "wikitext-9", *MODEL],
    }
    # The first transfer of the data breaks off, then the one of the weights, then all goes well.
    hub.cuts += [
        Cut("validation-00000-of-00001.parquet", after=1000, times=1),
        Cut("model.safetensors", 1000, times=1),
    ]
    cut = {"--dataset_name wikitext": [*TEXTS, *MODEL], "--model_name_or_path gpt2": [*TEXTS, *MODEL]}
    ends = evaluate(hub, tmp_path, *cut.values(), *cases.values(), [*TEXTS, *MODEL])
    assert ends.pop().status == 0
    for number, (named, end) in enumerate(zip([*cut, *cases], ends, strict=True)):
        assert end.status == 2, (named, end)
        (line,) = [line for line in end.log.splitlines() if line.startswith("error: ")]
        assert named in line
        assert not (tmp_path / str(number)).exists()
    assert "--token" in ends[2].log
    assert hub.escapes == []
