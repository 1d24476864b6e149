"""Values that a flag cannot have, contradictions, packages that are missing: one line, exit code 2."""

import json
import math
import re
import sys
from types import SimpleNamespace

import pytest
from running import ROOT, run_many

from gaudi_lm.arguments import consistency
from gaudi_lm.arguments.deepspeed_configs import check_deepspeed_config
from gaudi_lm.arguments.definitions import LMTrainingArguments
from gaudi_lm.arguments.ranges import RANGES, check_ranges
from gaudi_lm.arguments.refusals import NEEDS, check_flags
from gaudi_lm.arguments.schedules import odd_stages
from gaudi_lm.errors import UserError

# For every numeric flag some values outside of its range, and some within.
NUMBERS = [-math.inf, -1e9, -2, -1, -0.5, 0, 0.5, 1, 1.5, 2, 1e9, 1e30, math.inf, math.nan]


@pytest.mark.parametrize("name", RANGES)
def test_ranges(name):
    allowed = RANGES[name]
    refused = 0
    for value in NUMBERS:
        try:
            check_ranges({name: value})
        except UserError as error:
            refused += 1
            assert str(error).startswith(f"--{name} ") and "it must be" in str(error)
        else:
            assert allowed.low <= value <= allowed.high or value in allowed.also
    assert refused >= 5, "negative numbers, infinities and NaN"
    check_ranges({name: None})


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("seed", 2**32, "between 0 and 4294967295"),
        ("max_steps", 0, "at least 1 or -1"),
        ("max_steps", -2, "at least 1 or -1"),
        ("save_steps", 0, "more than 0"),
        ("save_steps", 2.5, "whole from 1 on; a number below 1 is a share of all steps"),
        ("adam_beta2", 1.0, "at least 0 and less than 1"),
        ("label_smoothing_factor", 2.0, "less than 1"),
        ("num_train_epochs", 0.0, "more than 0"),
        ("max_grad_norm", math.inf, "0 turns clipping off"),
        ("learning_rate", math.nan, "--learning_rate nan"),
    ],
)
def test_the_message_says_what_a_number_may_be(flag, value, words):
    with pytest.raises(UserError) as caught:
        check_ranges({flag: value})
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("flag", "value"),
    [("learning_rate", 0.0), ("weight_decay", 3.0), ("adam_epsilon", 0.0), ("warmup_ratio", 1.0)],
)
def test_what_is_merely_odd_gets_a_warning(flag, value, capsys):
    check_ranges({flag: value})
    assert capsys.readouterr().err.startswith(f"warning: --{flag} ")


def test_defaults_and_shares_are_no_cause_for_a_word(capsys):
    check_ranges({"save_steps": 0.1, "logging_steps": 1.0, "learning_rate": 5e-5, "max_steps": -1, "local_rank": -1})
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("steps", "kwargs", "words"),
    [
        (10, {"num_decay_steps": 8}, None),
        (9, {"num_decay_steps": 8}, "2 steps of warm-up, 0 stable ones and 8 of decay (num_decay_steps) are 10, and"),
        (10, {"num_decay_steps": 2, "num_stable_steps": 6}, None),
        (11, {"num_decay_steps": 2, "num_stable_steps": 6}, "and the run has 11"),
    ],
)
def test_a_schedule_in_stages_that_are_not_the_run_is_odd(steps, kwargs, words, tmp_path):
    flags = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": json.dumps(kwargs), "warmup_steps": 2}
    args = LMTrainingArguments(output_dir=str(tmp_path), use_cpu=True, do_train=True, **flags)
    said = odd_stages(args, steps)
    assert said is None if words is None else words in said
    assert odd_stages(LMTrainingArguments(output_dir=str(tmp_path), use_cpu=True, do_train=True), steps) is None


@pytest.mark.parametrize(("name", "needed"), NEEDS.items())
def test_a_flag_that_does_nothing_without_another(name, needed):
    defaults = {name: None, "attn_implementation": "eager", "peft_type": "ia3"}
    with pytest.raises(UserError, match=f"^--{name} needs --{needed}, which is not set$"):
        check_flags({**defaults, name: 1}, defaults)
    other, _, value = needed.partition(" ")
    check_flags({**defaults, name: 1, other: value or 1}, {**defaults, other: value or 1})


@pytest.mark.parametrize("other", ["deepspeed", "fsdp"])
def test_fast_ddp_averages_whole_gradients(other):
    values = {"distribution_strategy": "fast_ddp", other: "x"}
    with pytest.raises(UserError, match=f"^--distribution_strategy fast_ddp: .*--{other} divides$"):
        check_flags(values, values)
    check_flags({**values, "use_cpu": True}, values)


