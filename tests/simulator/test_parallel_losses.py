"""Two simulated cards give the losses of one in float32: each form of parallelism, in each mode, full and LoRA."""

import json
import re
from pathlib import Path

import pytest
from cards import card_environment
from running import ROOT, losses, results, run, run_ranks

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("two cards")]

STEPS = 10
MODES = {"lazy": "1", "eager": "0", "compile": "0"}
FORMS = ("DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP", "context")
TASKS = ("full", "lora")
LINE = re.compile(r"\d\d:\d\d:\d\d (INFO|WARNING) ")
FSDP = {
    "transformer_layer_cls_to_wrap": ["GaudiLlamaDecoderLayer"],
    "use_orig_params": True,
    "sync_module_states": True,
    "state_dict_type": "FULL_STATE_DICT",
}


def command(task: str, model: Path, assets, instructions, output: Path, rows: int) -> list:
    """A script and its flags: 10 steps on rows of 64 tokens, `rows` of them on each card."""
    script, data, rate, flags = {
        "full": ("run_clm.py", assets.train, 3e-3, ["--block_size", 64]),
        "lora": (
            "run_lora_clm.py",
            instructions.train,
            3e-2,
            ["--max_seq_length", 64, "--dataset_concatenation", "--lora_dropout", 0, "--lora_target_modules"]
            + ["q_proj", "down_proj"],
        ),
    }[task]
    return [
        *(ROOT / script, "--model_name_or_path", model, "--train_file", data, *flags, "--do_train"),
        *("--per_device_train_batch_size", rows, "--max_steps", STEPS, "--logging_steps", 1),
        *("--learning_rate", rate, "--lr_scheduler_type", "constant", "--save_strategy", "no"),
        *("--save_last_ckpt", "False", "--use_habana", "--output_dir", output),
    ]


def settings(form: str, folder: Path) -> list:
    """Flags of a form of parallelism."""
    if form == "DDP":
        return []
    if form == "FSDP":
        (folder / "fsdp.json").write_text(json.dumps(FSDP))
        return ["--fsdp", "full_shard auto_wrap", "--fsdp_config", folder / "fsdp.json"]
    zero = {"stage": 1 if form == "context" else int(form[-1]), "stage3_param_persistence_threshold": 0}
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    (folder / "zero.json").write_text(json.dumps({**dict.fromkeys(auto, "auto"), "zero_optimization": zero}))
    return ["--deepspeed", folder / "zero.json", *(CONTEXT if form == "context" else [])]


CONTEXT = ["--context_parallel_size", 2, "--attn_implementation", "gaudi_fused_sdpa"]
CONTEXT += ["--flash_attention_causal_mask", "True"]


@pytest.fixture(scope="module", params=TASKS)
def one_card(request, assets, instructions, tmp_path_factory) -> tuple[str, dict[int, list[float]], dict[int, float]]:
    """A task, and its losses and FLOP on one card with the rows of two, by the number of layers."""
    found, flos = {}, {}
    for layers, model in ((1, instructions.shallow), (2, instructions.llama)):
        output = tmp_path_factory.mktemp("one_card") / "out"
        run(*command(request.param, model, assets, instructions, output, 4), env=card_environment(2))
        found[layers], flos[layers] = losses(output), results(output)["total_flos"]
        assert len(found[layers]) == STEPS and found[layers][-1] < found[layers][0] - 0.05
    return request.param, found, flos


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", FORMS)
def test_two_cards_give_the_losses_of_one(one_card, form, mode, assets, instructions, tmp_path):
    task, wanted, flos = one_card
    layers, model = (1, instructions.shallow) if mode == "compile" else (2, instructions.llama)
    rows = 4 if form == "context" else 2  # both cards have a part of each of the four rows
    flags = command(task, model, assets, instructions, tmp_path / "out", rows) + settings(form, tmp_path)
    if mode == "compile":
        flags += ["--torch_compile", "--torch_compile_backend", "hpu_backend"]
    logs = [one.stderr for one in run_ranks(2, *flags, env=card_environment(2, PT_HPU_LAZY_MODE=MODES[mode]))]
    if mode != "compile":  # of which torch has words of its own
        assert logs[1] == "" and all(map(LINE.match, logs[0].splitlines())), logs
    assert losses(tmp_path / "out") == pytest.approx(wanted[layers], abs=1e-5)
    assert results(tmp_path / "out")["total_flos"] == pytest.approx(flos[layers])


def test_fast_ddp_gives_the_losses_of_one_card(one_card, assets, instructions, tmp_path):
    """The same rows, in two batches of each step."""
    task, wanted, _ = one_card
    flags = command(task, instructions.llama, assets, instructions, tmp_path / "out", 1)
    flags += ["--gradient_accumulation_steps", 2, "--distribution_strategy", "fast_ddp"]
    run_ranks(2, *flags, env=card_environment(2))
    assert losses(tmp_path / "out") == pytest.approx(wanted[2], abs=1e-5)
