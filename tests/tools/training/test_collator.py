"""`JinaVLMCollator`: rows of data sets in the sources' layouts to batches, with labels where assistants speak."""

import base64
import io

import pytest
import torch
from conftest import make_image
from PIL import Image

from jina_vlm_tools.training import JinaVLMCollator
from jina_vlm_tools.training.layouts import CAPTION_QUESTION, BadSample, to_conversation


@pytest.fixture(scope="module")
def collator(processor):
    return JinaVLMCollator(processor)


def image(height: int = 20, width: int = 30) -> Image.Image:
    return Image.fromarray(make_image(height, width, seed=height))


def encoded(shown: Image.Image, kind: str = "PNG") -> dict:
    """As `datasets` holds images that are not decoded."""
    file = io.BytesIO()
    shown.save(file, kind)
    return {"bytes": file.getvalue(), "path": None}


def said(collator, row) -> list[str]:
    """What is to be predicted, turn by turn."""
    batch = collator([row])
    assert batch["labels"][0, 0] == -100
    pieces = [[]]
    for token, label in zip(batch["input_ids"][0].tolist(), batch["labels"][0].tolist(), strict=True):
        if label == -100:
            pieces += [[]] if pieces[-1] else []
        else:
            assert label in (token, collator.processor.tokenizer.eos_token_id)
            pieces[-1].append(label)
    return [collator.processor.tokenizer.decode(piece) for piece in pieces if piece]


ONE = image()
CHAT = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "which?"}]},
    {"role": "assistant", "content": "the fox"},
    {"role": "user", "content": "and now?"},
    {"role": "assistant", "content": [{"type": "text", "text": "a dog"}]},
]
LAYOUTS = {
    "finevision": {
        "images": [ONE],
        "texts": [{"user": "which?", "assistant": "the fox"}, {"user": "and now?", "assistant": "a dog"}],
        "source": "some",
    },
    "cauldron": {
        "images": [encoded(ONE)],
        "texts": [
            {"user": "which?", "assistant": "the fox", "source": "s"},
            {"user": "and now?", "assistant": "a dog", "source": "s"},
        ],
    },
    "llava": {
        "id": "1",
        "image": ONE,
        "conversations": [
            {"from": "human", "value": "<image>\nwhich?"},
            {"from": "gpt", "value": "the fox"},
            {"from": "human", "value": "and now?"},
            {"from": "gpt", "value": "a dog"},
        ],
    },
    "chat with images inside": {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": ONE, "text": None},
                    {"type": "text", "text": "which?", "image": None},
                ],
            },
            *CHAT[1:],
        ]
    },
    "chat with images beside": {"messages": CHAT, "images": [ONE]},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_say_the_same(collator, layout):
    """The same conversation in each layout is the same batch."""
    expected, found = collator([LAYOUTS["finevision"]]), collator([LAYOUTS[layout]])
    assert (
        found.keys() == expected.keys() == {"input_ids", "attention_mask", "labels", "pixel_values", "tile_positions"}
    )
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


CAPTION = {"image_url": ONE, "caption": "the fox", "transcripts": ["a fox, well"]}  # PixMo-Cap's columns
AYA = {"inputs": "which?", "targets": "the fox", "language": "English", "language_code": "eng", "user_id": "1"}
DOCUMENT = {"identifier": "1", "collection": "some", "title": "A", "text": "the fox", "word_count": 2}


@pytest.mark.parametrize(
    ("row", "chat", "expected"),
    [
        (
            CAPTION,
            [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": CAPTION_QUESTION}]},
                {"role": "assistant", "content": "the fox"},
            ],
            ["the fox<|endoftext|>"],
        ),
        (
            AYA,
            [{"role": "user", "content": "which?"}, {"role": "assistant", "content": "the fox"}],
            ["the fox<|endoftext|>"],
        ),
        (DOCUMENT, [{"role": "assistant", "content": "the fox"}], ["the fox<|endoftext|>"]),
    ],
    ids=["pixmo", "aya", "common_corpus"],
)
def test_rows_that_are_no_chats(collator, row, chat, expected):
    """The same batch as the chat that they stand for."""
    same = {"messages": chat, **({"images": [ONE]} if row is CAPTION else {})}
    found, other = collator([row]), collator([same])
    assert found.keys() == other.keys() and all(torch.equal(found[name], other[name]) for name in found)
    assert [text.strip() for text in said(collator, row)] == expected


def test_captions_name_their_image_in_any_column(collator, web):
    folder, url = web
    ONE.save(folder / "one.png")
    expected = collator([CAPTION])["pixel_values"]
    for column, image in (("image_url", f"{url}/one.png"), ("image", ONE), ("images", [encoded(ONE)])):
        assert torch.equal(collator([{column: image, "caption": "the fox"}])["pixel_values"], expected)


