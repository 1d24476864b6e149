"""What an example of an instruction data set says: its format, its prompt, and the turns of a conversation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Value
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from .runtime import UserError

# The prompts of Stanford Alpaca (Taori et al. 2023), which many instruction models were tuned with.
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
SQL = (
    "Answer the question about a database with one SQL query. The context holds the statements that made its "
    "tables.\n\n### Question:\n{instruction}\n\n### Context:\n{input}\n\n### SQL:"
)


@dataclass(frozen=True)
class ExampleFormat:
    """How examples are read.

    Attributes:
        style: ``instruction``, ``sql``, ``chat`` (a question and an answer through the tokenizer's chat template),
            ``messages`` (whole conversations through it) or ``text``.
        columns: the column of each part: ``instruction``, ``input`` and ``output``, or ``messages``, or ``text``.
    """

    style: str
    columns: dict[str, str]

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
    """The format of a data set, by the flags or else by its columns.

    Args:
        instruction, input, output: names of the columns, where they are not the usual ones.

    Raises:
        UserError: a column is missing or is not text, or nothing fits.
    """
    there, named = dataset.column_names, instruction or input or output
    if text_column and (sql_prompt or chat_prompt or named):
        raise UserError("--text_column_name excludes --sql_prompt, --chat_prompt and --*_column_name")
    if "messages" in there and not (sql_prompt or named or text_column):
        return ExampleFormat("messages", {"messages": "messages"})
    if text_column or not (sql_prompt or chat_prompt or named or {"instruction", "output"} <= set(there)):
        if not text_column and "text" not in there:
            raise UserError(
                f"no columns instruction and output, messages or text, but {', '.join(there)}: name them with "
                "--instruction_column_name, --input_column_name and --output_column_name, or --text_column_name"
            )
        form = ExampleFormat("text", {"text": text_column or "text"})
    else:
        usual = {"instruction": "instruction", "input": "input", "output": "output"}
        if sql_prompt and "question" in there:
            usual = {"instruction": "question", "input": "context", "output": "answer"}
        given = {"instruction": instruction, "input": input, "output": output}
        columns = {part: given[part] or usual[part] for part in usual}
        if not sql_prompt and not input and columns["input"] not in there:
            del columns["input"]
        form = ExampleFormat("sql" if sql_prompt else "chat" if chat_prompt else "instruction", columns)
    for part, column in form.columns.items():
        flag = f"--{part}_column_name"
        if column not in there:
            raise UserError(f"{flag} {column}: no such column; there are {', '.join(there)}")
        feature = dataset.features[column]
        if not (isinstance(feature, Value) and feature.dtype in ("string", "large_string", "null")):
            kind = getattr(feature, "dtype", type(feature).__name__)
            raise UserError(f"{flag} {column}: the column holds {kind}, not text")
    return form


def check_tokenizer(form: ExampleFormat, tokenizer: PreTrainedTokenizerBase, train_on_inputs: bool) -> None:
    """Raise a UserError where the tokenizer lacks what the format needs, or the format what the flags need."""
    if form.style == "text" and not train_on_inputs:
        raise UserError("--train_on_inputs False: a single text column does not tell prompts from answers")
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-sequence token, with which answers end: set eos_token in it")
    if form.style in ("chat", "messages") and not tokenizer.chat_template:
        flag = "--chat_prompt" if form.style == "chat" else "the column 'messages'"
        raise UserError(f"{flag} needs a chat template, which the tokenizer does not have: name a tokenizer that does")


def text_of(table: pa.Table, name: str) -> pa.Array:
    """A column as text; a missing value counts as an empty one."""
    return pc.fill_null(pc.cast(table.column(name), pa.large_string()), "").combine_chunks()


def fill_prompts(table: pa.Table, form: ExampleFormat) -> list[str]:
    """The prompts of a table in the style ``instruction`` or ``sql``; a blank input counts as none."""

    def fill(template: str, **columns: pa.Array) -> pa.Array:
        pieces = template.replace("}", "{").split("{")
        texts = [pa.scalar(piece, pa.large_string()) for piece in [*pieces, ""]]
        return pc.binary_join_element_wise(
            *(columns[piece] if place % 2 else texts[place] for place, piece in enumerate(pieces)), texts[-1]
        )

    instruction = text_of(table, form.columns["instruction"])
    if "input" not in form.columns:
        return fill(WITHOUT_INPUT, instruction=instruction).to_pylist()
    given = text_of(table, form.columns["input"])
    if form.style == "sql":
        return fill(SQL, instruction=instruction, input=given).to_pylist()
    blank = pc.equal(pc.utf8_trim_whitespace(given), "")
    without = fill(WITHOUT_INPUT, instruction=instruction)
    return pc.if_else(blank, without, fill(WITH_INPUT, instruction=instruction, input=given)).to_pylist()


def conversations(table: pa.Table, form: ExampleFormat) -> Iterator[list[dict]]:
    """The conversations of a table: lists of messages with ``role`` and ``content``."""
    if form.style == "messages":
        yield from table.column(form.columns["messages"]).to_pylist()
        return
    columns = {part: text_of(table, column).to_pylist() for part, column in form.columns.items()}
    given = columns.get("input") or [""] * len(table)
    for instruction, more, output in zip(columns["instruction"], given, columns["output"], strict=True):
        question = f"{instruction}\n\n{more}" if more.strip() else instruction
        yield [{"role": "user", "content": question}, {"role": "assistant", "content": output}]


def split_conversation(messages: list[dict], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """A conversation as text, in turns: what is given, an answer, what is given, an answer, ...

    An answer ends with the end-of-sequence token, if the template writes one; what follows the last answer is left
    out. Joined, the turns are what the template renders.

    Raises:
        UserError: the template cannot render the conversation, or does not start an answer as its prompt ends.
    """

    def render(count: int, prompt: bool) -> str:
        return tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt)

    turns, done = [], ""
    try:
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, through = render(number, True), render(number + 1, False)
            if not (before.startswith(done) and through.startswith(before)):
                raise UserError(
                    "the chat template writes an answer otherwise than its generation prompt begins one, or changes "
                    f"earlier turns: the trained part of {str(messages)[:80]}... is not a continuation"
                )
            answer = through[len(before) :]
            if tokenizer.eos_token in answer:
                answer = answer[: answer.rindex(tokenizer.eos_token) + len(tokenizer.eos_token)]
            turns += [before[len(done) :], answer]
            done = before + answer
    except (TemplateError, KeyError, TypeError) as error:
        raise UserError(f"the chat template cannot render {str(messages)[:80]}... ({error})") from error
    return turns
