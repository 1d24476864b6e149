"""run_clm.py as a user runs it: a process of its own, small real text, and what it printed and wrote."""

import json
import re

import numpy as np
import pytest
import torch
import yaml
from running import ROOT, copy_elsewhere, log_history, losses, results, run
from short_runs import GPT2, scratch

FILES = {
    "config.json", "model.safetensors", "tokenizer.json", "all_results.json", "train_results.json",
    "eval_results.json",
    "trainer_state.json", "loss_curve.png", "README.md",
}  # fmt: skip


@pytest.mark.slow
def test_train_and_evaluate(assets, tmp_path):
    output = tmp_path / "out"
    result = run(
        "run_clm.py",
        *scratch(assets, output, "--do_train", "--do_eval", "--learning_rate", 1e-2, "--num_train_epochs", 3),
        "--throughput_warmup_steps", 2, "--max_train_samples", 60, "--max_eval_samples", 9,
    )  # fmt: skip
    assert {path.name for path in output.iterdir()} >= FILES
    figures = results(output)
    steps = 3 * -(-60 // 8)
    assert len(losses(output)) == steps
    assert losses(output)[-1] < losses(output)[0] - 0.5
    assert figures["eval_samples"] == 9 and figures["eval_tokens"] == 9 * 63
    assert figures["eval_perplexity"] == pytest.approx(np.exp(figures["eval_loss"]))
    assert figures["train_samples"] == 60
    # Throughput covers the steps after warm-up: their samples, tokens and steps have one duration. The last batch of
    # each epoch has four rows of its own; what completes it is no sample.
    seconds = 1 / figures["train_steps_per_second"] * (steps - 2)
    assert figures["train_samples_per_second"] * seconds == pytest.approx(3 * 60 - 2 * 8, rel=0.01)
    assert figures["train_tokens_per_second"] * seconds == pytest.approx((3 * 60 - 2 * 8) * 64, rel=0.01)
    assert figures["train_padding_share"] == pytest.approx(1 - (3 * 60 - 2 * 8) / (steps - 2) / 8, abs=1e-4)
    kept = re.search(r"train: 60 blocks of 64 tokens; (\d+) tokens kept, (\d+) dropped", result.stderr)
    assert kept and int(kept[1]) == 60 * 64
    assert "Traceback" not in result.stderr and "it/s" not in result.stderr  # no progress bar off a terminal
    card = (output / "README.md").read_text()
    assert "pipeline_tag: text-generation" in card and "python run_clm.py --model_type gpt2" in card
    assert (output / "loss_curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.slow
def test_equals_a_plain_loop(assets, tmp_path):
    """Losses of 20 steps, and evaluation, as a hand-written loop on the same batches gives them."""
    from transformers import GPT2LMHeadModel, GPT2TokenizerFast

    output = tmp_path / "out"
    run(
        "run_clm.py", "--model_name_or_path", assets.gpt2, "--train_file", assets.train, "--validation_file",
        assets.validation, "--output_dir", output, "--per_device_train_batch_size", 4,
        "--per_device_eval_batch_size", 4,
        "--gradient_accumulation_steps", 2, "--block_size", 64, "--max_train_samples", 84, "--max_steps", 20,
        "--learning_rate", 1e-3, "--logging_steps", 1, "--do_train", "--do_eval", "--use_cpu", "--weight_decay", 0.1,
        env={"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    config = json.loads((assets.gpt2 / "config.json").read_text())
    assert config["resid_pdrop"] == 0.0, "the comparison needs a model without dropout"

    model = GPT2LMHeadModel.from_pretrained(assets.gpt2, attn_implementation="sdpa")
    tokenizer = GPT2TokenizerFast.from_pretrained(assets.gpt2)

    def blocks(path):
        tokens = [token for line in path.open() for token in tokenizer(line)["input_ids"]]
        return torch.tensor(tokens[: len(tokens) // 64 * 64]).view(-1, 64)

    train = blocks(assets.train)[:84]
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=1e-3, eps=1e-6
    )

    def summed_loss(batch):
        logits = model(batch).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.reshape(-1, 512), batch[:, 1:].reshape(-1), reduction="sum")

    expected, epoch, window = [], 0, []
    while len(expected) < 20:
        order = np.random.default_rng([42, epoch]).permutation(84)
        batches = [train[order[start : start + 4]] for start in range(0, 84, 4)]
        for index, batch in enumerate(batches):
            window.append(batch)
            # 21 batches: the last step of an epoch has one batch, not two.
            if len(window) == 2 or index == len(batches) - 1:
                for group in optimizer.param_groups:
                    group["lr"] = 1e-3 * (1 - len(expected) / 20)
                loss = sum(summed_loss(part) for part in window) / sum(part[:, 1:].numel() for part in window)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                expected.append(loss.item())
                window = []
            if len(expected) == 20:
                break
        epoch += 1
    np.testing.assert_allclose(losses(output), expected, rtol=1e-5)
    evaluation = blocks(assets.validation)
    with torch.no_grad():
        loss = summed_loss(evaluation).item() / evaluation[:, 1:].numel()
        correct = (model(evaluation).logits[:, :-1].argmax(-1) == evaluation[:, 1:]).float().mean().item()
    assert results(output)["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert results(output)["eval_accuracy"] == pytest.approx(correct, abs=1e-6)
    assert results(output)["eval_samples"] == len(evaluation)


@pytest.mark.slow
def test_resume_is_exact(assets, tmp_path):
    """An interrupted run, resumed twice in different ways, ends with the same bits as one that was not interrupted."""
    # Dropout, so that the random state matters; a second epoch, so that the order of the data does.
    flags = scratch(assets, tmp_path / "whole", "--do_train", "--max_train_samples", 40, "--num_train_epochs", 3)
    flags[flags.index(GPT2)] = GPT2.split(",resid")[0]
    run("run_clm.py", *flags, "--save_steps", 7)
    whole = losses(tmp_path / "whole")
    assert len(whole) == 15
    flags[flags.index("--output_dir") + 1] = tmp_path / "again"
    explicit = run("run_clm.py", *flags, "--resume_from_checkpoint", tmp_path / "whole" / "checkpoint-7")
    assert losses(tmp_path / "again")[7:] == whole[7:]
    weights = (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == weights
    assert "missing keys" not in explicit.stderr

    # Automatic: the newest complete checkpoint of the output directory; one without its state was interrupted.
    for step in ("checkpoint-14", "checkpoint-15"):
        (tmp_path / "whole" / step / "trainer_state.json").unlink(missing_ok=True)
    flags[flags.index("--output_dir") + 1] = tmp_path / "whole"
    resumed = run("run_clm.py", *flags)
    assert losses(tmp_path / "whole") == whole
    assert (tmp_path / "whole" / "model.safetensors").read_bytes() == weights
    assert "checkpoint-7" in resumed.stderr
    # The loss is of the whole run; for its speed, only the steps of this process count.
    figures = results(tmp_path / "whole")
    assert figures["train_loss"] == pytest.approx(np.mean(whole), rel=1e-6)
    assert figures["train_samples_per_second"] / figures["train_steps_per_second"] == pytest.approx(8, rel=0.01)


@pytest.mark.slow
def test_evaluation_alone_and_flags_for_the_card(assets, tmp_path):
    """Inference only, from the very flags of the documentation, with --use_cpu appended."""
    result = run(
        "run_clm.py", "--model_name_or_path", assets.gpt2, "--validation_file", assets.validation_jsonl,
        "--text_column_name", "text", "--per_device_eval_batch_size", 4, "--do_eval", "--output_dir", tmp_path / "out",
        "--gaudi_config_name", "Habana/gpt2", "--use_habana", "--use_lazy_mode", "--use_hpu_graphs_for_inference",
        "--use_cpu",
    )  # fmt: skip
    assert "--use_cpu overrides --use_habana" in result.stderr
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"all_results.json", "eval_results.json"}, "inference writes figures, and no model"
    assert results(tmp_path / "out")["eval_loss"] > 0


@pytest.mark.slow
def test_streaming_with_a_split(assets, tmp_path):
    """One file, streamed: trained and evaluated on disjoint rows of it; --max_steps runs over its end."""
    output = tmp_path / "out"
    flags = scratch(assets, output, "--do_train", "--do_eval", "--streaming", "--max_steps", 30)
    at = flags.index("--validation_file")
    del flags[at : at + 2]
    run("run_clm.py", *flags, "--max_eval_samples", 5)
    assert len(losses(output)) == 30
    assert results(output)["eval_samples"] == 5
    at = flags.index("--max_steps")
    del flags[at : at + 2]
    flags.remove("--do_train")
    run("run_clm.py", *flags, "--max_eval_samples", 4, "--overwrite_output_dir")
    assert results(output)["eval_samples"] == 4


@pytest.mark.slow
def test_configuration_files_and_a_copy(assets, tmp_path):
    """JSON, YAML, an overriding flag and the old flag name, from a copy of the script in a folder of its own."""
    script = copy_elsewhere("run_clm.py", tmp_path / "elsewhere")
    values = {
        "model_type": "gpt2", "tokenizer_name": str(assets.tokenizer), "config_overrides": GPT2,
        "train_file": str(assets.train), "output_dir": str(tmp_path / "out"), "block_size": 64, "max_steps": 3,
        "do_train": True, "do_eval": True, "use_cpu": True, "logging_steps": 1, "learning_rate": 1e-3,
        "evaluation_strategy": "steps", "eval_steps": 1, "max_eval_samples": 4, "save_total_limit": None,
    }  # fmt: skip
    (tmp_path / "run.json").write_text(json.dumps(values))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    first = run(script, tmp_path / "run.json", cwd=tmp_path / "elsewhere")
    assert "--evaluation_strategy is the old name of --eval_strategy" in first.stderr
    assert len([row for row in log_history(tmp_path / "out") if "eval_loss" in row]) == 4
    run(script, tmp_path / "run.yaml", "--output_dir", tmp_path / "yaml", "--max_steps", 2, cwd=tmp_path / "elsewhere")
    assert len(losses(tmp_path / "yaml")) == 2
    assert ROOT not in (tmp_path / "elsewhere").parents


@pytest.mark.slow
def test_memory_and_precision_flags(assets, tmp_path):
    """--torch_dtype, --low_cpu_mem_usage, --gradient_checkpointing, --use_cache and --bf16 with its warning."""
    output = tmp_path / "out"
    result = run(
        "run_clm.py", "--model_name_or_path", assets.gpt2, "--train_file", assets.train, "--do_train",
        "--max_steps", 2, "--block_size", 64, "--torch_dtype", "bfloat16", "--low_cpu_mem_usage",
        "--gradient_checkpointing",
        "--use_cache", "False", "--bf16", "--output_dir", output, "--use_cpu", "--logging_steps", 1,
    )  # fmt: skip
    config = json.loads((output / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16" and config["use_cache"] is False
    assert "bf16 autocast" in result.stderr
    assert len(losses(output)) == 2
