"""Ports of loopback that nobody else gets while a test has them, also while nobody listens there."""

from __future__ import annotations

import socket
import sys


class HeldPort:
    """A free port, kept for whoever listens with SO_REUSEADDR, which gRPC's servers and most others set; used with `with`, or closed.

    A socket that is bound and does not listen keeps the system from giving the port to anybody who asks for any, or who dials. Connections
    to it are refused. Where the system is no Linux it lets nobody listen beside such a socket: there the port is free, and not kept.
    """

    def __init__(self) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        if not sys.platform.startswith("linux"):
            self.close()

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> HeldPort:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
