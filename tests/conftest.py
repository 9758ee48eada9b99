"""What the tests share: the package, the golden checkpoint, images made from integers."""

import http.server
import importlib.util
import json
import os
import re
import resource
import subprocess
import sys
import textwrap
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image


ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"

if importlib.util.find_spec("jina_vlm") is None:  # not installed: the checkout is the package
    spec = importlib.util.spec_from_file_location(
        "jina_vlm", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    sys.modules["jina_vlm"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["jina_vlm"])

import jina_vlm  # noqa: E402
from deprecations import DeprecatedCalls  # noqa: E402
from golden_images import make_image  # noqa: E402
from jina_vlm.compatibility_jina_vlm import VERSION  # noqa: E402


# Our code follows the newest names: what only older versions call deprecated is none of its faults.
PINNED = re.search(r"^transformers==(\d+)\.(\d+)", (ROOT / "requirements.txt").read_text(), flags=re.MULTILINE)
ON_NEWEST = tuple(map(int, PINNED.groups())) <= VERSION


def pytest_configure(config):
    if ON_NEWEST:
        config.pluginmanager.register(DeprecatedCalls())


# By EXIF orientation: what shows a stored image, an array, upright.
TURNS = {
    1: lambda image: image,
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.transpose(1, 0, 2),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: image[::-1, ::-1].transpose(1, 0, 2),
    8: lambda image: np.rot90(image),
}


def make_conversation(turns: list) -> list:
    """Messages from turns like ("user", "text", (20, 30), "text"): strings are text, (height, width) an image of that
    size, dictionaries parts as they stand, all else images. One string alone is the message's content. A list of
    lists of turns becomes a batch."""
    if isinstance(turns[0], list):
        return [make_conversation(item) for item in turns]

    def part(item):
        if isinstance(item, str):
            return {"type": "text", "text": item}
        if isinstance(item, tuple):
            item = Image.fromarray(make_image(*item, seed=sum(item)))
        return item if isinstance(item, dict) else {"type": "image", "image": item}

    return [
        {
            "role": role,
            "content": parts[0] if len(parts) == 1 and isinstance(parts[0], str) else [part(p) for p in parts],
        }
        for role, *parts in turns
    ]


def python(code: str, *args, expect: int = 0, **environment) -> subprocess.CompletedProcess:
    """Runs code in a fresh process that knows nothing of this package."""
    environment = {"PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        capture_output=True, text=True, env=environment, cwd="/",
    )  # fmt: skip
    assert result.returncode == expect, result.stderr
    assert not ON_NEWEST or "deprecat" not in result.stderr.lower(), result.stderr
    return result


def refused(message: str, error: type[Exception] = ValueError):
    """A block that is left by an error with a message in which this pattern is found."""
    return pytest.raises(error, match=message)


@contextmanager
def largest_file(size: int):
    """No file of this process may grow beyond this size: writing fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def serve(handler: type[http.server.BaseHTTPRequestHandler]):
    """A server on this machine, as its URL."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def conversation():
    return make_conversation


@pytest.fixture(scope="session")
def chat(processor):
    """The function `chat(turns, **kwargs)`: turns (see `make_conversation`) to model inputs in one call."""

    def apply(turns: list, **kwargs):
        kwargs = {"tokenize": True, "return_dict": True, "return_tensors": "pt", **kwargs}
        return processor.apply_chat_template(make_conversation(turns), **kwargs)

    return apply


@pytest.fixture(scope="session", name="make_image")
def image_maker():
    """The function `make_image(height, width, kind="texture", seed=0)`: [height, width, 3] uint8."""
    return make_image


@pytest.fixture(scope="session")
def tiler():
    """An image processor as it comes."""
    return jina_vlm.JinaVLMImageProcessor()


@pytest.fixture(scope="session")
def golden() -> Path:
    return GOLDEN


@pytest.fixture(scope="session")
def released_folder(golden) -> Path:
    """A small checkpoint in the released layout, without a chat template."""
    return golden / "released-tiny"


@pytest.fixture(scope="session")
def chat_template() -> str:
    return (ROOT / "chat_template.jinja").read_text()


@pytest.fixture
def new_processor(released_folder, chat_template):
    """A processor that a test may change."""
    processor = jina_vlm.JinaVLMProcessor.from_pretrained(released_folder)
    processor.chat_template = chat_template
    return processor


@pytest.fixture(scope="session")
def processor(released_folder, chat_template):
    processor = jina_vlm.JinaVLMProcessor.from_pretrained(released_folder)
    processor.chat_template = chat_template
    return processor


@pytest.fixture
def new_model(released_folder):
    """A model that a test may change: float32, random weights."""
    return jina_vlm.JinaVLMForConditionalGeneration.from_pretrained(released_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def model(released_folder):
    return jina_vlm.JinaVLMForConditionalGeneration.from_pretrained(released_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def bundle(model, processor, tmp_path_factory) -> Path:
    """A folder in this repository's layout, as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("bundle")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def geometry() -> list[dict]:
    return json.loads((GOLDEN / "geometry.json").read_text())


@pytest.fixture(scope="session")
def web(tmp_path_factory):
    """(folder, URL): what is put into the folder can be had from the URL."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=folder)

        def log_message(self, *args):
            pass

    folder = tmp_path_factory.mktemp("web")
    with serve(Handler) as url, pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "127.0.0.1")
        yield folder, url
