"""What an example of an instruction dataset says: its format, its prompt, and the turns of a conversation."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Json, Value
from transformers import PreTrainedTokenizerBase

from gaudi_lm.data.columns import spell, values_of
from gaudi_lm.data.conversations import from_json, is_conversation, read_messages, read_tools
from gaudi_lm.errors import UserError

logger = logging.getLogger("gaudi_lm")

# The columns that people give these parts, the first one that is there is taken.
CONVERSATIONS = ("messages", "conversations", "conversation", "dialog", "chat")
INSTRUCTIONS = ("instruction", "prompt", "question", "query")
INPUTS = ("input", "context")
OUTPUTS = ("output", "response", "completion", "answer")
SYSTEMS = ("system", "system_prompt")


@dataclass(frozen=True)
class ExampleFormat:
    """How examples are read.

    Attributes:
        style: ``instruction``, ``sql``, ``chat`` (a question and an answer through the tokenizer's chat template),
            ``messages`` (whole conversations through it) or ``text``.
        columns: the column of each part: ``instruction``, ``input`` and ``output``; or ``messages``, or ``prompt`` and
            ``completion``, which are lists of messages, and perhaps ``tools``; or ``text``. What goes through a chat
            template may have ``system`` too.
        unused: a column for the system, which only a chat template has a place for; empty where there is none.
    """

    style: str
    columns: dict[str, str]
    unused: str = ""

    def __str__(self) -> str:
        return f"{self.style} ({', '.join(f'{part} from {column!r}' for part, column in self.columns.items())})"


def find_format(
    dataset: Dataset,
    *,
    sql_prompt: bool = False,
    chat_prompt: bool = False,
    text_column: str | None = None,
    instruction: str | None = None,
    input: str | None = None,
    output: str | None = None,
) -> ExampleFormat:
    """The format of a dataset, by the flags or else by its columns.

    Args:
        instruction, input, output: names of the columns, where they are not the usual ones.

    Raises:
        UserError: a column is missing or is not text, or nothing fits.
    """
    there, named = dataset.column_names, instruction or input or output
    if text_column and (sql_prompt or chat_prompt or named):
        raise UserError("--text_column_name excludes --sql_prompt, --chat_prompt and --*_column_name")
    if not (sql_prompt or named or text_column):
        example_format = _find_conversations(dataset)
        if example_format:
            return example_format
    usual = {"instruction": INSTRUCTIONS, "input": INPUTS, "output": OUTPUTS}
    found = {part: next((name for name in names if name in there), None) for part, names in usual.items()}
    if text_column or not (sql_prompt or chat_prompt or named or (found["instruction"] and found["output"])):
        if not text_column and "text" not in there:
            raise UserError(
                f"no columns instruction and output, messages or text, but {', '.join(there)}: name them with "
                "--instruction_column_name, --input_column_name and --output_column_name, or --text_column_name"
            )
        example_format = ExampleFormat("text", {"text": text_column or "text"})
    else:
        missing = {part: part for part in usual}
        if sql_prompt and "question" in there:
            missing = {"instruction": "question", "input": "context", "output": "answer"}
            found = dict(missing)
        given = {"instruction": instruction, "input": input, "output": output}
        unused = ""
        columns = {part: given[part] or found[part] or missing[part] for part in usual}
        if not sql_prompt and columns["input"] not in there and not input:
            del columns["input"]
        if system := _system_column(there):
            if chat_prompt:
                columns["system"] = system
            else:
                unused = system
        example_format = ExampleFormat(
            "sql" if sql_prompt else "chat" if chat_prompt else "instruction", columns, unused
        )
    for part, column in example_format.columns.items():
        if part == "system":
            _check_text(dataset, column, "column")
            continue
        if column not in there:
            raise UserError(f"--{part}_column_name {column}: no such column; there are {', '.join(there)}")
        _check_text(dataset, column, f"--{part}_column_name")
    return example_format


def log_formats(formats: Iterable[ExampleFormat]) -> None:
    """Say how the examples of the splits are read, each thing once."""
    formats = list(formats)
    logger.info("examples: %s", "; ".join(dict.fromkeys(map(str, formats))))
    for column in dict.fromkeys(example_format.unused for example_format in formats if example_format.unused):
        logger.warning("column %r is left out: only --chat_prompt has a place for it", column)


def _system_column(there: list[str]) -> str | None:
    return next((name for name in SYSTEMS if name in there), None)


def _tools_column(dataset: Dataset) -> str | None:
    """``tools``, or ``functions`` where these are JSON schemas, not names alone."""
    there = dataset.column_names
    if "tools" in there:
        return "tools"
    value = from_json(_first_value(dataset, "functions")[1]) if "functions" in there else None
    return "functions" if isinstance(value, list) and all(isinstance(tool, dict) for tool in value) else None


def _find_conversations(dataset: Dataset) -> ExampleFormat | None:
    """The format of conversations in a column, or in two: prompts and completions that are lists of messages."""
    there = dataset.column_names
    found = {"system": _system_column(there), "tools": _tools_column(dataset)}
    more = {part: column for part, column in found.items() if column}
    for column in CONVERSATIONS:
        if column in there and (column == "messages" or is_conversation(_first_value(dataset, column)[1])):
            return ExampleFormat("messages", {"messages": column, **more})
    prompt, completion = (next((name for name in names if name in there), None) for names in (INSTRUCTIONS, OUTPUTS))
    if prompt and completion and is_conversation(_first_value(dataset, prompt)[1]):
        return ExampleFormat("messages", {"prompt": prompt, "completion": completion, **more})
    return None


def _first_value(dataset: Dataset, column: str) -> tuple[int, Any]:
    """The first row, from 1, in which a column has a value, and the value."""
    tables = dataset.select_columns([column]).with_format("arrow").iter(1000)
    for number, value in enumerate((value for table in tables for value in values_of(table, column)), 1):
        if value not in (None, "", []):
            return number, value
    return 1, None


def _check_text(dataset: Dataset, column: str, flag: str) -> None:
    """Raise a UserError if a column holds neither text, nor numbers, nor booleans, nor nothing at all."""
    feature = dataset.features[column]
    if isinstance(feature, Json) or (isinstance(feature, (Value, ClassLabel)) and "binary" not in feature.dtype):
        return  # a Json column holds values of several kinds: its lists and objects are refused by row
    row, value = _first_value(dataset, column)
    raise UserError(f"{flag} {column}, row {row}: a {type(value).__name__}, not text")


def check_tokenizer(example_format: ExampleFormat, tokenizer: PreTrainedTokenizerBase, train_on_inputs: bool) -> None:
    """Raise a UserError where the tokenizer lacks what the format needs, or the format what the flags need."""
    if example_format.style == "text" and not train_on_inputs:
        raise UserError("--train_on_inputs False: a single text column does not tell prompts from answers")
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-sequence token, with which answers end: set eos_token in it")
    if example_format.style in ("chat", "messages") and not tokenizer.chat_template:
        flag = (
            "--chat_prompt"
            if example_format.style == "chat"
            else f"the column {next(iter(example_format.columns.values()))!r}"
        )
        raise UserError(f"{flag} needs a chat template, which the tokenizer does not have: name a tokenizer that does")


def text_of(table: pa.Table, name: str) -> pa.Array:
    """A column as text: numbers and booleans are written out, a missing value counts as an empty one.

    So do lists and objects, which :func:`refused_values` names.
    """
    column = table.column(name)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return pc.fill_null(pc.cast(column, pa.large_string()), "").combine_chunks()
    values = ("" if isinstance(value, (list, dict)) else spell(value) for value in values_of(table, name))
    return pa.array(values, pa.large_string())


def refused_values(table: pa.Table, example_format: ExampleFormat) -> list[str | None]:
    """For each row, why it cannot be read as text, or None."""
    problems: list[str | None] = [None] * len(table)
    for name in example_format.columns.values():
        column = table.column(name)
        if isinstance(column.type, pa.JsonType):
            for row, value in enumerate(values_of(table, name)):
                if isinstance(value, (list, dict)):
                    problems[row] = f"column {name!r} has a {type(value).__name__}, not text"
    return problems


def example_parts(table: pa.Table, example_format: ExampleFormat) -> list[dict[str, str]]:
    """``instruction``, ``input`` and ``output`` of each row of a table; a row without an input has a blank one."""
    columns = {part: text_of(table, column).to_pylist() for part, column in example_format.columns.items()}
    return [{"input": "", **dict(zip(columns, row, strict=True))} for row in zip(*columns.values(), strict=True)]


def conversation(row: dict[str, Any], example_format: ExampleFormat) -> tuple[list[dict], list[dict] | None, int]:
    """The messages of a row, the tools that it names, and the number of the first message that may be an answer.

    Raises:
        ConversationError: there is no conversation, or it cannot be read.
    """
    parts = {part: row[column] for part, column in example_format.columns.items()}
    first = 0
    if example_format.style == "chat":
        question, more = parts["instruction"], parts.get("input", "")
        question = f"{question}\n\n{more}" if more.strip() else question
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": parts["output"]}]
    elif "prompt" in parts:
        messages = read_messages(parts["prompt"], "user")
        first = len(messages)
        messages += read_messages(parts["completion"], "assistant")
    else:
        messages = read_messages(parts["messages"])
    if str(parts.get("system") or "").strip() and messages[0]["role"] != "system":
        messages, first = [{"role": "system", "content": str(parts["system"])}, *messages], first + bool(first)
    tools = read_tools(parts.get("tools"))
    if tools and example_format.columns["tools"] == "functions":  # as OpenAI named them first
        tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    return messages, tools, first
