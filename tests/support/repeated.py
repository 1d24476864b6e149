"""The main function of a script, several times in one process: for many runs, each of which takes less than to begin.

python tests/support/repeated.py SCRIPT FILE     (by `running.run_repeatedly`; FILE has a JSON list of lists of flags)

Before the output of each run, and after the last, both streams have a line with MARK.
"""

import importlib
import json
import sys
import traceback
from pathlib import Path

MARK = "\x1e"


def main() -> None:
    from gaudi_lm.errors import user_errors

    name, path = sys.argv[1:]
    sys.path[0] = str(Path(__file__).parents[2])
    runs = json.loads(Path(path).read_text())
    sys.argv[:] = [f"{name}.py", *(runs[0] if runs else [])]
    script, status = importlib.import_module(name), 0
    for flags in runs:
        print(MARK, status, flush=True)
        print(MARK, file=sys.stderr, flush=True)
        sys.argv[:], status = [f"{name}.py", *flags], 0
        try:
            with user_errors():
                script.main()
        except SystemExit as end:
            status = end.code
        except Exception:
            traceback.print_exc()
            status = 1
    print(MARK, status, flush=True)
    print(MARK, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
