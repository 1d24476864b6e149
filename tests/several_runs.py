"""Run a script's `main` several times in one process, as most of the time of a short run is imports.

    python tests/several_runs.py SCRIPT < runs.json > ends.json

`runs.json` is a list of lists of flags, `ends.json` a list of (exit status, log, metrics), in the same order.
"""

import contextlib
import importlib
import io
import json
import logging
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path


@dataclass
class End:
    """How a run ended; `metrics` is what the script's `main` returns."""

    status: int
    log: str
    metrics: dict | None


def run_several(script: str, runs: list[list[str]], environment: dict[str, str], seconds: int = 600) -> list[End]:
    """Run `script` (a name such as ``run_clm``) once for each list of flags, one after the other."""
    done = subprocess.run(
        [sys.executable, __file__, script],
        input=json.dumps(runs),
        env=environment,
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stderr
    return [End(*end) for end in json.loads(done.stdout.splitlines()[-1])]


def main() -> None:
    runs = json.load(sys.stdin)
    sys.path.insert(0, str(Path(__file__).parents[1]))
    name, sys.argv[1:] = sys.argv[1], runs[0]  # the script looks for its card while it is imported
    script = importlib.import_module(name)
    from gaudi_lm.runtime import user_errors

    ends = []
    for flags in runs:
        log, status, metrics = io.StringIO(), 0, None
        try:
            with contextlib.redirect_stderr(log), user_errors():
                # The handler of the run before holds the stream of the run before.
                logging.basicConfig(stream=log, force=True, format="%(levelname)s %(message)s")
                metrics = script.main(flags)
        except SystemExit as end:
            status = end.code
        except Exception:
            status = 1
            log.write(traceback.format_exc())
        ends.append([status, log.getvalue(), metrics])
    print(json.dumps(ends))


if __name__ == "__main__":
    main()
