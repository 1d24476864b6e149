"""`trainer.predict` and `compute_metrics`, in the order of the dataset: one process, two, a card with HPU graphs."""

import json
from pathlib import Path

import numpy as np
import pytest
from running import copy_elsewhere, results, run, run_ranks
from short_runs import scratch

PREDICT = """        metrics.update(evaluation)
        output = trainer.predict(blocks["validation"])
        if trainer.is_world_process_zero():
            np.savez(f"{training_args.output_dir}/found", logits=output.predictions, labels=output.label_ids,
                     input_ids=np.stack(blocks["validation"].with_format("numpy")["input_ids"]),
                     loss=output.metrics["test_loss"])
"""
METRICS = """        collate_blocks,
        compute_metrics=lambda found: {"rows": len(found.predictions), "sum": int(found.label_ids.sum())},
"""
FLAGS = ("--do_train", "--do_eval", "--max_steps", 2, "--max_train_samples", 16, "--max_eval_samples", 7)


def predicting(folder: Path) -> Path:
    script = copy_elsewhere("run_clm.py", folder)
    text = script.read_text()
    for new in (PREDICT, METRICS):
        old = new.split("\n")[0] + "\n"
        assert text.count(old) == 1
        text = text.replace(old, new)
    script.write_text(text)
    return script


def check(output: Path) -> np.lib.npyio.NpzFile:
    found, figures = np.load(output / "found.npz"), results(output)
    assert found["logits"].shape == (7, 64, 512) and found["logits"].dtype == np.float32
    assert (found["labels"] == found["input_ids"]).all()
    assert figures["eval_rows"] == 7 and figures["eval_sum"] == found["labels"].sum()
    # The loss of these logits is the one that was reported: none is at another row's place.
    logits = found["logits"][:, :-1].astype(np.float64)
    chosen = np.take_along_axis(logits, found["labels"][:, 1:, None].astype(int), 2)[..., 0]
    loss = np.log(np.exp(logits).sum(-1)) - chosen
    assert loss.mean() == pytest.approx(figures["eval_loss"], rel=1e-5) == pytest.approx(float(found["loss"]))
    assert (logits.argmax(-1) == found["labels"][:, 1:]).mean() == pytest.approx(figures["eval_accuracy"])
    return found


def test_one_process_and_two(assets, tmp_path):
    script = predicting(tmp_path / "mine")
    run(script, *scratch(assets, tmp_path / "one", *FLAGS))
    one = check(tmp_path / "one")
    flags = [*scratch(assets, tmp_path / "two", *FLAGS), "--per_device_train_batch_size", 4]
    run_ranks(2, script, *flags)
    two = check(tmp_path / "two")
    assert np.allclose(one["logits"], two["logits"], atol=1e-4)


@pytest.mark.slow
def test_on_a_card_with_graphs(assets, tmp_path):
    script = predicting(tmp_path / "mine")
    flags = [flag for flag in scratch(assets, tmp_path / "card", *FLAGS) if flag != "--use_cpu"]
    graphs = ["--use_habana", "--use_lazy_mode", "--use_hpu_graphs_for_inference"]
    run(script, *flags, *graphs, env={"GAUDI_SIMULATOR": "1"})
    check(tmp_path / "card")
    history = json.loads((tmp_path / "card" / "trainer_state.json").read_text())["log_history"]
    assert any("eval_rows" in entry for entry in history)
