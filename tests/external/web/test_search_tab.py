"""The tab for searching in a browser: what users do, and what they see."""

import re

import pytest
from browsing import DONE, PHONE, User
from PIL import Image
from test_page import CAPTION, CONTRASTS

from jina_vlm_tools.webapp.search_examples import QUESTION, draw_examples, save_examples


pytest.importorskip("peft")
pytest.importorskip("pypdfium2")


class Searcher(User):
    """Somebody with the tab for searching open."""

    def __init__(self, browser, url, **options):
        super().__init__(browser, url, **options)
        self.page.set_default_timeout(DONE)
        self.page.get_by_role("tab", name="Search").click()
        self.page.locator("#search-question textarea").wait_for()

    def drop(self, *files) -> None:
        """Paths, or dictionaries of `name`, `mimeType` and `buffer`."""
        self.page.locator("#files input[type=file]").first.set_input_files(list(files))

    def wait_read(self, pages: int) -> None:
        self.page.wait_for_function(
            "text => document.querySelector('#reading .state')?.innerText === text",
            arg=f"Read {pages} page{'' if pages == 1 else 's'}",
            timeout=DONE,
        )

    def search(self, question: str) -> str:
        """The answer, once it is there as a whole."""
        self.page.locator("#search-question textarea").fill(question)
        self.page.locator("#search-question textarea").press("Enter")
        self.page.locator("#source .asked").get_by_text(question, exact=True).wait_for(timeout=DONE)
        return self.wait_answer()

    def wait_answer(self) -> str:
        self.page.wait_for_function(
            """() => document.querySelector("#answer")?.innerText.trim()
                && !document.querySelector("#search-stop")?.checkVisibility()
                && document.querySelector("#search-send")?.checkVisibility()""",
            timeout=DONE,
        )
        return self.answer

    @property
    def answer(self) -> str:
        return self.page.locator("#answer").inner_text().strip()

    @property
    def source(self) -> str:
        return " ".join(self.page.locator("#source .source").inner_text().split())

    @property
    def hits(self) -> list[tuple[str, float]]:
        """Name and score of each page that is shown, from the first on."""
        cards = self.page.locator(".hits button")
        names = [" ".join(name.split()[1:]) for name in cards.locator(".name").all_inner_texts()]
        return list(zip(names, map(float, cards.locator(".score b").all_inner_texts()), strict=True))

    @property
    def images(self) -> list[str]:
        return self.page.locator(".hits img, #chosen img").evaluate_all("images => images.map(image => image.src)")

    def problem(self) -> str:
        self.page.locator("#search-alert [role=alert]").wait_for()
        return self.page.locator("#search-alert [role=alert]").inner_text()


@pytest.fixture(scope="session")
def embedder(loaded, retrieval_folder):
    from jina_vlm_tools.webapp.searching import load_embedder

    return load_embedder(loaded[0], str(retrieval_folder))


@pytest.fixture(scope="session")
def search_url(loaded, embedder):
    from jina_vlm_tools.webapp.layout import Page, launch_arguments
    from jina_vlm_tools.webapp.search_tab import SearchTab

    blocks = Page(*loaded, name="checkpoints/tiny", search=SearchTab(embedder, *loaded)).build()
    _, url, _ = blocks.launch(prevent_thread_lock=True, quiet=True, **launch_arguments())
    yield url
    blocks.close(verbose=False)


@pytest.fixture
def come(browser, search_url):
    """Opens the tab for one more user, of whom none has met an error in a script, or fetched from elsewhere."""
    users = []

    def open_tab(**options) -> Searcher:
        users.append(Searcher(browser, search_url, **options))
        return users[-1]

    yield open_tab
    for user in users:
        user.context.close()
    assert [problem for user in users for problem in user.problems] == []


