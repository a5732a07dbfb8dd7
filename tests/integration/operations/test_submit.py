"""The job API's answer without a token, from a local HTTP server."""

from __future__ import annotations

import http.server
import threading

import pytest

from vitray.errors import ClusterError
from vitray.operations.submitting import Cluster as Api


class Answering(http.server.BaseHTTPRequestHandler):
    """A job API that answers with `status`, and sends elsewhere."""

    status = 308

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.send_header("Location", "http://127.0.0.1:1/")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("status", [200, 302, 308, 500, 503])
def test_what_is_or_may_lead_to_an_open_cluster_is_refused(status: int) -> None:
    server = http.server.HTTPServer(
        ("127.0.0.1", 0), type("Said", (Answering,), {"status": status})
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    unsure = f"does not say whether it asks for a token .HTTP {status}."
    with pytest.raises(ClusterError, match="answers without a token" if status == 200 else unsure):
        Api(f"http://127.0.0.1:{server.server_address[1]}")
    server.shutdown()
