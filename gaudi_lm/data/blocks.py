"""Texts to blocks of a fixed length: tokenise, concatenate, cut.

Tokens live in Arrow buffers from the tokenizer to the collator: int32, memory-mapped where the dataset is cached, and
a block is a view of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
from datasets import Dataset, concatenate_datasets
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from gaudi_lm.data.columns import texts_of
from gaudi_lm.data.fingerprints import fingerprint
from gaudi_lm.data.memory import forget_mapped_pages
from gaudi_lm.data.tokenization import encode
from gaudi_lm.errors import UserError

logger = logging.getLogger("gaudi_lm")

ROWS = 1000  # rows that are tokenised at a time
MAPPED_BYTES = 2**23  # so much of a mapped file is read before its pages are let go


def to_list_array(tokens: np.ndarray, lengths: np.ndarray) -> pa.ListArray:
    """An Arrow ``list<int32>`` of rows with these lengths, over ``tokens`` without a copy."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(tokens, type=pa.int32()))


def map_rows(
    dataset: Dataset,
    encode_rows: Callable[[pa.Table], pa.Table],
    *,
    wanted: int | None = None,
    measure: Callable[[Dataset], int] = len,
    num_proc: int | None = None,
    use_cache: bool = True,
    keep_in_memory: bool = False,
) -> Dataset:
    """Encode a thousand rows at a time into new columns, which replace all others; cached on disk.

    A cached result is found by the rows, and by the code of ``encode_rows`` and all that it refers to.

    Args:
        encode_rows: from an Arrow table of some rows to one of the new columns, of any number of rows.
        wanted: stop after the rows whose results measure so much; the rest of the dataset is not encoded.
        measure: what a part of the result counts for.
        num_proc: processes; one process already uses all threads of a fast tokenizer.
        use_cache: take a cached result, if there is one.
    """
    files = [file["filename"] for file in dataset.cache_files]
    code = fingerprint(encode_rows)
    read = 0

    def encode_and_forget(table: pa.Table) -> pa.Table:
        nonlocal read
        read += table.nbytes
        if read > MAPPED_BYTES:
            read = 0
            forget_mapped_pages(files)
        return encode_rows(table)

    def encode_range(start: int, stop: int) -> Dataset:
        rows = dataset.select(range(start, stop))
        encoded = rows.with_format("arrow").map(
            encode_and_forget,
            batched=True,
            batch_size=ROWS,
            num_proc=num_proc if stop - start > ROWS else None,
            remove_columns=dataset.column_names,
            load_from_cache_file=use_cache,
            keep_in_memory=keep_in_memory,
            new_fingerprint=fingerprint(code, rows._fingerprint),
            desc="Tokenising",
        )
        return encoded.with_format(None)

    total = len(dataset)
    if wanted is None:
        return encode_range(0, total)
    parts, rows, made = [], 0, 0
    while rows < total and made < wanted:
        # The first thousand rows tell how much a row gives; after that, one or two ranges are enough.
        need = ROWS if not made else (wanted - made) * rows // made + 1
        stop = min(total, rows + -(-need // ROWS) * ROWS)
        parts.append(encode_range(rows, stop))
        made += measure(parts[-1])
        rows = stop
    return concatenate_datasets(parts)


def tokenise(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    column: str,
    *,
    add_special_tokens: bool = True,
    max_tokens: int | None = None,
    **options,
) -> Dataset:
    """Tokenise a text column into ``input_ids`` (``list<int32>``), the only column of the result; cached on disk.

    Args:
        max_tokens: stop after the rows that hold so many tokens; the rest of the dataset is not tokenised.
        options: passed to :func:`map_rows`.
    """

    def encode_rows(table: pa.Table) -> pa.Table:
        texts = texts_of(table, column)
        return pa.table({"input_ids": to_list_array(*encode(tokenizer, texts, add_special_tokens))})

    return map_rows(dataset, encode_rows, wanted=max_tokens, measure=count_tokens, **options)


def token_chunks(dataset: Dataset, column: str = "input_ids") -> Iterator[np.ndarray]:
    """The values of a column of lists, row after row, in int32 arrays that are views of the dataset's buffers."""
    # flatten() respects the offsets of a sliced array; .values would not.
    for chunk in dataset.with_format("arrow")[:][column].chunks:
        yield chunk.flatten().to_numpy(zero_copy_only=False)


def count_tokens(dataset: Dataset) -> int:
    """How many tokens ``input_ids`` holds."""
    return sum(len(chunk) for chunk in token_chunks(dataset))


def cut(chunks: Iterator[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Cut a stream of tokens into blocks, the remainder of each chunk carried into the next.

    Yields:
        Arrays of shape ``[blocks, size]``; what is left at the end, less than one block, is not yielded.
    """
    carry = np.empty(0, dtype=np.int32)
    for chunk in chunks:
        if len(carry):
            need = size - len(carry)
            carry = np.concatenate([carry, chunk[:need]])
            chunk = chunk[need:]
            if len(carry) < size:
                continue
            yield carry.reshape(1, size)
        whole = len(chunk) // size * size
        if whole:
            yield chunk[:whole].reshape(-1, size)
        carry = chunk[whole:]


def group_into_blocks(
    dataset: Dataset, block_size: int, *, max_blocks: int | None = None, split: str = "train"
) -> Dataset:
    """Concatenate all rows of ``input_ids`` and cut them into blocks: ``input_ids``, fixed-size lists of int32.

    So are ``labels``, if there are any. Only the last, partial block of the split is dropped. Blocks are views of the
    tokenised dataset, except the one that straddles the border between two of its chunks.

    Args:
        block_size: tokens in a block.
        max_blocks: keep only the first so many.
        split: name for the log line and the error.

    Raises:
        UserError: there is not a single whole block.
    """
    total = count_tokens(dataset)
    columns: dict[str, pa.ChunkedArray] = {}
    blocks = 0
    for name in (name for name in ("input_ids", "labels") if name in dataset.column_names):
        arrays, blocks = [], 0
        for array in cut(token_chunks(dataset, name), block_size):
            array = array[: None if max_blocks is None else max_blocks - blocks]
            if not len(array):
                break
            arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1), type=pa.int32()), block_size))
            blocks += len(array)
        columns[name] = pa.chunked_array(arrays, pa.list_(pa.int32(), block_size))
    if not blocks:
        raise UserError(
            f"the {split} data has {total} tokens, less than one block of {block_size}: "
            "lower --block_size (or --max_seq_length), or give more text"
        )
    kept = blocks * block_size
    logger.info(
        "%s: %d blocks of %d tokens; %d tokens kept, %d dropped", split, blocks, block_size, kept, total - kept
    )
    # Without a fingerprint, datasets would copy and hash all tokens to make one: thirty times the work of the cutting.
    fingerprint = Hasher.hash(["blocks", dataset._fingerprint, block_size, max_blocks])
    return Dataset(pa.table(columns), fingerprint=fingerprint)
