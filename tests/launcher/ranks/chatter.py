"""A rank that prints numbered lines on both streams: as many as its argument says, or without end."""

import itertools
import sys

limit = int(sys.argv[1]) if len(sys.argv) > 1 else None
for number in itertools.islice(itertools.count(), limit):
    print(f"out {number}")
    print(f"err {number}", file=sys.stderr)