@pytest.mark.parametrize("name", ["constant", "constant_with_warmup", "inverse_sqrt"])
def test_a_schedule_without_settings(name, capsys):
    check_flags({"lr_scheduler_type": name, "lr_scheduler_kwargs": '{"timescale": 9}'}, {"lr_scheduler_kwargs": {}})
    assert f"--lr_scheduler_kwargs changes nothing: --lr_scheduler_type is {name}" in capsys.readouterr().err


# By the words that the line must have.
REFUSED = {
    "--optim nonsense": ["--optim nonsense", "unknown", "sgd"],
    "--optim adamw_trch": ["did you mean", "adamw_torch"],
    "--optim adamw_apex_fused": ["CUDA", "adamw_torch"],
    "--optim adamw_bnb_8bit": ["pip install bitsandbytes"],
    "--optim paged_lion_8bit": ["pip install bitsandbytes"],
    "--optim galore_adamw --optim_target_modules all-linear": ["pip install galore-torch"],
    "--optim schedule_free_adamw": ["pip install schedulefree"],
    "--optim adalomo": ["pip install lomo-optim"],
    "--optim adamw_torch_8bit": ["pip install torchao"],
    "--optim apollo_adamw": ["pip install apollo-torch"],
    "--optim stable_adamw": ["pip install torch-optimi"],
    "--optim grokadamw": ["pip install grokadamw"],
    "--optim_args rank=3": ["--optim_args", "takes none"],
    "--report_to swanlab": ["pip install swanlab"],
    "--report_to trackio": ["pip install trackio"],
    "--report_to wand": ["--report_to wand", "did you mean wandb"],
    "--report_to none wandb": ["none stands alone"],
    '--lr_scheduler_kwargs {"foo":1}': ["--lr_scheduler_kwargs", "foo", "linear"],
    '--lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs {"min_lr":"x"}': ["--lr_scheduler_kwargs", "min_lr"],
    '--lr_scheduler_type polynomial --lr_scheduler_kwargs {"lr_end":-1}': ["--lr_scheduler_kwargs", "outside of 0 to"],
    '--lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs {"min_lr_rate":2}': ["of 0 to --learning_rate"],
    "--lr_scheduler_type warmup_stable_decay": ["--lr_scheduler_kwargs", "num_decay_steps"],
    '--lr_scheduler_type warmup_stable_decay --lr_scheduler_kwargs {"num_decay_steps":0.1}': ["num_decay_steps is"],
    "--lr_scheduler_kwargs text": ["--lr_scheduler_kwargs text", "JSON"],
    "--lr_scheduler_kwargs {": ["--lr_scheduler_kwargs", "not valid JSON"],
    "--lr_scheduler_type reduce_lr_on_plateau": ["reduce_lr_on_plateau", "--eval_strategy"],
    "--metric_for_best_model f1 --eval_strategy epoch": ["--metric_for_best_model f1", "perplexity"],
    "--metric_for_best_model loss": ["--metric_for_best_model", "--eval_strategy"],
    "--load_best_model_at_end": ["--load_best_model_at_end", "--eval_strategy"],
    "--save_strategy best": ["--save_strategy best", "--eval_strategy"],
    "--dataloader_persistent_workers": ["--dataloader_persistent_workers", "--dataloader_num_workers"],
    "--dataloader_prefetch_factor 2": ["--dataloader_prefetch_factor", "--dataloader_num_workers"],
    "--streaming --max_steps 2 --group_by_length": ["--group_by_length", "--streaming"],
    "--dataloader_num_workers -1": ["--dataloader_num_workers -1", "between 0 and 1024"],
    "--learning_rate -1e-5": ["--learning_rate -1e-05", "between 0 and 1000000"],
    "--learning_rate nan": ["--learning_rate nan"],
    "--per_device_train_batch_size 0": ["--per_device_train_batch_size 0"],
    "--accelerator_config nowhere.json": ["--accelerator_config nowhere.json", "no such file"],
    '--accelerator_config {"splitbatches":true}': ["--accelerator_config", "splitbatches", "split_batches"],
    '--accelerator_config {"split_batches":true}': ["--accelerator_config", "split_batches"],
    '--gradient_checkpointing --gradient_checkpointing_kwargs {"use_rentrant":true}': ["did you mean use_reentrant"],
    '--gradient_checkpointing_kwargs {"use_reentrant":true}': ["needs --gradient_checkpointing"],
    "--torch_compile_backend nonsense": ["--torch_compile_backend nonsense", "inductor"],
    "--torch_compile --torch_compile_mode nonsense": ["--torch_compile_mode nonsense", "max-autotune"],
    "--half_precision_backend cpu_amp --fp16": ["--fp16", "--bf16"],
    "--push_to_hub": ["--push_to_hub", "hf auth login"],
    "--push_to_hub --hub_model_id a/b/c --hub_token x": ["--hub_model_id a/b/c", "namespace"],
    "--push_to_hub --hub_model_id a.git --hub_token x": ["--hub_model_id a.git", "cannot end by '.git'"],
    "--push_to_hub --output_dir a/my@model --hub_token x": [
        "name of --output_dir, my@model",
        "or '.'. The name cannot start",
        "maximum length is 96",
    ],
    "--hub_model_id a/b": ["--hub_model_id", "--push_to_hub"],
    "--dataset_config_name plain": ["--dataset_config_name", "--dataset_name"],
    "--output_dir file": ["--output_dir file", "is a file"],
    "--output_dir file/below/it": ["--output_dir file/below/it", "is a file"],
    "--output_dir broken": ["--output_dir broken", "broken link"],
    "--cache_dir file": ["--cache_dir file", "is a file"],
    "--logging_dir file": ["--logging_dir file", "is a file"],
    "--use_cpu False --use_habana --deepspeed zero.json": ["GAUDI_SIMULATOR"],
}


