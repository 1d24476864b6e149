"""Start a function of this package, which is found by path: ``python -I start.py rank.main ARGUMENTS``."""

import importlib
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    module, _, function = sys.argv[1].partition(".")
    sys.exit(getattr(importlib.import_module(f"gaudi_lm.launcher.{module}"), function)(*sys.argv[2:]))
