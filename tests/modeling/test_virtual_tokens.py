"""Prompt, prefix and P-tuning: virtual tokens before each text, in every form of rows, saved, resumed, refused."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from resuming import CARD, CPU, essence, script_flags, start, zero
from running import check_refused, log_history, losses, run
from short_runs import common
from simulator.cards import card_environment
from tiny_models import CAUSAL, VOCABULARY, make_batch, tiny_model

from gaudi_lm.architectures import packable
from gaudi_lm.data.packing import PackedCollator, pack_sequences
from gaudi_lm.errors import UserError
from gaudi_lm.modeling.loss import install_token_loss
from gaudi_lm.modeling.virtual_tokens import (
    check_virtual_tokens,
    install_virtual_tokens,
    load_encoder,
    save_encoder,
    virtual_token_config,
)
from gaudi_lm.training.samples import check_prompts

torch.set_num_threads(1)
KINDS = ("prompt_tuning", "prefix_tuning", "p_tuning")
FEW = {kind: ["--num_virtual_tokens", 5] for kind in KINDS}
FEW["p_tuning"] += ["--encoder_hidden_size", 32]


def flags(kind: str, *more) -> list:
    return ["--do_train", "--do_eval", "--peft_type", kind, *FEW[kind], *more]


def run_and_read(output, instructions, *more, env=None) -> tuple[dict, list[float], str]:
    done = run("run_lora_clm.py", *common(instructions, output), *more, env=env)
    found = json.loads((output / "all_results.json").read_text())
    return found, losses(output) if "--do_train" in more else [], done.stderr


CARDS = {"lazy": [*CARD], "eager": ["--use_habana", "--use_lazy_mode", "False"]}
SHORT = ["--max_steps", 4, "--learning_rate", 0.01]


@pytest.mark.slow
@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("rows", ["--pad_to_max_length", "--pack_sequences", "--dataset_concatenation"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_card_gives_the_losses_of_the_cpu(instructions, tmp_path, kind, rows, card):
    cpu = run_and_read(tmp_path / "cpu", instructions, *flags(kind, *SHORT, *CPU, rows))
    env = card_environment(PT_HPU_LAZY_MODE="1" if card == "lazy" else "0")
    found = run_and_read(tmp_path / card, instructions, *flags(kind, *SHORT, *CARDS[card], rows), env=env)
    assert found[1] == pytest.approx(cpu[1], rel=1e-4)
    assert found[0]["eval_loss"] == pytest.approx(cpu[0]["eval_loss"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_bf16_changes_the_losses_by_its_rounding(instructions, tmp_path, kind):
    runs = {}
    for precision in ("False", "True"):
        more = [*SHORT, *CARD, "--pack_sequences", "--bf16", precision]
        runs[precision] = run_and_read(tmp_path / precision, instructions, *flags(kind, *more), env=card_environment())
    (figures, rounded, _), (wanted, exact, _) = runs["True"], runs["False"]
    assert rounded != exact and rounded == pytest.approx(exact, rel=1e-3)
    assert figures["eval_loss"] == pytest.approx(wanted["eval_loss"], rel=1e-3) and wanted["eval_loss"] < exact[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_are_evaluated_as_padded_ones(instructions, tmp_path, kind):
    """Packed texts see the virtual tokens and themselves."""
    trained = run_and_read(tmp_path / "padded", instructions, *flags(kind, *SHORT, *CPU, "--pad_to_max_length"))[0]
    adapter = ["--do_eval", "--adapter_name_or_path", tmp_path / "padded", *CPU, "--pack_sequences"]
    packed = run_and_read(tmp_path / "packed", instructions, *adapter)[0]
    for name in ("eval_loss", "eval_accuracy"):
        assert packed[name] == pytest.approx(trained[name], rel=1e-5)


PACKABLE = [name for name in packable(patched=False) if name in CAUSAL]
FORMS = [
    *(("prompt_tuning", name) for name in PACKABLE if name != "opt"),  # refused, see below, as is Falcon
    *(("prefix_tuning", name) for name in PACKABLE if name != "falcon"),
]


@pytest.mark.parametrize("kind, model_type", FORMS)
def test_each_packed_text_has_the_loss_and_gradient_it_has_alone(kind, model_type):
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in (9, 17, 4, 23, 5, 12, 30)]
    packed = pack_sequences(Dataset.from_dict({"input_ids": [text.tolist() for text in texts]}), 40)
    rows = list(packed.with_format("numpy"))
    models = []
    for _ in range(2):
        model, config = tiny_model(model_type), virtual_token_config(kind, 5, 32)
        check_virtual_tokens(model, config)
        model = get_peft_model(model, config)
        with torch.no_grad():
            for weight in model.prompt_encoder.parameters():
                weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
        install_virtual_tokens(model)
        install_token_loss(model, "causal")
        models.append(model)
    together, alone = models
    output = together(**PackedCollator.for_model(together, 1, 40)(rows))
    assert output.count.item() == sum(len(text) - 1 for text in texts)
    output.loss.backward()
    total = 0.0
    for text in texts:
        ids = text.unsqueeze(0)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        single = alone(**inputs, num_items_in_batch=output.count)
        single.loss.backward()
        total += single.loss_sum.item()
    assert output.loss_sum.item() == pytest.approx(total, rel=1e-5)
    (one,), (other,) = (list(model.prompt_encoder.parameters()) for model in models)
    assert other.grad.norm() > 0 and (one.grad - other.grad).norm() <= 1e-4 * other.grad.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_text(kind):
    """Without labels, as for metrics and losses of one's own, padded and packed: the loss is that with labels."""
    model = get_peft_model(tiny_model("llama"), virtual_token_config(kind, 5, 32)).eval()
    install_virtual_tokens(model)
    install_token_loss(model, "causal")
    texts = [list(range(3, 3 + length)) for length in (9, 17, 4, 23)]
    packed = pack_sequences(Dataset.from_dict({"input_ids": texts}), 40)
    batches = [PackedCollator.for_model(model, 1, 40)(list(packed.with_format("numpy"))), make_batch("causal")]
    for batch in batches:
        labels = batch.pop("labels")
        with torch.no_grad():
            logits, wanted = model(**batch, use_cache=False).logits, model(**batch, labels=labels)
        assert logits.shape[:2] == labels.shape
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:])
        assert loss.item() == pytest.approx(wanted.loss.item(), rel=1e-5)


