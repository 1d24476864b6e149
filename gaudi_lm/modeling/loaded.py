"""What has been loaded from files: whether it is the whole model, and can be trained and saved again."""

from __future__ import annotations

from transformers import PreTrainedModel
from transformers.modeling_utils import is_fsdp_enabled

from gaudi_lm.errors import UserError


def check_weights_of_files(model: PreTrainedModel, name: str, missing: list[str]) -> None:
    """Refuse weights that are not those of a model: transformers warns of them at most, and makes up others.

    Args:
        name: of ``--model_name_or_path``.
        missing: names of weights that its files do not have.

    Raises:
        UserError: see above.
    """
    flag = f"--model_name_or_path {name}:"
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(f"{flag} an adapter, not a model: name its base model, and this by --adapter_name_or_path")
    weights = dict(model.named_parameters())
    if weights.keys() <= set(missing):
        raise UserError(
            f"{flag} its files have no weight of {type(model).__name__}; one is named {min(weights)} in the model"
        )
    for key, weight in weights.items():
        if weight.is_meta and not is_fsdp_enabled():  # whose other ranks are sent theirs
            raise UserError(f"{flag} {key} is in none of the files, though their index names it")
        if weight.is_floating_point() and weight.dtype.itemsize == 1:
            raise UserError(f"{flag} {key} is {weight.dtype}, and no quantization_config says what it stands for")
