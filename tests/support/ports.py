"""A port where ranks are to meet."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def reserved_port() -> Iterator[int]:
    """Keep all other processes off a free port while this lasts; rank 0 may listen there, as TCPStore does."""
    with socket.socket() as held:
        held.bind(("", 0))
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # two may have a port where neither listens yet
        yield held.getsockname()[1]
