"""What cannot be used is refused by an error that says what was given and what was expected."""

import dataclasses
import io
import re
import shutil

import numpy as np
import pytest
import torch
from jina_vlm import JinaVLMImageProcessor, JinaVLMProcessor
from PIL import Image


SMALL = (20, 20)


@pytest.fixture(scope="module")
def tiler():
    return JinaVLMImageProcessor()


def refused(message: str, error: type = ValueError):
    return pytest.raises(error, match=message)


def encoded(picture, file_format: str, **kwargs) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture(200, 200)).save(file, file_format, **kwargs)
    return file.getvalue()


# Images


@pytest.mark.parametrize(
    "thing", [object(), 7, {"a": 1}, b"bytes", None, [None], [object()]], ids=lambda thing: type(thing).__name__
)
def test_no_image(tiler, processor, thing):
    name = type(thing[0] if isinstance(thing, list) else thing).__name__
    with refused(f"Expected an image .*PIL image.*got {name}", TypeError):
        tiler(thing)
    if thing is not None:  # the processor takes it for no images
        with refused(f"Expected an image .*got {name}", TypeError):
            processor(images=thing, text="<|image|>")


@pytest.mark.parametrize(
    "content", [b"just text", b"<html><body>404</body></html>", b""], ids=["text", "html", "empty"]
)
def test_file_that_is_no_image(tiler, tmp_path, content):
    path = tmp_path / "page.png"
    path.write_bytes(content)
    with refused("page.png: not an image in a format that Pillow can read"):
        tiler(path)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_truncated(tiler, picture, tmp_path, file_format):
    data = encoded(picture, file_format)
    path = tmp_path / f"half.{file_format.lower()}"
    path.write_bytes(data[: len(data) // 2])
    with refused(f"half.{file_format.lower()}.*damaged or incomplete"):
        tiler(path)
    if file_format != "WEBP":  # which Pillow does not even open
        with refused("damaged or incomplete"):
            tiler(Image.open(io.BytesIO(path.read_bytes())))


def test_corrupt(tiler, picture, tmp_path):
    data = bytearray(encoded(picture, "PNG"))
    start = data.index(b"IDAT") + 20
    data[start : start + 200] = bytes(200)
    (tmp_path / "corrupt.png").write_bytes(data)
    with refused("corrupt.png.*damaged or incomplete"):
        tiler(tmp_path / "corrupt.png")
    header = bytearray(encoded(picture, "JPEG"))
    header[20:160] = b"\xff" * 140  # its tables
    (tmp_path / "corrupt.jpg").write_bytes(header)
    with refused("corrupt.jpg.*(damaged or incomplete|not an image)"):
        tiler(tmp_path / "corrupt.jpg")


@pytest.mark.parametrize("empty", [[], (), [[]]])
def test_no_images(tiler, processor, empty):
    with refused("[Ee]mpty list of images"):
        tiler(empty)
    if empty != [[]]:
        with refused("empty list of images"):
            processor(images=empty, text="hi")


@pytest.mark.parametrize("shape", [(0, 0, 3), (0, 5, 3), (5, 0, 3), (0, 0), (3, 0, 0)], ids=str)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32], ids=["uint8", "float32"])
def test_no_pixels(tiler, shape, dtype):
    with refused(r"\b0\b"):
        tiler(np.zeros(shape, dtype))


def test_aspect_ratio(tiler):
    for size, shown in (((1, 201), "201 x 1"), ((402, 2), "2 x 402")):
        with refused(f"{shown} pixels; its longer side may be at most 200 times"):
            tiler(Image.new("L", size[::-1]))
    assert (
        len(tiler(Image.new("L", (200, 1)))["pixel_values"])
        == len(tiler(Image.new("L", (2, 400)))["pixel_values"])
        == 2
    )


