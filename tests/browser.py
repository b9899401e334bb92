"""A headless Chromium that tests control, without a package for it: through pipes, by the DevTools protocol."""

import base64
import json
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
FLAGS += ["--remote-debugging-pipe", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
SECONDS = 60  # within which the browser must answer


class Page:
    """A page that Chromium shows.

    Args:
        address: The address of the page.
        profile: A new folder for the files of the browser.
        size: Width and height in pixels.
    """

    def __init__(self, address: str, profile: Path, size: tuple[int, int] = (900, 700)):
        assert CHROMIUM is not None
        self.count, self.events = 0, []
        ours, theirs = os.pipe(), os.pipe()  # Chromium reads its file descriptor 3 and writes to 4
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        redirected = ["bash", "-c", f'exec "$@" 3<&{ours[0]} 4>&{theirs[1]}', "bash", *command]
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        # Chromium writes below HOME, whatever the profile is.
        environment = os.environ | {"HOME": str(profile)}
        self.process = subprocess.Popen(redirected, pass_fds=(ours[0], theirs[1]), env=environment, **silent)
        os.close(ours[0])
        os.close(theirs[1])
        self.commands, self.answers = os.fdopen(ours[1], "wb", buffering=0), os.fdopen(theirs[0], "rb")
        self.overdue = threading.Timer(SECONDS, self.process.kill)
        self.overdue.daemon = True
        self.overdue.start()
        self.session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "DOM", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)
        self.call("Page.navigate", url=address)
        self.wait_for("document.readyState == 'complete'")

    def __enter__(self) -> "Page":
        return self

    def __exit__(self, *_) -> None:
        self.overdue.cancel()
        for pipe in (self.commands, self.answers):
            pipe.close()
        self.process.kill()
        self.process.wait()

    def call(self, method: str, **parameters):
        """Calls a method of the DevTools protocol and returns its result; events before it are kept in `events`."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        self.commands.write(
            json.dumps(message | ({"sessionId": self.session} if self.session else {})).encode() + b"\0"
        )
        while True:
            answer = self.read()
            if answer.get("id") == self.count:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def read(self):
        content = bytearray()
        while (byte := self.answers.read(1)) != b"\0":
            assert byte, "Chromium has ended"
            content += byte
        return json.loads(content)

    def evaluate(self, script: str):
        """Returns the value of a JavaScript expression, which may be a promise."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait_for(self, script: str):
        """Returns the value of a JavaScript expression as soon as it is true."""
        while not (value := self.evaluate(script)):
            time.sleep(0.02)
        return value

    def choose(self, selector: str, file: Path) -> None:
        """Chooses a file in an input, as a user does in the dialog."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(file)], nodeId=node)

    def drop(self, file: Path, x: int, y: int) -> None:
        """Drops a file at a place of the page."""
        data = {"items": [], "files": [str(file)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def problems(self) -> list[str]:
        """The errors that the browser has logged, such as a script that the page's policy forbids."""
        logged = [e["params"]["entry"] for e in self.events if e.get("method") == "Log.entryAdded"]
        thrown = [e["params"] for e in self.events if e.get("method") == "Runtime.exceptionThrown"]
        return [str(entry) for entry in logged if entry["level"] == "error"] + list(map(str, thrown))

    def requested(self) -> set[str]:
        """The addresses that the page has asked for."""
        sent = (e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent")
        return set(sent)

    def screenshot(self) -> bytes:
        """A picture of the page as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
