"""Texts, chats and arguments that cannot be used are refused by an error that says what was given and what was
expected."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from conftest import refused
from jina_vlm import JinaVLMProcessor
from PIL import Image
from transformers import AutoProcessor


SMALL = (20, 20)


# Arguments


def test_unknown_arguments(tiler, processor, chat, make_image):
    image = make_image(*SMALL)
    with refused("max_tile", (TypeError, ValueError)):
        tiler(image, max_tile=3)
    for attempt in (
        lambda: processor(images=image, text="<|image|>", max_tile=3),
        lambda: processor(images=image, text="<|image|>", images_kwargs={"max_tile": 3}),
        lambda: processor(text="hi", text_kwargs={"max_tile": 3}),
        lambda: chat([("user", SMALL)], max_tile=3),
        lambda: chat([("user", SMALL)], processor_kwargs={"max_tile": 3}),
        lambda: chat([("user", "hi")], max_tile=3),
    ):
        with refused("Unknown argument 'max_tile' (of|in) .* Known are: ", TypeError):
            attempt()


@pytest.mark.parametrize("auto_class", [JinaVLMProcessor, AutoProcessor])
def test_unknown_arguments_of_loading(auto_class, bundle):
    for name, value in {"foo": 2, "max_tile": 3, "images_kwargs": {"max_tiles": 3}}.items():
        with refused(f"Unknown argument '{name}' of JinaVLMProcessor.* Known are: .*max_tiles", TypeError):
            auto_class.from_pretrained(bundle, **{name: value})
    given = {"max_tiles": 3, "padding_side": "right", "model_max_length": 900, "chat_template": "hi", "use_fast": True}
    given |= {"chat_control_tokens": ["<box>"], "trust_remote_code": True, "local_files_only": True}
    processor = auto_class.from_pretrained(bundle, **given)
    assert processor.image_processor.max_tiles == 3 and processor.chat_template == "hi"
    assert processor.tokenizer.padding_side == "right" and processor.tokenizer.model_max_length == 900


def test_nothing_given(processor):
    with refused("Expected `text`, `images` or both"):
        processor()
    with refused("empty list of texts"):
        processor(text=[])
    with refused("`text` must be a string or a list of strings", TypeError):
        processor(text=[["a", "b"]])
    with refused("`text` must be a string or a list of strings", TypeError):
        processor(text=[1])


def test_half_a_character(processor, chat):
    """What Python reads from a command line that is not in UTF-8."""
    for attempt in (lambda: processor(text=["fine", "b\udcff"]), lambda: processor(text="\ud83d", images=None)):
        with refused(r"Sample [01] has '\\u\w+' at character [01], half of a character"):
            attempt()
    with refused("half of a character"):
        chat([("user", "a\udcff", SMALL)])


def test_video_and_audio(processor, chat, make_image):
    video = np.stack([make_image(*SMALL)] * 3)
    for kwargs in ({"videos": [video]}, {"audio": [np.zeros(100)]}):
        with refused("takes text and images; got a video or audio"):
            processor(text="hi", **kwargs)
    # No video at all is none, as callers of many models' processors say it.
    empty = processor(text="hi", videos=[], audio=[], audios=None)
    assert empty["input_ids"] == processor(text="hi")["input_ids"]
    for part in ({"type": "video", "video": video}, {"type": "video", "url": "http://127.0.0.1:9/x.mp4"}):
        with refused("(?i)video", Exception):
            chat([("user", part, "what?")])


# Texts and their images


@pytest.mark.parametrize(
    ("texts", "images", "sample", "places", "number"),
    [
        ("<|image|>", None, 0, 1, 0),
        ("hi", [1, 1], 0, 0, 2),
        ("<|image|><|image|>", [1], 0, 2, 1),
        ("<|image|>", [1, 1], 0, 1, 2),
        (["hi", "<|image|>"], None, 1, 1, 0),
        (["<|image|>", "<|image|>"], [1], 1, 1, 0),
        (["<|image|>", "hi"], [1, 1], 1, 0, 1),
        (["<|image|>", "<|image|>"], [[1, 1], []], 0, 1, 2),
        (["<|image|>", "<|image|>"], [[1], [1, 1, 1]], 1, 1, 3),
        (["hi", "<|image|>"], [[], []], 1, 1, 0),
    ],
)
def test_numbers_of_images(processor, make_image, texts, images, sample, places, number):
    def fill(item):
        return [fill(i) for i in item] if isinstance(item, list) else make_image(*SMALL)

    with refused(rf"Sample {sample} has {places} <\|image\|> in its text but {number} images"):
        processor(text=texts, images=fill(images) if images else None)


def test_numbers_of_samples(processor, make_image):
    with refused("images for 1 samples, but 2 texts"):
        processor(text=["<|image|>", "<|image|>"], images=[[make_image(*SMALL)] * 2])


def test_too_long(new_processor, make_image, conversation):
    new_processor.tokenizer.model_max_length = 500
    with refused("Sample 1 has 50[0-9] tokens, the model takes 500.*Shorten the text"):
        new_processor(text=["hi", "é " * 168])
    with refused("Sample 0 has 8[0-9]+ tokens, the model takes 500.*max_tiles"):
        new_processor.apply_chat_template(conversation([("user", SMALL, SMALL)]), tokenize=True, return_dict=True)
    assert len(new_processor(text="<|image|>", images=make_image(*SMALL))["input_ids"][0]) == 425


@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_that_would_cut_an_image(new_processor, make_image, side):
    new_processor.tokenizer.truncation_side = side
    text = "the fox <|image|>" if side == "right" else "<|image|> the fox"
    with refused("Sample 0 has 42[0-9] tokens; truncation to 400 would cut an image"):
        new_processor(text=text, images=make_image(*SMALL), truncation=True, max_length=400)


# Chats


def test_messages(processor, chat):
    with refused("Expected the role system, user or assistant, got tool", Exception):
        chat([("tool", "hi")])
    with refused("Expected text and images, got sound", Exception):
        chat([("user", {"type": "sound"})])
    with refused(r"1 <\|image\|> in its text but 0 images"):
        chat([("user", {"type": "image"}, "what?")])


LISTS = "Expected a list of messages, each a dictionary with `role` and `content`"
TEXT = {"type": "text", "text": "hi"}
BAD_CONVERSATIONS = {
    "a string": ("hi", f"{LISTS}, got 'hi'"),
    "strings": (["hi"], f"{LISTS}, got 'hi'"),
    "a message alone": ({"role": "user", "content": "hi"}, f"{LISTS}, got {{'role': 'user'"),
    "nothing": (None, f"{LISTS}, got None"),
    "none": ([], f"{LISTS}, got an empty one"),
    "an empty one of several": ([[{"role": "user", "content": "hi"}], []], f"{LISTS}, got an empty one"),
    "messages beside conversations": ([[{"role": "user", "content": "hi"}], {"role": "user", "content": "hi"}], LISTS),
}
BAD_CONTENT = {
    "a part alone": (
        TEXT,
        "Expected `content` to be a string or a list of parts such as .*got {'type': 'text', 'text': 'hi'}",
    ),
    "a number": (7, "Expected `content` to be a string or a list .*got 7"),
    "strings": (["which?", "color"], "Expected a part of `content` to be a dictionary such as .*got 'which"),
    "no type": ([{"text": "hi"}], "Expected a part of `content` to be a dictionary such as .*got {'text': 'hi'}"),
    "an image without type": (
        [{"image": "x.png"}, TEXT],
        "Expected a part of `content` to be a dictionary such as .*got {'image'",
    ),
    "no text": (
        [{"type": "text"}],
        "Expected a string under 'text', as in {'type': 'text', 'text': '...'}, got {'type': 'text'}",
    ),
    "text None": ([{"type": "text", "text": None}], "Expected a string under 'text'.*'text': None"),
    "text under another name": (
        [{"type": "text", "content": "hi"}],
        "Expected a string under 'text'.*'content': 'hi'",
    ),
    "a number as text": ([{"type": "text", "text": 7}], "Expected a string under 'text'.*'text': 7"),
    "two images in one": (
        [{"type": "image", "url": "x.png", "path": "y.png"}],
        "A part shows one image, got 'url' and 'path'",
    ),
}


@pytest.mark.parametrize("tokenize", [True, False])
@pytest.mark.parametrize("name", BAD_CONVERSATIONS)
def test_bad_conversations(processor, name, tokenize):
    conversation, message = BAD_CONVERSATIONS[name]
    with refused(message, (TypeError, ValueError)):
        processor.apply_chat_template(conversation, tokenize=tokenize)


@pytest.mark.parametrize("tokenize", [True, False])
@pytest.mark.parametrize("sanitize", [True, False])
@pytest.mark.parametrize("role", ["user", "assistant"])
@pytest.mark.parametrize("name", BAD_CONTENT)
def test_bad_content(processor, name, role, tokenize, sanitize):
    content, message = BAD_CONTENT[name]
    conversation = [{"role": "user", "content": "hi"}, {"role": role, "content": content}]
    for given in (conversation, [conversation[:1], conversation]):
        with refused(message, (TypeError, ValueError)) as caught:
            processor.apply_chat_template(given, tokenize=tokenize, return_dict=True, sanitize_control_tokens=sanitize)
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", [name for name in BAD_CONTENT if name != "two images in one"])
def test_bad_content_in_engines(processor, chat_template, name):
    """They have the template alone, which must neither print nor skip what it cannot use."""
    content, _ = BAD_CONTENT[name]
    with refused("Expected parts such as|is not iterable", Exception):
        processor.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], chat_template=chat_template, tokenize=False
        )


def test_what_is_none_is_not_there(processor, make_image, tmp_path):
    """Data sets give all parts and messages the same keys; clients send null."""
    path = tmp_path / "one.png"
    Image.fromarray(make_image(*SMALL)).save(path)
    plain = [{"role": "user", "content": [{"type": "image", "path": str(path)}, {"type": "text", "text": "what?"}]}]
    nothing = dict.fromkeys(("image", "url", "path", "base64", "image_url", "text"))
    padded = [
        {
            "role": "user",
            "name": None,
            "tool_calls": None,
            "content": [{**nothing, "type": "image", "path": str(path)}, {**nothing, "type": "text", "text": "what?"}],
        }
    ]
    empty = [{"role": "assistant", "content": None}]
    kwargs = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    expected, found = (processor.apply_chat_template(messages, **kwargs) for messages in (plain, padded))
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    assert processor.apply_chat_template(padded) == processor.apply_chat_template(plain)
    assert processor.apply_chat_template(empty) == "<|endoftext|> Assistant:<|endoftext|>"
    assert padded[0]["content"][0]["url"] is None, "what was given is left as it was"


def test_messages_that_are_objects(processor):
    """As clients of OpenAI's interface return them."""

    @dataclasses.dataclass
    class Part:
        text: str
        type: str = "text"

    @dataclasses.dataclass
    class Message:
        role: str
        content: list
        refusal: str | None = None

    class Model:
        def model_dump(self):
            return {"role": "user", "content": [{"type": "text", "text": "hi <|image|>"}], "name": None}

    for message in (Message("user", [Part("hi <|image|>")]), Model()):
        expected = processor.apply_chat_template([{"role": "user", "content": "hi <|image|>"}], tokenize=True)
        assert processor.apply_chat_template([message], tokenize=True) == expected
        assert processor.apply_chat_template([message]) == "<|endoftext|> User: hi < |image|> "


# Tokenizers


def test_folder_without_tokenizer(bundle, tmp_path):
    folder = shutil.copytree(bundle, tmp_path / "bundle", ignore=shutil.ignore_patterns("tokenizer*"))
    with refused(f"No tokenizer could be loaded from '{folder}'.*`tokenizer.json`", OSError):
        JinaVLMProcessor.from_pretrained(folder)


def test_foreign_tokenizer(processor):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    foreign = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [])))
    with refused("tokenizer lacks <im_start>, .*does not belong to a jina-vlm checkpoint"):
        JinaVLMProcessor(processor.image_processor, foreign)