@pytest.mark.slow
def test_a_prefix_continues_a_prompt_on_a_card(instructions, tmp_path):
    """With optimum-habana's Llama, which passes over keys of a cache that it is not to use."""
    more = [*flags("prefix_tuning", *SHORT), "--generate", "Explain the for statement.", "--use_cache", "False"]
    ends = [run_and_read(tmp_path / "cpu", instructions, *more, *CPU)[2]]
    ends.append(run_and_read(tmp_path / "card", instructions, *more, *CARD, env=card_environment())[2])
    found = [[line.partition(" -> ")[2] for line in log.splitlines() if "statement.' -> " in line] for log in ends]
    assert len(found[0]) == 1 and found[0] == found[1]


@pytest.mark.parametrize("kind", KINDS)
def test_virtual_tokens_take_positions_from_a_prompt(kind):
    """It was generated beyond the last position: a traceback after training, and no model card."""
    model = get_peft_model(tiny_model("gpt2"), virtual_token_config(kind, 5, 32))
    room = model.config.max_position_embeddings - 5

    class Words:
        model_max_length = 10**6
        __call__ = staticmethod(lambda prompt: {"input_ids": prompt.split()})

    check_prompts(SimpleNamespace(generate=["word " * (room - 1)], fsdp=""), True, model, Words())
    with pytest.raises(UserError, match="longer than the model takes"):
        check_prompts(SimpleNamespace(generate=["word " * room], fsdp=""), True, model, Words())


