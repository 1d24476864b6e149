"""Fixtures that several test files share."""

import json
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace

import pytest
from filelock import FileLock
from hub.fixtures import hub, stand_ins
from hypothesis import HealthCheck, settings
from small_models import instructions, masked_assets

from gaudi_lm.device import add_stand_in, real_frameworks

if not real_frameworks():
    add_stand_in()  # optimum.habana cannot be imported without it

__all__ = ["assets", "hub", "instructions", "masked_assets", "stand_ins"]

# A loaded machine is slow at times, which is no failure.
settings.register_profile("suite", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")

END = "<|endoftext|>"
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def _write_assets(root: Path) -> None:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast, set_seed

    root.mkdir(parents=True, exist_ok=True)
    names = sorted(topics)
    texts = {"train": names[20:40], "validation": names[:4]}
    for split, chosen in texts.items():
        lines = "\n".join(topics[name] for name in chosen).splitlines()
        (root / f"{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        rows = [json.dumps({"text": line, "length": len(line)}) for line in lines]
        (root / f"{split}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train([str(root / "train.txt")], vocab_size=512, special_tokens=[END], show_progress=False)
    GPT2TokenizerFast(
        tokenizer_object=tokenizer._tokenizer, bos_token=END, eos_token=END, unk_token=END, model_max_length=1024
    ).save_pretrained(root / "tokenizer")
    set_seed(1)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=2, n_positions=128, **NO_DROPOUT))
    model.save_pretrained(root / "gpt2")
    GPT2TokenizerFast.from_pretrained(root / "tokenizer").save_pretrained(root / "gpt2")


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> SimpleNamespace:
    """Small real text (``train``, ``validation``), a byte-level BPE tokenizer of 512 tokens and a tiny GPT-2.

    ``train_jsonl`` and ``validation_jsonl`` hold the same lines in column ``text``, beside a column ``length``.
    """
    base = tmp_path_factory.getbasetemp()
    root = (base if worker_id == "master" else base.parent) / "assets"
    with FileLock(f"{root}.lock"):
        if not (root / "complete").exists():
            _write_assets(root)
            (root / "complete").touch()
    return SimpleNamespace(
        train=root / "train.txt",
        validation=root / "validation.txt",
        train_jsonl=root / "train.jsonl",
        validation_jsonl=root / "validation.jsonl",
        tokenizer=root / "tokenizer",
        gpt2=root / "gpt2",
    )