def test_decompression_bomb(tiler, picture, tmp_path, web, monkeypatch):
    folder, url = web
    (folder / "bomb.png").write_bytes(encoded(picture, "PNG"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for image in (folder / "bomb.png", f"{url}/bomb.png"):
        with refused("bomb.png: more pixels than Pillow's limit .*MAX_IMAGE_PIXELS"):
            tiler(image)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize(
    ("value", "shown"), [(np.nan, "nan"), (np.inf, "inf"), (-0.5, "-0.5"), (1.5, "1.5"), (255.0, "255.0")]
)
def test_floats(tiler, picture, dtype, value, shown):
    array = (picture(*SMALL) / 255).astype(dtype)
    array[3, 4, 1] = value
    for image in (array, torch.from_numpy(array)):
        with refused(rf"floats must lie in 0 \.\. 1 without NaN, got .*{shown}"):
            tiler(image)


@pytest.mark.parametrize("value", [-1, 256, 70000])
def test_integers(tiler, value):
    with refused(rf"int64 must lie in 0 \.\. 255, got .*{value}"):
        tiler(np.full((20, 20, 3), value))
    if not 0 <= value <= 65535:
        with refused(rf"0 \.\. 65535, got {value}"):
            tiler(Image.fromarray(np.full(SMALL, value, np.int32)))


def test_other_types(tiler):
    with refused("complex64"):
        tiler(np.ones((20, 20, 3), np.complex64))
    with refused("object"):
        tiler(np.full((20, 20, 3), "a", object))


@pytest.mark.parametrize("shape", [(20, 20, 2), (2, 20, 20), (20, 20, 5), (5, 20, 20)], ids=str)
def test_channels(tiler, shape):
    with refused(rf"1, 3 or 4 channels.*{re.escape(str(list(shape)))}"):
        tiler(np.zeros(shape, np.uint8))
    with refused("1, 3 or 4 channels"):
        tiler(torch.zeros(shape), input_data_format="channels_last" if shape[0] == 20 else "channels_first")


@pytest.mark.parametrize("shape", [(20,), (2, 2, 20, 20, 3)], ids=str)
def test_dimensions(tiler, shape):
    with refused(rf"{re.escape(str(list(shape)))}|{re.escape(str(shape))}", (ValueError, TypeError)):
        tiler(np.zeros(shape, np.uint8))


def test_missing(tiler, web):
    folder, url = web
    with refused("No such image: '/nowhere/cat.png'. Expected a file, an http", FileNotFoundError):
        tiler("/nowhere/cat.png")
    with refused("nowhere/cat", (ValueError, FileNotFoundError)):
        tiler("/nowhere/cat")
    with refused(f"Could not download the image at '{url}/none.png'.*404"):
        tiler(f"{url}/none.png")
    with refused("Could not download the image at 'http://127.0.0.1:9/x.png'"):
        tiler("http://127.0.0.1:9/x.png")
    (folder / "page.html").write_text("<html>")
    with refused("page.html: not an image"):
        tiler(f"{url}/page.html")
    for source in (folder, str(folder)):
        with refused(f"'{folder}' is a folder. Expected a file"):
            tiler(source)
    for source in ("", " ", "\n"):
        with refused("is empty. Expected a file, an http"):
            tiler(source)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "TIFF", "BMP"])
def test_closed(tiler, picture, tmp_path, file_format):
    """As `with Image.open(path) as image: ...` leaves it, where nothing read its pixels."""
    path = tmp_path / "image"
    path.write_bytes(encoded(picture, file_format))
    with Image.open(path) as image:
        pass
    with refused("its file was closed before its pixels were read. Call its `load"):
        tiler(image)
    with Image.open(path) as image:
        image.load()
    assert len(tiler(image)["pixel_values"]) == 2


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("data:image/png,abc", "of the form `data:image/...;base64"),
        ("data:image/png;base64", "of the form `data:image/...;base64"),
        ("data:image/png;base64,#!$", "base64"),
        ("data:image/png;base64,aGVsbG8=", "not an image"),
        ("aGVsbG8=", "not an image"),
        ("file:///etc/hostname", "neither an existing file"),
        ("x" * 3000, "base64|not an image"),
    ],
)
def test_bad_uri(tiler, uri, message):
    with refused(message, (ValueError, FileNotFoundError)) as caught:
        tiler(uri)
    assert len(str(caught.value)) < 400


# Settings and arguments


@pytest.mark.parametrize("max_tiles", [0, -1])
def test_max_tiles(tiler, processor, picture, max_tiles):
    for attempt in (
        lambda: JinaVLMImageProcessor(max_tiles=max_tiles),
        lambda: tiler(picture(*SMALL), max_tiles=max_tiles),
        lambda: tiler.get_tiling(20, 20, max_tiles=max_tiles),
        lambda: processor(images=picture(*SMALL), text="<|image|>", max_tiles=max_tiles),
        lambda: processor._get_num_multimodal_tokens([(20, 20)], max_tiles=max_tiles),
    ):
        with refused(f"`max_tiles` must be at least 1, got {max_tiles}"):
            attempt()


@pytest.mark.parametrize(
    "setting", [{"min_pixels": 0}, {"max_pixels": 100}, {"min_pixels": 500, "max_pixels": 400}], ids=str
)
def test_pixel_budget(tiler, picture, setting):
    for attempt in (lambda: JinaVLMImageProcessor(**setting), lambda: tiler(picture(*SMALL), **setting)):
        with refused(f"`min_pixels` (<= `max_pixels`|must be at least 1).*{max(setting.values())}"):
            attempt()


def test_unknown_arguments(tiler, processor, chat, picture):
    image = picture(*SMALL)
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
        with refused("[Uu]nknown keyword argument 'max_tile'.* Known are: ", TypeError):
            attempt()


def test_nothing_given(processor):
    with refused("Expected `text`, `images` or both"):
        processor()
    with refused("empty list of texts"):
        processor(text=[])
    with refused("`text` must be a string or a list of strings", TypeError):
        processor(text=[["a", "b"]])
    with refused("`text` must be a string or a list of strings", TypeError):
        processor(text=[1])


# Texts and their images


