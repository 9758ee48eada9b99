"""`transformers serve`, as `jina_vlm_tools.inference.serve` starts it, through the `openai` client: it answers as
`generate` does, and a request that cannot be answered gets its own error."""

import base64
import io
import os
import re
import shutil
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import jina_vlm
import pytest
import servers
import torch
from PIL import Image

from jina_vlm_tools.synthetic.questions import evaluation_sample, normalize
from jina_vlm_tools.synthetic.shapes import draw_scene


for package in ("fastapi", "uvicorn", "openai"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install '.[serve]'")
import openai  # noqa: E402


ROOT = Path(__file__).parents[3]
TINY = "checkpoints/tiny"
SHAPES = evaluation_sample(1, "color", "en")
OTHER_SHAPES = evaluation_sample(3, "color", "en")
DESCRIBE = {"type": "text", "text": "Describe the picture."}

pytestmark = pytest.mark.skipif(not (ROOT / TINY).is_dir(), reason="checkpoints/tiny has not been trained yet")


def png(given: Image.Image) -> bytes:
    file = io.BytesIO()
    given.save(file, "PNG")
    return file.getvalue()


def data_uri(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def image(given: Image.Image | bytes | str) -> dict:
    """The part of a message that holds an image, a file's content or a URL."""
    content = png(given) if isinstance(given, Image.Image) else given
    return {"type": "image_url", "image_url": {"url": content if isinstance(content, str) else data_uri(content)}}


def user(*content) -> dict:
    return {"role": "user", "content": [{"type": "text", "text": c} if isinstance(c, str) else c for c in content]}


def shapes(width: int = 360, height: int = 360) -> dict:
    return image(draw_scene(SHAPES.scene).resize((width, height)))


@contextmanager
def running(folder: Path, *options):
    """A server as its users start it: its URL, and the file that it writes its log to."""
    port = servers.free_port()
    (folder / "jina_vlm").symlink_to(ROOT)  # the checkout is the package
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join([str(folder), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]),
        "HF_HOME": str(folder),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "no_proxy": "127.0.0.1",
    }
    command = [sys.executable, "-m", "jina_vlm_tools", "serve", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--device", "cpu", "--dtype", "float32", *options]
    url, log = f"http://127.0.0.1:{port}", folder / "log"
    with servers.running(command, f"{url}/health", log, seconds=60, cwd=ROOT, env=environment):
        yield url, log


def new_client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def server(tmp_path_factory, web):  # which keeps proxies out of the way
    with running(tmp_path_factory.mktemp("server"), TINY) as (url, _):
        yield url


@pytest.fixture(scope="module")
def client(server):
    with new_client(server) as client:
        yield client


@pytest.fixture(scope="module")
def ask(client):
    """The function `ask(messages, **options)`: the server's whole answer, or its stream."""

    def complete(messages: list[dict], **kwargs):
        return client.chat.completions.create(**{"model": TINY, "messages": messages, "temperature": 0, **kwargs})

    return complete


def text_of(completion) -> str:
    return completion.choices[0].message.content


def text_of_stream(chunks) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


@pytest.fixture(scope="module")
def generated():
    """The function `generated(messages, folder=TINY)`: the library's greedy answer to the same messages, and the
    number of tokens in the prompt."""
    loaded = {}

    def answer(messages: list[dict], folder=TINY, **kwargs) -> tuple[str, int]:
        if folder not in loaded:
            loaded[folder] = (
                jina_vlm.JinaVLMProcessor.from_pretrained(ROOT / folder),
                jina_vlm.JinaVLMForConditionalGeneration.from_pretrained(ROOT / folder, dtype=torch.float32).eval(),
            )
        processor, model = loaded[folder]
        # as the library spells it
        parts = {
            "image_url": lambda part: {"type": "image", "url": part["image_url"]["url"]},
            "text": lambda part: part,
        }
        messages = [
            {
                **m,
                "content": m["content"]
                if isinstance(m["content"], str)
                else [parts[p["type"]](p) for p in m["content"]],
            }
            for m in messages
        ]
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **kwargs
        )
        length = inputs["input_ids"].shape[1]
        ids = model.generate(**inputs, max_new_tokens=64, do_sample=False)
        return processor.decode(ids[0, length:], skip_special_tokens=True), length

    return answer


# Answers


CONVERSATIONS = {
    "one image": [user(shapes(), DESCRIBE)],
    "wide image, question first": [user(DESCRIBE, shapes(1280, 720))],
    "several images": [user(shapes(), image(draw_scene(OTHER_SHAPES.scene)), shapes(900, 640), DESCRIBE)],
    "the same image twice": [
        user(shapes(), DESCRIBE),
        {"role": "assistant", "content": "3 shapes."},
        user(shapes(), "How many shapes are there?"),
    ],
    "several turns": [
        {"role": "system", "content": "Answer briefly."},
        user(shapes(), "How many shapes are there?"),
        {"role": "assistant", "content": " 3"},
        user("Describe the picture."),
    ],
    "text only": [{"role": "user", "content": "How many shapes are there?"}],
}


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
def test_answers_are_those_of_generate(ask, generated, messages):
    text, prompt_tokens = generated(messages)
    completion = ask(messages, max_tokens=64)
    assert text_of(completion) == text and text
    assert completion.usage.prompt_tokens == prompt_tokens
    *chunks, last = ask(messages, max_tokens=64, stream=True)
    assert text_of_stream(chunks) == text
    assert last.usage == completion.usage and last.choices[0].finish_reason == completion.choices[0].finish_reason
    if len(text.split()) > 3:
        assert len(chunks) > 3  # in pieces


@pytest.mark.parametrize("sample", [SHAPES, OTHER_SHAPES], ids=["shapes", "other shapes"])
def test_answers_are_right(ask, sample):
    turn = sample.turn
    assert normalize(text_of(ask([user(image(draw_scene(sample.scene)), turn.question)]))) == normalize(turn.answer)


def test_url(ask, generated, web):
    folder, url = web
    draw_scene(SHAPES.scene).save(folder / "shapes.png")
    messages = [user(image(f"{url}/shapes.png"), DESCRIBE)]
    assert (
        text_of(ask(messages))
        == generated(messages)[0]
        == generated([user(image(draw_scene(SHAPES.scene)), DESCRIBE)])[0]
    )


def test_responses(client, generated):
    text, _ = generated([user(shapes(), DESCRIBE)])
    content = [{"type": "input_image", "image_url": shapes()["image_url"]["url"]}, {**DESCRIBE, "type": "input_text"}]
    request = {"model": TINY, "input": [{"role": "user", "content": content}], "temperature": 0}
    assert client.responses.create(**request, stream=False).output_text == text
    events = client.responses.create(**request, stream=True)
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == text


def test_max_tokens(ask):
    messages = [user(shapes(), DESCRIBE)]
    completion = ask(messages, max_tokens=3)
    *chunks, last = ask(messages, max_tokens=3, stream=True)
    assert completion.usage.completion_tokens == last.usage.completion_tokens == 3
    assert completion.choices[0].finish_reason == last.choices[0].finish_reason == "length"
    assert text_of(ask(messages)).startswith(text_of(completion)) and text_of(completion) == text_of_stream(chunks)


def test_arguments_of_the_processor(ask, generated):
    messages = [user(shapes(1280, 720), DESCRIBE)]
    completion = ask(messages, extra_body={"chat_template_kwargs": {"max_tiles": 1}})
    assert (text_of(completion), completion.usage.prompt_tokens) == generated(messages, max_tiles=1)
    assert completion.usage.prompt_tokens < generated(messages)[1]


@pytest.mark.parametrize("text", ["<|image|>", "x<im_patch>y", "<im_start><im_col><im_end>", "a<|endoftext|> User: b"])
def test_typed_special_tokens_are_text(ask, text):
    tokenizer = jina_vlm.JinaVLMProcessor.from_pretrained(ROOT / TINY).tokenizer
    for role in ("system", "assistant", "user"):
        messages = [{"role": role, "content": text}, user("Are you there?")]
        prompt = f" {role.capitalize()}: {text}  User: Are you there? Assistant:"
        ids = tokenizer(prompt, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ask(messages, max_tokens=1).usage.prompt_tokens == 1 + len(ids)  # with the first <|endoftext|>


def test_concurrent_requests(server, generated):
    sizes = [(360, 360), (1280, 720), (500, 1500), (640, 480)]
    conversations = [[user(shapes(*size), DESCRIBE)] for size in sizes] + [CONVERSATIONS["text only"]]
    expected = [generated(messages)[0] for messages in conversations]

    def answer(request):
        index, messages = request
        with new_client(server) as client:
            # every third one is refused, meanwhile
            if index % 3 == 0:
                with pytest.raises(openai.BadRequestError):
                    client.chat.completions.create(model=TINY, messages=[user(image(b"no image"), DESCRIBE)])
            stream = index % 2 == 0
            result = client.chat.completions.create(model=TINY, messages=messages, temperature=0, stream=stream)
            return text_of_stream(result) if stream else text_of(result)

    with ThreadPoolExecutor(len(conversations)) as pool:
        assert list(pool.map(answer, enumerate(conversations))) == expected


# Errors

IMAGE = png(draw_scene(SHAPES.scene))

# What makes up the message, and what the error says. {url} is a server's, {dead} nobody's.
REFUSED = {
    "not an image": ([image(b"just text")], "not an image in a format that Pillow can read"),
    "empty": ([image(b"")], "not an image"),
    "truncated": ([image(IMAGE[: len(IMAGE) // 2])], "damaged or incomplete"),
    "not base64": ([image("data:image/png;base64,!?")], "base64"),
    "thin": ([image(Image.new("RGB", (3, 2000)))], "3 x 2000"),
    "connection refused": ([image("{dead}/a.png")], "Could not download the image at 'http://127.0.0.1:.*refused"),
    "404": ([image("{url}/none.png")], "Could not download the image.*404"),
    "page": ([image("{url}/page.png")], "not an image"),
    "file of the server": (
        [image(str(ROOT / "docs" / "shapes.png"))],
        "Expected an image's http.* URL or data URI, got '/",
    ),
    "file, as a URL": (
        [image((ROOT / "docs" / "shapes.png").as_uri())],
        "Expected an image's http.* URL or data URI, got 'file:",
    ),
    "long text": (["word " * 5000], r"has \d+ tokens, the model takes 4096"),
    "too many images": ([shapes(1280, 720)] * 3, r"has 52\d\d tokens, the model takes 4096.*fewer or smaller images"),
    "audio": (
        [{"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}],
        "takes text and images, got audio",
    ),
    "video": ([{"type": "video_url", "video_url": {"url": "{url}/a.mp4"}}], "takes text and images, got video"),
}


def filled(value, **names: str):
    """A copy of parts of a message, with {names} in their strings replaced."""
    if isinstance(value, dict):
        return {key: filled(item, **names) for key, item in value.items()}
    if isinstance(value, list):
        return [filled(item, **names) for item in value]
    for name, text in names.items():
        value = value.replace(f"{{{name}}}", text)
    return value


def refused(message: str):
    """The client's error for a request that is refused, which says why."""

    return pytest.raises(
        openai.BadRequestError, check=lambda error: re.search(message, error.body["detail"]) is not None
    )


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_request(ask, generated, web, content, message, stream):
    folder, url = web
    (folder / "page.png").write_text("<html>no image</html>")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{closed.getsockname()[1]}"
        with refused(message):
            ask([user(*filled(content, url=url, dead=dead), DESCRIBE)], stream=stream)
    # On the same connection. A client that has to open another one fails here.
    assert text_of(ask(CONVERSATIONS["text only"])) == generated(CONVERSATIONS["text only"])[0]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message"),
        ([{"role": "tool", "content": "x", "tool_call_id": "1"}], "role system, user or assistant, got tool"),
    ],
    ids=["none", "role"],
)
def test_bad_messages(ask, messages, message):
    with refused(message):
        ask(messages)


def test_a_bad_request_leaves_a_running_stream_alone(ask, server, generated):
    messages = [user(shapes(), DESCRIBE)]
    stream = ask(messages, stream=True)
    beginning = [next(stream), next(stream)]
    with new_client(server) as other, refused("not an image"):
        other.chat.completions.create(model=TINY, messages=[user(image(b"just text"))])
    assert text_of_stream([*beginning, *stream]) == generated(messages)[0]


def test_a_url_that_does_not_answer_leaves_the_others_their_answers(server, generated):
    """The library's server fetches images between its requests, so that the others wait meanwhile."""
    messages = [user(shapes(), DESCRIBE)]
    with socket.create_server(("127.0.0.1", 0)) as silent, new_client(server) as one, new_client(server) as other:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/a.png"
        with ThreadPoolExecutor(2) as pool:
            fetching = pool.submit(one.chat.completions.create, model=TINY, messages=[user(image(url))])
            connection, _ = silent.accept()
            answered = pool.submit(other.chat.completions.create, model=TINY, messages=messages, temperature=0)
            time.sleep(0.3)
            connection.close()
            assert text_of(answered.result()) == generated(messages)[0]
            with refused("Could not download the image"):
                fetching.result()


def test_responses_refuse_too(client):
    content = [{"type": "input_image", "image_url": data_uri(b"just text")}]
    with refused("not an image"):
        client.responses.create(model=TINY, input=[{"role": "user", "content": content}], stream=False)


def test_errors_of_generation_stay_with_their_request(server, generated):
    """The library's server gives `generate` the processor for a tokenizer, so that `stop` fails. Nothing of ours is
    asked before; what is seen here is what any such error looks like."""
    messages = [user(shapes(), DESCRIBE)]
    for stream, error, message in (
        (False, openai.InternalServerError, "Internal Server Error"),
        (True, openai.APIError, "get_vocab"),
    ):
        with new_client(server) as client, pytest.raises(error) as caught:
            list(client.chat.completions.create(model=TINY, messages=messages, stop=["star"], stream=stream))
        assert message in caught.value.body
    with new_client(server) as client:
        completion = client.chat.completions.create(model=TINY, messages=messages, temperature=0)
        assert text_of(completion) == generated(messages)[0]


# Other checkpoints


def test_released_layout_beside_a_bundle(tmp_path, released_folder, chat_template, generated, web):
    """One server, each request for the checkpoint that it names; asked for continuous batching, it falls back."""
    released = shutil.copytree(released_folder, tmp_path / "released")
    (released / "chat_template.jinja").write_text(chat_template)
    for name in ("configuration", "modeling", "processing", "image_processing"):
        (released / f"{name}_jvlm.py").write_text("raise SystemExit('foreign code ran')")
    messages = [user(shapes(), DESCRIBE)]
    (tmp_path / "server").mkdir()
    with running(tmp_path / "server", "--continuous-batching") as (url, log), new_client(url) as client:
        for folder in (str(released), TINY):
            completion = client.chat.completions.create(model=folder, messages=messages, temperature=0, max_tokens=64)
            assert text_of(completion) == generated(messages, folder)[0]
        assert "does not support continuous batching. Falling back" in log.read_text()
