"""Fixtures for run_mlm.py and run_lora_clm.py: tokenizers, tiny models and instructions, all offline."""

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock

SMALL = {
    "bert": "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=48,max_position_embeddings=64",
    "roberta": "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=48,"
    "max_position_embeddings=66,type_vocab_size=1",
    "distilbert": "dim=32,n_layers=2,n_heads=2,hidden_dim=48,max_position_embeddings=64",
    "albert": "embedding_size=16,hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=48,"
    "max_position_embeddings=64",
}
NO_DROPOUT = {
    "bert": ",hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0",
    "roberta": ",hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0",
    "distilbert": ",dropout=0.0,attention_dropout=0.0",
    "albert": "",  # has none by default
}
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass
class MaskedAssets:
    """``roberta`` (byte-level BPE) and ``bert`` (WordPiece): folders of tokenizers."""

    roberta: Path
    bert: Path

    def scratch(self, model_type: str, dropout: bool = False) -> list:
        """Flags for a tiny model from scratch with a tokenizer of its kind."""
        tokenizer = self.roberta if model_type == "roberta" else self.bert
        overrides = SMALL[model_type] + ("" if dropout else NO_DROPOUT[model_type])
        return ["--model_type", model_type, "--tokenizer_name", tokenizer, "--config_overrides", overrides]


def _write_tokenizers(root: Path) -> None:
    from hub.stand_ins import masked_tokenizer, topics
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import BertTokenizerFast

    masked_tokenizer().save_pretrained(root / "roberta")
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=512, special_tokens=names, show_progress=False)
    tokenizer.train_from_iterator(list(topics.values())[:10], trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    BertTokenizerFast(tokenizer_object=tokenizer, model_max_length=512).save_pretrained(root / "bert")


def _write_instructions(root: Path) -> None:
    import torch
    from hub.stand_ins import paragraphs, train_llama
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizerFast

    rows = []
    for title, blocks in paragraphs():
        for block in blocks:
            given = "Use one sentence." if len(rows) % 3 else ""
            rows.append({"instruction": f"Explain {title}.", "input": given, "output": block[:120]})
    for split, part in (("train", rows[:60]), ("validation", rows[60:75])):
        (root / f"{split}.jsonl").write_text("\n".join(map(json.dumps, part)) + "\n")
    for name, layers in (("llama", 2), ("shallow", 1), ("deeper", 3)):
        tokenizer = LlamaTokenizerFast(tokenizer_object=train_llama(), model_max_length=512)
        tokenizer.chat_template = None if name == "deeper" else CHAT_TEMPLATE
        tokenizer.save_pretrained(root / name)
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
            num_attention_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(root / name)


def _once(tmp_path_factory: pytest.TempPathFactory, worker_id: str, name: str, write) -> Path:
    base = tmp_path_factory.getbasetemp()
    root = (base if worker_id == "master" else base.parent) / name
    with FileLock(f"{root}.lock"):
        if not (root / "complete").exists():
            root.mkdir(exist_ok=True)
            write(root)
            (root / "complete").touch()
    return root


@pytest.fixture(scope="session")
def masked_assets(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> MaskedAssets:
    """Tokenizers of masked language models."""
    root = _once(tmp_path_factory, worker_id, "masked", _write_tokenizers)
    return MaskedAssets(root / "roberta", root / "bert")


@pytest.fixture(scope="session")
def instructions(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> SimpleNamespace:
    """Alpaca-like ``train`` and ``validation`` files, a tiny ``llama`` with tokenizer, a ``deeper`` one,
    and one of one layer, ``shallow``, for runs that compile, whose time goes with the layers.

    All but ``deeper`` have a chat template; none has a padding token.
    """
    root = _once(tmp_path_factory, worker_id, "instructions", _write_instructions)
    return SimpleNamespace(
        train=root / "train.jsonl",
        validation=root / "validation.jsonl",
        llama=root / "llama",
        shallow=root / "shallow",
        deeper=root / "deeper",
    )