@pytest.mark.slow
@pytest.mark.parametrize("flags", REFUSED)
def test_one_line_before_anything_is_written(flags, assets, tmp_path):
    (tmp_path / "file").write_text("something")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    base = ["--use_cpu", "--do_train", "--do_eval", "--model_name_or_path", assets.gpt2, "--train_file", assets.train]
    cases = {flags: [*base, "--output_dir", "out", *flags.split()]}
    ((code, stderr),) = run_many("run_clm.py", cases, tmp_path).values()
    assert code == 2 and "Traceback" not in stderr, stderr
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, stderr
    for word in REFUSED[flags]:
        assert word in lines[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "file"], "a refused run wrote something"


def test_deepspeed_and_fsdp_need_a_launcher_and_exclude_each_other(monkeypatch, capsys, tmp_path):
    from gaudi_lm.arguments.consistency import _check_deepspeed, _check_fsdp, read_mapping

    class Flags:
        optim = "adamw_torch"
        deepspeed, fsdp, save_only_model, save_on_each_node = "zero.json", "", False, False
        gradient_checkpointing = True
        warmup_steps = warmup_ratio = 0

    config = tmp_path / "zero.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"^--deepspeed: .*gaudi_spawn.py --world_size 1"):
        _check_deepspeed(Flags, read_mapping("deepspeed", str(config), is_file=True))
    Flags.fsdp = "full_shard auto_wrap"
    with pytest.raises(UserError, match=r"^--fsdp: .*gaudi_spawn.py"):
        _check_fsdp(Flags, {})
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(UserError, match="--deepspeed and --fsdp exclude"):
        _check_deepspeed(Flags, {})
    Flags.fsdp = ""
    _check_deepspeed(Flags, {})
    with monkeypatch.context() as patch, pytest.raises(UserError, match="--deepspeed: .* is not installed"):
        patch.setitem(sys.modules, "deepspeed", None)
        _check_deepspeed(Flags, {})
    Flags.fsdp = "full_shard auto_wrap"
    _check_fsdp(Flags, {"fsdp_min_num_params": 1, "use_orig_params": True})
    assert not capsys.readouterr().err
    with pytest.raises(UserError, match="--gradient_checkpointing: .* has activation_checkpointing"):
        _check_fsdp(Flags, {"fsdp_activation_checkpointing": "true"})
    _check_fsdp(Flags, {"fsdp_version": 2})
    assert "warning: --fsdp_config: no effect of version; the settings are activation_" in capsys.readouterr().err
    with pytest.raises(UserError, match="--fsdp_config: state_dict_type LOCAL_STATE_DICT: FULL_STATE_DICT or SHARDED"):
        _check_fsdp(Flags, {"state_dict_type": "LOCAL_STATE_DICT"})
    for name, value, allowed in (
        ("activation_checkpointing", "maybe", "true or false"),
        ("use_orig_params", 1, "true or false"),
        ("min_num_params", "many", "a whole number"),
        ("backward_prefetch", "never", "backward_pre or backward_post or no_prefetch"),
        ("transformer_layer_cls_to_wrap", 3, "a name or a list of names"),
    ):
        with pytest.raises(UserError, match=f"^--fsdp_config: {name} {value}: {allowed}$"):
            _check_fsdp(Flags, {name: value})
    Flags.gradient_checkpointing = False
    taken = {"backward_prefetch": "BACKWARD_PRE", "activation_checkpointing": "True", "sync_module_states": False}
    _check_fsdp(Flags, {**taken, "transformer_layer_cls_to_wrap": ["GPT2Block"]})
    assert Flags.fsdp_config["activation_checkpointing"] is True
    _check_fsdp(Flags, {"fsdp_activation_checkpointing": "false"})
    assert Flags.fsdp_config == {"activation_checkpointing": False}
    _check_fsdp(Flags, {"transformer_layer_cls_to_wrap": None})
    monkeypatch.setenv("FSDP_STATE_DICT_TYPE", "LOCAL_STATE_DICT")
    with pytest.raises(UserError, match="FSDP_STATE_DICT_TYPE LOCAL_STATE_DICT: FULL_STATE_DICT or SHARDED"):
        _check_fsdp(Flags, {})
    monkeypatch.setenv("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT")
    Flags.save_only_model = True
    with pytest.raises(UserError, match="--save_only_model: not with SHARDED_STATE_DICT"):
        _check_fsdp(Flags, {})
    Flags.save_only_model, Flags.save_on_each_node = False, True
    with pytest.raises(UserError, match="--save_on_each_node: not with --fsdp"):
        _check_fsdp(Flags, {})
    Flags.fsdp = "ful_shard"
    with pytest.raises(UserError, match="--fsdp ful_shard: unknown; did you mean full_shard"):
        _check_fsdp(Flags, {})
    for text, words in (("{", "not valid JSON"), ("[1]", "a list, not a mapping")):
        config.write_text(text)
        with pytest.raises(UserError, match=words):
            read_mapping("deepspeed", str(config), is_file=True)


