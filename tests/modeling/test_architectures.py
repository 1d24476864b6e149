"""The table of architectures: what a row says is what the model does. Heads and packing have tests of their own."""

import json
from types import SimpleNamespace

import pytest
import torch
from running import run_many
from test_losses import make_batch, tiny_model
from tiny_models import CAUSAL, MASKED, OTHERS, VOCABULARY
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForMaskedLM, GPT2Config

from gaudi_lm.architectures import ARCHITECTURES, ENCODERS, PADDING, make_causal
from gaudi_lm.arguments.definitions import LMTrainingArguments
from gaudi_lm.data.packing import PackedCollator
from gaudi_lm.errors import UserError
from gaudi_lm.modeling.attention import check_model, choose_attention
from gaudi_lm.modeling.loading import fit_vocabulary, length_limit
from gaudi_lm.modeling.loss import install_token_loss

POSITIONS = {"n_positions": 40, "max_position_embeddings": 40, "max_seq_len": 40, "seq_length": 40}


def make_model(model_type: str, pad_token_id: int | None) -> torch.nn.Module:
    """A tiny model with 40 positions, whatever the configuration calls them."""
    settings = CAUSAL.get(model_type) or MASKED.get(model_type) or OTHERS[model_type]
    config = CONFIG_MAPPING[model_type]()
    names = {**settings, **{name: size for name, size in POSITIONS.items() if hasattr(config, name)}}
    config = CONFIG_MAPPING[model_type](**names, vocab_size=VOCABULARY, pad_token_id=pad_token_id)
    auto = AutoModelForCausalLM if model_type in CAUSAL else AutoModelForMaskedLM
    return auto.from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize("pad_token_id", [0, 1, 3])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_default_length_is_the_longest_that_the_model_takes(model_type, pad_token_id):
    model, row = make_model(model_type, pad_token_id), ARCHITECTURES[model_type]
    unlimited = SimpleNamespace(model_max_length=10**30)
    length = length_limit("--max_seq_length", None, unlimited, model.config, default=40)
    assert length == 40 - row.position_of_first_token(model.config)
    assert row.position_of_first_token(model.config) == (
        pad_token_id + 1 if row.first_position == PADDING else row.first_position
    )
    input_ids = torch.randint(5, VOCABULARY, (2, length + 1), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=input_ids[:, :length]).logits).all()
        if row.first_position:
            with pytest.raises((IndexError, RuntimeError)):
                model(input_ids=input_ids)


def test_a_tokenizer_without_a_limit_may_say_so_by_infinity():
    """Which Python's JSON writes and reads."""
    tokenizer = SimpleNamespace(model_max_length=float("inf"))
    config = SimpleNamespace(model_type="bloom")
    assert length_limit("--block_size", None, tokenizer, config, default=40) == 40
    assert length_limit("--block_size", 64, tokenizer, config) == 64
    tokenizer.model_max_length = float("nan")
    with pytest.raises(UserError, match="model_max_length is nan"):
        length_limit("--block_size", None, tokenizer, config)


