"""A file that was read is not held in memory."""

import numpy as np
import pyarrow as pa

from gaudi_lm.data.memory import forget_mapped_pages


def held_of_files() -> int:
    """Resident bytes of this process that belong to files."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssFile:")) * 1024


def test_pages_of_a_file_are_let_go(tmp_path):
    size = 2**26
    path = tmp_path / "a file, with spaces"
    path.write_bytes(np.arange(size // 4, dtype=np.int32).tobytes())
    with pa.memory_map(str(path)) as mapped:
        tokens = np.frombuffer(mapped.read_buffer(), np.int32)
        before = held_of_files()
        total = int(tokens.sum(dtype=np.int64))
        assert held_of_files() - before > 0.9 * size
        forget_mapped_pages([str(tmp_path / "another file")])
        assert held_of_files() - before > 0.9 * size
        forget_mapped_pages([str(path)])
        assert held_of_files() - before < 0.1 * size
        assert int(tokens.sum(dtype=np.int64)) == total == (size // 4 - 1) * (size // 4) // 2
        del tokens
