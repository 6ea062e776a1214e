"""Headless Chromium, driven through its DevTools protocol over two pipes: nothing to install but the browser."""

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page:
    """A page and what its console said."""

    def __init__(self, write: Any, read: Any) -> None:
        self._write, self._read, self._number, self._session = write, read, 0, None
        self.errors: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command and its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        told = message | ({"sessionId": self._session} if self._session else {})
        self._write.write(json.dumps(told).encode() + b"\0")
        self._write.flush()
        while True:
            found = self._next()
            if found.get("id") == self._number:
                assert "error" not in found, found["error"]
                return found["result"]

    def _next(self) -> dict[str, Any]:
        data = bytearray()
        while (byte := self._read.read(1)) != b"\0":
            assert byte, "the browser has gone"
            data += byte
        found = json.loads(data)
        about = found.get("params", {})
        if found.get("method") == "Runtime.exceptionThrown":
            self.errors.append(str(about["exceptionDetails"]))
        elif found.get("method") == "Log.entryAdded" or about.get("type") in ("error", "warning", "assert"):
            self.errors.append(str(about))
        elif found.get("method") == "Network.requestWillBeSent":
            url = about["request"]["url"]
            self.errors += [] if url.startswith(("file://", "data:")) else [f"asks for {url}"]
        return found

    def open(self, path: Path, width: int, dark: bool = False) -> None:
        """Load a file as a screen of this width sees it."""
        narrow = width < 600
        metrics = {"width": width, "height": 844 if narrow else 900, "deviceScaleFactor": 1, "mobile": narrow}
        self.send("Emulation.setDeviceMetricsOverride", **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Page.navigate", url=path.absolute().as_uri())
        while self._next().get("method") != "Page.loadEventFired":
            pass

    def __call__(self, script: str) -> Any:
        """What a script evaluates to. Raises AssertionError where it throws."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def click(self, element: str) -> None:
        """As a mouse would, at the middle of the first rectangle of what the script `element` gives."""
        place = (
            f"(() => {{ const at = {element}; at.scrollIntoView({{block: 'center'}}); const r = at.getClientRects()[0];"
        )
        x, y = self(f"{place} return [r.x + r.width / 2, r.y + r.height / 2]; }})()")
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str) -> None:
        """A key."""
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def type(self, text: str) -> None:
        """A text into what has the focus."""
        self.send("Input.insertText", text=text)

    def screenshot(self, path: Path, whole: bool = True) -> None:
        """The page as a PNG."""
        if whole:  # as high as the page, so that nothing sticks to the end of a smaller screen
            size = self("({width: innerWidth, height: document.documentElement.scrollHeight})")
            self.send("Emulation.setDeviceMetricsOverride", **size, deviceScaleFactor=1, mobile=False)
        taken = self.send("Page.captureScreenshot")
        path.write_bytes(base64.b64decode(taken["data"]))


@contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A browser with one page; `profile` is a folder for it."""
    assert CHROMIUM
    to_read, write = os.pipe()
    read, to_write = os.pipe()
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
    command = [CHROMIUM, "--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-first-run", *options]
    # Chromium reads commands from descriptor 3 and answers on 4.
    process = subprocess.Popen(
        ["bash", "-c", f'exec "$@" 3<&{to_read} 4>&{to_write} 2>/dev/null', "bash", *command],
        pass_fds=(to_read, to_write),
        start_new_session=True,
    )
    os.close(to_read)
    os.close(to_write)
    with os.fdopen(write, "wb") as pipe, os.fdopen(read, "rb") as answers:
        try:
            yield Page(pipe, answers)
        finally:
            process.terminate()
            process.wait(20)
