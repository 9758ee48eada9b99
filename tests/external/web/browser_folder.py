"""A folder for transformers.js in Chromium, with packages of node_modules in the place of a network's."""

import base64
import functools
import http.server
import json
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from browsing import HERE, STEP
from playwright.sync_api import Browser, Page, Route

from jina_vlm_tools.engines.browser_folder import PAGE


NETWORK = "https://cdn.jsdelivr.net/npm/"
MODULES = HERE / "node_modules"
LOADED = 120_000  # ms that the model may take to load, on a busy machine
# What the page's script does with a chat whose images are named by their places in `files`
ANSWER = """
async ({ files, messages, options }) => {
  const { JinaVLM, readImage } = await import("./jina_vlm.js");
  window.loaded ??= await JinaVLM.load(".");
  const images = await Promise.all(
    files.map(async (file) => readImage(await (await fetch(`data:;base64,${file}`)).blob())),
  );
  const chat = messages.map(({ role, content }) => ({
    role,
    content: content.map((part) => (part.type === "image" ? { type: "image", image: images[part.image] } : part)),
  }));
  const inputs = window.loaded.prepare(chat);
  let streamed = "";
  const stop = new AbortController();
  const onText = (piece) => {
    streamed += piece;
    if (options.stopAtOnce) stop.abort();
  };
  const answer = await window.loaded.answer(chat, { onText, signal: stop.signal, ...options });
  const list = (tensor) => tensor?.tolist().map((row) => row.map(Number));
  return { ...answer, streamed, input_ids: list(inputs.input_ids), tile_positions: list(inputs.tile_positions) };
}
"""


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The URL of a folder, as `python -m http.server` serves it."""
    handler = functools.partial(_Quiet, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


class Visitor:
    """Somebody with a folder's page open."""

    def __init__(self, browser: Browser, url: str):
        self.context = browser.new_context()
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(STEP)
        self.problems: list[str] = []
        self.brought: list[str] = []  # what a network would have brought
        self.page.on("pageerror", lambda error: self.problems.append(f"script: {error}"))
        self.context.route(lambda address: not address.startswith((url, "data:", "blob:")), self._bring)
        self.page.goto(url)
        self.wait("Ready|not work", LOADED)

    def _bring(self, route: Route) -> None:
        """A file of a package, of the version that is installed."""
        asked = re.fullmatch(f"{NETWORK}((?:@[^/@]+/)?[^/@]+)@([^/]+)/?(.*)", route.request.url)
        folder = MODULES / asked[1] if asked else None
        package = json.loads((folder / "package.json").read_text()) if folder and folder.is_dir() else {}
        if package.get("version") != (asked and asked[2]):
            self.problems.append(f"fetched from elsewhere: {route.request.url}")
            route.abort()
            return
        self.brought.append(route.request.url)
        path = folder / (asked[3] or package["jsdelivr"])
        kind = "application/wasm" if path.suffix == ".wasm" else "text/javascript"
        route.fulfill(path=path, headers={"access-control-allow-origin": "*", "content-type": kind})

    @property
    def status(self) -> str:
        return self.page.locator("#status").inner_text()

    @property
    def answer(self) -> str:
        return self.page.locator("#answer").inner_text()

    def wait(self, pattern: str, timeout: int = STEP) -> None:
        self.page.wait_for_function(
            "pattern => RegExp(pattern).test(document.querySelector('#status').textContent)",
            arg=pattern,
            timeout=timeout,
        )

    def ask(self, question: str, image: Path | None = None) -> str:
        """What the page answers, once it is there as a whole."""
        self.page.locator("#image").set_input_files(image or [])
        self.page.locator("#question").fill(question)
        self.page.locator("#ask").click()
        self.wait("of the question|not work", LOADED)
        return self.answer

    def answer_chat(self, files: list[bytes], messages: list[dict], **options) -> dict:
        """What the page's script makes of a chat, without the page."""
        encoded = [base64.b64encode(file).decode() for file in files]
        return self.page.evaluate(ANSWER, {"files": encoded, "messages": messages, "options": options})


def run_node(script: str, *arguments: str, given: str = "") -> str:
    """What a script prints, with what `jina_vlm.js` exports at hand as `page`."""
    whole = f"import fs from 'node:fs'; import * as page from {json.dumps(PAGE.joinpath('jina_vlm.js').as_uri())};"
    command = ["node", "--input-type=module", "--eval", whole + script, *arguments]
    done = subprocess.run(command, input=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
