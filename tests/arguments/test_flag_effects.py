"""Every flag of --help changes something, or is refused by name, or says that what it asks for always holds.

Runs change several flags at once where each shows in a place of its own.
"""

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from running import ROOT, log_history, losses, results, run, run_ranks

from gaudi_lm.arguments.parsing import OLD_NAMES
from gaudi_lm.arguments.refusals import ALWAYS, REFUSED, UNUSED

# Flags whose effect other tests show, by the file in which they are looked for.
ELSEWHERE = {
    "tests/scripts/test_clm.py": "model_name_or_path tokenizer_name token torch_dtype use_cache low_cpu_mem_usage "
    "train_file validation_file max_eval_samples model_type config_overrides do_eval "
    "gaudi_config_name use_habana use_lazy_mode use_hpu_graphs_for_inference "
    "throughput_warmup_steps text_column_name resume_from_checkpoint block_size",
    "tests/simulator/test_parallel_losses.py": "distribution_strategy",
    "tests/scripts/test_mlm.py": "mlm_probability line_by_line max_predictions_per_seq",
    "tests/scripts/test_lora.py": "attn_softmax_bf16 flash_attention_recompute flash_attention_fast_softmax "
    "flash_attention_causal_mask flash_attention_fp8 pad_to_max_length pack_sequences "
    "adapter_name_or_path use_fused_rope load_meta_device merge_adapter "
    "dataset_concatenation train_on_inputs sql_prompt chat_prompt peft_type lora_rank "
    "lora_alpha lora_dropout lora_target_modules ia3_target_modules feedforward_modules "
    "adapter_layers ln_target_modules output_column_name attn_implementation",
    "tests/support/short_runs.py": "adalora_tinit adalora_tfinal adalora_delta_t adapter_len vera_target_modules",
    "tests/modeling/test_virtual_tokens.py": "num_virtual_tokens encoder_hidden_size prompt_tuning_init_text",
    "tests/data/test_lora_spans.py": "input_column_name",
    "tests/modeling/test_families.py": "config_name",
    "tests/data/test_streams.py": "streaming max_seq_length max_train_samples validation_split_percentage",
    "tests/training/test_evaluation.py": "bf16_full_eval",
    "tests/hub/test_scripts.py": "dataset_name dataset_config_name model_revision",
    "tests/scripts/test_bad_input.py": "overwrite_output_dir",
    "tests/arguments/test_parsing.py": "greater_is_better",
    "tests/scripts/test_documented_commands.py": "deepspeed",
    "tests/simulator/test_context_parallel.py": "context_parallel_size",
    "tests/training/test_dry_run.py": "dry_run dry_run_cards card_memory_gb",
    "tests/training/test_trackers.py": "logging_dir report_to hub_token",
    "tests/hub/test_uploads.py": "push_to_hub hub_model_id hub_private_repo hub_strategy hub_always_push hub_revision",
}


@pytest.fixture(scope="module")
def clm(assets, tmp_path_factory):
    """Run run_clm.py for four steps in a folder of its own: the folder, with what went to stderr in stderr.txt."""

    def start(*flags: object) -> Path:
        output = tmp_path_factory.mktemp("effects") / "out"
        base = ["--model_name_or_path", assets.gpt2, "--train_file", assets.train, "--validation_file"]
        base += [assets.validation, "--block_size", 32, "--max_train_samples", 16, "--max_eval_samples", 4]
        base += ["--per_device_train_batch_size", 2, "--max_steps", 4, "--logging_steps", 1, "--save_strategy", "no"]
        done = run("run_clm.py", *base, "--do_train", "--use_cpu", "--output_dir", output, *flags)
        (output.parent / "stderr.txt").write_text(done.stderr)
        return output

    return start


@pytest.fixture(scope="module")
def plain(clm):
    return clm()


def log_of(output: Path) -> str:
    return (output.parent / "stderr.txt").read_text()


def rates(output: Path) -> list[float]:
    return [row["learning_rate"] for row in log_history(output) if "learning_rate" in row]


