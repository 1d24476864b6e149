"""`python -m gaudi_simulator` with `--report`: what is simulated, how faithfully; with `--build`: build the device."""

import argparse
import os
import sys

from . import STAND_IN, absent

REPORT = """\
A simulated Gaudi: n cards of a PyTorch device `hpu` in host memory, for GAUDI_SIMULATOR=n. The real
optimum-habana, accelerate and DeepSpeed run their Gaudi code on it, unchanged. A real habana_frameworks always takes
its place.

Simulated, as on a card
  results          float32: the CPU's, to the bit. bf16 and fp16 products: computed in float32, rounded once.
                   Attention by the kernel that the CPU would choose.
  device           views, in-place and resized outputs, streams, events, pinned memory, files; tensors of two devices
                   in one operation are an error.
  memory           per card: in use, peak, limit (96 GB, or GAUDI_SIMULATOR_MEMORY_GB), out-of-memory errors. Counted
                   are tensors; the workspace of a kernel or a compiled graph is not. Dropout keeps a mask of one
                   byte per element for backward, as Gaudi's bridge does.
  random numbers   a generator for each card, apart from the CPU's, in checkpoints by torch.hpu.random. Other numbers
                   than a Gaudi draws.
  autocast         by PyTorch's operation lists; PT_HPU_AUTOCAST_LOWER_PRECISION_OPS_LIST and _FP32_OPS_LIST replace
                   them.
  lazy mode        PT_HPU_LAZY_MODE=1: what happens between marks of a step, waits of the host and collectives is one
                   graph: its operations, shapes, dtypes, and the integers and floating-point attributes (`alpha`,
                   fill values) that a compiler bakes in. Values are no part of it: x * 0.5 and the numbers of the
                   fused optimizer compile nothing anew. metric_global("graph_compilation") counts new graphs.
  eager mode       PT_HPU_LAZY_MODE=0: every operation with new shapes is a compilation. torch.compile with
                   hpu_backend: one graph forward, one backward.
  HPU graphs       a wrapped module is one graph for each set of shapes; it runs in Python at each call. An explicit
                   capture computes nothing, is replayed in place, and refuses to wait for the host.
  host waits       counted by operation: item, copies to the host, results of unknown shape, synchronize.
  collectives      hccl by gloo: DDP, FSDP, ZeRO-1, 2 and 3, under mpirun, torchrun and the deepspeed launcher; also
                   where torch.compile has traced them. Each ends the graph that is being gathered, and is counted
                   with its bytes (habana_frameworks.torch.hpu.metrics.collectives).
  counts alone     GAUDI_SIMULATOR_PRODUCTS=0 leaves out what products of matrices compute. Memory, graphs, waits and
                   bytes stay those of the run, which takes a fraction of the time; its losses mean nothing.
  fused parts      FusedAdamW, FusedClipNorm, FusedSDPA, FusedRMSNorm, rotary helpers, mixture_of_experts and
                   optimizer_adamw of torch.ops.hpu: by plain PyTorch.
  FP8              Habana's Transformer Engine (--fp8): inputs and weights of linear layers are really rounded to E4M3
                   (to 240, as on a Gaudi 2), gradients to E5M2, by delayed scales that are powers of two; so are the
                   operands of its FusedAttention. Products are summed in float32 and rounded once.
                   The first run of a layer uses its own largest values; scales are in no checkpoint.

Not simulated
  speed            of anything: steps, compilations, collectives. Time means nothing here.
  graph compiler   its fusions, its memory plan, its bugs, shapes that it pads by itself, operations that it lacks.
  numbers          the order of sums, and the rounding, of Gaudi's engines.
  FusedAdamW       moments in another dtype than the parameters'.
  INC quantisation, sparse tensors, media pipes, several processes on one card.

Absent names that optimum-habana, accelerate or DeepSpeed call, and what happens then
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m gaudi_simulator", description=__doc__)
    parser.add_argument("--report", action="store_true", help="say what is simulated and what is not")
    parser.add_argument("--build", action="store_true", help="build the device into its cache, and print its place")
    arguments = parser.parse_args()
    if not (arguments.report or arguments.build):
        parser.error("give --report or --build")
    if arguments.report:
        print(REPORT + absent.report(), end="")
    if arguments.build:
        os.environ.pop("GAUDI_SIMULATOR", None)
        sys.path.append(STAND_IN)
        from habana_frameworks.torch._simulator.build import BuildError, library

        try:
            print(library())
        except BuildError as error:
            sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
