"""Small stand-ins for the models and datasets that the documented commands name.

Each has the architecture, tokenizer class, file layout and columns of the original; weights come from a seed and text
from CPython's documentation topics. The sizes are set by the documented commands, which run unshortened: a single-card
run of three epochs must be short, and 8 cards with 16 blocks each must still find more than one step in an epoch.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPT2TokenizerFast,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GPTNeoXTokenizerFast,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizerFast,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaTokenizerFast,
)

VOCABULARY = 512
POSITIONS = 128
# Block counts at 128 tokens follow from these: about 150 for training, 16 each for validation and test.
TRAIN_CHARACTERS, HELD_OUT_CHARACTERS = 38_000, 4_000
INSTRUCTIONS = 350

# The names that commands use, and where the hub has moved them.
MOVED = {
    ("models", "gpt2"): "openai-community/gpt2",
    ("models", "gpt2-xl"): "openai-community/gpt2-xl",
    ("models", "roberta-base"): "FacebookAI/roberta-base",
    ("datasets", "wikitext"): "Salesforce/wikitext",
}
GATED = "stand-in/gated-gpt2"


def write_stand_ins(root: Path) -> None:
    """Write every stand-in under `root` as `models/<owner>/<name>/<branch>` and `datasets/<owner>/<name>/<branch>`."""
    write_models(root / "models")
    write_wikitext(root / "datasets" / "Salesforce" / "wikitext" / "main")
    write_alpaca(root / "datasets" / "tatsu-lab" / "alpaca" / "main")


def paragraphs() -> Iterator[tuple[str, list[str]]]:
    """(title, paragraphs, each one line) of every topic."""
    for title, text in topics.items():
        blocks = [" ".join(block.split()) for block in text.split("\n\n")]
        yield title, [block for block in blocks if len(block) > 40]


def wikitext_lines() -> Iterator[str]:
    """Rows as WikiText-2 has them: blank lines, headings between equals signs, paragraphs between spaces."""
    for title, blocks in paragraphs():
        yield from ("", f" = {title} = \n", "")
        for number, block in enumerate(blocks):
            if number % 6 == 5:
                yield from ("", f" = = Part {number // 6 + 1} = = \n", "")
            yield f" {block} \n"


def write_wikitext(folder: Path, train: int = TRAIN_CHARACTERS, held_out: int = HELD_OUT_CHARACTERS) -> None:
    """The dataset repository `Salesforce/wikitext`, with its one configuration that the commands name."""
    lines = wikitext_lines()
    configuration = "wikitext-2-raw-v1"
    splits = {"test": held_out, "train": train, "validation": held_out}
    (folder / configuration).mkdir(parents=True)
    for split, characters in splits.items():
        rows = []
        while sum(map(len, rows)) < characters:
            rows.append(next(lines))
        pq.write_table(pa.table({"text": rows}), folder / configuration / f"{split}-00000-of-00001.parquet")
    files = [f"  - split: {split}\n    path: {configuration}/{split}-*\n" for split in splits]
    card = (
        f"---\nconfigs:\n- config_name: {configuration}\n  data_files:\n{''.join(files)}---\n\n# WikiText stand-in\n"
    )
    (folder / "README.md").write_text(card)


def write_alpaca(folder: Path, count: int = INSTRUCTIONS) -> None:
    """The dataset repository `tatsu-lab/alpaca`: instructions, some with an input, answers, and the whole text."""
    rows = []
    for title, blocks in paragraphs():
        for block in blocks:
            question = {"instruction": f"What is said about {title}?", "input": "", "output": block[:600]}
            shorten = {"instruction": "Shorten the text.", "input": block[:400], "output": block.split(". ")[0][:200]}
            rows.append(shorten if len(rows) % 3 == 2 else question)
    rows = rows[:count]
    for row in rows:
        given = f"\n\n### Input:\n{row['input']}" if row["input"] else ""
        row["text"] = f"### Instruction:\n{row['instruction']}{given}\n\n### Response:\n{row['output']}"
    (folder / "data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "data" / "train-00000-of-00001-a09b74b3ef9c3b56.parquet")
    (folder / "README.md").write_text("---\nlanguage:\n- en\n---\n\n# Alpaca stand-in\n")


def train_byte_level(special_tokens: list[str]) -> Tokenizer:
    """A byte-level BPE tokenizer of the topics, the special tokens first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(topics.values(), trainer)
    return tokenizer