def test_the_network_behind_virtual_tokens_is_that_of_its_adapter(tmp_path):
    """What P-tuning goes on with: saved beside the vectors that it made."""
    small, same, large = (
        get_peft_model(tiny_model("llama"), virtual_token_config("p_tuning", 5, size)) for size in (32, 32, 48)
    )
    with pytest.raises(UserError, match="without prompt_encoder.safetensors, .* it can be evaluated, but not trained"):
        load_encoder(same, tmp_path)
    save_encoder(small, tmp_path)
    load_encoder(same, tmp_path)
    for one, other in zip(small.prompt_encoder.parameters(), same.prompt_encoder.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(UserError, match="prompt_encoder.safetensors: of another adapter .*size mismatch"):
        load_encoder(large, tmp_path)


PLACES = {"cpu": (1, CPU), "two cards": (2, CARD), "zero": (2, [*CARD, *zero(2)])}


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_run_goes_on_exactly(assets, masked_assets, instructions, tmp_path, kind, place):
    ranks, card = PLACES[place]
    base = script_flags("run_lora_clm.py", assets, masked_assets, instructions)
    base += ["--peft_type", kind, *FEW[kind], *card]
    base += ["--lora_dropout", 0.05, "--lora_rank", 8]  # the defaults, over those that are for LoRA alone
    start("run_lora_clm.py", ranks, tmp_path / "whole", *base)
    start(
        "run_lora_clm.py", ranks, tmp_path / "again", *base,
        "--resume_from_checkpoint", tmp_path / "whole" / "checkpoint-3",
    )  # fmt: skip
    weights, log = essence(tmp_path / "whole")
    again, later = essence(tmp_path / "again")
    assert "adapter_model.safetensors" in weights and ("prompt_encoder.safetensors" in weights) == (kind == "p_tuning")
    assert again == weights
    assert later[-len(log) + 1 :] == log[1:] or later == log


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_loads_elsewhere_and_is_trained_further(instructions, tmp_path, kind):
    """Three steps, saved, and three more from there give what evaluation of the saved one began from."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    train = ["--max_steps", 3, "--learning_rate", 0.01, *CPU]
    text = ["--prompt_tuning_init_text", "Answer the question"] if kind == "prompt_tuning" else []
    more = ["--generate", "What is", "--lr_scheduler_type", "constant", *text]
    done, _, log = run_and_read(tmp_path / "first", instructions, *flags(kind, *train, *more))
    assert f"{kind} adapter, trainable params: " in log and "'What is' -> " in log
    elsewhere = shutil.copytree(tmp_path / "first", tmp_path / "copy")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(instructions.llama), elsewhere)
    assert loaded.active_peft_config.num_virtual_tokens == 5
    further = ["--adapter_name_or_path", tmp_path / "first", "--eval_on_start", "--do_train", "--do_eval", *train]
    then, _, _ = run_and_read(tmp_path / "then", instructions, *further)
    began = [row["eval_loss"] for row in log_history(tmp_path / "then") if "eval_loss" in row][0]
    assert began == pytest.approx(done["eval_loss"], rel=1e-5) and then["eval_loss"] < began


@pytest.mark.slow
def test_what_virtual_tokens_cannot_do_is_refused(instructions, tmp_path):
    prompt = ["--do_train", "--peft_type", "prompt_tuning"]
    cases = {
        "merged": ([*prompt, "--merge_adapter"], "error: --merge_adapter: prompt_tuning adds tokens"),
        "none": ([*prompt, "--num_virtual_tokens", 0], "error: --num_virtual_tokens 0"),
        "positions": ([*prompt, "--num_virtual_tokens", 100000], "error: --num_virtual_tokens 100000: "),
        "text": ([*prompt, "--prompt_tuning_init_text", ""], "error: --prompt_tuning_init_text ''"),
        "text of others": (
            ["--do_train", "--prompt_tuning_init_text", "a"], "--prompt_tuning_init_text: only with --peft_type prompt"
        ),
    }  # fmt: skip
    output = tmp_path / "out"
    check_refused("run_lora_clm.py", cases, [*common(instructions, output), *CPU], tmp_path, output)


@pytest.mark.slow
def test_a_dry_run_counts_the_virtual_tokens(instructions, tmp_path):
    for kind in KINDS:
        more = [*flags(kind), "--dry_run", *CPU]
        done = run("run_lora_clm.py", *common(instructions, tmp_path / kind), *more)
        assert "it fits: " in done.stdout, done.stdout
        assert not (tmp_path / kind).exists()
