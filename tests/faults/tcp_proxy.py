"""A TCP proxy that misbehaves on demand: resets, stalls, slows, and cuts after COMMIT was sent.

Of the protocol it knows that COMMIT and INSERT stand as words in what the client sends, and that
psycopg sends a statement that it has prepared by its name alone.
"""

import contextlib
import re
import socket
import struct
import threading
import time
from types import TracebackType
from typing import Self

_CHUNK = 65536
_INSERT = b"INSERT INTO chunks"
_PREPARED = re.compile(rb"(_pg3_\d+\x00)" + _INSERT)
_TAIL = 64  # bytes of what came before that a word may have begun in
_RESET = struct.pack("ii", 1, 0)  # linger for no time: close sends RST


class TcpProxy:
    """Listens on `port` of the loopback, forwards to `upstream`'s port there."""

    def __init__(self, upstream: int) -> None:
        self._upstream = upstream
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.delay_seconds = 0.0
        self.cuts = 0
        """So many of the next COMMITs of transactions that inserted chunks reach the server, whose
        answer never comes."""
        self.cut = 0  # so many have been
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
                if source is pair.client and pair.commits_chunks(data) and self.cuts > 0:
                    self.cuts, self.cut = self.cuts - 1, self.cut + 1
                    pair.cut = True
                elif source is pair.server and pair.cut:
                    break  # the server has committed, and nobody will hear of it
                target.sendall(data)
        pair.reset()
        self._pairs.discard(pair)


class _Pair:
    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client, self.server, self.cut = client, server, False
        self._names: set[bytes] = set()
        self._inserted, self._tail = False, b""

    def commits_chunks(self, data: bytes) -> bool:
        """Whether the client ends a transaction here in which it has inserted chunks."""
        data = self._tail + data
        self._names |= set(_PREPARED.findall(data))
        sent = _INSERT in data or any(name in data for name in self._names)
        inserted = self._inserted = self._inserted or sent
        over = b"COMMIT\x00" in data or b"ROLLBACK\x00" in data
        if over:
            self._inserted = False
        self._tail = b"" if over else data[-_TAIL:]
        return inserted and b"COMMIT\x00" in data

    def reset(self) -> None:
        for end in (self.client, self.server):
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                end.shutdown(socket.SHUT_RDWR)
            end.close()