def checkpoints(output: Path) -> set[str]:
    return {path.name for path in output.glob("checkpoint-*")}


def flags_shown(*names: str):
    """What a test shows, for :func:`test_every_flag_is_honoured_or_refused`."""

    def mark(test):
        test.flags = set(names)
        return pytest.mark.slow(test)

    return mark


@flags_shown(
    "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim", "save_strategy",
    "save_steps", "save_safetensors", "logging_first_step", "logging_steps", "logging_strategy",
    "include_num_input_tokens_seen", "skip_memory_metrics", "gradient_accumulation_steps",
    "per_device_train_batch_size", "do_train", "output_dir",
)  # fmt: skip
def test_optimizer_and_files(clm, plain):
    changed = clm(
        "--learning_rate", 1e-3, "--weight_decay", 0.1, "--adam_beta1", 0.8, "--adam_beta2", 0.9,
        "--adam_epsilon", 1e-4, "--save_strategy", "steps", "--save_steps", 3, "--save_safetensors", False,
        "--logging_first_step", "--logging_steps", 3, "--include_num_input_tokens_seen",
        "--skip_memory_metrics", False, "--gradient_accumulation_steps", 2, "--per_device_train_batch_size", 3,
        "--max_train_samples", 24,
        "--optim", "adamw_torch",
    )  # fmt: skip
    state = torch.load(changed / "checkpoint-3" / "optimizer.pt", weights_only=True)
    decayed, others = state["param_groups"]
    assert (decayed["betas"], decayed["eps"], decayed["initial_lr"]) == ((0.8, 0.9), 1e-4, 1e-3)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert not decayed["fused"]  # that is the default on the CPU
    assert checkpoints(changed) == {"checkpoint-3", "checkpoint-4"} and not checkpoints(plain)
    assert (changed / "checkpoint-3" / "pytorch_model.bin").exists() and not (changed / "model.safetensors").exists()
    history = [row for row in log_history(changed) if "loss" in row]
    assert [row["step"] for row in history] == [1, 3]
    assert [row["step"] for row in log_history(plain) if "loss" in row] == [1, 2, 3, 4]
    assert history[0]["num_input_tokens_seen"] == 2 * 3 * 32
    assert any(name.startswith("train_mem_cpu") for name in results(changed))
    assert not any("mem_cpu" in name for name in results(plain))
    final = clm("--logging_strategy", "no", "--optim", "sgd", "--save_strategy", "epoch", "--max_train_samples", 4)
    assert not [row for row in log_history(final) if "loss" in row]
    assert checkpoints(final) == {"checkpoint-2", "checkpoint-4"}
    state = torch.load(final / "checkpoint-4" / "optimizer.pt", weights_only=True)
    assert "momentum" in state["param_groups"][0] and not state["state"]


@flags_shown("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio", "max_steps")
def test_scheduler(clm, plain):
    assert rates(plain) == pytest.approx([5e-5, 3.75e-5, 2.5e-5, 1.25e-5])
    kwargs = {"min_lr": 4e-5}
    cosine = clm(
        "--lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_kwargs", json.dumps(kwargs), "--warmup_steps", 1
    )
    assert rates(cosine)[0] == 0 and min(rates(cosine)[1:]) >= 4e-5
    assert rates(clm("--warmup_ratio", 0.5)) == pytest.approx([0, 2.5e-5, 5e-5, 2.5e-5])
    assert len(rates(clm("--max_steps", 2))) == 2


LOSSES = {
    "seed": ["--seed", 7],
    "data_seed": ["--data_seed", 7],
    "label_smoothing_factor": ["--label_smoothing_factor", 0.5],
    "neftune_noise_alpha": ["--neftune_noise_alpha", 50],
    "max_grad_norm": ["--max_grad_norm", 1e-7],
    "num_train_epochs": ["--max_steps", -1, "--num_train_epochs", 0.25],
    "dataloader_drop_last": ["--dataloader_drop_last", "--max_train_samples", 15, "--max_steps", -1]
    + ["--num_train_epochs", 1],
    "bf16": ["--bf16"],
    "chunked_loss": ["--chunked_loss", False],
    "keep_linebreaks": ["--keep_linebreaks", False],
}