@pytest.fixture
def searcher(come):
    return come()


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Four images, and a PDF of six pages."""
    return save_examples(tmp_path_factory.mktemp("files"))


def page_image(path, number=1) -> Image.Image:
    from jina_vlm_tools.retrieval.documents import Document

    with Document(path, 1_003_520) as document:
        return document.draw(number)


def test_drop_ask_see_answer(searcher, files, embedder, tmp_path, expected, model_work):
    """Two images and a PDF: pages in the order of the embedder's scores, an answer that streams and is the chat's, and
    one from another page."""
    dropped = [files[0], files[2], files[-1]]
    searcher.drop(*dropped)
    searcher.wait_read(8)
    pages = {files[0].name: page_image(files[0]), files[2].name: page_image(files[2])}
    pages |= {f"drawings.pdf page {number} of 6": page_image(files[-1], number) for number in range(1, 7)}
    asked = embedder.embed([CAPTION], role="query", kind="multi")
    vectors = [embedder.embed([image], kind="multi") for image in pages.values()]
    scores = {
        name: float(embedder.score(asked, one)) / len(asked.multi[0]) for name, one in zip(pages, vectors, strict=True)
    }
    right = sorted(scores, key=scores.get, reverse=True)[:5]

    with model_work.slowly(0.1):
        searcher.page.locator("#search-question textarea").fill(CAPTION)
        searcher.page.locator("#search-send").click()
        searcher.page.wait_for_function("document.querySelector('#answer')?.innerText.trim()")
        seen = []
        while searcher.page.locator("#search-stop").is_visible():
            seen.append(searcher.answer)
            searcher.page.wait_for_timeout(50)
    answer = searcher.wait_answer()
    assert [name for name, _ in searcher.hits] == right
    assert [score for _, score in searcher.hits] == pytest.approx([scores[name] for name in right], abs=6e-4)
    partial = list(dict.fromkeys(seen))
    assert [text for text in partial if not answer.startswith(text)] == [] and len(partial) > 5
    assert searcher.source == f"Answered from {right[0]}"

    def chat_answer(name):
        pages[name].save(tmp_path / "page.png")
        return expected(tmp_path / "page.png", CAPTION)[0].text

    assert answer == chat_answer(right[0])

    before = searcher.images
    searcher.page.locator(".hits button").nth(3).click()
    searcher.page.locator("#source .source").get_by_text(right[3].split()[0]).wait_for()
    searcher.page.wait_for_function("src => document.querySelector('#chosen img').src !== src", arg=before[-1])
    assert searcher.wait_answer() == chat_answer(right[3]) and searcher.source == f"Answered from {right[3]}"
    assert searcher.page.locator(".hits button[aria-pressed=true]").count() == 1


def test_a_word_chooses_what_is_shown(searcher, files):
    searcher.drop(files[0], files[-1])
    searcher.wait_read(7)
    answer, before = searcher.search(QUESTION), searcher.images
    words = searcher.page.locator("#words")
    word = words.get_by_role("button", name="pink", exact=True)
    assert words.locator("[aria-pressed=true]").inner_text() == "All words"
    word.click()
    searcher.page.wait_for_function("src => document.querySelector('#chosen img').src !== src", arg=before[-1])
    assert words.locator("[aria-pressed=true]").inner_text() == "pink"
    assert all(one != other for one, other in zip(before, searcher.images, strict=True))
    assert word.evaluate("element => element === document.activeElement") and searcher.answer == answer
    words.get_by_role("button", name="All words").click()
    searcher.page.wait_for_function("src => document.querySelector('#chosen img').src === src", arg=before[-1])
    assert searcher.images == before


def test_the_chat_is_as_it_was(searcher, files, image_file, expected):
    searcher.drop(files[0])
    searcher.wait_read(1)
    searcher.page.get_by_role("tab", name="Chat").click()
    searcher.upload(image_file())
    searcher.canvas.wait_for()
    searcher.ask(CAPTION)
    assert searcher.wait() == expected(image_file(), CAPTION)[0].text


def test_drawn_pages_to_begin_with(searcher):
    searcher.page.locator("#search-example").click()
    searcher.wait_read(10)
    assert searcher.page.locator("#search-question textarea").input_value() == QUESTION
    searcher.page.locator("#search-send").click()
    assert searcher.wait_answer() and len(searcher.hits) == 5


def test_bad_files_are_named_and_the_others_searched(searcher, files):
    bad = [
        {"name": "<img src=x onerror=alert(1)>.png", "mimeType": "image/png", "buffer": b"no image"},
        {"name": "half.pdf", "mimeType": "application/pdf", "buffer": files[-1].read_bytes()[:200]},
    ]
    searcher.drop(*bad, {"name": "good.png", "mimeType": "image/png", "buffer": files[1].read_bytes()})
    searcher.wait_read(1)
    problems = searcher.page.locator("#reading .problems li")
    assert problems.count() == 2 and searcher.page.locator("#reading img").count() == 0
    assert any(text.startswith("half.pdf: cannot be read as a PDF") for text in problems.all_inner_texts())
    assert not any("/" in text.replace("http(s)", "") for text in problems.all_inner_texts())
    assert searcher.search(QUESTION)
    assert [name for name, _ in searcher.hits] == ["good.png"]


def test_progress_stop_and_go_on(searcher, files, embedder):
    import threading

    go_on = threading.Event()
    handle = embedder.model.model.vision_model.register_forward_pre_hook(lambda *_: go_on.wait(20) and None)
    try:
        searcher.drop(files[-1])
        searcher.page.locator("#end-reading").click()
        go_on.set()
        searcher.page.wait_for_function("document.querySelector('#reading .state')?.innerText.startsWith('Stopped')")
    finally:
        go_on.set()
        handle.remove()
    state = searcher.page.locator("#reading .state").inner_text()
    assert int(re.fullmatch(r"Stopped (\d) of 6 pages", state).group(1)) < 6
    searcher.page.locator("#read-on").click()
    searcher.wait_read(6)
    assert (
        not searcher.page.locator("#read-on").is_visible() and not searcher.page.locator("#end-reading").is_visible()
    )


def test_a_file_that_is_taken_away_is_searched_no_more(searcher, files):
    searcher.drop(files[0], files[1])
    searcher.wait_read(2)
    searcher.search(QUESTION)
    searcher.page.locator("#files button[aria-label='Remove this file']").first.click()
    searcher.wait_read(1)
    searcher.page.locator("#hits .quiet").wait_for()
    assert searcher.page.locator("#source .asked").count() == 0 and searcher.answer == ""
    searcher.search(QUESTION)
    assert len(searcher.hits) == 1


def test_users_at_once_see_their_own_files(come, files):
    users = [come(), come()]
    for user, own in zip(users, (files[:2], files[2:4]), strict=True):
        user.drop(*own)
    for user, own in zip(users, (files[:2], files[2:4]), strict=True):
        user.wait_read(2)
        user.search(QUESTION)
        assert {name for name, _ in user.hits} == {path.name for path in own}


def test_what_cannot_be_asked_says_why(searcher, files):
    searcher.page.locator("#search-send").click()
    assert searcher.problem() == "Not yet. Write a question."
    searcher.page.locator("#search-question textarea").fill(QUESTION)
    searcher.page.locator("#search-send").click()
    searcher.page.locator("#search-alert").get_by_text("Drop files first.").wait_for()
    searcher.drop(files[0])
    searcher.wait_read(1)
    assert searcher.search(QUESTION) and searcher.page.locator("#search-alert [role=alert]").count() == 0


def test_a_failing_model_is_an_error_on_the_page(searcher, files, model_work):
    searcher.drop(files[0])
    searcher.wait_read(1)
    with model_work.slowly(), model_work.failing(RuntimeError("CUDA out of <memory>")):
        searcher.page.locator("#search-question textarea").fill(CAPTION)
        searcher.page.locator("#search-send").click()
        assert searcher.problem() == "This could not be answered. CUDA out of <memory>"
    assert searcher.page.locator("#search-send").is_visible()
    assert searcher.search(CAPTION)


def test_stop(searcher, files, model_work):
    searcher.drop(files[0])
    searcher.wait_read(1)
    with model_work.slowly(0.3):
        searcher.page.locator("#search-question textarea").fill(CAPTION)
        searcher.page.locator("#search-send").click()
        searcher.page.wait_for_function("document.querySelector('#answer')?.innerText.includes('shapes')")
        searcher.page.locator("#search-stop").click()
        assert searcher.wait_answer().endswith("Stopped.")
    assert len(model_work.head) < 40


def test_without_a_retrieval_folder_there_is_no_tab(user):
    assert user.page.get_by_role("tab").count() == 0 and user.page.locator("#search").count() == 0


def test_a_phones_width_is_enough(come, files):
    user = come(**PHONE)
    user.drop(files[0], files[1], files[2])
    user.wait_read(3)
    user.search(QUESTION)
    assert not user.is_wider_than_the_screen()
    for part in (
        "#files",
        "#search-question",
        "#search-send",
        "#reading",
        "#words",
        ".hits",
        "#chosen img",
        "#answer",
    ):
        box = user.page.locator(part).first.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= PHONE["viewport"]["width"], part


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(come, files, scheme, tmp_path):
    """Contrasts of at least 4.5 to 1, as WCAG 2 asks for."""
    user = come(color_scheme=scheme)
    (tmp_path / "bad.png").write_text("no image")
    user.drop(files[-1], tmp_path / "bad.png")
    user.wait_read(6)
    user.search(QUESTION)
    selectors = [
        "#reading .state", "#reading .problems b", "#words span", "#words [aria-pressed=true]", ".hits .name > b",
        ".hits .name > span", ".hits .score b", "#hits .quiet", ".asked", ".source", ".source span", "#answer p",
        "#search-send", "#search-example",
    ]  # fmt: skip
    contrasts = user.page.evaluate(CONTRASTS, selectors)
    assert {part: round(contrast, 2) for part, contrast in contrasts.items() if contrast < 4.5} == {}


def test_examples_are_what_they_say():
    assert len({image.tobytes() for image in draw_examples()}) == 10