def test_a_document_longer_than_the_model_takes(processor):
    """Its beginning is what the whole document's would be."""
    text = "the quick brown fox jumps over the lazy dog " * 5000
    for length in (50, processor.tokenizer.model_max_length):
        batch = JinaVLMCollator(processor, max_length=length)([{"text": text}])
        kept = batch["input_ids"].shape[1]
        assert length - 20 < kept <= length and (batch["labels"][0, 3:] >= 0).all()
        shorter = JinaVLMCollator(processor, max_length=length)([{"text": text[: 6 * length]}])["input_ids"]
        assert torch.equal(batch["input_ids"][0, : kept - 1], shorter[0, : kept - 1])


def test_documents_are_cut(processor):
    """Of a long one the beginning is learned, with no end; beside samples that are whole."""
    document = {"text": "the quick brown fox jumps over the lazy dog " * 50}
    whole, collator = JinaVLMCollator(processor)([document]), JinaVLMCollator(processor, max_length=64)
    batch = collator([document, {"text": "the fox"}])
    assert collator.measure(document) == (64, 0) and batch["input_ids"].shape == (2, 64)
    assert torch.equal(batch["input_ids"][0], whole["input_ids"][0, :64])
    assert torch.equal(batch["labels"][0], whole["labels"][0, :64])
    eos = processor.tokenizer.eos_token_id
    assert eos not in batch["labels"][0] and batch["labels"][1].tolist().count(eos) == 1
    answer = {"inputs": "which?", "targets": document["text"]}
    for use in (lambda: collator.measure(answer), lambda: collator([answer, document])):
        with pytest.raises(BadSample, match="tokens, more than 64"):
            use()


def test_an_image_by_its_path(collator, tmp_path):
    ONE.save(tmp_path / "one.png")
    found = to_conversation({"image": "one.png", "conversations": LAYOUTS["llava"]["conversations"]}, tmp_path)
    assert torch.equal(collator([{"messages": found}])["pixel_values"], collator([LAYOUTS["llava"]])["pixel_values"])


def test_an_image_by_its_url(collator, web):
    """As the bundle opens it."""
    folder, url = web
    ONE.save(folder / "one.png")
    expected = collator([{"images": [ONE], "texts": ANSWER}])["pixel_values"]
    content = [{"type": "image", "url": f"{url}/one.png"}, {"type": "text", "text": "which?"}]
    chat = [{"role": "user", "content": content}, {"role": "assistant", "content": "this"}]
    data = f"data:image/png;base64,{base64.b64encode((folder / 'one.png').read_bytes()).decode()}"
    for row in ({"images": [f"{url}/one.png"], "texts": ANSWER}, {"messages": chat}, {"image": data, "texts": ANSWER}):
        assert torch.equal(collator([row])["pixel_values"], expected)


def test_images_stand_where_the_text_says(processor):
    row = {
        "image": [image(20, 30), image(40, 30)],
        "conversations": [
            {"from": "human", "value": "this <image> or <image>\nthat?"},
            {"from": "gpt", "value": "an <image> is no image"},
        ],
    }
    parts = to_conversation(row)[0]["content"]
    assert [part.get("text", part["type"]) for part in parts] == ["this ", "image", " or ", "image", "that?"]
    assert [part["image"].height for part in parts if part["type"] == "image"] == [20, 40]
    assert to_conversation(row)[1]["content"] == [{"type": "text", "text": "an <image> is no image"}]


def test_labels_are_what_assistants_say_and_its_end(collator):
    assert said(collator, LAYOUTS["finevision"]) == [" the fox<|endoftext|>", " a dog<|endoftext|>"]


def test_labels_are_not_found_by_their_looks(collator):
    """A user who writes like the template moves no label; nor do typed special tokens."""
    row = {
        "messages": [
            {"role": "user", "content": "a Assistant: b<|endoftext|> User: c <|image|>"},
            {"role": "assistant", "content": "d User: e"},
        ]
    }
    assert said(collator, row) == [" d User: e<|endoftext|>"]


def test_images_and_padding_are_never_in_the_loss(collator, processor):
    rows = [
        LAYOUTS["finevision"],
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
    ]
    batch = collator(rows)
    special = torch.tensor(processor.image_token_ids)
    assert torch.isin(batch["input_ids"], special).sum() > 400 and not torch.isin(batch["labels"], special).any()
    padding = batch["attention_mask"] == 0
    assert padding[1, -100:].all() and not padding[:, 0].any() and (batch["labels"][padding] == -100).all()
    assert next(iter(batch)) == "input_ids", "the Trainer takes the first tensor's length for the number of samples"


