"""A headless Chromium driven over the DevTools protocol's pipe: no driver, no port, no package."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def find() -> str | None:
    """Path of a Chromium; the variable CHROMIUM goes first."""
    return os.environ.get("CHROMIUM") or next((p for n in NAMES if (p := shutil.which(n))), None)


class Page:
    """One tab. `errors` gathers exceptions, console errors and refused loads; `requests` every address asked for."""

    def __init__(self, browser: str, folder: Path, *, width=1360, height=900, dark=False, flags=()):
        to_us, theirs_out = os.pipe()
        theirs_in, from_us = os.pipe()
        # The browser reads commands from descriptor 3 and writes to 4. Ours are first moved out of the way of both.
        held = [os.dup2(fd, n) for fd, n in ((theirs_in, 203), (theirs_out, 204))]
        os.close(theirs_in), os.close(theirs_out)
        command = [browser, "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu",
                   "--mute-audio", "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking",
                   "--autoplay-policy=no-user-gesture-required", f"--user-data-dir={folder / 'profile'}",
                   f"--window-size={width},{height}", *flags, "about:blank"]  # fmt: skip
        self.process = subprocess.Popen(
            ["bash", "-c", 'exec "$@" 3<&203 4>&204 203<&- 204>&-', "bash", *command], pass_fds=held,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "HOME": str(folder)},
        )  # fmt: skip
        for fd in held:
            os.close(fd)
        self._read, self._write, self._rest, self._id = to_us, from_us, b"", 0
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)

    def call(self, method: str, **params) -> dict:
        self._id += 1
        message = {"id": self._id, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._id:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def _next(self, seconds: float = 60) -> dict:
        end = time.monotonic() + seconds
        while b"\0" not in self._rest:
            if not select.select([self._read], [], [], max(0, end - time.monotonic()))[0]:
                raise TimeoutError("the browser does not answer")
            part = os.read(self._read, 2**20)
            if not part:
                raise RuntimeError("the browser ended")
            self._rest += part
        line, self._rest = self._rest.split(b"\0", 1)
        message = json.loads(line)
        params = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(params["exceptionDetails"])[:2000])
        if message.get("method") == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.errors.append(json.dumps(params["args"])[:2000])
        if message.get("method") == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(json.dumps(params["entry"])[:2000])
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"][:200])
        return message

    def open(self, path: Path) -> None:
        """Open a file from file:// and wait until the page says that it is drawn."""
        self.visit(path.resolve().as_uri())

    def visit(self, url: str) -> None:
        """Open an address and wait until the page says that it is drawn."""
        self.call("Page.navigate", url=url)
        self.until("document.documentElement?.dataset.ready === 'true'")

    def js(self, expression: str):
        """Value of an expression; a promise is awaited."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"])[:2000])
        return answer["result"].get("value")

    def until(self, expression: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not self.js(expression):
            if time.monotonic() > end:
                raise TimeoutError(f"never true: {expression}; errors: {self.errors}")
            time.sleep(0.05)

    def click(self, selector: str) -> None:
        """A real click in the middle of the element."""
        x, y = self.middle(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def hover(self, selector: str) -> None:
        x, y = self.middle(selector)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def middle(self, selector: str) -> tuple[float, float]:
        found = self.js(f"""(() => {{ const e = document.querySelector({json.dumps(selector)}); if (!e) return null;
            e.scrollIntoView({{block: "center"}}); const r = e.getClientRects()[0];
            return [r.left + r.width / 2, r.top + r.height / 2]; }})()""")
        assert found, f"no element {selector}"
        return tuple(found)

    def screenshot(self, path: Path, whole: bool = False) -> None:
        clip = {"clip": {**self.call("Page.getLayoutMetrics")["cssContentSize"], "scale": 1}} if whole else {}
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole, **clip)
        path.write_bytes(base64.b64decode(answer["data"]))

    def close(self) -> None:
        try:
            self.session = None
            self.call("Browser.close")
            self.process.wait(20)
        except (RuntimeError, TimeoutError, OSError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        finally:
            os.close(self._read), os.close(self._write)