@pytest.mark.parametrize("optim", ["adafactor", "galore_adamw", "grokadamw", "adagrad", "sgd"])
def test_an_optimizer_that_looks_at_whole_weights_gets_no_shares_of_them(monkeypatch, optim):
    """On two cards its result would be another one than on one; DeepSpeed makes Adagrad anew, without its schedule."""
    flags = SimpleNamespace(
        optim=optim, deepspeed="zero.json", fsdp="", gradient_checkpointing=False, save_only_model=False,
        save_on_each_node=False, warmup_steps=0, warmup_ratio=0,
    )  # fmt: skip
    monkeypatch.setenv("WORLD_SIZE", "2")

    def refused(check, *args) -> bool:
        try:
            check(flags, *args)
        except UserError as error:
            assert str(error).startswith(f"--optim {optim}: not with ")
            return True
        return False

    own = {"optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 3}}
    assert [refused(consistency._check_deepspeed, {"zero_optimization": {"stage": stage}}) for stage in range(4)] == [
        False, *[optim != "sgd"] * 3,
    ]  # fmt: skip
    assert not refused(consistency._check_deepspeed, own)
    flags.fsdp = "full_shard auto_wrap"
    assert refused(consistency._check_fsdp, {}) == (optim not in ("adagrad", "sgd"))
    flags.fsdp = "no_shard"
    assert not refused(consistency._check_fsdp, {})


ZERO_FAULTS = {
    "unknown key zero_optimization.contigous_gradients; did you mean contiguous_gradients": {
        "zero_optimization": {"contigous_gradients": True, "stage": 4}
    },
    "unknown key zero_optimization.stage3_max_live_parameter; did you mean stage3_max_live_parameters": {
        "zero_optimization": {"stage3_max_live_parameter": 1}
    },
    "unknown key zero_optimization.offload_optimizer.devise; did you mean device": {
        "zero_optimization": {"offload_optimizer": {"devise": "cpu"}}
    },
    "zero_optimization.stage is 4: Input should be 0, 1, 2": {"zero_optimization": {"stage": 4}},
    "zero_optimization is a mapping": {"zero_optimization": True},  # transformers looks for its stage
    "zero_optimization: Cannot provide deprecated parameter 'cpu_offload'": {
        "zero_optimization": {"cpu_offload": True, "offload_optimizer": {"device": "cpu"}}
    },
    "fp16 does not exist on a Gaudi": {"fp16": {"enabled": True}},
    "unknown key gradient_cliping; did you mean gradient_clipping": {"gradient_cliping": 1.0},
    "unknown key zero_optimisation; did you mean zero_optimization": {"zero_optimisation": {"stage": 3}},
    "unknown key bf16.enable; did you mean enabled": {"bf16": {"enable": True}},
    "bf16 is a mapping": {"bf16": "true"},
    "scheduler is a mapping": {"scheduler": "auto"},
    "optimizer.type is Adamm, which neither": {"optimizer": {"type": "Adamm"}},
    "optimizer.type is lr_scheduler, which neither": {"optimizer": {"type": "lr_scheduler"}},
    "optimizer.type Lion: DeepSpeed has no Lion for a Gaudi": {"optimizer": {"type": "Lion"}},
    "optimizer.type LBFGS: it asks for losses again within a step": {"optimizer": {"type": "LBFGS"}},
    "optimizer.type SparseAdam: it takes sparse gradients alone": {"optimizer": {"type": "SparseAdam"}},
    "optimizer.params.momentun: unknown; did you mean momentum?": {
        "optimizer": {"type": "SGD", "params": {"momentun": 0.9}},
    },
    "optimizer.type Adagrad: not with ZeRO": {"optimizer": {"type": "Adagrad"}, "zero_optimization": {"stage": 1}},
    "optimizer.type Adafactor: not with ZeRO": {
        "optimizer": {"type": "Adafactor"},
        "zero_optimization": {"stage": 3},
        "zero_allow_untested_optimizer": True,
    },
    'optimizer.type SGD: ZeRO takes it only with "zero_allow_untested_optimizer": true': {
        "optimizer": {"type": "SGD"},
        "zero_optimization": {"stage": 2},
    },
    "scheduler.params is a mapping": {"scheduler": {"params": 7}},
    "optimizer.params.learning_rate: unknown; known are": {
        "optimizer": {"type": "AdamW", "params": {"learning_rate": 1e-3}}
    },
    "scheduler.type WarmupLr: unknown; did you mean WarmupLR": {"scheduler": {"type": "WarmupLr"}},
    "scheduler.params.warmup_max: unknown; did you mean warmup_max_lr": {"scheduler": {"params": {"warmup_max": 3}}},
    "checkpoint: Checkpoint config contains invalid tag_validation": {"checkpoint": {"tag_validation": "maybe"}},
    "unknown key comms_logger.enable; did you mean enabled": {"comms_logger": {"enable": True}},
    "unknown key tensorboard.path": {"tensorboard": {"enabled": True, "path": "logs"}},
    "data_types: 'half a byte' is not a valid": {"data_types": {"grad_accum_dtype": "half a byte"}},
    "communication_data_type: Invalid": {"communication_data_type": "fp4"},
    "tensor_parallel: each card trains on data of its own": {"tensor_parallel": {"autotp_size": 2}},
}


@pytest.mark.parametrize("fault", ZERO_FAULTS)
def test_a_wrong_deepspeed_file_is_named_before_anything_is_loaded(fault):
    with pytest.raises(UserError, match=f"^--deepspeed zero.json: {re.escape(fault)}") as caught:
        check_deepspeed_config("--deepspeed zero.json", ZERO_FAULTS[fault])
    assert "\n" not in str(caught.value)


def test_a_schedule_of_deepspeed_without_warm_up():
    for kind in ("WarmupLR", "WarmupDecayLR"):
        config = {"scheduler": {"type": kind, "params": {"warmup_num_steps": "auto"}}}
        check_deepspeed_config("--deepspeed", config, warms_up=True)
        with pytest.raises(UserError, match="scheduler.params.warmup_num_steps auto: --warmup_steps or --warmup_rat"):
            check_deepspeed_config("--deepspeed", config, warms_up=False)


def test_what_deepspeed_takes_is_not_refused():
    zero, half = {"stage": 2, "overlap_comm": "auto"}, {"enabled": "auto", "loss_scale": 0}
    check_deepspeed_config("--deepspeed", {"zero_optimization": zero, "bf16": {"enabled": "auto"}})
    check_deepspeed_config("--deepspeed", {"zero_optimization": zero, "fp16": half})
    for kind, stage in (("SGD", 0), ("Adagrad", 0), ("Adafactor", 0), ("Muon", 1), ("Adam", 3)):
        check_deepspeed_config("--deepspeed", {"optimizer": {"type": kind}, "zero_optimization": {"stage": stage}})
    untested = {"optimizer": {"type": "SGD"}, "zero_allow_untested_optimizer": True}
    check_deepspeed_config("--deepspeed", {**untested, "zero_optimization": {"stage": 1}})
    adam = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True}
    warmup = {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto", "total_num_steps": "auto"}
    several = {
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "steps_per_print": 2000,
        "optimizer": {"type": "AdamW", "params": adam},
        "scheduler": {"type": "WarmupDecayLR", "params": warmup},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "activation_checkpointing": {"partition_activations": True},
        "flops_profiler": {"enabled": False},
        "tensor_parallel": {"autotp_size": 1},
        "wandb": {"enabled": False},
        "_comment": "of one's own",
    }
    check_deepspeed_config("--deepspeed", several)
    for file in (ROOT / "configs" / "deepspeed").iterdir():
        check_deepspeed_config("--deepspeed", json.loads(file.read_text()))


@pytest.mark.parametrize("offline", [True, False])
def test_that_nothing_is_uploaded_offline_is_said_at_the_start(offline, monkeypatch, capsys):
    monkeypatch.setattr(consistency, "HF_HUB_OFFLINE", offline)
    consistency._check_hub(SimpleNamespace(push_to_hub=True, hub_model_id="me/a", output_dir="o", hub_token="hf_x"))
    words = "nothing will be uploaded with HF_HUB_OFFLINE=1 (or TRANSFORMERS_OFFLINE=1)"
    said = f"warning: --push_to_hub: {words}\n" if offline else ""
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("metric", "greater"),
    [("loss", False), ("eval_perplexity", False), ("accuracy", True), ("seen_perplexity", False), ("f1", None)],
)
def test_which_of_two_models_is_better(metric, greater):
    """Upstream takes a perplexity for better when it is greater."""
    from gaudi_lm.arguments.consistency import _check_best_model

    class Flags:
        metric_for_best_model, greater_is_better = metric, None
        eval_strategy = save_strategy = "steps"
        load_best_model_at_end, lr_scheduler_type = True, "linear"
        save_only_model, fsdp, deepspeed = True, "", None

    _check_best_model(Flags)
    assert Flags.greater_is_better is greater
    Flags.deepspeed = "zero.json"
    with pytest.raises(UserError, match="^--save_only_model: not with --deepspeed and --load_best_model_at_end"):
        _check_best_model(Flags)
    Flags.fsdp, Flags.save_only_model = "full_shard", False
    _check_best_model(Flags)