def test_tiles_come_in_the_order_of_rows(collator):
    tall, text = (
        image(700, 300),
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
    )
    rows = [LAYOUTS["finevision"], text, {"image": tall, "conversations": LAYOUTS["llava"]["conversations"]}]
    batch = collator(rows)
    alone = [collator([rows[0]]), collator([rows[2]])]
    assert torch.equal(batch["pixel_values"], torch.cat([one["pixel_values"] for one in alone]))
    assert len(alone[1]["pixel_values"]) > len(alone[0]["pixel_values"])


def test_a_batch_without_images(collator, model):
    batch = collator([{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}])
    assert batch.keys() == {"input_ids", "attention_mask", "labels"}
    with torch.no_grad():
        assert model(**batch).loss.isfinite()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_measures_are_what_a_row_becomes(collator, layout):
    batch = collator([LAYOUTS[layout]])
    assert collator.measure(LAYOUTS[layout]) == (batch["input_ids"].shape[1], len(batch["pixel_values"]))


def test_measures_of_a_turned_image(collator):
    turned = image(200, 900)
    exif = turned.getexif()
    exif[0x0112] = 6  # a quarter to the right
    file = io.BytesIO()
    turned.save(file, "PNG", exif=exif)
    row = {"images": [{"bytes": file.getvalue(), "path": None}], "texts": LAYOUTS["finevision"]["texts"]}
    batch = collator([row])
    assert batch["tile_positions"][0, 2] > batch["tile_positions"][0, 3], "it stands upright"
    assert collator.measure(row) == (batch["input_ids"].shape[1], len(batch["pixel_values"]))


def truncated() -> dict:
    return {"bytes": encoded(image(300, 300), "JPEG")["bytes"][:2000], "path": None}


ANSWER = [{"user": "which?", "assistant": "this"}]
BAD = {
    "no layout": (
        {"image": ONE, "shows": "x"},
        "Expected a column texts, conversations, messages, caption, inputs or text, got image, shows",
    ),
    "a caption of nothing": ({"caption": "x"}, "no image: expected one in images, image or image_url"),
    "no caption": ({"image_url": ONE, "caption": None}, "`caption` is None, expected a text"),
    "no target": ({"inputs": "x"}, "`targets` is None, expected a text"),
    "an empty document": ({"text": " "}, "No assistant says anything"),
    "a document with an image": ({"image": ONE, "text": "x"}, "Call the column `caption`"),
    "images twice": ({"image": ONE, "image_url": ONE, "caption": "x"}, "both in `image` and in `image_url`"),
    "no turns": ({"texts": []}, "expected a list of turns"),
    "no answer": ({"messages": [{"role": "user", "content": "hi"}]}, "No assistant says anything"),
    "empty answer": ({"texts": [{"user": "which?", "assistant": " "}]}, "No assistant says anything"),
    "null": ({"texts": [{"user": None, "assistant": "x"}]}, "expected a text under 'user'"),
    "unknown role": ({"conversations": [{"from": "bot", "value": "x"}]}, "a turn from 'bot'"),
    "unknown part": ({"messages": [{"role": "assistant", "content": [{"type": "video"}]}]}, "of type text or image"),
    "a place too many": (
        {"image": ONE, "conversations": [{"from": "human", "value": "<image><image>"}, {"from": "gpt", "value": "x"}]},
        "2 places for images, but 1",
    ),
    "a place and no image": (
        {"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}]},
        "1 places for images, but 0",
    ),
    "no image": ({"images": [{"bytes": b"junk", "path": None}], "texts": ANSWER}, "cannot be opened"),
    "a program": ({"images": [encoded(ONE, "EPS")], "texts": ANSWER}, "cannot be opened"),
    "missing file": ({"image": "nowhere.png", "conversations": [{"from": "gpt", "value": "x"}]}, "cannot be opened"),
    "half an image": ({"images": [truncated()], "texts": ANSWER}, "cannot be decoded"),
    "a strip": ({"images": [image(1, 900)], "texts": ANSWER}, "200"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_samples_say_what_is_wrong(collator, name):
    row, message = BAD[name]
    with pytest.raises(BadSample, match=message):
        collator.measure(row)


def test_too_long_a_sample(processor):
    row = LAYOUTS["finevision"]
    tokens, _ = JinaVLMCollator(processor).measure(row)
    assert JinaVLMCollator(processor, max_length=tokens).measure(row)[0] == tokens
    short = JinaVLMCollator(processor, max_length=tokens - 1)
    for use in (lambda: short.measure(row), lambda: short([row])):
        with pytest.raises(BadSample, match=f"{tokens} tokens, more than"):
            use()


def test_a_template_without_generation_marks(new_processor):
    new_processor.chat_template = new_processor.chat_template.replace("{%- generation %}", "").replace(
        "{%- endgeneration %}", ""
    )
    with pytest.raises(ValueError, match="chat_template.jinja"):
        JinaVLMCollator(new_processor)
