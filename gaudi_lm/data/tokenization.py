"""Texts to tokens, however long a text is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain

import numpy as np
from transformers import PreTrainedTokenizerBase

PIECE = 2**17  # characters of a longest text that is tokenised as a whole
CHARACTERS = 2**23  # that are tokenised at a time
WINDOW = 2**12  # characters before the end of a piece in which a place to cut is looked for
WORD_BEGINS = re.compile(r"(?<=\S) (?=\S)")


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], add_special_tokens: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Tokenise a list of texts, about :data:`CHARACTERS` at a time: a tokenizer takes 50 bytes and more for each.

    A longer text is cut between words, and its pieces are tokenised one by one: the tokens are those of the whole, for
    every tokenizer that merges nothing over the beginning of a word.

    Returns:
        ``(tokens, lengths)``: int32 of shape ``[sum(lengths)]`` and int64 of shape ``[len(texts)]``.
    """
    long = [index for index, text in enumerate(texts) if len(text) > PIECE]
    if not long and sum(map(len, texts)) <= CHARACTERS:
        return _encode_at_once(tokenizer, texts, add_special_tokens)
    tokens, lengths = [], []
    for group in _groups(texts):
        if len(texts[group.start]) > PIECE:
            pieces = [_encode_at_once(tokenizer, part, False)[0] for part in _pieces(texts[group.start], tokenizer)]
            start, end = special_ends(tokenizer) if add_special_tokens else ([], [])
            tokens += [np.array(start, np.int32), *pieces, np.array(end, np.int32)]
            lengths.append([len(start) + sum(map(len, pieces)) + len(end)])
        else:
            part = _encode_at_once(tokenizer, texts[group], add_special_tokens)
            tokens.append(part[0])
            lengths.append(part[1])
    return np.concatenate(tokens), np.concatenate(lengths).astype(np.int64)


def _groups(texts: list[str]) -> Iterator[slice]:
    """Slices of texts that are together no longer than what is tokenised at a time; a text over a piece is alone."""
    start, characters = 0, 0
    for index, text in enumerate(texts):
        alone = len(text) > PIECE
        if index > start and (alone or characters + len(text) > CHARACTERS or len(texts[start]) > PIECE):
            yield slice(start, index)
            start, characters = index, 0
        characters += len(text)
    if start < len(texts):
        yield slice(start, len(texts))


def _pieces(text: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[str]]:
    """A long text cut where a word begins after a single space, else at another white space, else anywhere; in groups.

    The space goes to the word, unless the tokenizer puts one before every text: then it is left out.
    """
    together = [encode(tokenizer, [text], False)[0].tolist() for text in ("one two", "one", " two", "two")]
    drop_space = together[0] != together[1] + together[2] and together[0] == together[1] + together[3]
    start, group = 0, []
    while start < len(text):
        end = start + PIECE
        if end < len(text):
            window = text[end - WINDOW : end + 1]
            found = [match.start() for match in WORD_BEGINS.finditer(window)]
            spaces = [index for index, character in enumerate(window) if index and character.isspace()]
            end -= WINDOW - (found or spaces or [WINDOW])[-1]
        dropped = bool(start) and drop_space and text[start] == " " and not text[start + 1 : start + 2].isspace()
        group.append(text[start + dropped : end])
        start = end
        if len(group) * PIECE >= CHARACTERS:
            yield group
            group = []
    if group:
        yield group


def _encode_at_once(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], add_special_tokens: bool
) -> tuple[np.ndarray, np.ndarray]:
    if not texts:
        rows: list = []
    elif getattr(tokenizer, "is_fast", False):
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = tokenizer.split_special_tokens  # set by some calls of a tokenizer only
        rows = [row.ids for row in backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)]
    else:
        rows = tokenizer(texts, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    tokens = np.empty(int(lengths.sum()), dtype=np.int32)
    end = 0
    for row in rows:
        tokens[end : end + len(row)] = row
        end += len(row)
    return tokens, lengths


def special_ends(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a single text, such as ``[CLS]`` and ``[SEP]``."""
    special = set(tokenizer.all_special_tokens)
    # A tokenizer of another script, of digits or of proteins has no "a", and perhaps no token for what is unknown.
    known = (tokenizer.convert_tokens_to_string([token]) for token in tokenizer.get_vocab() if token not in special)
    for text in chain("a", known):
        try:
            bare, whole = (encode(tokenizer, [text], added)[0].tolist() for added in (False, True))
        except Exception:  # of a tokenizer that takes no text with anything unknown; it raises no narrower class
            continue
        if bare:
            start = next(index for index in range(len(whole)) if whole[index : index + len(bare)] == bare)
            return whole[:start], whole[start + len(bare) :]
    return [], []


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the highest id: the rows of an embedding. There may be fewer tokens than that."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))