@pytest.fixture(scope="module")
def dropout_config(assets, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dropout")
    config = json.loads((assets.gpt2 / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "resid_pdrop": 0.5, "embd_pdrop": 0.5}))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_losses(clm, plain, name):
    changed = clm(*LOSSES[name])
    if name == "chunked_loss":  # the same losses by another way
        assert losses(changed) == pytest.approx(losses(plain), rel=1e-5)
        assert "without full logits" in log_of(plain)
        assert "from the full logits: --chunked_loss False" in log_of(changed)
    elif name == "max_grad_norm":
        assert losses(changed)[0] == losses(plain)[0] and losses(changed)[3] > losses(plain)[3]
    elif name == "num_train_epochs":
        assert len(losses(changed)) == 2
    elif name == "dataloader_drop_last":
        assert len(losses(changed)) == 7
    else:
        assert losses(changed)[0] != losses(plain)[0]
    if name == "bf16":
        assert "bf16 autocast" in log_of(changed)


@flags_shown(
    "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "load_best_model_at_end", "metric_for_best_model",
    "save_total_limit", "save_only_model", "per_device_eval_batch_size", "dataloader_num_workers",
    "dataloader_prefetch_factor", "dataloader_persistent_workers", "dataloader_pin_memory",
)  # fmt: skip
def test_evaluations_while_training(clm, plain):
    """The learning rate is so large that the model gets worse: the best one is the first."""
    flags = ["--do_eval", "--eval_strategy", "steps", "--eval_steps", 1, "--save_strategy", "steps", "--save_steps", 1]
    flags += ["--learning_rate", 1, "--load_best_model_at_end", "--metric_for_best_model", "accuracy"]
    flags += ["--save_total_limit", 1, "--save_only_model", "--eval_delay", 2, "--eval_on_start"]
    one = clm(*flags, "--per_device_eval_batch_size", 1)
    steps = [row["step"] for row in log_history(one) if "eval_loss" in row]
    assert steps[0] == 0 and steps[1:4] == [2, 3, 4]
    state = json.loads((one / "trainer_state.json").read_text())
    best = max(row["eval_accuracy"] for row in log_history(one) if row["step"] and "eval_accuracy" in row)
    assert state["best_metric"] == best
    assert len(checkpoints(one)) <= 2
    assert not list(one.glob("checkpoint-*/optimizer.pt"))
    assert results(one)["eval_accuracy"] == best, "the best model is the one at the end"
    workers = ["--dataloader_num_workers", 2, "--dataloader_prefetch_factor", 3, "--dataloader_persistent_workers"]
    two = clm(*flags, *workers, "--dataloader_pin_memory", False, "--per_device_eval_batch_size", 4)
    rows = [[row["eval_loss"] for row in log_history(output) if "eval_loss" in row] for output in (one, two)]
    assert rows[0] == pytest.approx(rows[1], rel=1e-5), "neither workers nor the batch size change a figure"
    assert losses(one) == losses(two)


@flags_shown("log_level", "disable_tqdm", "logging_nan_inf_filter", "save_last_ckpt", "run_name")
def test_logs(clm, plain):
    assert " INFO " in log_of(plain) and "step 1/4" in log_of(plain)
    quiet = clm("--log_level", "error", "--run_name", "mine")
    assert " INFO " not in log_of(quiet) and losses(quiet) == losses(plain)
    bar = clm("--disable_tqdm", False, "--save_last_ckpt", False)
    assert "4/4" in log_of(bar) and "step 1/4" not in log_of(bar)
    assert not (bar / "model.safetensors").exists() and (plain / "model.safetensors").exists()
    diverging = ["--learning_rate", 1e6, "--max_grad_norm", 0, "--max_steps", 12]
    assert not all(math.isfinite(loss) for loss in losses(clm(*diverging)))
    assert all(math.isfinite(loss) for loss in losses(clm(*diverging, "--logging_nan_inf_filter")))


