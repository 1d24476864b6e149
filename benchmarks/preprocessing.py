"""Text to blocks: by Arrow against Python lists, against the tokenizer alone, and its memory."""

import json
import multiprocessing
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, disable_caching, disable_progress_bars
from tokenizers import ByteLevelBPETokenizer

from .measure import MIB, forget_peak, resident, write_report
from .workloads import paragraphs

BLOCK = 512


def _alternate(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each of several functions, one call of each per round, after one that does not count."""
    seconds = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, contender in contenders.items():
            started = time.perf_counter()
            contender()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def _read(blocks: Dataset) -> int:
    """Look at every token once: a view that was never read has cost nothing."""
    column = blocks.with_format("arrow")[:]["input_ids"]
    return sum(pc.sum(chunk.flatten()).as_py() for chunk in column.chunks)


def grouping(rounds: int = 5, rows: int = 40_000) -> None:
    """Tokenised rows to blocks, both ways, the blocks read once."""
    from gaudi_lm.data.blocks import group_into_blocks

    disable_caching()
    disable_progress_bars()
    generator = np.random.default_rng(0)
    lengths = generator.lognormal(4.2, 0.8, rows).astype(int)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    tokens = generator.integers(50257, size=offsets[-1], dtype=np.int32)
    column = pa.ListArray.from_arrays(pa.array(offsets), pa.array(tokens))
    tokenised = Dataset(pa.table({"input_ids": column}))

    def by_lists(examples):
        joined = list(chain(*examples["input_ids"]))
        whole = len(joined) // BLOCK * BLOCK
        pieces = [joined[start : start + BLOCK] for start in range(0, whole, BLOCK)]
        return {"input_ids": pieces, "labels": pieces.copy()}

    seconds = _alternate(
        {
            "arrow": lambda: _read(group_into_blocks(tokenised, BLOCK)),
            "lists": lambda: _read(tokenised.map(by_lists, batched=True, keep_in_memory=True)),
        },
        rounds,
    )
    ratio = float(np.median(np.array(seconds["lists"]) / np.array(seconds["arrow"])))
    figures = {"tokens": int(offsets[-1])}
    figures |= {f"{who}_seconds": float(np.median(values)) for who, values in seconds.items()}
    write_report("grouping", ratio, ">= 30", ratio >= 30, figures)


def make_tokenizer():
    """A fast byte-level tokenizer of 8,000 tokens, trained on the same text."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(paragraphs(), vocab_size=8000, min_frequency=2)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="<|endoftext|>")


def preprocess(rounds: int = 5, copies: int = 4) -> None:
    """Tokenise and cut into blocks, as run_clm.py does, against the tokenizer's encode_batch alone."""
    from gaudi_lm.data.blocks import group_into_blocks, tokenise

    tokenizer = make_tokenizer()
    texts = paragraphs() * copies
    dataset = Dataset.from_dict({"text": texts})
    backend = tokenizer.backend_tokenizer
    seconds = _alternate(
        {
            "ours": lambda: group_into_blocks(tokenise(dataset, tokenizer, "text", use_cache=False), BLOCK),
            "encode_batch": lambda: backend.encode_batch(texts),
        },
        rounds,
    )
    ratio = float(np.median(np.array(seconds["ours"]) / np.array(seconds["encode_batch"])))
    figures = {"texts": len(texts), "characters": sum(map(len, texts))}
    figures |= {f"{who}_seconds": float(np.median(values)) for who, values in seconds.items()}
    write_report("preprocess", ratio, "<= 1.25", ratio <= 1.25, figures)


INSTRUCTIONS = {"train_on_inputs": False, "concatenate": False, "limit": None, "split": "train"}


def alpaca_like(rows: int) -> dict[str, list[str]]:
    """Columns like Alpaca's, of sentences from the Python manual; two examples in five have an input."""
    sentences = [text[:400] for text in paragraphs()]
    generator = np.random.default_rng(0)
    question, extra, answer = (
        [sentences[index] for index in column] for column in generator.integers(len(sentences), size=(3, rows))
    )
    extra = [text if with_input else "" for text, with_input in zip(extra, generator.random(rows) < 0.4, strict=True)]
    return {"instruction": question, "input": extra, "output": answer}


def instructions(rows: int = 200_000, rounds: int = 1) -> None:
    """Examples like Alpaca's to rows with their trained span, as run_lora_clm.py does, against encode_batch alone.

    Its memory is that of two more processes, one with a tenth of the examples.
    """
    sys.argv = ["run_lora_clm.py", "--use_cpu"]
    from gaudi_lm.data.prompts import example_parts, find_format
    from run_lora_clm import format_example, tokenise_examples

    disable_caching()
    disable_progress_bars()
    tokenizer = make_tokenizer()
    dataset = Dataset.from_dict(alpaca_like(rows))
    example_format = find_format(dataset)
    parts = example_parts(dataset.with_format("arrow")[:], example_format)
    prompts, answers = zip(*map(format_example, parts), strict=True)

    def ours():
        options = INSTRUCTIONS | {
            "format_example": format_example,
            "num_proc": None,
            "use_cache": False,
            "keep_in_memory": True,
        }
        tokenise_examples(dataset, example_format, tokenizer, 512, **options)

    def encode_batch():
        for texts in (prompts, answers):
            for start in range(0, rows, 1000):
                tokenizer.backend_tokenizer.encode_batch(texts[start : start + 1000])

    seconds = _alternate({"ours": ours, "encode_batch": encode_batch}, rounds)
    ratio = float(np.median(np.array(seconds["ours"]) / np.array(seconds["encode_batch"])))
    figures = {"examples": rows, "characters": sum(map(len, prompts)) + sum(map(len, answers))}
    figures |= {f"{who}_seconds": float(np.median(values)) for who, values in seconds.items()}
    peaks = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in (rows // 10, rows):
            Dataset.from_dict(alpaca_like(count)).to_json(f"{folder}/{count}.jsonl")
            peaks[count], tokens = _in_a_process(_prepare_instructions, count, folder)
    figures |= {
        "tokens": tokens,
        "tenth_own_peak_mib": peaks[rows // 10] / MIB,
        "own_peak_mib": peaks[rows] / MIB,
        "added_bytes_per_token": (peaks[rows] - peaks[rows // 10]) / (0.9 * tokens),
    }
    note = "Own peak: resident memory without mapped cache files. A Python list of integers takes 8 bytes for a token."
    write_report("instructions", ratio, "<= 2", ratio <= 2, figures, note)


def _in_a_process(function: Callable, *arguments):
    """What `function`, called with these arguments and a connection in a process of its own, sends through it."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe()
    process = context.Process(target=function, args=(*arguments, sender))
    process.start()
    sender.close()
    answer = receiver.recv()
    process.join()
    return answer


class _OwnMemory:
    """The peak of resident memory without mapped files while the block runs, in bytes: `peak`."""

    def __enter__(self):
        self.peak, self._done = 0, threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        forget_peak()
        self._watcher.start()
        return self

    def _watch(self):
        while not self._done.wait(0.02):
            self.peak = max(self.peak, resident("RssAnon"))

    def __exit__(self, *_):
        self._done.set()
        self._watcher.join()


def _prepare_instructions(rows: int, folder: str, connection) -> None:
    """In a process of its own: examples from a file to rows; sends its own peak of memory and the number of tokens."""
    sys.argv = ["run_lora_clm.py", "--use_cpu"]
    from gaudi_lm.arguments.definitions import DataArguments, ModelArguments
    from gaudi_lm.data.blocks import count_tokens
    from gaudi_lm.data.loading import load_raw
    from gaudi_lm.data.prompts import find_format
    from run_lora_clm import format_example, tokenise_examples

    disable_progress_bars()
    data_args = DataArguments(train_file=f"{folder}/{rows}.jsonl")
    examples = load_raw(data_args, ModelArguments(cache_dir=folder), True, False)["train"]
    tokenizer = make_tokenizer()
    with _OwnMemory() as memory:
        found = tokenise_examples(
            examples, find_format(examples), tokenizer, 512, format_example=format_example, **INSTRUCTIONS
        )
    connection.send((memory.peak, count_tokens(found)))


def _prepare(copies: int, folder: str, connection) -> None:
    """In a process of its own: text file to blocks; sends its peak of memory with and without mapped files, bytes."""
    sys.argv = ["run_clm.py", "--use_cpu"]
    from run_clm import DataArguments, ModelArguments, load_raw, make_blocks

    disable_progress_bars()
    file = Path(folder) / f"{copies}.jsonl"
    with file.open("w") as lines:
        for _ in range(copies):
            lines.writelines(json.dumps({"text": text}) + "\n" for text in paragraphs())
    tokenizer = make_tokenizer()
    texts = load_raw(DataArguments(train_file=str(file)), ModelArguments(cache_dir=folder), True, False)["train"]
    with _OwnMemory() as memory:
        make_blocks(texts, tokenizer, "text", BLOCK, None, "train")
    connection.send((resident("VmHWM"), memory.peak, file.stat().st_size))


def memory_scale(small: int = 20) -> None:
    """Peak resident memory of preprocessing, with ten times the data."""
    peaks, own, sizes = {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for copies in (small, 10 * small):
            peaks[copies], own[copies], sizes[copies] = _in_a_process(_prepare, copies, folder)
    ratio = peaks[10 * small] / peaks[small]
    figures = {
        "text_mib": sizes[small] / MIB,
        "peak_mib": peaks[small] / MIB,
        "ten_times_text_mib": sizes[10 * small] / MIB,
        "ten_times_peak_mib": peaks[10 * small] / MIB,
        "peak_without_mapped_files_mib": own[small] / MIB,
        "ten_times_peak_without_mapped_files_mib": own[10 * small] / MIB,
        "ratio_without_mapped_files": own[10 * small] / own[small],
    }
    write_report("memory_scale", ratio, "<= 1.1", ratio <= 1.1, figures)


def _prepare_many(file: str, folder: str, connection) -> None:
    """In a process of its own: a file to blocks, then its texts through the tokenizer alone."""
    sys.argv = ["run_clm.py", "--use_cpu"]
    from run_clm import DataArguments, ModelArguments, load_raw, make_blocks

    disable_progress_bars()
    tokenizer = make_tokenizer()
    with _OwnMemory() as memory:
        started = time.perf_counter()
        texts = load_raw(DataArguments(train_file=file), ModelArguments(cache_dir=folder), True, False)["train"]
        read = time.perf_counter()
        blocks = make_blocks(texts, tokenizer, "text", BLOCK, None, "train")
        ended = time.perf_counter()
    peak = resident("VmHWM")
    alone = 0.0
    for start in range(0, len(texts), 1000):
        rows = texts[start : start + 1000]["text"]
        begun = time.perf_counter()
        tokenizer.backend_tokenizer.encode_batch(rows)
        alone += time.perf_counter() - begun
    connection.send(
        {
            "rows": len(texts),
            "blocks": len(blocks),
            "reading_seconds": read - started,
            "blocks_seconds": ended - read,
            "encode_batch_seconds": alone,
            "peak_mib": peak / MIB,
            "peak_without_mapped_files_mib": memory.peak / MIB,
        }
    )


def preprocess_many(rows: int = 2_000_000, characters: int = 150) -> None:
    """Two million rows of jsonl, 300 MB of text, to blocks: in time against encode_batch alone, and in memory."""
    pieces = [
        text[start : start + characters]
        for text in paragraphs()
        for start in range(0, len(text) - characters, characters)
    ]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        with file.open("w") as lines:
            lines.writelines(json.dumps({"text": pieces[row % len(pieces)]}) + "\n" for row in range(rows))
        figures = {"file_mib": file.stat().st_size / MIB} | _in_a_process(_prepare_many, str(file), folder)
    ratio = figures["blocks_seconds"] / figures["encode_batch_seconds"]
    met = ratio <= 1.15 and figures["peak_mib"] < 1024
    note = "The time is that of blocks from rows that have been read; reading is a figure of its own."
    write_report("preprocess_many", ratio, "<= 1.15, peak memory < 1 GB", met, figures, note)