@pytest.mark.parametrize(
    ("texts", "images", "sample", "places", "number"),
    [
        ("<|image|>", None, 0, 1, 0),
        ("hi", 1, 0, 0, 1),
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
def test_numbers_of_images(processor, picture, texts, images, sample, places, number):
    def fill(item):
        return [fill(i) for i in item] if isinstance(item, list) else picture(*SMALL)

    with refused(rf"Sample {sample} has {places} <\|image\|> in its text but {number} images"):
        processor(text=texts, images=fill(images) if images else None)


def test_numbers_of_samples(processor, picture):
    with refused("images for 1 samples, but 2 texts"):
        processor(text=["<|image|>", "<|image|>"], images=[[picture(*SMALL)] * 2])


def test_too_long(new_processor, picture, conversation):
    new_processor.tokenizer.model_max_length = 500
    with refused("Sample 1 has 50[0-9] tokens, the model takes 500.*Shorten the text"):
        new_processor(text=["hi", "é " * 168])
    with refused("Sample 0 has 8[0-9]+ tokens, the model takes 500.*max_tiles"):
        new_processor.apply_chat_template(conversation([("user", SMALL, SMALL)]), tokenize=True, return_dict=True)
    assert len(new_processor(text="<|image|>", images=picture(*SMALL))["input_ids"][0]) == 425


@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_that_would_cut_a_image(new_processor, picture, side):
    new_processor.tokenizer.truncation_side = side
    text = "the fox <|image|>" if side == "right" else "<|image|> the fox"
    with refused("Sample 0 has 42[0-9] tokens; truncation to 400 would cut an image"):
        new_processor(text=text, images=picture(*SMALL), truncation=True, max_length=400)


def test_video_and_audio(processor, chat, picture):
    video = np.stack([picture(*SMALL)] * 3)
    for kwargs in ({"videos": [video]}, {"audio": [np.zeros(100)]}):
        with refused("takes text and images; got a video or audio"):
            processor(text="hi", **kwargs)
    # No video at all is none, as callers of many models' processors say it.
    empty = processor(text="hi", videos=[], audio=[], audios=None)
    assert empty["input_ids"] == processor(text="hi")["input_ids"]
    for part in ({"type": "video", "video": video}, {"type": "video", "url": "http://127.0.0.1:9/x.mp4"}):
        with refused("(?i)video", Exception):
            chat([("user", part, "what?")])


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


def test_what_is_none_is_not_there(processor, picture, tmp_path):
    """Data sets give all parts and messages the same keys; clients send null."""
    path = tmp_path / "one.png"
    Image.fromarray(picture(*SMALL)).save(path)
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
    assert processor.apply_chat_template(empty) == "<|endoftext|> Assistant: <|endoftext|>"
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
        assert processor.apply_chat_template([message]) == "<|endoftext|> User: hi < |image|>"


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


# What reaches the model


@pytest.fixture(scope="module")
def inputs(chat):
    return chat([("user", (113, 500), SMALL, "which?")])


def test_tensors_that_do_not_belong_together(model, inputs):
    def run(**changes):
        given = {**inputs, **changes}
        return lambda: model(**{name: value for name, value in given.items() if value is not None})

    pixels, places = inputs["pixel_values"], inputs["tile_positions"]
    swapped = places.clone()
    swapped[[1, 2]] = swapped[[2, 1]]
    wrong = places.clone()
    wrong[:3, 2] = 2
    cases = {
        "`pixel_values` without `tile_positions`": run(tile_positions=None),
        r"got \[5, 3, 378, 378\] and \[4, 4\]": run(tile_positions=places[:4]),
        r"got \[4, 3, 378, 378\] and \[5, 4\]": run(pixel_values=pixels[:4]),
        r"got \[0, 3, 378, 378\] and \[0, 4\].* where there are no images": run(
            pixel_values=pixels[:0], tile_positions=places[:0]
        ),
        # a sample that `default_collate` put a dimension around
        r"got \[1, 5, 3, 378, 378\] and \[1, 5, 4\].* concatenated along": run(
            pixel_values=pixels[None], tile_positions=places[None]
        ),
        "from tile 3 on .* expected": run(pixel_values=pixels[:4], tile_positions=places[:4]),
        r"from tile 0 on is \[\[0, 0, 1, 2\].* expected \[\[-1, -1, 1, 2\]": run(
            pixel_values=pixels[1:], tile_positions=places[1:]
        ),
        "from tile 0 on is": run(tile_positions=swapped),
        r"from tile 0 on is \[\[-1, -1, 2, 2\]": run(tile_positions=wrong),
        "text has 924 places .* make 392": run(pixel_values=pixels[3:], tile_positions=places[3:]),
        "either `input_ids` or `inputs_embeds`": run(input_ids=None),
    }
    for message, attempt in cases.items():
        with refused(message):
            attempt()
    with refused("without `tile_positions`"):
        model.generate(input_ids=inputs["input_ids"], pixel_values=pixels, max_new_tokens=2)
    with refused("unused|not used"):
        model.generate(**inputs, tile_position=places, max_new_tokens=2)
