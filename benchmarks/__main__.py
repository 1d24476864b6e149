"""Run benchmarks by name, or all: `python -m benchmarks clm_step mlm_head`."""

import argparse
import importlib
import inspect
import os

from gaudi_lm.device import choose_card

from .tables import write_tables

# Name: module.
BENCHMARKS = {
    "grouping": "preprocessing",
    "preprocess": "preprocessing",
    "instructions": "preprocessing",
    "memory_scale": "preprocessing",
    "preprocess_many": "preprocessing",
    "mlm_head": "masked",
    "mlm_packed": "masked",
    "lora_packed": "causal",
    "clm_step": "causal",
    "clm_limit": "causal",
    "eval_memory": "running",
    "startup": "running",
    "answers": "running",
    "graphs": "running",
    "syncs": "running",
    "weak_scaling": "running",
    "simulator_overhead": "running",
    "fp8": "precision",
    "fp8_noise": "precision",
    "price": "price",
}
# Two figures of one run.
ANSWERED_BY = {"clm_limit": "clm_step", "syncs": "graphs", "fp8_noise": "fp8"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"one or more of {', '.join(BENCHMARKS)}; default: all"
    )
    parser.add_argument("--rounds", type=int, help="pairs to measure, where a benchmark has pairs; by default 1 to 9")
    parser.add_argument("--table", action="store_true", help="write the results into README and docs, and end")
    options = parser.parse_args()
    if options.table:
        write_tables(list(BENCHMARKS))
        return
    names = options.names or [name for name in BENCHMARKS if name not in ANSWERED_BY]
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark {unknown[0]!r}: there are {', '.join(BENCHMARKS)}")
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    choose_card(["--use_cpu"])
    for name in names:
        benchmark = getattr(importlib.import_module(f"benchmarks.{BENCHMARKS[name]}"), ANSWERED_BY.get(name, name))
        if options.rounds and "rounds" in inspect.signature(benchmark).parameters:
            benchmark(rounds=options.rounds)
        else:
            benchmark()


if __name__ == "__main__":
    main()
