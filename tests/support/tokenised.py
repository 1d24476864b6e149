"""Rows of instruction data as run_lora_clm.py makes them, without the script's other steps."""

from __future__ import annotations

from functools import partial

from datasets import Dataset
from running import load_script

from gaudi_lm.data.instructions import tokenise_examples
from gaudi_lm.data.prompts import find_format

LORA = load_script("run_lora_clm")


def tokenised(tokenizer, data: Dataset | list[dict], max_length: int, flags: dict | None = None, **changes) -> Dataset:
    """Rows of examples.

    Args:
        flags: passed to :func:`find_format`.
        changes: other arguments of :func:`tokenise_examples` than of a run with ``--train_on_inputs False``.
    """
    data, flags = data if isinstance(data, Dataset) else Dataset.from_list(data), flags or {}
    format_example = partial(LORA.format_example, sql="sql_prompt" in flags)
    usual = {"train_on_inputs": False, "concatenate": False, "limit": None, "split": "train"}
    options = {**usual, "format_example": format_example, **changes}
    return tokenise_examples(data, find_format(data, **flags), tokenizer, max_length, **options)
