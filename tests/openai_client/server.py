"""A server on the loopback that plays streams: each chunk as an event, then `[DONE]`.

The transport is that of the reference's section 3.10; what is played is handed in.
"""

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Streams = Mapping[str, Sequence[Mapping[str, Any]]]


@contextmanager
def playing(streams: Streams) -> Iterator[str]:
    """The base URL under which a request for the model NAME gets the stream of that name."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(streams))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _handler(streams: Streams) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked = self.path == "/v1/chat/completions" and body["stream"] is True
            self.send_response(200 if asked else 404)
            self.send_header("Content-Type", "text/event-stream; charset=utf-8")
            self.end_headers()
            for chunk in streams[body["model"]] if asked else ():
                data = json.dumps(chunk, ensure_ascii=False, separators=(",", ":"))
                self.wfile.write(f"data: {data}\n\n".encode())
            self.wfile.write(b"data: [DONE]\n\n")

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler
