"""Screenshots of the page of `fastllama serve` after a real answer: `python -m tools.page_shot --url URL --out DIR`.

Drives a headless Chromium by the DevTools protocol over two pipes, without a package. It takes a picture when the
answer has ended, not after a fixed time; any error or warning in the browser's console is an error.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

COMMANDS = ("chromium", "chromium-browser", "google-chrome")
SHOTS = {  # file -> width, height, color scheme
    "serve-page.png": (1100, 940, "light"),
    "serve-page-phone.png": (400, 760, "dark"),
}
PROMPTS = ["Tell me a story about a fox.", "Is it a happy ending?"]  # what the bundled model was trained on
COLOURS = 64  # colours of a picture: text looks the same, in a third of the bytes
STATE = """(() => {
  const answer = document.querySelector("article.assistant:last-of-type");
  return answer ? {busy: answer.getAttribute("aria-busy"), failure: answer.querySelector(".failure")?.innerText ?? "",
                   text: answer.innerText} : null;
})()"""


def command() -> str | None:
    """Path of the installed Chromium; None without one."""
    return next(filter(None, map(shutil.which, COMMANDS)), None)


class Chromium:
    """One tab of a headless Chromium. complaints: what the page wrote into the console as errors and warnings."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.complaints: list[str] = []
        self._process, self._rest, self._last, self._session = process, b"", 0, {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._session = {"sessionId": session}
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a method of the protocol. Raises RuntimeError with its error, or if the browser ended."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": params, **self._session}
        assert self._process.stdin
        self._process.stdin.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._message()
            if answer.get("id") == self._last:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            if answer.get("method") == "Log.entryAdded" and answer["params"]["entry"]["level"] in ("error", "warning"):
                self.complaints.append(answer["params"]["entry"]["text"])
            if answer.get("method") == "Runtime.exceptionThrown":
                self.complaints.append(answer["params"]["exceptionDetails"]["exception"]["description"])

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def wait(self, expression: str, seconds: float = 120) -> Any:
        """The value of an expression once it is true. Raises TimeoutError."""
        end = time.monotonic() + seconds
        while not (value := self.evaluate(expression)):
            if time.monotonic() > end:
                raise TimeoutError(f"not true within {seconds} s: {expression}")
            time.sleep(0.05)
        return value

    def look(self, width: int, height: int, scheme: str) -> None:
        """Sets the window's size in CSS pixels, and "light" or "dark"."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def open(self, url: str) -> None:
        """Loads a page, and waits until its scripts ran."""
        failed = self.call("Page.navigate", url=url).get("errorText")
        if failed:
            raise RuntimeError(f"{url}: {failed}")
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def picture(self) -> bytes:
        """The window's content as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png", optimizeForSpeed=False)["data"])

    def _message(self) -> dict[str, Any]:
        assert self._process.stdout
        while b"\0" not in self._rest:
            piece = self._process.stdout.read(1 << 16)
            if not piece:
                raise RuntimeError(f"the browser ended with status {self._process.wait()}")
            self._rest += piece
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)


@contextlib.contextmanager
def chromium() -> Iterator[Chromium]:
    """Context manager of a new browser. Raises RuntimeError without an installed one."""
    program = command()
    if program is None:
        raise RuntimeError(f"no browser: none of {', '.join(COMMANDS)} is on PATH")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ["--headless=new", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
        options += ["--remote-debugging-pipe", f"--user-data-dir={profile}"]
        if os.geteuid() == 0:
            options.append("--no-sandbox")  # Chromium's sandbox refuses root; the page is our own
        # it reads commands from descriptor 3 and writes answers to 4
        script = 'exec "$@" 3<&0 4>&1 </dev/null >/dev/null'
        arguments = ["/bin/sh", "-c", script, "sh", program, *options]
        pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
        with subprocess.Popen(arguments, bufsize=0, stdin=pipe, stdout=pipe, stderr=nowhere) as process:
            try:
                yield Chromium(process)
            finally:
                process.terminate()


def shoot(url: str, out: Path, prompts: list[str]) -> None:
    """Writes the pictures, each of a conversation in a new browser. Raises RuntimeError for errors of the page."""
    from PIL import Image  # matplotlib brings it; the tests that drive a browser need none

    for name, (width, height, scheme) in SHOTS.items():
        with chromium() as tab:
            tab.look(width, height, scheme)
            for count, prompt in enumerate(prompts, 1):
                tab.open(f"{url}/?prompt={quote(prompt)}")
                answers = "document.querySelectorAll('article.assistant').length"
                tab.wait(f"{answers} === {count} && {STATE}.busy === 'false'")
                state = tab.evaluate(STATE)
                if state["failure"] or tab.complaints:
                    raise RuntimeError(f"{url}: {state['failure'] or '; '.join(tab.complaints)}")
            picture = Image.open(io.BytesIO(tab.picture())).convert("RGB")
        picture.quantize(COLOURS, dither=Image.Dither.NONE).save(out / name, optimize=True)
        print(f"{out / name}: {(out / name).stat().st_size:,} bytes; the last answer: {state['text']!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8229", help="of the server (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="folder (default: %(default)s)")
    parser.add_argument("--prompts", nargs="+", default=PROMPTS, help="one after the other (default: a story)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    shoot(options.url.rstrip("/"), options.out, options.prompts)


if __name__ == "__main__":
    main()
