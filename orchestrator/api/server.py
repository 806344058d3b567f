"""The application behind a socket: uvicorn in a thread, with limits of time.

Knows nothing of routes or commands.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import Self

import h11
import uvicorn
from anyio import to_thread
from uvicorn.protocols.http.h11_impl import H11Protocol

from orchestrator.api.app import Application
from orchestrator.errors import WorkerError

HEAD_SECONDS = 20.0
IDLE_SECONDS = 30
GRACE_SECONDS = 5
_MOST_HEAD = 64 * 1024
_START_SECONDS = 30.0


def listen(host: str, port: int | None, *, usual: int = 0) -> socket.socket:
    """A socket that listens at that port, 0 being any free one; None: the usual, or any free one.

    Raises WorkerError where that cannot be.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0]
        if port is not None:
            return _bound(family, address[0], port)
        try:
            return _bound(family, address[0], usual)
        except OSError:
            return _bound(family, address[0], 0)
    except OSError as error:
        raise WorkerError("api", f"{host} port {port}: {error.strerror or error}") from error


def _bound(family: int, address: str | int, port: int) -> socket.socket:
    made = socket.create_server((str(address), port), family=family, backlog=1024)
    # Accepted sockets inherit it: else an answer's last piece waits for the reader, some 40 ms.
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


class ApiServer:
    """The application at a socket, in a thread of its own."""

    def __init__(self, app: Application, listening: socket.socket) -> None:
        host, port = listening.getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self._socket = listening
        self._server = _Server(_config(app), app)
        self._thread = threading.Thread(target=self._run, name="penstock-api", daemon=True)
        self._ready = threading.Event()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def alive(self) -> bool:
        """The thread is at work."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Begin; returns once it answers. Raises WorkerError where it does not."""
        self._server.ready = self._ready
        self._thread.start()
        if not self._ready.wait(_START_SECONDS) or not self._server.started:
            raise WorkerError("api", "it did not start; the log says why")

    def stop(self) -> None:
        """Take no more, tell open streams to end, wait a little for what is under way."""
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()

    def _run(self) -> None:
        try:
            self._server.run(sockets=[self._socket])
        finally:
            self._ready.set()


class _Server(uvicorn.Server):
    """uvicorn's, but streams are told to end before it waits for them."""

    def __init__(self, config: uvicorn.Config, app: Application) -> None:
        super().__init__(config)
        self._app = app
        self.ready = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await to_thread.run_sync(self._app.state.context.tails.close)
        await super().shutdown(sockets)


def _config(app: Application) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=_PatientForAWhile,
        loop="asyncio",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=GRACE_SECONDS,
        h11_max_incomplete_event_size=_MOST_HEAD,
    )


class _PatientForAWhile(H11Protocol):
    """uvicorn's, but whoever does not send a whole head in time is closed."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.access_log = False  # its lines have paths and queries; ours do not
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._forget()
        elif self._deadline is None and not self.transport.is_closing():
            self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        self._deadline = self.loop.call_later(HEAD_SECONDS, self._too_late)

    def _forget(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_late(self) -> None:
        self._deadline = None
        if self.conn.their_state is h11.IDLE:
            self.timeout_keep_alive_handler()
