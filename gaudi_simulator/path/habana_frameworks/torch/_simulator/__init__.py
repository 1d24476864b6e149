"""The simulated cards: their number, and the library that is the device."""

import contextlib
import ctypes
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch

CARDS = int(os.environ.get("GAUDI_SIMULATOR") or 0)
"""Number of simulated cards; 0 without `GAUDI_SIMULATOR`: no device, plain CPU tensors."""

MEMORY_FIELDS = ("InUse", "MaxInUse", "NumAllocs", "NumFrees", "MaxAllocSize", "TotalSystemAllocs")

library: ctypes.CDLL | None = None


def register(hpu: ModuleType) -> None:
    """Build and load the device, with `hpu` as `torch.hpu`. A build that fails ends the process with one line."""
    global library
    from .build import BuildError
    from .build import library as build

    try:
        _check_torch()
        _check_memory_limit()
        path = str(build())
    except (BuildError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    torch.ops.load_library(path)
    library = ctypes.CDLL(path)
    library.gaudi_memory.restype = ctypes.c_int64
    library.gaudi_compilations.restype = ctypes.c_int64
    library.gaudi_host_syncs.restype = ctypes.c_int64
    library.gaudi_compilation_history.restype = ctypes.c_char_p
    library.gaudi_compilation_history.argtypes = [ctypes.c_int64]
    library.gaudi_host_sync_operations.restype = ctypes.c_char_p
    library.gaudi_collectives.restype = ctypes.c_char_p
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or accelerator.type != "hpu":
        raise RuntimeError(
            "import habana_frameworks.torch before anything asks torch.accelerator which device there is"
        )
    torch.hpu = sys.modules["torch.hpu"] = hpu
    register_autocast_lists()
    from torch._dynamo.backends.registry import register_backend

    register_backend(compile_for_card, name="hpu_backend")
    _announce()


def _check_torch() -> None:
    """PyTorch refuses to have an HPU beside the devices that it was built for ("Cannot have both HPU and cuda")."""
    others = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip, "XPU": torch.version.xpu}
    for name in filter(others.get, others):
        raise ValueError(
            f"GAUDI_SIMULATOR: PyTorch {torch.__version__} is built for {name} and has no simulated card; "
            "install the build for CPUs: pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
        )


def _check_memory_limit() -> None:
    text = os.environ.get("GAUDI_SIMULATOR_MEMORY_GB") or "96"
    try:
        valid = float(text) > 0
    except ValueError:
        valid = False
    if not valid:
        raise ValueError(f"GAUDI_SIMULATOR_MEMORY_GB is {text!r}: it holds the memory of a simulated card in GB")


def _announce() -> None:
    rank = os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ.get("RANK") or "0"
    if int(rank) == 0 and multiprocessing.parent_process() is None:
        print(
            f"SIMULATED GAUDI: {CARDS} card{'s' if CARDS > 1 else ''} in host memory. SPEED MEANS NOTHING HERE. "
            "What does: results, shapes, graphs compiled, host synchronisations, device memory.",
            file=sys.stderr,
            flush=True,
        )


def register_autocast_lists() -> None:
    """(Re-)install the autocast rules: those of PyTorch, or the lists that `PT_HPU_AUTOCAST_*_OPS_LIST` name."""
    lists = []
    for variable in ("PT_HPU_AUTOCAST_LOWER_PRECISION_OPS_LIST", "PT_HPU_AUTOCAST_FP32_OPS_LIST"):
        path = os.environ.get(variable)
        if path and not os.path.isfile(path):
            raise FileNotFoundError(f"{variable} names {path}, which does not exist")
        lists.append(Path(path).read_text() if path else "")
    torch.ops.gaudi_simulator.register_autocast(*lists)


def memory(card: int) -> dict[str, int]:
    """Bytes and counts by the real API's names, for one card."""
    figures = {name: library.gaudi_memory(card, which) for which, name in enumerate(MEMORY_FIELDS)}
    figures["ActiveAllocs"] = figures["NumAllocs"] - figures["NumFrees"]
    return {"Limit": library.gaudi_memory(card, -1), **figures}


def compilations(since: int = 0) -> list[dict]:
    """The graphs compiled, from number `since` on: how many `operations` each has, and the `first` one, at `position`,
    that no graph before it had in that place."""
    return json.loads(library.gaudi_compilation_history(since))


def host_syncs() -> dict[str, int]:
    """How often the host waited for the card, by the operation that made it wait."""
    return json.loads(library.gaudi_host_sync_operations())


def collectives() -> dict[str, tuple[int, int]]:
    """The collectives of this rank, by operation: calls, and bytes of what they were about.

    That is the larger side of each: what is reduced, what is gathered, what is broadcast.
    """
    return {name: tuple(figures) for name, figures in json.loads(library.gaudi_collectives()).items()}


@contextlib.contextmanager
def one_graph() -> Iterator[None]:
    """What runs inside is one graph, whatever the mode."""
    library.gaudi_open_region()
    try:
        yield
    finally:
        library.gaudi_close_region()


def compile_for_card(module: torch.fx.GraphModule, inputs: list, **_options):
    """The backend `hpu_backend` of torch.compile: forward and backward are one graph each."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    def compiler(traced: torch.fx.GraphModule, _example_inputs: list):
        _make_results_contiguous(traced)

        def call(*arguments):
            with one_graph():
                return traced(*arguments)

        return make_boxed_func(call)

    return aot_autograd(fw_compiler=compiler)(module, inputs)


def _make_results_contiguous(traced: torch.fx.GraphModule) -> None:
    """Give results the layout that they were traced with.

    PyTorch traces for this device as for one whose operations have contiguous results (`is_noncontiguous_supported` in
    torch/_subclasses/fake_impls.py), while the CPU's kernels, which run here, keep the order of permuted operands.
    """
    from torch._prims_common import is_contiguous_for_memory_format_or_false as is_contiguous

    def permuted(node: torch.fx.Node) -> bool:
        value = node.meta.get("val")
        return isinstance(value, torch.Tensor) and not is_contiguous(value, memory_format=torch.contiguous_format)

    for node in list(traced.graph.nodes):
        is_tensor = node.op == "call_function" and isinstance(node.meta.get("val"), torch.Tensor)
        if is_tensor and not permuted(node) and any(map(permuted, node.all_input_nodes)):
            with traced.graph.inserting_after(node):
                dense = traced.graph.call_function(torch.ops.aten.contiguous.default, (node,))
            node.replace_all_uses_with(dense, delete_user_cb=lambda user, dense=dense: user is not dense)
    traced.recompile()
