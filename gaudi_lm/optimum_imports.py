"""How libraries are imported: optimum-habana in the parts that a run needs, and nothing that only other runs use.

``import optimum.habana`` imports sentence-transformers and all trainers: more than importing torch and transformers
costs, in each rank, before a flag is read. To know that a flag is wrong takes none of it, and a run only its trainer.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from types import ModuleType

PACKAGES = ("optimum.habana", "optimum.habana.transformers")


class _Package(ModuleType):
    """A package whose own file is executed when a name of it is first asked for; its modules can be imported before.

    `importlib.util.LazyLoader` executes it already when one of its modules is imported.
    """

    def __getattr__(self, name: str) -> object:
        if name.startswith("__") and name not in ("__all__", "__version__"):
            raise AttributeError(name)  # what the interpreter and debuggers look for in every module
        if importlib.util.find_spec(f"{self.__name__}.{name}") is not None:
            return importlib.import_module(f"{self.__name__}.{name}")
        self.__class__ = ModuleType  # type: ignore[assignment]
        with answers_without_pip():
            self.__spec__.loader.exec_module(self)  # type: ignore[union-attr]
        return getattr(self, name)


def import_in_parts() -> None:
    """Let the modules of optimum-habana be imported one by one; repeating it, or calling it late, changes nothing."""
    for name in PACKAGES:
        if name not in sys.modules:
            spec = importlib.util.find_spec(name)
            package = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
            package.__class__ = _Package
            sys.modules[name] = package
            parent, _, child = name.rpartition(".")
            setattr(sys.modules[parent], child, package)


def import_transformers() -> None:
    """Let transformers be imported without scikit-learn and scipy, and look for its models once: a second and more in
    each rank.

    transformers 4.55 takes one function of each library, for assisted generation and for finding objects in images,
    and finds them there once :func:`gaudi_lm.modeling.patches.find_scikit_learn` has been called. It reads the files
    of all models twice: for itself by the path of their folder, for the package of models by that of its own file.
    """
    if "transformers.modeling_utils" in sys.modules:
        return
    found = importlib.import_module("transformers.utils.import_utils")
    found._sklearn_available = found._scipy_available = False  # type: ignore[attr-defined]
    if importlib.metadata.version("transformers").startswith("4.55."):
        models, read = Path(found.__file__).parents[1] / "models", found.create_import_structure_from_path  # type: ignore
        found.create_import_structure_from_path = lambda path: read(  # type: ignore[attr-defined]
            models if path == f"{models}/__init__.py" else path
        )


def import_deepspeed() -> None:
    """Without MLflow, which its autotuner imports where it is installed: up to a second in each rank."""
    with redirect_stdout(None), _replaced({"mlflow": None}):
        importlib.import_module("deepspeed")


def leave_out_libraries(args) -> None:
    """Let the models of optimum-habana be imported without scipy and torch's inductor: each takes a quarter of a
    second to a second in each rank.

    optimum-habana 1.21 finds objects in images by a function of scipy, and mends two faults of torch 2.2, in
    collectives that inductor compiles.

    Args:
        args: :class:`gaudi_lm.arguments.definitions.LMTrainingArguments`.
    """
    if args.use_cpu:
        return
    optimize = ModuleType("scipy.optimize")
    optimize.linear_sum_assignment = _linear_sum_assignment  # type: ignore[attr-defined]
    left_out = [optimize]
    if not (args.torch_compile or args.torch_compile_backend):
        ir, lowering = ModuleType("torch._inductor.ir"), ModuleType("torch._inductor.lowering")
        ir._WaitKernel, lowering.lowerings = type("_WaitKernel", (), {}), {}  # type: ignore[attr-defined]
        left_out += [ir, lowering]
    with _replaced({module.__name__: module for module in left_out}):
        importlib.import_module("optimum.habana.transformers.modeling_utils")


def _linear_sum_assignment(*args, **kwargs):
    return importlib.import_module("scipy.optimize").linear_sum_assignment(*args, **kwargs)


@contextmanager
def _replaced(modules: dict[str, ModuleType | None]) -> Iterator[None]:
    """While this is open, the modules are these, or cannot be imported; those that have been imported stay."""
    missing = {name: module for name, module in modules.items() if name not in sys.modules}
    sys.modules.update(missing)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in missing:
            del sys.modules[name]


@contextmanager
def answers_without_pip() -> Iterator[None]:
    """While this is open, optimum-habana learns the version of Habana's plugin from its metadata.

    optimum-habana 1.21 runs ``pip list`` when it is imported, and ``pip show`` with its models: seconds in every rank.
    """
    run = subprocess.run

    def answer(command, *args, **kwargs) -> subprocess.CompletedProcess:
        if isinstance(command, str) and "pip " in command and "habana-torch-plugin" in command:
            with suppress(importlib.metadata.PackageNotFoundError):
                version = importlib.metadata.version("habana-torch-plugin")
                return subprocess.CompletedProcess(
                    command, 0, f"habana-torch-plugin {version}\nVersion: {version}", ""
                )
        return run(command, *args, **kwargs)

    subprocess.run = answer  # type: ignore[assignment]
    try:
        yield
    finally:
        subprocess.run = run
