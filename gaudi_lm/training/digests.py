"""What tells training data and models from others."""

from __future__ import annotations

import hashlib
from itertools import islice

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from gaudi_lm.data.streams import StreamedRows

ROWS_AT_ONCE, BLOCKS = 256, 64
STREAM = "stream "  # begins the digest of one


def data_digest(dataset) -> str | None:
    """A digest of a dataset's rows, of evenly spread ones where there are many; of a stream's first ones, where these
    are of files; None for a stream of one's own, which may give each row once."""
    digest = hashlib.sha256()
    if isinstance(dataset, StreamedRows):
        for row in islice(dataset, max(1, min(ROWS_AT_ONCE, 2**20 // dataset.size))):
            digest.update(np.int64(len(row["input_ids"])).tobytes() + row["input_ids"].tobytes())
        return STREAM + digest.hexdigest()
    if not isinstance(dataset, datasets.Dataset):
        return None
    rows = len(dataset)
    step = max(1, -(-rows // (BLOCKS * ROWS_AT_ONCE))) * ROWS_AT_ONCE
    table = dataset.with_format("arrow")
    for start in range(0, rows, step):
        block = table[start : start + ROWS_AT_ONCE]
        for name, column in zip(block.column_names, block.columns, strict=True):
            digest.update(f"{name} {column.type}".encode())
            if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
                digest.update(pc.list_value_length(column).to_numpy().tobytes())
                column = pc.list_flatten(column)
            if pa.types.is_primitive(column.type) and not column.null_count:
                digest.update(column.to_numpy().tobytes())
            else:
                digest.update(str(column.to_pylist()).encode())
    return digest.hexdigest()


def may_be_same(then: str | None, now: str | None) -> bool:
    """Whether two digests may be of the same data: older checkpoints have none of any stream."""
    return then == now or (then is None and now is not None and now.startswith(STREAM))


def model_digest(model: torch.nn.Module) -> str:
    """A digest of the names and shapes of the weights that are trained."""
    lines = [
        f"{name} {tuple(getattr(weight, 'ds_shape', weight.shape))}"
        for name, weight in model.named_parameters()
        if weight.requires_grad
    ]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
