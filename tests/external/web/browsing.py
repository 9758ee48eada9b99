"""A browser on the page, for tests and for the guide's image."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Locator, Page, sync_playwright


HERE = Path(__file__).parent
DESKTOP = {"viewport": {"width": 1280, "height": 900}}
PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "is_mobile": True, "has_touch": True}
STEP = 15_000  # ms that anything else may take
DONE = 60_000  # ms that an answer may take, on a busy machine


@contextmanager
def chromium() -> Iterator[Browser]:
    """The browser that `npm ci` brought, without a window."""
    path = subprocess.run(["node", "chromium.js"], cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()
    with sync_playwright() as playwright:
        # without a sandbox: containers and continuous integration often allow none
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


class User:
    """Somebody with the page open, in a session of their own."""

    def __init__(self, browser: Browser, url: str, **options):
        self.context = browser.new_context(**(DESKTOP | options))
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(STEP)
        self.problems: list[str] = []
        self.page.on("pageerror", lambda error: self.problems.append(f"script: {error}"))
        self.page.on("request", lambda request: self._check(request.url, url))
        self.page.goto(url)
        self.question.wait_for()

    def _check(self, requested: str, url: str) -> None:
        if not requested.startswith((url, "data:", "blob:")):
            self.problems.append(f"fetched from elsewhere: {requested}")

    @property
    def question(self) -> Locator:
        return self.page.locator("#question textarea")

    @property
    def answers(self) -> Locator:
        return self.page.locator("#chat .bot .prose")

    @property
    def questions(self) -> Locator:
        return self.page.locator("#chat .user .prose")

    @property
    def alert(self) -> Locator:
        return self.page.locator("#alert [role=alert]")

    @property
    def canvas(self) -> Locator:
        return self.page.locator("#tiling .canvas img")

    def upload(self, file: Path | dict) -> None:
        """A path, or a dictionary of `name`, `mimeType` and `buffer`."""
        remove = self.page.locator("#image button[aria-label='Remove Image']")
        if remove.count():
            remove.click()
            self.page.locator("#tiling .quiet").wait_for()
        self.page.locator("#image input[type=file]").set_input_files(file)

    def ask(self, question: str) -> None:
        self.question.fill(question)
        self.question.press("Enter")

    def wait(self, number: int = 1) -> str:
        """The answer with this number, once it is there as a whole."""
        self.page.wait_for_function(
            """number => document.querySelectorAll("#chat .bot .prose").length >= number
                && !document.querySelector("#stop")?.checkVisibility()
                && document.querySelector("#send")?.checkVisibility()""",
            arg=number,
            timeout=DONE,
        )
        return self.answers.nth(number - 1).inner_text().strip()

    def table(self, where: str) -> dict[str, str]:
        """The rows of the tables in a part of the page, by their names."""
        rows = self.page.locator(f"{where} tr").evaluate_all(
            "rows => rows.map(row => [row.querySelector('th').innerText, row.lastElementChild.innerText])"
        )
        return {name.strip(): value.strip() for name, value in rows}

    def is_wider_than_the_screen(self) -> bool:
        return self.page.evaluate(
            "document.documentElement.scrollWidth > window.innerWidth || document.body.scrollWidth > window.innerWidth"
        )
