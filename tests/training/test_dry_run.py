"""--dry_run: nothing is loaded or written, and what it says is what the run then takes."""

import json
import os
import re
import socket
from collections import Counter
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from running import ROOT, results, run, run_ranks
from torch import nn

from gaudi_lm.arguments.dry_runs import prepare_dry_run
from gaudi_lm.training.live_memory import LiveBytes, gradients_seen, without_data
from gaudi_lm.training.sharding import FullySharded, Replicas, Zero, ZeroSettings

CARD = ["--use_habana", "--use_lazy_mode"]
GPT2 = "n_embd=256,n_layer=3,n_head=4,n_positions=64"
ROBERTA = (
    "hidden_size=256,num_hidden_layers=3,num_attention_heads=4,intermediate_size=1024,max_position_embeddings=66,"
    "type_vocab_size=1"
)


def peak(text: str) -> float:
    """The estimate, in units of 2^30 bytes."""
    return float(re.search(r"it (?:fits|does not fit): ([\d.]+)", text)[1])


@pytest.fixture(scope="module")
def llama(instructions, tmp_path_factory):
    """A wider Llama, with the tokenizer of the tiny one."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("wide") / "llama"
    tokenizer = AutoTokenizer.from_pretrained(instructions.llama)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=688, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=512, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def jobs(assets, masked_assets, instructions, llama):
    """By name: a script and the flags of a job on a card."""
    common = ["--do_train", "--max_steps", 4, "--per_device_train_batch_size", 4, "--save_strategy", "no", *CARD]
    common += ["--save_last_ckpt", "False"]
    lora = ["--model_name_or_path", llama, "--train_file", instructions.train, "--bf16", "True"]
    return {
        "gpt2": ["run_clm.py", "--model_type", "gpt2", "--tokenizer_name", assets.tokenizer, "--config_overrides",
                 GPT2, "--train_file", assets.train, "--gaudi_config_name", "Habana/gpt2", *common],
        "roberta": ["run_mlm.py", "--model_type", "roberta", "--tokenizer_name", masked_assets.roberta,
                    "--config_overrides", ROBERTA, "--train_file", assets.train, "--gaudi_config_name",
                    "Habana/roberta-base", *common],
        "llama": ["run_lora_clm.py", *lora, "--dataset_concatenation", "--max_seq_length", 64, *common],
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("stage", [None, 1, 2, 3, "full_shard auto_wrap"])
@pytest.mark.parametrize("model", ["gpt2", "roberta", "llama"])
def test_memory_is_what_a_simulated_card_measures(jobs, tmp_path, model, stage):
    script, *flags = jobs[model]
    flags += ["--output_dir", tmp_path / "out"]
    env, ranks = {"GAUDI_SIMULATOR": "2"}, 2
    if stage is None:
        run(script, *flags, env=env)
        ranks = 1
    else:
        zero = ["--deepspeed", ROOT / "configs" / "deepspeed" / f"zero_{stage}.json"]
        flags += ["--fsdp", stage] if isinstance(stage, str) else zero
        run_ranks(2, script, *flags, env=env)
    measured = results(tmp_path / "out")["peak_device_memory_gb"]
    estimate = peak(run(script, *flags, "--dry_run", "--dry_run_cards", ranks, env=env).stdout)
    assert estimate == pytest.approx(measured, rel=0.15)


@pytest.mark.slow
def test_weights_that_zero_3_fetches_ahead_are_what_a_simulated_card_measures(jobs, tmp_path):
    """Beside what is used again soon, up to so many live weights are gathered."""
    script, *flags = jobs["gpt2"]
    flags += ["--config_overrides", GPT2.replace("n_layer=3", "n_layer=8"), "--block_size", 32]
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    few = ("stage3_prefetch_bucket_size", "stage3_max_reuse_distance", "reduce_bucket_size")
    found = {}
    for live in (10**5, 10**9):
        zero = {"stage": 3, **dict.fromkeys(few, 10**5), "stage3_max_live_parameters": live}
        file, output = tmp_path / f"{live}.json", tmp_path / f"out{live}"
        file.write_text(json.dumps({**dict.fromkeys(auto, "auto"), "zero_optimization": zero}))
        given = [*flags, "--output_dir", output, "--deepspeed", file]
        found[live] = peak(run(script, *given, "--dry_run", "--dry_run_cards", 2, env={"GAUDI_SIMULATOR": "2"}).stdout)
        run_ranks(2, script, *given, env={"GAUDI_SIMULATOR": "2"})
        measured = results(output)["peak_device_memory_gb"]
        assert found[live] == pytest.approx(measured, rel=0.15)
    assert found[10**9] > 1.15 * found[10**5]


@pytest.mark.slow
def test_checkpointing_and_the_second_card_are_what_a_simulated_card_measures(jobs, tmp_path):
    script, *flags = jobs["gpt2"]
    flags += ["--output_dir", tmp_path / "out", "--gradient_checkpointing"]
    planned = run(script, *flags, "--dry_run", "--dry_run_cards", 2, env={"GAUDI_SIMULATOR": "1"}).stdout
    run_ranks(2, script, *flags, env={"GAUDI_SIMULATOR": "2"})
    assert peak(planned) == pytest.approx(results(tmp_path / "out")["peak_device_memory_gb"], rel=0.15)
    without = float(re.search(r"^  peak +([\d.]+)", planned, re.MULTILINE)[1])
    assert without > 1.1 * peak(planned)


@pytest.mark.slow
def test_parts_of_rows_are_what_a_simulated_card_measures(jobs, tmp_path):
    script, *flags = jobs["llama"]
    flags += ["--output_dir", tmp_path / "out", "--max_seq_length", 256, "--attn_implementation", "gaudi_fused_sdpa"]
    flags += ["--flash_attention_causal_mask", "True", "--deepspeed", ROOT / "configs" / "deepspeed" / "zero_1.json"]
    parts, planned = ["--context_parallel_size", 2], ["--dry_run", "--dry_run_cards", 2]
    text = run(script, *flags, *parts, *planned, env={"GAUDI_SIMULATOR": "1"}).stdout
    assert "step: 4 sequences of at most 256 tokens, each on 2 cards: 4 sequences, 1,024 tokens" in text
    whole = run(script, *flags, *planned, env={"GAUDI_SIMULATOR": "1"}).stdout
    assert "step: 4 sequences x 2 cards of at most 256 tokens: 8 sequences, 2,048 tokens" in whole
    run_ranks(2, script, *flags, *parts, env={"GAUDI_SIMULATOR": "2"})
    assert peak(text) == pytest.approx(results(tmp_path / "out")["peak_device_memory_gb"], rel=0.15)
    assert peak(whole) > 1.4 * peak(text)
    planned[-1] = 4
    text = run(script, *flags, *parts, *planned, env={"GAUDI_SIMULATOR": "1"}).stdout
    assert "step: 4 sequences x 2 groups of at most 256 tokens, each on 2 cards: 8 sequences, 2,048 tokens" in text
    planned[-1] = 3
    line = "error: --context_parallel_size 2 does not divide the number of ranks, 3 (--dry_run_cards)"
    assert line in run(script, *flags, *parts, *planned, env={"GAUDI_SIMULATOR": "1"}, code=2).stderr


def tree(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def clm(assets, output, *flags):
    return [
        "--model_name_or_path", assets.gpt2, "--train_file", assets.train, "--validation_file", assets.validation,
        "--per_device_train_batch_size", 2, "--output_dir", output, *flags,
    ]  # fmt: skip


@pytest.mark.slow
def test_nothing_is_loaded_or_written_and_the_steps_are_those_of_the_run(assets, tmp_path):
    folder, output = tmp_path / "model", tmp_path / "out"
    folder.mkdir()
    for file in assets.gpt2.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    flags = ["--do_train", "--do_eval", "--max_train_samples", 21, "--num_train_epochs", 3, "--use_cpu"]
    flags += ["--gradient_accumulation_steps", 2, "--save_strategy", "no"]
    without = clm(assets, output, *flags, "--model_name_or_path", folder)
    planned = run("run_clm.py", *without, "--dry_run").stdout
    assert not output.exists()
    run("run_clm.py", *clm(assets, output, *flags))
    state = json.loads((output / "trainer_state.json").read_text())
    parameters = 512 * 32 + 128 * 32 + 2 * (12 * 32 * 32 + 13 * 32) + 2 * 32
    assert f"parameters: {parameters:,} of gpt2, {parameters:,} of them trained" in planned
    assert f"steps: {state['max_steps']}, 3 epochs of {state['max_steps'] // 3} (21 sequences)" in planned
    assert "4 sequences, 512 tokens" in planned
    before = tree(output)
    run("run_clm.py", *without, "--dry_run")
    assert tree(output) == before, "a folder of another run was touched"


@pytest.mark.slow
def test_several_ranks_print_once(assets, tmp_path):
    flags = clm(assets, tmp_path / "out", "--do_train", "--max_steps", 2, "--use_cpu", "--dry_run")
    first, second = run_ranks(2, "run_clm.py", *flags)
    assert "x 2 cards" in first.stdout and second.stdout == ""
    alone = run("run_clm.py", *flags, "--dry_run_cards", 2).stdout
    assert alone == first.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_where_it_does_not_fit_flags_are_named_that_make_it_fit(jobs, tmp_path):
    script, *flags = jobs["gpt2"]
    flags += ["--output_dir", tmp_path, "--dry_run", "--dry_run_cards", 2]
    text = run(script, *flags, "--card_memory_gb", 0.04, env={"GAUDI_SIMULATOR": "1"}).stdout
    assert "it does not fit" in text and "most helps" in text
    assert "zero_" in text
    text = run(script, *flags, "--card_memory_gb", 1e-6, env={"GAUDI_SIMULATOR": "1"}).stdout
    assert "no other flag makes it fit" in text
    smaller = {"GAUDI_SIMULATOR": "1", "GAUDI_SIMULATOR_MEMORY_GB": "0.04"}
    assert "and a card has 0.04 (--card_memory_gb)" in run(script, *flags, env=smaller).stdout
    assert " of 2 GB (--card_memory_gb)" in run(script, *flags, "--card_memory_gb", 2, env=smaller).stdout
    wrong = {**smaller, "GAUDI_SIMULATOR_MEMORY_GB": "much"}
    said = run(script, *flags, env=wrong, code=2, fresh=True).stderr
    assert said.strip().splitlines()[-1].startswith("error: GAUDI_SIMULATOR_MEMORY_GB is 'much'")


@pytest.mark.parametrize("flags, said", [
    (["--dry_run"], "--do_train"),
    (["--dry_run", "--do_eval"], "--do_train"),
    (["--do_train", "--dry_run", "--card_memory_gb", 0], "--card_memory_gb 0"),
    (["--do_train", "--dry_run", "--card_memory_gb", -96], "--card_memory_gb -96"),
    (["--do_train", "--dry_run", "--dry_run_cards", 0], "--dry_run_cards 0"),
    (["--do_train", "--card_memory_gb", 128], "--dry_run"),
    (["--do_train", "--dry_run", "--resume_from_checkpoint", "nowhere"], "--resume_from_checkpoint nowhere"),
    (["--do_train", "--dry_run", "--streaming"], "--max_steps"),
])  # fmt: skip
def test_what_cannot_be_planned_is_refused(assets, tmp_path, flags, said):
    done = run("run_clm.py", *clm(assets, tmp_path / "out", "--use_cpu", *flags), code=2)
    (line,) = done.stderr.strip().splitlines()[-1:]
    assert line.startswith("error: ") and said in line
    assert not (tmp_path / "out").exists()


def test_streams_are_planned_by_their_first_batch(assets, tmp_path):
    flags = clm(assets, tmp_path / "out", "--do_train", "--use_cpu", "--dry_run", "--streaming", "--max_steps", 7)
    assert "steps: 7 of a stream" in run("run_clm.py", *flags).stdout


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adalora", "ia3", "vera", "ln_tuning", "llama-adapter"])
def test_every_adapter_is_planned(instructions, tmp_path, kind):
    flags = ["--model_name_or_path", instructions.llama, "--train_file", instructions.train, "--do_train", "--use_cpu"]
    flags += ["--peft_type", kind, "--output_dir", tmp_path, "--dry_run", "--pack_sequences"]
    flags += ["--adapter_layers", 2] if kind == "llama-adapter" else []
    text = run("run_lora_clm.py", *flags).stdout
    trained, total = re.search(r"parameters: ([\d,]+) of llama, ([\d,]+)", text).groups()[::-1]
    assert int(trained.replace(",", "")) < 0.5 * int(total.replace(",", ""))
    assert "it fits" in text


def test_the_port_of_one_process_that_stands_for_all_is_its_own():
    """Another process could get it before it is listened on."""
    with patch.dict(os.environ):
        os.environ.pop("WORLD_SIZE", None)
        prepare_dry_run(SimpleNamespace(do_train=True, dry_run_cards=None, deepspeed="zero_2.json", fsdp=""))
        address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(address)
    with socket.create_server(address):  # as TCPStore does
        pass


OFF = {"offload_optimizer": True}


@pytest.mark.parametrize(
    ("cards", "weights", "gathered", "gradients", "optimizer"),
    [
        (Replicas(), 2048, 0, 0, 2048),
        (Zero(ZeroSettings(1), 4), 1024, 0, 0, 1024),  # weights in bf16; the optimizer's own, and momentum, in fp32
        (Zero(ZeroSettings(2), 4), 1024, 0, 0, 1024),
        (Zero(ZeroSettings(2, **OFF), 4), 1024, 0, 0, 0),
        (Zero(ZeroSettings(3), 4), 256, 2048, 256, 1024),  # gathered together, then copied apart
        (Zero(ZeroSettings(3, prefetch=64), 4), 256, 1152, 256, 1024),
        (Zero(ZeroSettings(3, **OFF), 4), 256, 2048, 0, 0),
        (Zero(ZeroSettings(3, offload_weights=True), 4), 0, 2048, 256, 1024),
        (Zero(ZeroSettings(3), 1), 1024, 0, 1024, 4096),
        (Zero(ZeroSettings(3, torch.float32), 3), 684, 4096, 684, 1368),  # shares that do not come out even
        (FullySharded(4, "full_shard"), 512, 2048, 0, 512),
        (FullySharded(4, "full_shard auto_wrap", ("Linear",)), 512, 1536, 0, 512),  # the larger layer
        (FullySharded(4, "full_shard auto_wrap", ("Linear",), bf16=True), 512, 768, 0, 512),
        (FullySharded(4, "shard_grad_op auto_wrap", ("Linear",)), 512, 2048, 0, 512),
        (FullySharded(4, "no_shard"), 2048, 2048, 0, 2048),
    ],
)
def test_what_a_card_holds_between_two_steps(cards, weights, gathered, gradients, optimizer):
    """Of 512 weights; before the step that is looked at, and after it, and what is gathered for its first batch."""
    model, live = nn.Sequential(nn.Linear(16, 8, bias=False), nn.Linear(8, 48, bias=False)), LiveBytes("cpu")
    take, found = lambda p: cards.take_gradient(live, p), []
    with without_data(model, torch.device("cpu"), cards.dtype) as mode, mode, live, gradients_seen(model, take):
        cards.place(live, model)
        sgd = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.5, foreach=False)
        cards.make_state(live, sgd)
        found.append(Counter(live.live))
        cards.begin_batch(live)
        assert live.live["weights"] - weights == gathered
        model(torch.empty(1, 16, dtype=cards.dtype)).sum().backward()
        cards.step(live, sgd)
        sgd.zero_grad()
        found.append(Counter(live.live))
    wanted = [weights, gradients, optimizer]
    assert [[one[kind] for kind in ("weights", "gradients", "optimizer")] for one in found] == [wanted, wanted]
