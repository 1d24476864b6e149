"""Small stand-ins for the large models of docs/large_models.md: one layer each, and data for a step or two."""

from pathlib import Path

import pyarrow.parquet as pq
from tokenizers import processors
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2TokenizerFast,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizerFast,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from hub.stand_ins import (
    VOCABULARY,
    masked_tokenizer,
    train_byte_level,
    train_llama,
    write_alpaca,
    write_model,
    write_wikitext,
)

LENGTH = 64  # of all rows: longer ones are cut to what tokenizers and models take
MOVED = {
    ("models", "gpt2"): "openai-community/gpt2",
    ("models", "roberta-base"): "FacebookAI/roberta-base",
    ("datasets", "wikitext"): "Salesforce/wikitext",
}


def write_large_stand_ins(root: Path) -> None:
    """Write the models and datasets of docs/large_models.md under ``root``, as :mod:`hub.stand_ins` does."""
    models, datasets = root / "models", root / "datasets"
    write_wikitext(datasets / "Salesforce/wikitext/main", train=5_000, held_out=1_500)
    write_alpaca(datasets / "tatsu-lab/alpaca/main", 40)
    write_guanaco(datasets / "timdettmers/openassistant-guanaco/main", datasets / "tatsu-lab/alpaca/main/data")

    tokenizer = train_llama()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    llama = LlamaTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=LENGTH
    )
    end = "<|endoftext|>"
    byte_level = train_byte_level([end])
    gpt2 = GPT2TokenizerFast(tokenizer_object=byte_level, model_max_length=LENGTH)
    falcon = PreTrainedTokenizerFast(tokenizer_object=byte_level, eos_token=end, model_max_length=LENGTH)

    size = {"hidden_size": 32, "num_hidden_layers": 1, "max_position_embeddings": LENGTH}
    size |= {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 64}
    size |= {"vocab_size": VOCABULARY + 256, "pad_token_id": None}
    write_model(models / "meta-llama/Llama-2-70b-hf/main", LlamaForCausalLM, LlamaConfig(**size), llama)
    write_model(models / "ibm-granite/granite-3.1-8b-base/main", GraniteForCausalLM, GraniteConfig(**size), llama)
    mixtral = MixtralConfig(num_local_experts=4, **size)
    write_model(models / "mistralai/Mixtral-8x7B-v0.1/main", MixtralForCausalLM, mixtral, llama)

    llama.model_max_length = size["max_position_embeddings"] = (
        4 * LENGTH
    )  # fewer rows for the few cards that share them
    write_model(models / "meta-llama/Llama-3.1-8B/main", LlamaForCausalLM, LlamaConfig(**size), llama)

    heads = {"num_attention_heads": 4, "num_kv_heads": 2, "new_decoder_architecture": True}
    config = FalconConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, **heads)
    for name in ("tiiuae/falcon-40b", "tiiuae/falcon-180B"):
        write_model(models / name / "main", FalconForCausalLM, config, falcon)

    size = {"n_positions": LENGTH, "n_embd": 32, "n_head": 2, "n_layer": 1, "vocab_size": VOCABULARY}
    size |= {"bos_token_id": 0, "eos_token_id": 0}
    write_model(models / "openai-community/gpt2/main", GPT2LMHeadModel, GPT2Config(**size), gpt2)
    write_model(models / "bigcode/starcoder/main", GPTBigCodeForCausalLM, GPTBigCodeConfig(**size), gpt2)
    roberta = RobertaConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=VOCABULARY,
        max_position_embeddings=LENGTH + 2, type_vocab_size=1,
    )  # fmt: skip
    write_model(models / "FacebookAI/roberta-base/main", RobertaForMaskedLM, roberta, masked_tokenizer(LENGTH))


def write_guanaco(folder: Path, alpaca: Path) -> None:
    """The dataset repository `timdettmers/openassistant-guanaco`: a column of whole conversations, two splits."""
    rows = pq.read_table(next(alpaca.iterdir())).select(["text"])
    folder.mkdir(parents=True)
    for split, part in {"train": rows.slice(0, 32), "test": rows.slice(32)}.items():
        pq.write_table(part, folder / f"{split}.parquet")
    files = "".join(f"  - split: {split}\n    path: {split}.parquet\n" for split in ("train", "test"))
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n")
