"""Prompts and answers to tokens, with what is to be learnt told apart.

Prompt and answer are tokenised apart and joined as tokens: no merge crosses the border, and what is trained is what a
model continues when it is given the prompt alone. A conversation is rendered by the chat template and tokenised as a
whole, since that is what the model reads; a token that holds anything of an answer is trained, also where it begins
before the answer or ends behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from gaudi_lm.data.chat_templates import ChatTemplate
from gaudi_lm.data.columns import values_of
from gaudi_lm.data.conversations import ConversationError
from gaudi_lm.data.prompts import ExampleFormat, conversation, example_parts, refused_values, text_of
from gaudi_lm.data.ragged import join_rows
from gaudi_lm.data.tokenization import encode, special_ends
from gaudi_lm.errors import UserError


@dataclass
class EncodedRows:
    """Examples as rows of tokens, targets as they are and all others as their complement.

    Attributes:
        tokens, lengths: int32 of shape ``[sum(lengths)]`` and int64 of shape ``[examples]``; a row that cannot be read
            has no tokens.
        ends: int32 of shape ``[examples]``, the token that ends each answer.
        closed: bool of shape ``[examples]``, whether the row has it already.
        problems: why a row cannot be read, or None.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    ends: np.ndarray
    closed: np.ndarray
    problems: list[str | None]


def encode_examples(
    table: pa.Table,
    example_format: ExampleFormat,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate | None = None,
    format_example: Callable[[dict[str, str]], tuple[str, str]] | None = None,
) -> EncodedRows:
    """Tokenise examples.

    Args:
        template: the tokenizer's, for the styles ``chat`` and ``messages``.
        format_example: prompt and response of a row, for the styles ``instruction`` and ``sql``.
    """
    if template is not None:
        return encode_conversations(table, example_format, tokenizer, template)
    start = special_ends(tokenizer)[0]
    problems = refused_values(table, example_format)
    read = np.array([problem is None for problem in problems], bool)
    if example_format.style == "text":
        texts = text_of(table, example_format.columns["text"]).to_pylist()
        read &= np.array([bool(text.strip()) for text in texts], bool)
        text = encode(tokenizer, texts, False)
        tokens, lengths = join_rows(_starts(start, *text), text)
    else:
        prompts, answers = format_examples(example_parts(table, example_format), format_example)
        tokens, lengths = encode(tokenizer, prompts + answers, add_special_tokens=False)
        border = int(lengths[: len(prompts)].sum())
        prompt, answer = (tokens[:border], lengths[: len(prompts)]), (tokens[border:], lengths[len(prompts) :])
        tokens, lengths = join_rows(_starts(start, *prompt), (~prompt[0], prompt[1]), answer)
    if not read.all():
        tokens, lengths = tokens[np.repeat(read, lengths)], np.where(read, lengths, 0)
    ends = np.full(len(table), tokenizer.eos_token_id, np.int32)
    closed = np.zeros(len(table), bool)
    closed[lengths > 0] = tokens[np.cumsum(lengths)[lengths > 0] - 1] == tokenizer.eos_token_id
    return EncodedRows(tokens, lengths, ends, closed, problems)


def _starts(start: list[int], tokens: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the tokenizer puts before each row, as no targets; nothing where a row's text begins with it."""
    if not start:
        return np.empty(0, np.int32), np.zeros(len(lengths), np.int64)
    rows = np.split(tokens, np.cumsum(lengths)[:-1])
    missing = np.array([len(start) * (row[: len(start)].tolist() != start) for row in rows], np.int64)
    return np.tile(~np.array(start, np.int32), np.count_nonzero(missing)), missing


def format_examples(rows: list[dict[str, str]], format_example: Callable | None) -> tuple[list[str], list[str]]:
    """All prompts, and all responses; a UserError where ``format_example``, which users write, makes others."""
    prompts, answers = [], []
    for row in rows:
        match format_example(row) if format_example else None:
            case (str(prompt), str(answer)):
                prompts.append(prompt)
                answers.append(answer)
            case other:
                raise UserError(
                    f"format_example makes two texts of an example, prompt and response, not {other!r:.80}"
                )
    return prompts, answers


def encode_conversations(
    table: pa.Table,
    example_format: ExampleFormat,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
) -> EncodedRows:
    """Render and tokenise conversations; what follows the last answer of each is left out."""
    names = list(example_format.columns.values())
    if example_format.style == "chat":
        columns = {name: text_of(table, name).to_pylist() for name in names}
        problems = refused_values(table, example_format)
    else:
        columns = {name: values_of(table, name) for name in names}
        problems = [None] * len(table)
    rendered = []
    for row in range(len(table)):
        try:
            messages, tools, first = conversation({name: columns[name][row] for name in names}, example_format)
            text, spans, closed = template.answers(messages, tools, first)
            if not spans:
                raise ConversationError("it has no message of the assistant, or none of weight 1")
        except ConversationError as error:
            problems[row] = problems[row] or str(error)
        rendered.append((text, spans, closed) if problems[row] is None else ("", [], False))
    encoded = encode_with_offsets(tokenizer, [text for text, _, _ in rendered], [spans for _, spans, _ in rendered])
    ends = np.full(len(table), tokenizer.eos_token_id, np.int32)
    rows = []
    for row, ((_, _, closed), (tokens, positions)) in enumerate(zip(rendered, encoded, strict=True)):
        targets = np.zeros(len(tokens), bool)
        for begin, end in positions:
            targets[begin:end] = True
        used = int(targets.nonzero()[0].max(initial=-1)) + 1
        if closed:
            ends[row] = tokens[used - 1]
        rows.append(np.where(targets, tokens, ~tokens)[:used])
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    tokens = np.concatenate([np.empty(0, np.int32), *rows])
    return EncodedRows(tokens, lengths, ends, np.array([closed for _, _, closed in rendered]), problems)


def encode_with_offsets(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], spans: list[list[tuple[int, int]]]
) -> list[tuple[np.ndarray, list[tuple[int, int]]]]:
    """Tokenise each text as a whole, and find the tokens that hold anything of its spans of characters.

    Returns:
        For each text its tokens, int32, and for each span the first token and the one behind the last.
    """
    if not getattr(tokenizer, "is_fast", False):
        return [_encode_by_parts(tokenizer, text, own) for text, own in zip(texts, spans, strict=True)]
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    found = []
    for row, own in zip(backend.encode_batch(texts, add_special_tokens=False), spans, strict=True):
        starts, ends = np.array(row.offsets, np.int64).reshape(-1, 2).T
        # A token of spaces alone may be given as empty, at its end.
        starts = np.where(starts == ends, np.concatenate([[0], ends[:-1]]), starts)
        positions = [
            (int(np.searchsorted(ends, start, side="right")), int(np.searchsorted(starts, end))) for start, end in own
        ]
        found.append((np.array(row.ids, np.int32), positions))
    return found


def _encode_by_parts(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: list[tuple[int, int]]
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """For a tokenizer that tells no places: how far the tokens of the text and of its start are the same."""
    tokens, _ = encode(tokenizer, [text], add_special_tokens=False)

    def shared(length: int) -> tuple[int, bool]:
        start, _ = encode(tokenizer, [text[:length]], add_special_tokens=False)
        size = min(len(start), len(tokens))
        differ = np.flatnonzero(start[:size] != tokens[:size])
        return (int(differ[0]), False) if len(differ) else (size, True)

    positions = []
    for start, end in spans:
        stop, whole = shared(end)
        positions.append((shared(start)[0], stop if whole else stop + 1))
    return tokens, positions
