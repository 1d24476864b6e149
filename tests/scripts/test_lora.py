"""run_lora_clm.py as a user runs it: adapters of every kind, what is saved, resumed, merged, refused."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from running import check_refused, copy_elsewhere, environment, load_elsewhere, log_history, losses, run, run_several
from short_runs import ADAPTERS, common
from tokenised import tokenised

from gaudi_lm.data.instructions import collate_examples

STYLE = {"ln_tuning": "chat"}


@pytest.mark.slow
def test_adapters(instructions, tmp_path):
    """Each kind trains, its evaluation loss falls, and adapter and merged model load again with the same loss."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    training = [
        "--do_train", "--do_eval", "--eval_on_start", "--use_cpu", "--num_train_epochs", "3",
        "--learning_rate", "0.02", "--save_strategy", "no",
    ]  # fmt: skip
    data_flags = ("--train_on_inputs", "False", "--dataset_concatenation", "--chat_prompt", "--pad_to_max_length")
    runs, again = [], []
    for kind, flags in ADAPTERS.items():
        merge = [] if kind == "llama-adapter" else ["--merge_adapter"]
        runs.append(common(instructions, tmp_path / kind, *training, "--peft_type", kind, *flags, *merge))
        same_data = [flag for flag in flags if flag in data_flags]
        evaluation = ["--do_eval", "--use_cpu", *same_data]
        again.append(common(instructions, tmp_path / "x", *evaluation, "--adapter_name_or_path", tmp_path / kind))
        if merge:
            merged = common(instructions, tmp_path / "x", *evaluation)
            merged[1] = str(tmp_path / kind / "merged")
            again.append(merged)
    ends = run_several("run_lora_clm", runs + again, environment())
    evaluations = iter(ends[len(runs) :])
    for kind, end in zip(ADAPTERS, ends, strict=False):
        assert end.status == 0, f"{kind}: {end.log}"
        folder = tmp_path / kind
        for name in (
            "adapter_model.safetensors",
            "adapter_config.json",
            "tokenizer.json",
            "README.md",
            "all_results.json",
        ):
            assert (folder / name).is_file(), f"{kind}: {name}"
        assert not (folder / "model.safetensors").exists()
        assert "library_name: peft" in (folder / "README.md").read_text()
        said = re.search(r"trainable params: ([\d,]+) \|\| all params: ([\d,]+) \|\| trainable%: ([\d.]+)", end.log)
        trained, total = (int(said[group].replace(",", "")) for group in (1, 2))
        assert 0 < trained < total and float(said[3]) == pytest.approx(100 * trained / total, abs=1e-4)
        assert f"examples: {STYLE.get(kind, 'instruction')} (" in end.log and ">>>" in end.log
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        before = next(row["eval_loss"] for row in history if "eval_loss" in row)
        assert end.metrics["eval_loss"] < before, kind
        for form in ["adapter"] if kind == "llama-adapter" else ["adapter", "merged"]:
            reloaded = next(evaluations)
            assert reloaded.status == 0, f"{kind}, {form}: {reloaded.log}"
            assert reloaded.metrics["eval_loss"] == pytest.approx(end.metrics["eval_loss"], rel=1e-5), (kind, form)
            assert reloaded.metrics["eval_tokens"] == end.metrics["eval_tokens"]
    forms = [(tmp_path / kind, instructions.llama) for kind in ADAPTERS]
    forms += [(folder / "merged", None) for folder, _ in forms if folder.name != "llama-adapter"]
    load_elsewhere(*(("AutoModelForCausalLM", *form) for form in forms))
    # The library's own way to load both, without this suite.
    model = AutoModelForCausalLM.from_pretrained(instructions.llama)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "lora")
    tokens = tokenizer("Explain assert.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(model, tmp_path / "lora")(tokens).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "lora" / "merged")(tokens).logits
    torch.testing.assert_close(adapted, merged, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_resume_is_exact_and_equals_a_plain_loop(instructions, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    training = [
        "--do_train",
        "--use_cpu",
        "--num_train_epochs",
        2,
        "--train_on_inputs",
        "False",
        "--learning_rate",
        1e-2,
    ]
    saving = ["--save_steps", 7, "--lora_dropout", 0.1]
    whole = common(instructions, tmp_path / "whole", *training, *saving)
    again = common(instructions, tmp_path / "again", *training, *saving)
    plain = common(instructions, tmp_path / "plain", *training, "--lora_dropout", 0.0, "--save_strategy", "no")
    again += ["--resume_from_checkpoint", str(tmp_path / "whole" / "checkpoint-7")]
    ends = run_several("run_lora_clm", [whole, again, plain], environment())
    assert [end.status for end in ends] == [0, 0, 0], ends
    assert len(losses(tmp_path / "whole")) == 12
    assert losses(tmp_path / "again")[7:] == losses(tmp_path / "whole")[7:]
    saved = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "again")]
    assert saved[0] == saved[1]
    # Automatic: the newest checkpoint that is complete. From a copy of the script in a folder of its own.
    (tmp_path / "whole" / "checkpoint-12" / "trainer_state.json").unlink()
    (tmp_path / "whole" / "merged").mkdir()
    (tmp_path / "whole" / "merged" / "config.json").write_text("{}")
    resumed = run(copy_elsewhere("run_lora_clm.py", tmp_path / "elsewhere"), *whole, cwd=tmp_path / "elsewhere")
    assert "checkpoint-7" in resumed.stderr
    assert "merged is from an earlier run, without this adapter; --merge_adapter writes it anew" in resumed.stderr
    assert (tmp_path / "whole" / "adapter_model.safetensors").read_bytes() == saved[0]

    tokenizer = AutoTokenizer.from_pretrained(instructions.llama)
    data = Dataset.from_json(str(instructions.train), cache_dir=str(tmp_path / "cache"))
    rows = list(tokenised(tokenizer, data, 128, limit=24).with_format("numpy"))
    set_seed(3)
    config = LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(instructions.llama), config).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, eps=1e-6, weight_decay=0.0)
    expected = []
    for epoch in range(2):
        order = np.random.default_rng([3, epoch]).permutation(24)
        for start in range(0, 24, 4):
            batch = collate_examples([rows[n] for n in order[start : start + 4]], tokenizer.eos_token_id, [])
            labels = batch.pop("labels")
            logits = model(**batch).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1))
            optimizer.param_groups[0]["lr"] = 1e-2 * (1 - len(expected) / 12)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            expected.append(loss.item())
    np.testing.assert_allclose(losses(tmp_path / "plain"), expected, rtol=1e-5)


