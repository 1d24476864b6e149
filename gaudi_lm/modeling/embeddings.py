"""The embeddings of a loaded model, made large enough for the tokenizer."""

from __future__ import annotations

import inspect
import logging

from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from gaudi_lm.errors import UserError

logger = logging.getLogger("gaudi_lm")


def enlarge_embeddings(model: PreTrainedModel, size: int, mean_resizing: bool = True) -> None:
    """Give a model embeddings, and a head, for at least ``size`` tokens.

    Args:
        mean_resizing: draw the new ones around the mean of those that are there.

    Raises:
        UserError: a model without a table of token embeddings, or one that cannot be enlarged.
    """
    name = model.config.model_type
    try:
        weight = model.get_input_embeddings().weight
    except (AttributeError, NotImplementedError) as error:
        raise UserError(f"{name}: a model without a table of token embeddings, which these scripts train") from error
    # Under ZeRO-3 a rank holds a part of the weight; ds_shape is the whole.
    rows = getattr(weight, "ds_shape", weight.shape)[0]
    if size <= rows:
        return
    parameters = inspect.signature(model.resize_token_embeddings).parameters.values()
    takes_it = any(p.name == "mean_resizing" or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    try:
        model.resize_token_embeddings(size, **({"mean_resizing": mean_resizing} if takes_it else {}))
    except NotImplementedError as error:
        raise UserError(
            f"{name}: its {rows} embeddings cannot be made the tokenizer's {size}: choose another by --tokenizer_name"
        ) from error
    logger.info("embedding: resized from %d to the tokenizer's %d tokens", rows, size)
    head = model.get_output_embeddings()
    for module in model.modules():
        bias = getattr(module, "bias", None)
        if isinstance(bias, nn.Parameter) and bias.shape == (rows,) and head in module.children():
            # That of ESM stands beside its head: transformers 4.55 leaves it as it is.
            module.bias = nn.Parameter(functional.pad(bias.data, (0, size - rows)), bias.requires_grad)
