"""A receiver of webhooks, as anyone may write one: a real HTTP server on loopback."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import ssl
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True)
class Received:
    """One POST as it came."""

    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Receiver:
    """Answers with `statuses` in turn, then with 200; a redirect leads to `/elsewhere`."""

    port: int = 0
    secure: bool = False
    statuses: list[int] = field(default_factory=list)
    received: list[Received] = field(default_factory=list)
    came: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def url(self, host: str = "127.0.0.1", path: str = "/hook?token=t") -> str:
        return f"{'https' if self.secure else 'http'}://{host}:{self.port}{path}"


@contextlib.contextmanager
def receiving(
    statuses: Sequence[int] = (), *, certificate: tuple[str, str] | None = None
) -> Iterator[Receiver]:
    """A receiver at work; `certificate` are the files of a chain and of its key."""
    receiver = Receiver(statuses=list(statuses), secure=certificate is not None)

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            receiver.received.append(Received(self.path, headers, body))
            status = receiver.statuses.pop(0) if receiver.statuses else 200
            self.send_response(status)
            if 300 <= status < 400:
                self.send_header("location", receiver.url(path="/elsewhere"))
            self.end_headers()
            receiver.came.release()

        def do_GET(self) -> None:
            receiver.received.append(Received(self.path, {}, b""))

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    receiver.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield receiver
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def is_signed(message: Received, key: bytes) -> bool:
    """The convention's own words, written a second time: https://www.standardwebhooks.com."""
    headers = message.headers
    text = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.{message.body.decode()}"
    digest = hmac.new(key, text.encode(), hashlib.sha256).digest()
    expected = "v1," + base64.b64encode(digest).decode()
    given = headers["webhook-signature"].split(" ")
    return any(hmac.compare_digest(expected, each) for each in given)
