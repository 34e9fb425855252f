"""A real headless Chromium, spoken to in its own protocol over two pipes; nothing to install but the browser."""

from __future__ import annotations

import base64
import fcntl
import io
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from PIL import Image

COMMAND = next((name for name in ("chromium", "chromium-browser", "google-chrome") if shutil.which(name)), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync",
    "--no-first-run", "--window-size=1100,900", "--remote-debugging-pipe",
)  # fmt: skip


class Browser:
    """One page of a headless Chromium, with a mouse.

    Args:
        profile: folder for the browser's files.
        timeout: seconds to wait for an answer or a condition.
    """

    def __init__(self, profile: Path, timeout: float = 60.0) -> None:
        assert COMMAND is not None, "no Chromium"
        self.timeout = timeout
        # The browser reads commands from file descriptor 3 and writes answers to 4, so ours must be others.
        ends = [*os.pipe(), *os.pipe()]
        commands, self._commands, self._answers, answers = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
        for end in ends:
            os.close(end)
        script = f'exec "$@" 3<&{commands} 4>&{answers}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, "browser", COMMAND, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(commands, answers), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(commands)
        os.close(answers)
        self._buffer, self._numbers, self._session = b"", itertools.count(1), None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._commands)
        os.close(self._answers)

    def call(self, method: str, **params: Any) -> Any:
        """The answer to a command of the protocol; events in between are passed over."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + self.timeout
        while True:
            while b"\0" not in self._buffer:
                if not select.select([self._answers], [], [], max(0.0, end - time.monotonic()))[0]:
                    raise TimeoutError(f"{method}: no answer in {self.timeout} s")
                self._buffer += os.read(self._answers, 1 << 20)
            raw, _, self._buffer = self._buffer.partition(b"\0")
            answer = json.loads(raw)
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def open(self, url: str) -> None:
        """Load a page and wait until it is complete."""
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def read(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, condition: str) -> None:
        """Wait until a JavaScript condition holds."""
        end = time.monotonic() + self.timeout
        while not self.read(f"Boolean({condition})"):
            if time.monotonic() > end:
                raise TimeoutError(f"{condition}: not in {self.timeout} s")
            time.sleep(0.1)

    def box(self, element: str, frame: str = "null") -> tuple[float, float, float, float]:
        """Left, top, width and height of an element on the page, given by a JavaScript expression.

        Args:
            frame: the expression of the iframe that it is in, if any.
        """
        inside = f"const e = ({element}).getBoundingClientRect(), f = {frame}"
        offset = "const o = f ? f.getBoundingClientRect() : {left: 0, top: 0}"
        result = "return [e.left + o.left, e.top + o.top, e.width, e.height]"
        return tuple(self.read(f"(() => {{ {inside}; {offset}; {result} }})()"))  # type: ignore[return-value]

    def mouse(self, kind: str, x: float, y: float, held: bool = False) -> None:
        """A mouse event: "mouseMoved", "mousePressed" or "mouseReleased"; ``held`` moves with the button down."""
        down = held or kind == "mousePressed"
        button = "left" if down or kind == "mouseReleased" else "none"
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, buttons=int(down), clickCount=1)

    def click(self, element: str, until: str = "true") -> None:
        """Bring an element into view and click its middle with the mouse.

        An element that is not there (yet, or because the click before this one took effect late) is waited for.

        Args:
            until: a JavaScript condition; a page whose scripts are still starting may miss the first clicks.
        """
        # In one step, since a page may replace the element at any time.
        place = f"(() => {{ const e = {element}; if (!e) return null;"
        place += " e.scrollIntoView({block: 'center', behavior: 'instant'});"
        place += " const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2] })()"
        end, clicked = time.monotonic() + self.timeout, False
        while time.monotonic() < end:
            if middle := self.read(place):
                for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
                    self.mouse(kind, *middle)
                clicked = True
            patience = time.monotonic() + 2  # a second click may undo the first: close the menu that it opens
            while time.monotonic() < patience:
                if clicked and self.read(f"Boolean({until})"):
                    return
                time.sleep(0.1)
        raise TimeoutError(f"{until}: not in {self.timeout} s of clicking {element}")

    def drag(self, x: float, y: float, to_x: float, pieces: int = 8) -> None:
        """Press the mouse at a place, move it sideways in pieces, and let go."""
        self.mouse("mouseMoved", x, y)
        self.mouse("mousePressed", x, y)
        for i in range(1, pieces + 1):
            self.mouse("mouseMoved", x + (to_x - x) * i / pieces, y, held=True)
        self.mouse("mouseReleased", to_x, y)

    def picture(self, box: tuple[float, float, float, float]) -> Image.Image:
        """What is shown at a place of the page: left, top, width, height."""
        clip = {**dict(zip(("x", "y", "width", "height"), box, strict=True)), "scale": 1}
        data = self.call("Page.captureScreenshot", format="png", clip=clip)["data"]
        return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
