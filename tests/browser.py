"""Debian's Chromium, without a window, told what to do by its DevTools protocol."""

import contextlib
import itertools
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tornado import gen
from tornado.ioloop import IOLoop
from tornado.websocket import WebSocketClientConnection, websocket_connect

SIZE = (1400, 900)
_SECONDS = 60.0  # for an answer, on a busy machine


class Browser:
    """One page. `messages`: what it said on its console, and what it refused to load or to run."""

    def __init__(self, loop: IOLoop, socket: WebSocketClientConnection) -> None:
        self._loop = loop
        self._socket = socket
        self._numbers = itertools.count(1)
        self.messages: list[str] = []
        self._tell("Page.enable")
        self._tell("Runtime.enable")
        self._tell("Log.enable")
        self.resize(*SIZE)

    def resize(self, width: int, height: int) -> None:
        """The window, CSS px."""
        self._tell("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def medium(self, name: str) -> None:
        """Lay the page out for `screen` or for `print`."""
        self._tell("Emulation.setEmulatedMedia", media=name)

    def _tell(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message = json.dumps({"id": number, "method": method, "params": parameters})
        self._loop.run_sync(lambda: self._socket.write_message(message))
        while True:
            said = json.loads(str(self._loop.run_sync(self._socket.read_message, timeout=_SECONDS)))
            if said.get("id") == number:
                assert "error" not in said, said["error"]
                result: dict[str, Any] = said["result"]
                return result
            if said["method"] in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
                self.messages.append(json.dumps(said["params"]))

    def open(self, address: str) -> None:
        """Show a page, and wait until it is read and its scripts have run: before that it has rows, but no handlers."""
        self._tell("Page.navigate", url=address)
        self.wait_for("document.readyState === 'complete'")

    def evaluate(self, expression: str) -> Any:
        """The value of JavaScript on the page."""
        said = self._tell("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in said, said["exceptionDetails"]
        return said["result"].get("value")

    def wait_for(self, condition: str) -> Any:
        """The value of JavaScript on the page as soon as it is true; an error, as of a page half read, is not."""
        until = time.monotonic() + _SECONDS
        while not (value := self.evaluate(f"(() => {{ try {{ return {condition}; }} catch {{ return null; }} }})()")):
            assert time.monotonic() < until, f"not so: {condition}; the console has {self.messages}"
            time.sleep(0.03)
        return value

    def point(self, x: float, y: float) -> None:
        """Move the mouse, CSS px."""
        self._tell("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def tap(self, x: float, y: float) -> None:
        """Touch the screen for a moment, CSS px."""
        self._tell("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self._tell("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def press(self, key: str, code: int) -> None:
        """Press and release a key. code: its virtual key code, as that of its letter."""
        named = f"Key{key.upper()}" if len(key) == 1 else key
        for kind in ("keyDown", "keyUp"):
            self._tell("Input.dispatchKeyEvent", type=kind, key=key, code=named, windowsVirtualKeyCode=code)


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A page of a new Chromium; the test is skipped where there is none."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("needs Chromium (Debian's package chromium), which is not installed")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-port=0"]
        process = subprocess.Popen(
            [program, *options, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        loop = IOLoop(make_current=False)
        try:
            page = _first_page(Path(profile, "DevToolsActivePort"))
            socket = loop.run_sync(lambda: websocket_connect(page, max_message_size=2**26), timeout=_SECONDS)
            yield Browser(loop, socket)
            loop.add_callback(socket.close)
            loop.run_sync(lambda: gen.sleep(0))
        finally:
            process.terminate()
            process.wait()
            loop.close()


def _first_page(port: Path) -> str:
    """The address at which Chromium takes commands for its first page. port: the file in which it says its port."""
    until = time.monotonic() + _SECONDS
    while not port.is_file() or not port.read_text():
        assert time.monotonic() < until, "Chromium did not start"
        time.sleep(0.05)
    with urllib.request.urlopen(f"http://127.0.0.1:{port.read_text().split()[0]}/json/list") as answer:
        targets = json.load(answer)
    return str(next(target["webSocketDebuggerUrl"] for target in targets if target["type"] == "page"))