@pytest.mark.slow
def test_on_a_simulated_card(instructions, tmp_path):
    """The flags of the documentation compile nothing after warm-up; what only a card's model has reaches it."""
    card = ["--use_habana", "--use_lazy_mode", "--throughput_warmup_steps", "3", "--bf16", "True", "--do_train"]
    documented = ["--evaluation_strategy", "no", "--dataset_concatenation", "--gradient_accumulation_steps", "2"]
    epochs = ["--num_train_epochs", "2", "--save_strategy", "no"]
    fused = [
        "--attn_implementation",
        "gaudi_fused_sdpa",
        "--flash_attention_recompute",
        "--flash_attention_causal_mask",
    ]
    modes = {
        "documented": documented,
        "lines": ["--do_eval", "--gradient_checkpointing", "--use_fused_rope", "False", "--low_cpu_mem_usage"],
        "fused": [*documented, *fused],
        "softmax": [*documented, "--attn_softmax_bf16", "--load_meta_device"],
        "adalora": [*documented, "--peft_type", "adalora"],
        "refused": [*documented, "--attn_implementation", "gaudi_fused_sdpa", "--flash_attention_fast_softmax"],
        "fp8": [*documented, "--attn_implementation", "gaudi_fused_sdpa", "--flash_attention_fp8"],
    }
    runs = [common(instructions, tmp_path / name, *card, *mode, *epochs) for name, mode in modes.items()]
    ends = dict(zip(modes, run_several("run_lora_clm", runs, environment(GAUDI_SIMULATOR="1")), strict=True))
    for name in ("refused", "fp8"):
        assert ends[name].status == 2 and f"error: {modes[name][-1]}" in ends[name].log, ends[name].log
    for name in set(modes) - {"refused", "fp8"}:
        assert ends[name].status == 0, f"{name}: {ends[name].log}"
        assert (tmp_path / name / "adapter_model.safetensors").is_file()
    for name in ("documented", "fused", "softmax"):
        assert ends[name].metrics["graph_compilations_after_warmup"] == 0, ends[name].log
    assert losses(tmp_path / "documented") != losses(tmp_path / "softmax")
    assert re.search(r"padded to one of the lengths \[([\d, ]+)\]", ends["lines"].log)


