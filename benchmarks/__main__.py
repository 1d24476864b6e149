"""Run benchmarks by name, or all: `python -m benchmarks clm_step mlm_head`."""

import argparse
import importlib
import os

from gaudi_lm.runtime import choose_card

# Name: module. clm_limit is answered by the same run as clm_step.
BENCHMARKS = {
    "grouping": "preprocessing",
    "preprocess": "preprocessing",
    "memory_scale": "preprocessing",
    "mlm_head": "masked",
    "mlm_packed": "masked",
    "lora_packed": "causal",
    "clm_step": "causal",
    "clm_limit": "causal",
    "eval_memory": "running",
    "startup": "running",
    "graphs": "running",
    "syncs": "running",
    "weak_scaling": "running",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"one or more of {', '.join(BENCHMARKS)}; default: all"
    )
    names = parser.parse_args().names or list(BENCHMARKS)
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark {unknown[0]!r}: there are {', '.join(BENCHMARKS)}")
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    choose_card(["--use_cpu"])
    for name in names:
        getattr(importlib.import_module(f"benchmarks.{BENCHMARKS[name]}"), name)()


if __name__ == "__main__":
    main()
