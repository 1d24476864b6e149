"""A script on a disk that gets full, once for each size, all in one process that has done the imports.

    unshare --user --map-root-user --mount python tests/support/full_disk.py FOLDER SIZES FLAGS... > ends.json

A tmpfs of so many kilobytes is mounted on FOLDER, and ``run_clm.py`` runs with ``--output_dir FOLDER/out``; then the
disk is made large enough, and the run is started again. For each size: both ends, and what lay there in between.
"""

import contextlib
import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import warm


def forked(script, flags: list[str]) -> tuple[int, str]:
    """Exit status and standard error of a run in a child."""
    with tempfile.TemporaryFile(dir="/dev/shm") as errors:
        if not (pid := os.fork()):
            os.dup2(errors.fileno(), 2)
            sys.argv[1:] = flags
            status = 1
            with contextlib.suppress(BaseException):
                try:
                    script.run_script(script.main)
                except SystemExit as end:
                    status = end.code or 0
                except BaseException:
                    sys.excepthook(*sys.exc_info())
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        errors.seek(0)
        return status, errors.read().decode()


def main() -> None:
    folder, sizes, flags = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:]
    flags += ["--output_dir", str(folder / "out")]
    sys.argv[1:] = flags
    sys.path.insert(0, str(Path(__file__).parents[2]))
    import run_clm

    for module in warm.LATER + warm.LIBRARIES:
        importlib.import_module(module)
    gc.freeze()
    ends = []
    for size in sizes:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", folder], check=True)
        end = {"size": size, "first": forked(run_clm, flags)}
        end["left"] = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
        subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)
        end["second"] = forked(run_clm, flags)
        end["weights"] = (folder / "out" / "model.safetensors").read_bytes().hex() if not end["second"][0] else ""
        ends.append(end)
        subprocess.run(["umount", folder], check=True)
    print(json.dumps(ends))


if __name__ == "__main__":
    main()
