"""Headless Chromium by its DevTools protocol, over pipes: what a page asked for, said and looks
like.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BROWSER = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
WAIT_S = 60.0


@dataclass
class Visit:
    """requests: URLs other than the page and data:. said: console, log and errors of the page.
    dialogs: what it asked.
    """

    width: int = 0  # of the content
    requests: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)
    picture: bytes = b""


class Browser:
    def __init__(self, profile: Path) -> None:
        assert BROWSER is not None
        (theirs_in, self._to), (self._from, theirs_out) = os.pipe(), os.pipe()
        flags = (
            f"--headless=new --no-sandbox --disable-gpu --hide-scrollbars --remote-debugging-pipe "
            f"--user-data-dir={profile}"
        )
        # Chromium reads from 3 and writes to 4
        line = f"exec {BROWSER} {flags} --no-first-run 3<&{theirs_in} 4>&{theirs_out}"
        self._process = subprocess.Popen(
            ["bash", "-c", line], pass_fds=(theirs_in, theirs_out), stderr=subprocess.DEVNULL
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._held, self._number, self._events = b"", 0, list[dict[str, Any]]()

    def visit(
        self, page: Path, width: int, values: tuple[str, ...] = (), scheme: str = "light"
    ) -> Visit:
        """Open a page in a tab of its own, so wide. values: expressions to evaluate in it."""
        self._events.clear()
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        tab = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Network", "Runtime", "Log", "Page"):
            self._call(f"{domain}.enable", tab)
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", tab, **size)
        self._call(
            "Emulation.setEmulatedMedia",
            tab,
            features=[{"name": "prefers-color-scheme", "value": scheme}],
        )
        self._call("Page.navigate", tab, url=page.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._read()
        found = Visit()
        found.values = [self._evaluate(tab, value) for value in values]
        found.width = self._evaluate(
            tab, "Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)"
        )
        shot = self._call("Page.captureScreenshot", tab, captureBeyondViewport=True)
        found.picture = base64.b64decode(shot["data"])
        for event in self._events:
            told = event.get("params", {})
            match event["method"]:
                case "Network.requestWillBeSent":
                    url = told["request"]["url"]
                    found.requests += (
                        [] if url == page.as_uri() or url.startswith("data:") else [url]
                    )
                case "Runtime.consoleAPICalled" | "Runtime.exceptionThrown" | "Log.entryAdded":
                    found.said.append(json.dumps(told))
                case "Page.javascriptDialogOpening":
                    found.dialogs.append(told["message"])
        self._call("Target.closeTarget", targetId=target)
        return found

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._to)
        os.close(self._from)

    def _evaluate(self, tab: str, expression: str) -> Any:
        """The value of an expression, or of the promise that it is."""
        options = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        return self._call("Runtime.evaluate", tab, **options)["result"].get("value")

    def _call(self, method: str, tab: str | None = None, **arguments: object) -> dict[str, Any]:
        self._number += 1
        message = {
            "id": self._number,
            "method": method,
            "params": arguments,
            **({"sessionId": tab} if tab else {}),
        }
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._number:
            pass
        assert "error" not in answer, answer["error"]
        result: dict[str, Any] = answer["result"]
        return result

    def _read(self) -> dict[str, Any]:
        until = time.monotonic() + WAIT_S
        while b"\0" not in self._held:
            ready, _, _ = select.select([self._from], [], [], max(0, until - time.monotonic()))
            data = os.read(self._from, 1 << 20) if ready else b""
            assert data, "Chromium does not answer"
            self._held += data
        message, _, self._held = self._held.partition(b"\0")
        told: dict[str, Any] = json.loads(message)
        if "method" in told:
            self._events.append(told)
        return told
