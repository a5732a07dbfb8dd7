"""An HTTP proxy in front of an S3 server that misbehaves on demand: errors, lost answers, cut and
slow bodies, dropped headers.
"""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

FORWARD, LOSE, CUT, SLOW, FLIP = (
    0,
    -1,
    -2,
    -3,
    -4,
)  # any other answer of a rule is an HTTP status to give instead of forwarding
SLOW_S = 2.0


@dataclass(frozen=True)
class Call:
    method: str
    path: str
    headers: dict[str, str]


@dataclass
class Proxy:
    """url: its endpoint. rule: what becomes of a call. calls: every request that came, in order."""

    url: str = ""
    rule: Callable[[Call], int] = lambda call: FORWARD
    drop_headers: frozenset[str] = frozenset()
    calls: list[Call] = field(default_factory=list)

    def count(self, method: str, part: str = "") -> int:
        return sum(call.method == method and part in call.path for call in self.calls)


@contextmanager
def proxied(backend: str) -> Iterator[Proxy]:
    """A running proxy to the server at `backend`."""
    proxy, target = Proxy(), urlsplit(backend)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            call = Call(self.command, self.path, {k.lower(): v for k, v in self.headers.items()})
            proxy.calls.append(call)
            verdict = proxy.rule(call)
            if verdict > 0:
                self.answer(verdict, [], b"")
                return
            headers = {
                k: v
                for k, v in self.headers.items()
                if k.lower() not in proxy.drop_headers | {"expect", "connection"}
            }
            upstream = http.client.HTTPConnection(str(target.hostname), target.port, timeout=30)
            upstream.request(self.command, self.path, body, headers)
            answer = upstream.getresponse()
            data = answer.read()
            upstream.close()
            if verdict == LOSE:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            self.answer(answer.status, answer.getheaders(), data, verdict)

        def answer(
            self, status: int, headers: list[tuple[str, str]], data: bytes, verdict: int = FORWARD
        ) -> None:
            self.send_response_only(status)
            own = {"transfer-encoding", "connection"} | (
                set() if self.command == "HEAD" else {"content-length"}
            )
            for name, value in headers:
                if name.lower() not in own:
                    self.send_header(name, value)
            if self.command != "HEAD" or not headers:
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if verdict == FLIP and data:
                data = (
                    bytes(data[: len(data) // 3])
                    + bytes([data[len(data) // 3] ^ 4])
                    + data[len(data) // 3 + 1 :]
                )
            half = len(data) // 2 if verdict in (CUT, SLOW) else len(data)
            self.wfile.write(data[:half])
            if verdict == CUT:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            if verdict == SLOW:
                time.sleep(SLOW_S)
            self.wfile.write(data[half:])

        def log_message(self, format: str, *args: object) -> None:
            """Quiet: the calls are kept."""

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = serve

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
    )
    thread.start()
    proxy.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
