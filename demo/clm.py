"""Train a small GPT-2 on English text that every Python brings along, with the real run_clm.py: ``make demo``."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2TokenizerFast

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "build" / "demo"
OUTPUT = ROOT / "output" / "demo"
END = "<|endoftext|>"


def prepare() -> None:
    """Write train.txt, validation.txt and a byte-level BPE tokenizer of 2,048 tokens into build/demo."""
    DATA.mkdir(parents=True, exist_ok=True)
    names = sorted(topics)
    held_out = names[::10]
    for split, chosen in (("train", [n for n in names if n not in held_out]), ("validation", held_out)):
        (DATA / f"{split}.txt").write_text("\n".join(topics[name] for name in chosen), encoding="utf-8")
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train([str(DATA / "train.txt")], vocab_size=2048, special_tokens=[END], show_progress=False)
    GPT2TokenizerFast(
        tokenizer_object=tokenizer._tokenizer, bos_token=END, eos_token=END, unk_token=END, model_max_length=1024
    ).save_pretrained(DATA / "tokenizer")


def command() -> list[str]:
    """The run, as a user would type it."""
    data, output = DATA.relative_to(ROOT), OUTPUT.relative_to(ROOT)
    return shlex.split(
        f"{shlex.quote(sys.executable)} run_clm.py --model_type gpt2 --tokenizer_name {data}/tokenizer"
        " --config_overrides n_embd=192,n_layer=3,n_head=4,n_positions=256,resid_pdrop=0,embd_pdrop=0,attn_pdrop=0"
        f" --train_file {data}/train.txt --validation_file {data}/validation.txt --block_size 128"
        " --do_train --do_eval --eval_on_start --per_device_train_batch_size 16 --num_train_epochs 6"
        " --learning_rate 2e-3 --lr_scheduler_type cosine --warmup_ratio 0.05 --logging_steps 10"
        " --eval_strategy epoch --save_strategy no --throughput_warmup_steps 3"
        f" --output_dir {output} --overwrite_output_dir --use_cpu"
    )


def main() -> None:
    prepare()
    words = command()
    shown = shlex.join([Path(words[0]).name, *words[1:]])
    print(f"$ {shown}", flush=True)
    status = subprocess.run(words, cwd=ROOT, check=False).returncode
    if status:
        sys.exit(status)
    results = json.loads((OUTPUT / "all_results.json").read_text())
    history = json.loads((OUTPUT / "trainer_state.json").read_text())["log_history"]
    before = next(row["eval_perplexity"] for row in history if "eval_perplexity" in row)
    print(
        f"\nvalidation perplexity  {before:.1f} before training, {results['eval_perplexity']:.1f} after"
        f"\nthroughput             {results['train_tokens_per_second']:.0f} tokens/s"
        f"\nmodel, metrics, card   {OUTPUT}"
        f"\nloss curve             {OUTPUT / 'loss_curve.png'}"
        f"\ncommand                {shown}"
    )


if __name__ == "__main__":
    main()