@flags_shown("ignore_data_skip")
def test_resume_at_the_first_rows(clm, plain):
    first = clm("--save_strategy", "steps", "--save_steps", 2)
    checkpoint = first / "checkpoint-2"
    resumed = clm("--resume_from_checkpoint", checkpoint)
    assert losses(resumed) == losses(plain)
    assert losses(clm("--resume_from_checkpoint", checkpoint, "--ignore_data_skip"))[2:] != losses(plain)[2:]


@flags_shown("gradient_checkpointing", "gradient_checkpointing_kwargs")
def test_what_is_computed_again(clm, plain, dropout_config):
    """With dropout, activations that are computed again are the same only if the random state is kept for them."""
    dropout = ["--config_name", dropout_config]
    kwargs = ["--gradient_checkpointing", "--gradient_checkpointing_kwargs"]
    wanted = losses(clm(*dropout))
    assert losses(clm(*dropout, *kwargs, '{"use_reentrant": false}')) == pytest.approx(wanted, rel=1e-5)
    lost = losses(clm(*dropout, *kwargs, '{"use_reentrant": false, "preserve_rng_state": false}'))
    assert lost[0] == pytest.approx(wanted[0], rel=1e-5) and lost != pytest.approx(wanted, rel=1e-5)


@flags_shown("overwrite_cache", "preprocessing_num_workers", "use_fast_tokenizer")
def test_preprocessing(clm, assets, tmp_path):
    (tmp_path / "longer.txt").write_text(assets.train.read_text() * 5)
    longer = ["--train_file", tmp_path / "longer.txt", "--max_train_samples", 2500, "--max_steps", 1]

    def start(cache: str, *flags: object) -> tuple[list[float], set[tuple[str, int]]]:
        output = clm(*longer, "--cache_dir", tmp_path / cache, *flags)
        tables = (tmp_path / cache).rglob("*.arrow")
        return losses(output), {(path.name, path.stat().st_mtime_ns) for path in tables}

    found, tables = start("one")
    assert start("one") == (found, tables)
    again, anew = start("one", "--overwrite_cache")
    assert again == found and not anew <= tables
    again, halves = start("two", "--preprocessing_num_workers", 2)
    assert again == found
    assert any("_of_00002" in name for name, _ in halves) and not any("_of_" in name for name, _ in tables)
    assert start("one", "--use_fast_tokenizer", False)[0] == found, "the slow tokenizer gives the same ids"


@flags_shown("group_by_length")
def test_group_by_length(masked_assets, assets, tmp_path):
    shares = []
    for index, flags in enumerate(([], ["--group_by_length"])):
        output = tmp_path / str(index)
        run(
            "run_mlm.py", *masked_assets.scratch("bert"), "--train_file", assets.train, "--max_seq_length", 64,
            "--line_by_line", "--do_train", "--use_cpu", "--max_train_samples", 64, "--num_train_epochs", 1,
            "--per_device_train_batch_size", 4, "--save_strategy", "no", "--output_dir", output, *flags,
        )  # fmt: skip
        shares.append(results(output)["train_padding_share"])
    assert shares[1] < shares[0]


