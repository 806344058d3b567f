"""A TCP proxy that misbehaves on demand: resets, stalls, slows, and cuts after COMMIT was sent.

Knows nothing of the protocol but that the word COMMIT stands in what the client sends.
"""

import contextlib
import socket
import struct
import threading
import time
from types import TracebackType
from typing import Self

_CHUNK = 65536
_RESET = struct.pack("ii", 1, 0)  # linger for no time: close sends RST


class TcpProxy:
    """Listens on `port` of the loopback, forwards to `upstream`'s port there."""

    def __init__(self, upstream: int) -> None:
        self._upstream = upstream
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.delay_seconds = 0.0
        self.cuts = 0
        """So many of the next COMMITs reach the server, whose answer never comes."""
        self._open = threading.Event()
        self._open.set()
        self._pairs: set[_Pair] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._listener.close()
        self._open.set()
        self.reset()

    def reset(self) -> None:
        """Break every connection off with RST."""
        for pair in list(self._pairs):
            pair.reset()

    def stall(self) -> None:
        """Let nothing through, in either direction, until `flow`."""
        self._open.clear()

    def flow(self) -> None:
        """The end of `stall`."""
        self._open.set()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._upstream))
            except OSError:
                client.close()
                continue
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            pair = _Pair(client, server)
            self._pairs.add(pair)
            for source, target in ((client, server), (server, client)):
                threading.Thread(
                    target=self._pump, args=(pair, source, target), daemon=True
                ).start()

    def _pump(self, pair: "_Pair", source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_CHUNK):
                self._open.wait()
                if self.delay_seconds:
                    time.sleep(self.delay_seconds)
                if source is pair.client and self.cuts > 0 and b"COMMIT" in data:
                    self.cuts -= 1
                    pair.cut = True
                elif source is pair.server and pair.cut:
                    break  # the server has committed, and nobody will hear of it
                target.sendall(data)
        pair.reset()
        self._pairs.discard(pair)


class _Pair:
    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client, self.server, self.cut = client, server, False

    def reset(self) -> None:
        for end in (self.client, self.server):
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                end.shutdown(socket.SHUT_RDWR)
            end.close()
