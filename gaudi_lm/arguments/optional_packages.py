"""What some values of --optim, --report_to and other flags need, and is not among the requirements."""

from __future__ import annotations

import importlib.util

from transformers.training_args import OptimizerNames

from gaudi_lm.errors import UserError, unknown

# By value, where it is not the name of both: modules of which one must be importable, and what pip calls the package.
_REPORTERS: dict[str, tuple[tuple[str, ...], str]] = {
    "azure_ml": (("azureml",), "azureml-mlflow"),
    "flyte": (("flytekit",), "flytekit"),
    "mlflow": (("mlflow",), "mlflow-skinny"),
    "tensorboard": (("tensorboard", "tensorboardX"), "tensorboard"),
}
_BITSANDBYTES = (("bitsandbytes",), "bitsandbytes")
# By the beginning of an optimizer's name.
_OPTIMIZER_PACKAGES: dict[str, tuple[tuple[str, ...], str]] = {
    "adalomo": (("lomo_optim",), "lomo-optim"),
    "adamw_8bit": _BITSANDBYTES,
    "adamw_anyprecision": (("torchdistx",), "torchdistx"),
    "adamw_bnb": _BITSANDBYTES,
    "adamw_torch_4bit": (("torchao",), "torchao"),
    "adamw_torch_8bit": (("torchao",), "torchao"),
    "ademamix": _BITSANDBYTES,
    "apollo": (("apollo_torch",), "apollo-torch"),
    "galore": (("galore_torch",), "galore-torch"),
    "grokadamw": (("grokadamw",), "grokadamw"),
    "lion": _BITSANDBYTES,
    "lomo": (("lomo_optim",), "lomo-optim"),
    "paged": _BITSANDBYTES,
    "rmsprop_bnb": _BITSANDBYTES,
    "schedule_free": (("schedulefree",), "schedulefree"),
    "stable_adamw": (("optimi",), "torch-optimi"),
}
_OTHER_DEVICES = {"adamw_torch_xla": "TPUs", "adamw_torch_npu_fused": "Ascend NPUs", "adamw_apex_fused": "CUDA"}
# They look at rows, columns or norms of a whole weight, and ZeRO and FSDP leave a card flat shares.
_OF_WHOLE_WEIGHTS = ("adafactor", "adalomo", "apollo", "galore", "grokadamw", "lomo", "stable_adamw")
# These take neither --optim_args nor --optim_target_modules.
PLAIN_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")


def is_importable(module: str) -> bool:
    """Whether a module is there, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def require(flag: str, package: tuple[tuple[str, ...], str]) -> None:
    """Refuse a flag whose package is missing.

    Raises:
        UserError: none of the modules can be imported; the message has the command that installs the package.
    """
    modules, name = package
    if not any(map(is_importable, modules)):
        raise UserError(f"{flag}: the package {name} is not installed; pip install {name}")


def check_optimizer(optim: str, optim_args: str | None, optim_target_modules: str | None) -> None:
    """Refuse an optimizer that is unknown, of other devices, or of a package that is missing, and odd arguments.

    Raises:
        UserError: see above.
    """
    names = [name.value for name in OptimizerNames]
    if optim not in names:
        raise UserError(f"--optim {optim}: {unknown(optim, names)}")
    if optim in _OTHER_DEVICES:
        raise UserError(f"--optim {optim} is for {_OTHER_DEVICES[optim]}; use adamw_torch")
    for beginning, package in _OPTIMIZER_PACKAGES.items():
        if optim.startswith(beginning):
            require(f"--optim {optim}", package)
            break
    for flag, value in (("optim_args", optim_args), ("optim_target_modules", optim_target_modules)):
        if value and optim in PLAIN_OPTIMIZERS:
            raise UserError(f"--{flag}: --optim {optim} takes none")
    for pair in (optim_args or "").replace(" ", "").split(",") if optim_args else ():
        if pair.count("=") != 1:
            raise UserError(f"--optim_args: {pair!r} is not of the form key=value")


def check_optimizer_of_shares(source: str, optimizer: str, zero: bool) -> None:
    """Refuse an optimizer that would train something else on the shares of several cards than on one card.

    Args:
        zero: whether DeepSpeed's ZeRO divides the weights, instead of FSDP.

    Raises:
        UserError: see above.
    """
    by, other = "ZeRO" if zero else "FSDP", "adamw_torch" if source == "--optim" else "AdamW"
    if optimizer.lower().startswith(_OF_WHOLE_WEIGHTS):
        raise UserError(f"{source} {optimizer}: not with {by}, of which it would see shares for weights; use {other}")
    if zero and optimizer.lower() == "adagrad":  # DeepSpeed 0.19 makes it anew: no schedule, no decay of the groups
        raise UserError(f"{source} {optimizer}: not with ZeRO, under which it loses its schedule; use {other}")


def check_reporters(report_to: list[str] | str | None) -> None:
    """Refuse a place to report to that is unknown, or whose package is missing.

    Raises:
        UserError: see above.
    """
    names = [report_to] if isinstance(report_to, str) else list(report_to or ())
    for name in names:
        if name in ("none", "all"):
            if len(names) > 1:
                raise UserError(f"--report_to {' '.join(names)}: {name} stands alone")
            continue
        # Imported here: a run that reports nowhere need not wait for what this imports.
        from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

        if name not in INTEGRATION_TO_CALLBACK:
            known = ["none", "all", *INTEGRATION_TO_CALLBACK]
            raise UserError(f"--report_to {name}: {unknown(name, known)}")
        require(f"--report_to {name}", _REPORTERS.get(name, ((name,), name)))