@flags_shown("log_level_replica", "average_tokens_across_devices")
def test_ranks(assets, tmp_path):
    """Of each answer's tokens, or of each rank's mean: with answers of unlike lengths these are two losses."""
    rows = [{"instruction": "a", "output": "word " * (2 if number % 2 else 40)} for number in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    base = ["--model_name_or_path", assets.gpt2, "--train_file", tmp_path / "rows.jsonl", "--train_on_inputs", False]
    base += ["--max_seq_length", 96, "--do_train", "--use_cpu", "--max_steps", 1, "--logging_steps", 1]
    base += ["--per_device_train_batch_size", 1, "--save_strategy", "no", "--save_last_ckpt", False]
    plain = run_ranks(2, "run_lora_clm.py", *base, "--output_dir", tmp_path / "plain")
    assert " INFO " not in plain[1].stderr
    apart_flags = ["--average_tokens_across_devices", False, "--log_level_replica", "info"]
    apart = run_ranks(2, "run_lora_clm.py", *base, "--output_dir", tmp_path / "apart", *apart_flags)
    assert " INFO " in apart[1].stderr
    assert losses(tmp_path / "plain") != pytest.approx(losses(tmp_path / "apart"), rel=1e-5)
    # A rank whose rows only complete the step has no mean, which would count as 0.
    base += ["--max_train_samples", 2, "--max_steps", 2, "--per_device_train_batch_size", 2]
    run_ranks(2, "run_lora_clm.py", *base, "--output_dir", tmp_path / "all")
    run_ranks(2, "run_lora_clm.py", *base, "--output_dir", tmp_path / "own", *apart_flags)
    assert losses(tmp_path / "own") == pytest.approx(losses(tmp_path / "all"), rel=1e-5)


@flags_shown(
    "adalora_init_r", "adalora_target_r", "adalora_orth_reg_weight", "instruction_column_name", "dataset_seed",
    "dataset_cache_directory", "keep_in_memory", "cache_dir", "trust_remote_code",
)  # fmt: skip
def test_adapters_and_examples(instructions, assets, tmp_path):
    rows = [json.loads(line) for line in instructions.train.read_text().splitlines()[:40]]
    questions = [json.dumps({"question": row.pop("instruction"), **row}) for row in rows]
    (tmp_path / "questions.jsonl").write_text("\n".join(questions))
    base = ["--model_name_or_path", instructions.llama, "--train_file", tmp_path / "questions.jsonl", "--do_train"]
    base += ["--use_cpu", "--max_steps", 1, "--logging_steps", 1, "--instruction_column_name", "question"]
    base += ["--do_eval", "--validation_split_percentage", 20, "--save_strategy", "no"]
    base += ["--dataset_cache_directory", tmp_path / "one", "--cache_dir", tmp_path / "other"]
    env = {"HF_DATASETS_CACHE": str(tmp_path / "default")}
    flags = ["--peft_type", "adalora", "--adalora_init_r", 6, "--adalora_target_r", 3]
    flags += ["--adalora_orth_reg_weight", 0.25, "--adalora_tinit", 0, "--adalora_tfinal", 0]
    run("run_lora_clm.py", *base, *flags, "--output_dir", tmp_path / "adalora", env=env)
    config = json.loads((tmp_path / "adalora" / "adapter_config.json").read_text())
    assert (config["init_r"], config["target_r"], config["orth_reg_weight"]) == (6, 3, 0.25)
    assert list((tmp_path / "one").rglob("*.arrow")) and not (tmp_path / "other").exists()
    tables = set((tmp_path / "one").rglob("*.arrow"))
    run("run_lora_clm.py", *base, "--output_dir", tmp_path / "seed", "--dataset_seed", 7, "--keep_in_memory", env=env)
    evaluated = [results(tmp_path / name)["eval_tokens"] for name in ("adalora", "seed")]
    assert evaluated[0] != evaluated[1], "another split has other examples"
    assert set((tmp_path / "one").rglob("*.arrow")) == tables
    clm = ["--train_file", assets.train, "--block_size", 32, "--do_train", "--use_cpu", "--max_steps", 1]
    clm += ["--cache_dir", tmp_path / "other", "--save_strategy", "no"]
    code = tmp_path / "code"
    shutil.copytree(assets.gpt2, code)
    config = json.loads((code / "config.json").read_text()) | {"model_type": "mine"}
    config["auto_map"] = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.Mine"}
    (code / "config.json").write_text(json.dumps(config))
    (code / "mine.py").write_text(
        "from transformers import GPT2Config, GPT2LMHeadModel\n\n\n"
        "class MineConfig(GPT2Config):\n    model_type = 'mine'\n\n\n"
        "class Mine(GPT2LMHeadModel):\n    config_class = MineConfig\n"
    )
    clm += ["--model_name_or_path", code]
    env["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    refused = run("run_clm.py", *clm, "--output_dir", tmp_path / "no", env=env, code=2)
    assert "trust_remote_code" in refused.stderr
    run("run_clm.py", *clm, "--output_dir", tmp_path / "yes", "--trust_remote_code", env=env)
    assert list((tmp_path / "other").rglob("*.arrow"))


# Resolved by the arguments object, or by what it sets in torch.
RESOLVED = {
    "sdp_on_bf16": (["--sdp_on_bf16"], lambda args: torch._C._get_math_sdp_allow_fp16_bf16_reduction()),
    "full_determinism": (["--full_determinism"], lambda args: args.full_determinism),
    "inline_inbuilt_nn_modules": (
        ["--inline_inbuilt_nn_modules", "False", "--torch_compile"],
        lambda args: torch._dynamo.config.inline_inbuilt_nn_modules,
    ),
    "allow_unspec_int_on_nn_module": (
        ["--allow_unspec_int_on_nn_module", "True", "--torch_compile"],
        lambda args: torch._dynamo.config.allow_unspec_int_on_nn_module,
    ),
    "cache_size_limit": (
        ["--cache_size_limit", "77", "--torch_compile"],
        lambda args: torch._dynamo.config.cache_size_limit,
    ),
    "save_on_each_node": (["--save_on_each_node"], lambda args: args.save_on_each_node),
}


@pytest.mark.parametrize("name", RESOLVED)
def test_resolved(name, tmp_path, monkeypatch):
    from gaudi_lm.arguments.definitions import LMTrainingArguments
    from gaudi_lm.arguments.parsing import parse

    for variable in ("ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_IPEX"):
        monkeypatch.setenv(variable, "no")
    flags, read = RESOLVED[name]
    base = ["--use_cpu", "--do_train", "--output_dir", str(tmp_path)]
    config = torch._dynamo.config
    kept = {key: getattr(config, key) for key in RESOLVED if hasattr(config, key)}
    try:
        before = read(parse(base, LMTrainingArguments)[0])
        assert read(parse([*base, *flags], LMTrainingArguments)[0]) != before
    finally:
        torch._C._set_math_sdp_allow_fp16_bf16_reduction(False)
        for key, value in kept.items():
            setattr(config, key, value)


@pytest.mark.slow
def test_zero3_leaf_promotion(monkeypatch):
    from deepspeed.utils import z3_leaf_module
    from optimum.habana.transformers.models.llama.modeling_llama import GaudiLlamaDecoderLayer
    from tiny_models import tiny_model

    from gaudi_lm.errors import UserError
    from gaudi_lm.modeling import attention

    model = tiny_model("llama")
    layers = list(model.model.layers)
    for layer in layers:
        layer.__class__ = GaudiLlamaDecoderLayer  # as on a card
    with pytest.raises(UserError, match="not of stage 3"):
        attention.promote_leaves(model)
    monkeypatch.setattr(attention, "is_deepspeed_zero3_enabled", lambda: True)
    attention.promote_leaves(model)
    assert all(map(z3_leaf_module, layers))
    with pytest.raises(UserError, match="^--use_zero3_leaf_promotion: .*; leave it out$"):
        attention.promote_leaves(tiny_model("llama"))
    with pytest.raises(UserError, match="gpt2 is not among llama, mixtral, qwen3_moe"):
        attention.promote_leaves(tiny_model("gpt2"))


# Read by upstream's own code on the way of a run, where no simulated card or single process shows a difference.
UPSTREAM = {
    "optimum/habana/transformers/trainer.py": "non_blocking_data_copy ddp_bucket_cap_mb "
    "ddp_broadcast_buffers ddp_find_unused_parameters pipelining_fwd_bwd profiling_steps profiling_warmup_steps "
    "profiling_record_shapes profiling_with_stack use_hpu_graphs_for_training compile_from_sec_iteration "
    "use_regional_compilation use_compiled_autograd "
    "disable_tensor_cache_hpu_graphs max_hpu_graphs accelerator_config half_precision_backend",
    "optimum/habana/transformers/training_args.py": "ddp_timeout minimize_memory compile_dynamic torch_compile "
    "torch_compile_mode torch_compile_backend "
    "fsdp fsdp_config fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap fp8 use_cpu",
    "transformers/trainer.py": "optim_args optim_target_modules",
}


def test_every_flag_is_honoured_or_refused(all_flags):
    shown = (
        {"use_zero3_leaf_promotion"}
        | set(LOSSES)
        | set(RESOLVED)
        | set().union(*(getattr(test, "flags", ()) for test in globals().values()))
    )
    for file, names in ELSEWHERE.items():
        text = (ROOT / file).read_text()
        for name in names.split():
            assert re.search(rf"(--|\b){name}\b", text), f"{file} does not try --{name}"
        shown.update(names.split())
    import transformers
    from optimum.habana import GaudiTrainingArguments

    inherited = {field.name for field in dataclasses.fields(GaudiTrainingArguments)}
    texts = [path.read_text() for path in (ROOT / "tests").rglob("test_*.py")]
    # A flag of our own is tried where the test of its feature is.
    shown |= {name for name in all_flags - inherited if any(f"--{name}" in text for text in texts)}
    packages = Path(transformers.__file__).parents[1]
    for file, names in UPSTREAM.items():
        text = (packages / file).read_text()
        for name in names.split():
            assert re.search(rf"(args|self)\.{name}\b", text), f"{file} does not read {name}"
        shown.update(names.split())
    kinds = {"shown": shown, "refused": set(REFUSED), "always": set(ALWAYS), "old": {o[2:] for o in OLD_NAMES}}
    for flag in sorted(all_flags - {"help"}):
        found = [kind for kind, names in kinds.items() if flag in names]
        assert found, f"nothing shows that --{flag} is honoured, and it is not refused"
        assert found == ["old"] or "old" not in found
        assert len({"refused", "always", "shown"} & set(found)) <= 1, f"--{flag} is {' and '.join(found)}"
    unknown = (set(REFUSED) | set(ALWAYS)) - all_flags
    assert not unknown, f"no such flags: {unknown}"


@pytest.fixture(scope="module")
def all_flags():
    from test_flags import caught_parser

    return {
        action.dest for script in ("run_clm", "run_mlm", "run_lora_clm") for action in caught_parser(script)._actions
    }


def test_every_refused_flag_is_refused_by_name(all_flags):
    from gaudi_lm.arguments.refusals import check_flags
    from gaudi_lm.errors import UserError

    for name, reason in REFUSED.items():
        with pytest.raises(UserError, match=f"^--{name}: not in these scripts: {re.escape(reason)}$"):
            check_flags({name: "something else"}, {name: None})
        check_flags({name: None}, {name: None})


def test_flags_that_change_nothing_say_so(capsys):
    from gaudi_lm.arguments.refusals import check_flags

    for name, reason in ALWAYS.items():
        check_flags({name: True}, {name: False})
        expected = "" if name == "local_rank" else f"warning: --{name} changes nothing: {reason}\n"
        assert capsys.readouterr().err == expected
    for name, (other, among) in UNUSED.items():
        for value in among:
            check_flags({"eval_strategy": "no", name: 7, other: value}, {name: 0, other: "x"})
            assert capsys.readouterr().err == f"warning: --{name} changes nothing: --{other} is {value}\n"
        check_flags({name: 7, other: "steps"}, {name: 0, other: "x"})
        assert capsys.readouterr().err == ""
    check_flags({"logging_steps": 7, "logging_strategy": "no", "eval_strategy": "steps"}, {"logging_steps": 500})
    assert capsys.readouterr().err == "", "evaluation takes its steps"


def test_every_number_has_a_range():
    from test_flags import caught_parser

    from gaudi_lm.arguments.parsing import whole_number
    from gaudi_lm.arguments.ranges import RANGES

    for script in ("run_clm", "run_mlm", "run_lora_clm"):
        for action in caught_parser(script)._actions:
            if action.type in (float, whole_number) and f"--{action.dest}" not in OLD_NAMES:
                assert action.dest in RANGES or action.dest in REFUSED, f"--{action.dest} has no range"
                if action.default is not None and action.dest in RANGES:
                    assert RANGES[action.dest].holds(action.default)