def test_metrics_of_several_sets_have_their_names():
    from gaudi_lm.arguments.consistency import check_best_metric

    for name, sets in ((None, None), ("eval_loss", None), ("seen_loss", {"seen": [], "new": []}), (None, {"a": []})):
        check_best_metric(name, sets)
    for name, sets, given in (("seen_loss", None, "loss, perplexity"), ("loss", {"seen": []}, "seen_loss, seen_per")):
        with pytest.raises(UserError, match=f"^--metric_for_best_model {name}: an evaluation gives {given}"):
            check_best_metric(name, sets)


def test_folders_that_cannot_be_written_to(tmp_path):
    """In /proc, root too may write nothing, whatever the permissions say."""
    from gaudi_lm.arguments.refusals import check_folders

    check_folders({"output_dir": str(tmp_path / "new" / "folder"), "cache_dir": None})
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"^--output_dir /proc/new/folder: /proc is not writable \(.+\)$"):
        check_folders({"output_dir": "/proc/new/folder"})


@pytest.mark.parametrize("overrides", ["n_layer=-1", "n_embd=0", "vocab_size=0"])
def test_sizes_that_no_model_has(overrides):
    from gaudi_lm.arguments.definitions import ModelArguments
    from gaudi_lm.modeling.loading import load_config

    with pytest.raises(
        UserError, match=f"^--config_overrides {overrides}: .* is {overrides.split('=')[1]}; it must be"
    ):
        load_config(ModelArguments(), "gpt2", overrides)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "a list, not a mapping"),
        ('{"use_fused_adm": true}', "unknown key use_fused_adm; did you mean use_fused_adam"),
        ('{"use_fused_clip_norm": "false"}', "use_fused_clip_norm is 'false', not true or false"),
    ],
)
def test_a_gaudi_configuration_that_is_none(content, words, tmp_path):
    from gaudi_lm.arguments.gaudi_configs import resolve_gaudi_config

    file = tmp_path / "gaudi_config.json"
    file.write_text(content)
    for name in (file, tmp_path):
        with pytest.raises(UserError, match=f"^--gaudi_config_name .*{words}"):
            resolve_gaudi_config(str(name))
