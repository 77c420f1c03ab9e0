"""A real browser by the WebDriver protocol: Debian's chromium and its chromedriver, driven with the standard library.

https://www.w3.org/TR/webdriver2/ - the few commands that a rater's way needs.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
KEYS = {
    "left": "\ue012",
    "up": "\ue013",
    "right": "\ue014",
    "down": "\ue015",
    "enter": "\ue007",
    "tab": "\ue004",
    "backspace": "\ue003",
    "space": "\ue00d",
}
ARGUMENTS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]


def why_absent() -> str:
    """Why there is no browser to test with; "" where there is one."""
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"no real browser: {' and '.join(missing)} not installed" if missing else ""


class Browser:
    """One window of a headless browser; more by `new_window`."""

    def __init__(self, folder: Path) -> None:
        self._driver = subprocess.Popen(
            ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self._driver.stdout is not None
        port = next(
            found[1]
            for line in self._driver.stdout
            if (found := re.search(r"successfully on port (\d+)", line))
        )
        self._root = f"http://127.0.0.1:{port}/session"
        options = {"args": [*ARGUMENTS, f"--user-data-dir={folder}"], "binary": shutil.which("chromium")}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options}
        made = self._call("POST", "", {"capabilities": {"alwaysMatch": wanted}})
        self._root += f"/{made['sessionId']}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        try:
            self._call("DELETE", "")
        finally:
            self._driver.terminate()
            self._driver.wait(timeout=30)
            assert self._driver.stdout is not None
            self._driver.stdout.close()

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = json.dumps(body or {}).encode() if method == "POST" else None
        request = urllib.request.Request(self._root + path, data, method=method)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.loads(answer.read())["value"]

    def resize(self, width: int, height: int) -> None:
        """A screen of this size, in the pixels of the page, whatever the window's own least width is."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        body = {"cmd": "Emulation.setDeviceMetricsOverride", "params": size}
        self._call("POST", "/goog/cdp/execute", body)

    def open(self, address: str) -> None:
        self._call("POST", "/url", {"url": address})

    def back(self) -> None:
        self._call("POST", "/back")

    def reload(self) -> None:
        self._call("POST", "/refresh")

    def script(self, text: str, *arguments: object) -> Any:
        return self._call("POST", "/execute/sync", {"script": text, "args": list(arguments)})

    def click(self, css: str) -> None:
        """A click of the mouse in the middle of what a selector finds first."""
        found = self._call("POST", "/element", {"using": "css selector", "value": css})
        self._call("POST", f"/element/{found[ELEMENT]}/click")

    def press(self, *keys: str) -> None:
        """Keys on whatever has the focus, by name or letter."""
        actions = [
            {"type": kind, "value": KEYS.get(key, key)} for key in keys for kind in ("keyDown", "keyUp")
        ]
        self._call("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def text(self) -> str:
        """What the page shows."""
        return str(self.script("return document.body.innerText"))

    def new_window(self) -> str:
        """A further window, in which everything happens from now on; returns its name."""
        return self.use(str(self._call("POST", "/window/new", {"type": "tab"})["handle"]))

    def window(self) -> str:
        return str(self._call("GET", "/window"))

    def use(self, window: str) -> str:
        self._call("POST", "/window", {"handle": window})
        return window

    def wait(self, is_so: Callable[[], bool], seconds: float = 60.0) -> None:
        """Wait until something is so; an AssertionError shows the page where it never is."""
        end = time.monotonic() + seconds
        while not is_so():
            assert time.monotonic() < end, self.text()
            time.sleep(0.02)