@pytest.mark.parametrize("model_type", [name for name, row in ARCHITECTURES.items() if row.first_position])
def test_positions_start_where_the_row_says(model_type):
    model = make_model(model_type, 3)
    input_ids = torch.randint(5, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    first = ARCHITECTURES[model_type].position_of_first_token(model.config)
    with torch.no_grad():
        own = model(input_ids=input_ids).logits
        given = model(input_ids=input_ids, position_ids=torch.arange(first, first + 12).expand(2, -1)).logits
        other = model(input_ids=input_ids, position_ids=torch.arange(first + 1, first + 13).expand(2, -1)).logits
    torch.testing.assert_close(own, given)
    assert not torch.allclose(own, other)


@pytest.mark.parametrize(
    ("model_type", "size", "words"),
    [
        ("gpt2", 2, "gpt2 is not among llama, qwen2"),
        ("llama", 3, "does not divide the 4 attention heads"),
        ("llama", 4, "does not divide the 2 key value heads"),
        ("llama", 2, "a loss_func or compute_metrics of a script's own would see parts of rows"),
    ],
)
def test_models_whose_rows_cannot_be_divided(model_type, size, words):
    model, args = tiny_model(model_type), SimpleNamespace(fp8=False, context_parallel_size=size)
    with pytest.raises(UserError, match=f"--context_parallel_size {size}.* {words}"):
        check_model(model, args, own_figures=True)
    args.context_parallel_size = 1
    check_model(model, args, own_figures=True)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_tokenizer_without_padding_token(model_type):
    """Where positions do not count from it, the model is made and runs; elsewhere the fault is named."""
    config = CONFIG_MAPPING[model_type]()
    sized = {"__len__": lambda self: VOCABULARY, "get_vocab": lambda self: {"a": VOCABULARY - 1}}
    tokenizer = type("Tokenizer", (SimpleNamespace,), sized)(pad_token_id=None, bos_token_id=0, eos_token_id=2)
    if ARCHITECTURES[model_type].first_position == PADDING:
        with pytest.raises(UserError, match=f"{model_type} counts positions from the padding token"):
            fit_vocabulary(config, tokenizer, True, None)
        return
    fit_vocabulary(config, tokenizer, True, None)
    assert config.vocab_size == VOCABULARY and config.pad_token_id is None
    model = make_model(model_type, None)
    assert torch.isfinite(model(input_ids=torch.randint(5, VOCABULARY, (2, 9))).logits).all()


@pytest.mark.parametrize("model_type", sorted(ENCODERS & {**MASKED, **OTHERS}.keys()))
def test_an_encoder_that_is_a_causal_model_sees_no_token_that_follows(model_type):
    config = CONFIG_MAPPING[model_type](**(MASKED.get(model_type) or OTHERS[model_type]), vocab_size=VOCABULARY)
    config.pad_token_id = 0
    make_causal(AutoModelForMaskedLM, config)
    assert not config.is_decoder
    make_causal(AutoModelForCausalLM, config)
    model = AutoModelForCausalLM.from_config(config).eval()
    if model_type == "xmod":
        model.set_default_language(config.languages[0])
    input_ids = torch.randint(5, VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(0))
    changed = input_ids.clone()
    changed[:, -1] = 5 + (changed[:, -1] == 5)
    with torch.no_grad():
        logits = [model(input_ids=tokens).logits[:, :-1] for tokens in (input_ids, changed)]
    torch.testing.assert_close(*logits)
    with pytest.raises(UserError, match=f"--pack_sequences: {model_type} "):
        PackedCollator.for_model(model, pad_token_id=0, length=12)


def test_a_model_that_sees_all_tokens_is_no_causal_one():
    with pytest.raises(UserError, match="^xlnet: not a causal model"):
        make_causal(AutoModelForCausalLM, CONFIG_MAPPING["xlnet"]())
    make_causal(AutoModelForCausalLM, config := CONFIG_MAPPING["bart"]())  # whose decoder says so itself
    assert not config.is_decoder


def sees_later_tokens(kind: str, attention: str, **settings) -> bool:
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = CONFIG_MAPPING[kind](**size, intermediate_size=48, vocab_size=64, head_dim=8, **settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    tokens = torch.arange(5, 29).view(2, 12)
    tokens[1, :-1] = tokens[0, :-1]
    with torch.no_grad():
        one, other = model(tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits[:, :-1]
    return not torch.allclose(one, other, atol=1e-6)


def test_a_mixture_of_experts_that_mixes_up_tokens_is_refused():
    small = {"intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 16}
    assert sees_later_tokens("llama4_text", "eager", **small), "transformers has mended it"
    for kind in ("llama4", "llama4_text"):
        with pytest.raises(UserError, match=f"^{kind}: transformers 4.55 computes its experts wrongly"):
            make_causal(AutoModelForCausalLM, CONFIG_MAPPING[kind]())


def test_doge_is_eager(tmp_path):
    assert (sees_later_tokens("doge", "sdpa"), sees_later_tokens("doge", "eager")) == (True, False)
    args = LMTrainingArguments(output_dir=str(tmp_path), use_cpu=True, do_eval=True)
    args.attn_implementation, args.chosen = "sdpa", set()
    assert choose_attention(CONFIG_MAPPING["doge"](), args) == "eager"


@pytest.mark.parametrize("wanted", [None, True, False])
def test_modernbert_keeps_its_own_compilation_setting(wanted, tmp_path):
    model = tiny_model("modernbert", reference_compile=wanted)
    install_token_loss(model, "masked", max_predictions_per_seq=12)
    model(**make_batch("masked")).loss.backward()
    model.save_pretrained(tmp_path)
    assert model.config.reference_compile is wanted
    # transformers 4.55 writes no such setting at all.
    assert "reference_compile" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.slow
def test_scripts_say_or_do_what_is_right(assets, masked_assets, tmp_path):
    """roberta-prelayernorm at its default length; a tokenizer with a mask token and no padding token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(masked_assets.roberta)
    tokenizer._pad_token = None
    tokenizer._special_tokens_map["pad_token"] = None
    tokenizer.save_pretrained(tmp_path / "no_padding")
    small = "hidden_size=32,num_hidden_layers=1,num_attention_heads=2,intermediate_size=48,max_position_embeddings=66"
    common = [
        "--train_file", assets.train, "--do_train", "--use_cpu", "--max_steps", 1, "--config_overrides", small,
        "--per_device_train_batch_size", 2, "--validation_split_percentage", 20,
    ]  # fmt: skip
    cases = {
        name: [*map(str, common), "--model_type", model_type, "--tokenizer_name", str(tokenizer_name),
               "--output_dir", str(tmp_path / name)]
        for name, model_type, tokenizer_name in (
            ("longest", "roberta-prelayernorm", masked_assets.roberta),
            ("no padding", "roberta", tmp_path / "no_padding"),
        )
    }  # fmt: skip
    ends = run_many("run_mlm.py", cases, tmp_path)
    assert ends["longest"][0] == 0, ends["longest"][1]
    status, log = ends["no padding"]
    assert status == 2, log
    assert "error: roberta counts positions from the padding token, and the tokenizer has none" in log
    assert "Traceback" not in log and not (tmp_path / "no padding").exists()


@pytest.mark.parametrize("field", ["scale_attn_by_inverse_layer_idx", "scale_attn_weights"])
def test_a_gpt2_that_scales_its_attention_otherwise_is_eager(field, tmp_path):
    """transformers' sdpa scales by the width of a head alone."""
    args = LMTrainingArguments(output_dir=str(tmp_path), use_cpu=True, do_eval=True)
    args.attn_implementation, args.chosen = "sdpa", set()
    assert choose_attention(GPT2Config(), args) == "sdpa"
    config = GPT2Config(**{field: not getattr(GPT2Config(), field)})
    assert choose_attention(config, args) == args.attn_implementation == "eager"
    args.attn_implementation, args.chosen = "sdpa", {"attn_implementation"}
    with pytest.raises(UserError, match=f"^--attn_implementation sdpa: gpt2 has {field}.*, which only eager"):
        choose_attention(config, args)