def masked_tokenizer(length: int = POSITIONS) -> RobertaTokenizerFast:
    """A tokenizer as RoBERTa's: byte-level BPE, a start and an end around each text, and a mask."""
    tokenizer = train_byte_level(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return RobertaTokenizerFast(tokenizer_object=tokenizer, model_max_length=length)


def train_llama() -> Tokenizer:
    """A tokenizer in the manner of Llama's: BPE over words with a leading mark, unknown characters as bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    # The pre-tokenizer keeps the training to words; Llama's own file has none, and encodes the whole text at once.
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    replace, strip = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse(), strip])
    special_tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY + 256, special_tokens=special_tokens, show_progress=False)
    tokenizer.train_from_iterator(topics.values(), trainer)
    tokenizer.pre_tokenizer = None
    definition = json.loads(tokenizer.to_str())
    # Bytes are ordinary pieces: as special tokens they would be matched in text and lost in decoding.
    definition["added_tokens"] = definition["added_tokens"][:3]
    return Tokenizer.from_str(json.dumps(definition))


def write_models(folder: Path) -> None:
    """The model repositories, each with its tokenizer, in the weight files that the original has."""
    end = "<|endoftext|>"
    gpt2_tokenizer = GPT2TokenizerFast(tokenizer_object=train_byte_level([end]), model_max_length=POSITIONS)
    gpt2_size = {"n_positions": POSITIONS, "n_embd": 32, "n_head": 2, "vocab_size": VOCABULARY}
    gpt2_size |= {"bos_token_id": 0, "eos_token_id": 0}
    gpt2 = GPT2Config(n_layer=2, **gpt2_size)
    write_model(folder / "openai-community/gpt2/main", GPT2LMHeadModel, gpt2, gpt2_tokenizer)
    write_model(folder / "openai-community/gpt2/v2", GPT2LMHeadModel, gpt2, gpt2_tokenizer, seed=1)
    write_model(folder / GATED / "main", GPT2LMHeadModel, gpt2, gpt2_tokenizer)
    gpt2_xl = GPT2Config(n_layer=4, **gpt2_size)
    write_model(folder / "openai-community/gpt2-xl/main", GPT2LMHeadModel, gpt2_xl, gpt2_tokenizer)

    # GPT-J's embedding has more rows than its tokenizer has tokens, and its weights are a pickled file.
    gptj = GPTJConfig(n_layer=2, rotary_dim=8, **(gpt2_size | {"vocab_size": VOCABULARY + 32}))
    write_model(folder / "EleutherAI/gpt-j-6b/main", GPTJForCausalLM, gptj, gpt2_tokenizer, safe_serialization=False)

    neox_tokenizer = GPTNeoXTokenizerFast(
        tokenizer_object=train_byte_level([end, "<|padding|>"]), model_max_length=POSITIONS
    )
    neox = GPTNeoXConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, vocab_size=VOCABULARY + 32,
        max_position_embeddings=POSITIONS, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    # Large originals come in several files with an index.
    neox_folder, half = folder / "EleutherAI/gpt-neox-20b/main", torch.float16
    write_model(neox_folder, GPTNeoXForCausalLM, neox, neox_tokenizer, dtype=half, max_shard_size="60KB")

    roberta = RobertaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, vocab_size=VOCABULARY,
        max_position_embeddings=POSITIONS + 2, type_vocab_size=1, layer_norm_eps=1e-5,
    )  # fmt: skip
    write_model(folder / "FacebookAI/roberta-base/main", RobertaForMaskedLM, roberta, masked_tokenizer())

    tokenizer = train_llama()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    llama_tokenizer = LlamaTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=2048
    )
    llama = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=VOCABULARY + 256,
        max_position_embeddings=2048, pad_token_id=None,
    )  # fmt: skip
    llama_folder = folder / "huggyllama/llama-7b/main"
    write_model(llama_folder, LlamaForCausalLM, llama, llama_tokenizer, dtype=half, max_shard_size="100KB")


def write_model(
    folder: Path,
    model_class: type[PreTrainedModel],
    config,
    tokenizer: PreTrainedTokenizerFast,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **save_options,
) -> None:
    """Write a model with weights drawn from `seed`, and its tokenizer."""
    torch.manual_seed(seed)
    model_class(config).to(dtype).save_pretrained(folder, **save_options)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text("# Stand-in\n\nWeights drawn at random, for tests.\n")
