"""A threading HTTP server that ends the threads of its connections when it is closed."""

from __future__ import annotations

import contextlib
import socket
from http.server import ThreadingHTTPServer
from typing import Any


class ClosingServer(ThreadingHTTPServer):
    """Its clients keep connections open, each of which would keep a thread waiting for more."""

    daemon_threads = True
    connections: set[socket.socket]

    def __init__(self, *args: Any) -> None:
        self.connections = set()
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        super().server_close()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):  # closed meanwhile
                connection.shutdown(socket.SHUT_RDWR)
