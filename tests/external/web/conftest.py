"""The page of the small checkpoint, in this process, so that tests can slow the model down, make it fail, and count
what it does; and a browser on it."""

import os
import time
from contextlib import contextmanager
from pathlib import Path

import pytest


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["no_proxy"] = "127.0.0.1,localhost"

ROOT = Path(__file__).parents[3]
TINY = ROOT / "checkpoints" / "tiny"


@pytest.fixture(scope="session")
def loaded():
    """Model and processor."""
    from jina_vlm_tools.inference.loading import load_on_device, load_processor_and_class, quiet_libraries

    quiet_libraries()
    processor, load_model = load_processor_and_class(str(TINY))
    return load_on_device(load_model, "cpu"), processor


@pytest.fixture(scope="session")
def retrieval_folder():
    return ROOT / "checkpoints" / "tiny-retrieval"


@pytest.fixture(scope="session")
def url(loaded):
    from jina_vlm_tools.webapp.layout import Page, launch_arguments

    blocks = Page(*loaded, name="checkpoints/tiny", note="It knows shapes.").build()
    _, url, _ = blocks.launch(prevent_thread_lock=True, quiet=True, **launch_arguments())
    yield url
    blocks.close(verbose=False)


@pytest.fixture(scope="session")
def browser():
    from browsing import chromium

    with chromium() as browser:
        yield browser


@pytest.fixture
def visit(browser, url):
    """Opens the page for one more user. In the end none of them has met an error in a script, or fetched something
    from elsewhere."""
    from browsing import User

    users = []

    def open_page(**options) -> User:
        users.append(User(browser, url, **options))
        return users[-1]

    yield open_page
    for user in users:
        user.context.close()
    assert [problem for user in users for problem in user.problems] == []


@pytest.fixture
def user(visit):
    return visit()


@pytest.fixture
def image_file(tmp_path):
    """The file of an example's image."""
    from jina_vlm_tools.webapp.examples import EXAMPLES

    return lambda number=0: EXAMPLES[number].save(tmp_path)


@pytest.fixture
def model_work(loaded):
    """What the model does: times at which its `tower` and its `head` began; and `slowly(seconds)` for each token."""

    class Work:
        def __init__(self):
            self.tower, self.head = [], []

        @contextmanager
        def slowly(self, seconds: float = 0.15):
            handle = loaded[0].lm_head.register_forward_pre_hook(lambda *_: time.sleep(seconds))
            yield
            handle.remove()

        @contextmanager
        def failing(self, error: Exception):
            def fail(*_):
                if len(self.head) > 3:  # with a part of the answer on the page
                    raise error

            handle = loaded[0].lm_head.register_forward_pre_hook(fail)
            yield
            handle.remove()

    work = Work()
    modules = ((work.tower, loaded[0].model.vision_model), (work.head, loaded[0].lm_head))
    handles = [
        module.register_forward_pre_hook(lambda *_, times=times: times.append(time.monotonic()))
        for times, module in modules
    ]
    yield work
    for handle in handles:
        handle.remove()


@pytest.fixture
def expected(loaded):
    """What the command line's chat answers to questions about an image: token by token the same is asked of the
    page."""
    from PIL import Image

    from jina_vlm_tools.inference.conversation import Conversation

    def answers(path: Path, *questions: str) -> list:
        conversation = Conversation(*loaded, 256)
        return [
            conversation.answer(question, [] if number else [Image.open(path)])
            for number, question in enumerate(questions)
        ]

    return answers
