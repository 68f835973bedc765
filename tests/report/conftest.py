"""The runs that the tests of the page read, and a headless Chromium driven through its pipe."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fxq
from fxq.models_zoo import tiny_residual
from fxq.report import write

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE = 120.0
"""Seconds until an answer is given up; the machine may be busy."""

FLAGS = (
    "--headless",
    "--no-sandbox",  # tests may run as root, and the page is our own
    "--disable-gpu",
    "--hide-scrollbars",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-extensions",
    "--disable-background-networking",
    "--remote-debugging-pipe",
)

KEY_CODES = {
    **{"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40},
    **{"Enter": 13, "Escape": 27, "+": 187, "=": 187, "-": 189},
}


def find_browser() -> str | None:
    """The path of an installed Chromium."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One tab.

    Attributes:
        complaints: Everything the page or the browser complained of, as text.
        requests: The addresses it asked for.
    """

    def __init__(self, binary: str, profile: Path, size: tuple[int, int] = (1500, 950)) -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self._count = 0
        self._buffer = b""
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (to_read, to_write)]

        def as_three_and_four() -> None:
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        flags = [*FLAGS, f"--window-size={size[0]},{size[1]}", f"--user-data-dir={profile}"]
        self._process = subprocess.Popen(
            [binary, *flags, "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=as_three_and_four,
            close_fds=False,
        )
        for end in (to_read, to_write, *ends):
            os.close(end)
        self._session = ""
        tab = self._tab()
        attached = self.send("Target.attachToTarget", targetId=tab, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def _tab(self) -> str:
        limit = time.monotonic() + PATIENCE
        while time.monotonic() < limit:
            for target in self.send("Target.getTargets")["targetInfos"]:
                if target["type"] == "page":
                    return str(target["targetId"])
            time.sleep(0.1)
        raise TimeoutError("the browser opened no tab")

    def close(self) -> None:
        with contextlib.suppress(OSError, TimeoutError):
            self._session = ""
            self.send("Browser.close")
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for end in (self._read, self._write):
            os.close(end)

    # ---- the protocol ------------------------------------------------------------------------

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """The answer to a command."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return dict(answer["result"])
            self._notice(answer)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], PATIENCE)
            if not ready:
                raise TimeoutError("the browser does not answer")
            part = os.read(self._read, 1 << 20)
            if not part:
                raise OSError("the browser has gone")
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))

    def _notice(self, event: dict[str, Any]) -> None:
        method, params = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.complaints.append(str(params["exceptionDetails"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("warning", "error"):
            self.complaints.append(str(params["entry"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("warning", "error"):
            self.complaints.append(str(params["args"]))
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])

    # ---- the hand ----------------------------------------------------------------------------

    def open(self, path: Path, fragment: str = "") -> int:
        """The page is open and drawn; the milliseconds it took, by its own clock."""
        self.send("Page.navigate", url=f"{path.resolve().as_uri()}{fragment}")
        self.wait("document.documentElement?.dataset.ready")
        return int(self.evaluate("document.documentElement.dataset.ready"))

    def evaluate(self, expression: str) -> Any:
        """The value of an expression in the page."""
        answer = self.send(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def wait(self, expression: str) -> None:
        """The expression has become true."""
        limit = time.monotonic() + PATIENCE
        while not self.evaluate(expression):
            if time.monotonic() > limit:
                raise TimeoutError(expression)
            time.sleep(0.05)

    def drawn(self) -> None:
        """What was changed is on the screen."""
        self.evaluate(
            "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
        )

    def press(self, key: str) -> None:
        """A key is pressed, where the focus is."""
        known = {"key": key, "windowsVirtualKeyCode": KEY_CODES.get(key, ord(key[0]))}
        text = {"Enter": "\r"}.get(key, key)
        typed = {"text": text} if len(text) == 1 else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", **known, **typed)
        self.send("Input.dispatchKeyEvent", type="keyUp", **known)

    def type(self, words: str) -> None:
        """Text is typed, where the focus is."""
        self.send("Input.insertText", text=words)

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        """The mouse does something at a place."""
        self.send("Input.dispatchMouseEvent", type=f"mouse{kind}", x=x, y=y, **more)

    def click_at(self, x: float, y: float) -> None:
        """A place is clicked."""
        for kind in ("Pressed", "Released"):
            self.mouse(kind, x, y, button="left", clickCount=1)

    def click(self, selector: str) -> None:
        """The middle of an element is clicked."""
        box = self.evaluate(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            " e.scrollIntoView({block: 'nearest'}); const b = e.getBoundingClientRect();"
            " return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        self.click_at(*box)

    def screenshot(self, path: Path) -> bytes:
        """The page as a PNG, also in a file."""
        data = base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"])
        path.write_bytes(data)
        return data


# ---- fixtures --------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a small residual network, one of whose passes folds, one observes, one rounds."""
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    result = fxq.compile(tiny_residual(), images[:1], "aciq-4bit", calibration=[images])
    result.artifact.metadata["model"] = {"spec": "tiny/residual"}
    return result.artifact.save(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser; the test is skipped where none is installed."""
    binary = find_browser()
    if binary is None:
        pytest.skip(f"no browser is installed; any of {', '.join(NAMES)} will do")
    opened = Browser(binary, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture
def page(browser: Browser, folder: Path, tmp_path: Path) -> Browser:
    """The browser with the report of the run open, which has nothing to complain of at the end."""
    browser.open(write(folder, tmp_path / "report.html"))
    return browser