@pytest.mark.slow
def test_tied_embeddings_that_an_adapter_parts_stay_apart_on_a_card(instructions, tmp_path):
    """A card tied them anew: the head was the trained copy of the embeddings, or could not be replaced at all."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(instructions.llama).save_pretrained(tmp_path / "model")
    config = AutoModelForCausalLM.from_pretrained(instructions.llama).config
    config.tie_word_embeddings = True
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "model")
    saved = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM")
    get_peft_model(model, saved).save_pretrained(tmp_path / "saved")
    adapters = {"saved": ["--adapter_name_or_path", str(tmp_path / "saved")]}
    adapters["head"] = ["--lora_target_modules", "q_proj", "lm_head", "--lora_dropout", "0"]
    short = ["--do_train", "--max_steps", "3", "--learning_rate", "1e-2", "--save_strategy", "no"]
    short += ["--model_name_or_path", str(tmp_path / "model")]
    for kind, flags in adapters.items():
        found = []
        for device in ("--use_cpu", "--use_habana"):
            run("run_lora_clm.py", *common(instructions, tmp_path / f"{kind}{device}", *short, *flags, device),
                env={"GAUDI_SIMULATOR": "1"})  # fmt: skip
            found.append(losses(tmp_path / f"{kind}{device}"))
        np.testing.assert_allclose(*found, atol=1e-5)


@pytest.mark.slow
def test_a_model_that_accelerate_has_placed_continues_prompts(instructions, tmp_path):
    flags = ["--do_train", "--use_cpu", "--max_steps", "1", "--load_meta_device", "--generate", "What"]
    assert "INFO 'What' -> '" in run("run_lora_clm.py", *common(instructions, tmp_path / "out", *flags)).stderr


@pytest.mark.slow
@pytest.mark.xdist_group("cards")
def test_a_pretrained_model_learns(tmp_path):
    """The short form of `make demo-lora`: loss falls, adapter and merged model give it again to 1e-6."""
    from demo import lora as demo

    model, rows = demo.unpack_model(), demo.pairs()
    for split, part in (("train", rows[:16]), ("validation", rows[24:32])):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, part)))
    base = [
        "--train_file", tmp_path / "train.jsonl", "--validation_file", tmp_path / "validation.jsonl", "--chat_prompt",
        "--train_on_inputs", "False", "--max_seq_length", 96, "--do_eval", "--use_cpu",
    ]  # fmt: skip
    training = [
        "--do_train", "--eval_on_start", "--learning_rate", 3e-3, "--num_train_epochs", 1, "--merge_adapter",
        "--per_device_train_batch_size", 4, "--save_strategy", "no", "--output_dir", tmp_path / "out",
    ]  # fmt: skip
    x = ["--output_dir", tmp_path / "x"]
    runs = [
        ["--model_name_or_path", model, *base, *training],
        ["--model_name_or_path", model, *base, *x, "--adapter_name_or_path", tmp_path / "out"],
        ["--model_name_or_path", tmp_path / "out" / "merged", *base, *x],
    ]
    ends = run_several("run_lora_clm", [list(map(str, flags)) for flags in runs], environment())
    assert [end.status for end in ends] == [0] * 3, [end.log[-2000:] for end in ends]
    after, adapter, merged = (end.metrics["eval_loss"] for end in ends)
    before = next(row["eval_loss"] for row in log_history(tmp_path / "out") if "eval_loss" in row)
    assert after < before - 0.3
    assert adapter == pytest.approx(after, rel=1e-6)
    assert merged == pytest.approx(after, rel=1e-6)


def test_bad_input(instructions, assets, tmp_path):
    """One line that names the flag, exit code 2, nothing written."""
    output = tmp_path / "out"
    (tmp_path / "long.jsonl").write_text(json.dumps({"instruction": "word " * 300, "output": "x"}) + "\n")
    (tmp_path / "odd.jsonl").write_text(json.dumps({"question": "a", "reply": "b"}) + "\n")
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}) + "\n")
    (tmp_path / "empty").mkdir()
    adapter = _write_adapter(instructions, tmp_path / "adapter")
    llama = ["--model_name_or_path", instructions.llama]
    deeper = ["--model_name_or_path", instructions.deeper]
    data = ["--train_file", instructions.train]
    cases = {
        "answers gone": ([*llama, "--train_file", tmp_path / "long.jsonl"], "--max_seq_length"),
        "missing columns": ([*llama, "--train_file", tmp_path / "odd.jsonl"], "question, reply"),
        "renamed column": ([*llama, *data, "--output_column_name", "answer"], "--output_column_name answer"),
        "both prompts": ([*llama, *data, "--sql_prompt", "--chat_prompt"], "--sql_prompt and --chat_prompt exclude"),
        "no chat template": ([*deeper, *data, "--chat_prompt"], "--chat_prompt needs a chat template"),
        "no chat template for messages": ([*deeper, "--train_file", tmp_path / "chat.jsonl"], "needs a chat template"),
        "no answers": ([*llama, "--train_file", tmp_path / "chat.jsonl"], "none of the 1 train examples"),
        "rank 0": ([*llama, *data, "--lora_rank", 0], "--lora_rank 0"),
        "dropout": ([*llama, *data, "--lora_dropout", 1.5], "--lora_dropout 1.5"),
        "target": (
            [*llama, *data, "--lora_target_modules", "q_proj", "query"],
            "--lora_target_modules query: no such layer; the model's linear layers are down_proj, gate_proj, k_proj",
        ),
        "norm target": (
            [*llama, *data, "--peft_type", "ln_tuning", "--ln_target_modules", "ln_1"],
            "--ln_target_modules ln_1: no such layer; the model's norms are input_layernorm",
        ),
        "feedforward": (
            [*llama, *data, "--peft_type", "ia3", "--ia3_target_modules", "k_proj", "--feedforward_modules", "x"],
            "--peft_type ia3",
        ),
        "layers": ([*llama, *data, "--peft_type", "llama-adapter"], "--adapter_layers"),
        "merge": ([*llama, *data, "--peft_type", "llama-adapter", "--merge_adapter"], "--merge_adapter"),
        "no model": ([*data], "--model_name_or_path"),
        "streaming": ([*llama, *data, "--streaming", "--max_steps", 3], "--streaming: run_lora_clm.py"),
        "text without answers": (
            [*llama, *data, "--text_column_name", "output", "--train_on_inputs", "False"], "--train_on_inputs False",
        ),
        "pack and concatenate": (
            [*llama, *data, "--pack_sequences", "--dataset_concatenation"],
            "--dataset_concatenation and --pack_sequences exclude",
        ),
        "split": ([*llama, *data, "--validation_split_percentage", 100], "--validation_split_percentage 100"),
        "no adapter": ([*llama, *data, "--adapter_name_or_path", tmp_path / "empty"], "--adapter_name_or_path"),
        "deeper model": ([*deeper, *data, "--adapter_name_or_path", adapter], "made for another model"),
        "another architecture": (
            ["--model_name_or_path", assets.gpt2, *data, "--adapter_name_or_path", adapter], "made for another model",
        ),
    }  # fmt: skip
    check_refused("run_lora_clm.py", cases, ["--output_dir", output, "--use_cpu", "--do_train"], tmp_path, output)


def _write_adapter(instructions, folder: Path) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(instructions.llama)
    get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"])).save_pretrained(folder)
    return folder
