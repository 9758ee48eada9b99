"""Text and images to model inputs: what goes where."""

import base64
import copy
import io
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby

import numpy as np
import pytest
import torch
from conftest import ROOT, python
from jina_vlm import JinaVLMProcessor
from PIL import Image
from released import RELEASED_TEMPLATE
from transformers import AutoTokenizer, pipeline


START, END, PATCH, COLUMN, IMAGE = range(512, 517)  # of the golden tokenizer
BOS = "<|endoftext|>"
TINY = ROOT / "checkpoints" / "tiny"
SMALL, WIDE = (20, 20), (113, 500)  # 1 x 1 and 1 x 2 tiles


def grid(rows: int, columns: int) -> list[int]:
    return [START, *([PATCH] * columns + [COLUMN]) * rows, END]


BLOCKS = {SMALL: grid(14, 14) + grid(14, 14), WIDE: grid(14, 14) + grid(14, 24)}


def expected_ids(processor, *parts) -> list[int]:
    """Of text, where the size of an image stands for its tokens."""
    return [
        token_id
        for part in parts
        for token_id in (
            BLOCKS[part] if isinstance(part, tuple) else processor.tokenizer.encode(part, add_special_tokens=False)
        )
    ]


def unpadded(inputs, row: int) -> list[int]:
    return inputs["input_ids"][row][inputs["attention_mask"][row].bool()].tolist()


CHATS = {  # with what stands between `<|endoftext|>` and "Assistant:"
    "string": ([("user", "the fox")], [" User: the fox "]),
    "list": ([("user", "the", "fox")], [" User: the fox "]),
    "no content": ([("user", ""), ("assistant", "")], [" User:  Assistant: "]),
    "system": ([("system", "be quick"), ("user", "hi")], [" System: be quick  User: hi "]),
    "image first": ([("user", SMALL, "which?")], [" User: ", SMALL, "which? "]),
    "image last": ([("user", "which?", SMALL)], [" User: which? ", SMALL]),
    "image alone": ([("user", WIDE)], [" User: ", WIDE]),
    "image between": ([("user", "is", SMALL, "that?")], [" User: is ", SMALL, "that? "]),
    "two images": ([("user", WIDE, "and", SMALL, "?")], [" User: ", WIDE, "and ", SMALL, "? "]),
    "side by side": ([("user", SMALL, WIDE, "?")], [" User: ", SMALL, WIDE, "? "]),
    "several turns": (
        [
            ("system", "s"),
            ("user", SMALL, "a"),
            ("assistant", "b"),
            ("user", "c", WIDE),
            ("assistant", "d", "e"),
            ("user", "f"),
        ],
        [" System: s  User: ", SMALL, "a  Assistant: b  User: c ", WIDE, " Assistant: d e  User: f "],
    ),
}


@pytest.mark.parametrize("name", list(CHATS))
def test_chat(processor, conversation, chat, name):
    turns, parts = CHATS[name]
    inputs = chat(turns, add_generation_prompt=True)
    *parts, last = parts
    parts = [*parts, f"{last}Assistant:"] if isinstance(last, str) else [*parts, last, "Assistant:"]
    assert inputs["input_ids"].tolist() == [expected_ids(processor, BOS, *parts)]
    assert inputs["attention_mask"].min() == 1
    text = "".join("<|image|>" if isinstance(part, tuple) else part for part in parts)
    messages = conversation(turns)
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == f"{BOS}{text}"
    images = [
        part["image"]
        for message in messages
        for part in message["content"]
        if isinstance(part, dict) and "image" in part
    ]
    assert ("pixel_values" in inputs) == bool(images)
    if images:
        alone = [processor.image_processor(image, return_tensors="pt") for image in images]
        for key in ("pixel_values", "tile_positions"):
            assert torch.equal(inputs[key], torch.cat([one[key] for one in alone]))
    # the same in two steps, flat and nested
    for given in [images, [images]] if images else [None]:
        again = processor(text=text, images=given, return_tensors="pt")
        assert again.keys() == inputs.keys()
        assert all(torch.equal(again[key], inputs[key]) for key in again)


@pytest.mark.parametrize("side", [None, "left", "right"])
def test_batch(processor, conversation, chat, side):
    """Different numbers of images, none at all too."""
    names = ["two images", "string", "image first", "several turns"]
    batch = [CHATS[name][0] for name in names]
    inputs = chat(batch, padding=True, **({"padding_side": side} if side else {}))
    alone = [chat(turns) for turns in batch]
    for row, one in enumerate(alone):
        assert unpadded(inputs, row) == one["input_ids"][0].tolist()
        edge = inputs["attention_mask"][row, -1 if side != "right" else 0]
        assert edge == 1
    assert torch.equal(
        inputs["pixel_values"], torch.cat([one["pixel_values"] for one in alone if "pixel_values" in one])
    )
    padding = inputs["input_ids"][inputs["attention_mask"] == 0]
    assert len(padding) and (padding == processor.tokenizer.pad_token_id).all()
    # several texts and a flat list, in order
    texts = processor.apply_chat_template(conversation(batch))
    images = [
        part["image"] for messages in conversation(batch) for m in messages for part in m["content"] if "image" in part
    ]
    flat = processor(text=texts, images=images, return_tensors="pt", **({"padding_side": side} if side else {}))
    assert torch.equal(flat["input_ids"], inputs["input_ids"]) and torch.equal(
        flat["pixel_values"], inputs["pixel_values"]
    )


def test_no_padding_without_tensors(processor):
    texts = ["the fox", "the quick brown fox"]
    assert len({len(ids) for ids in processor(text=texts)["input_ids"]}) == 2
    assert len(processor(text="the fox")["input_ids"]) == 1
    padded = processor(text=texts, padding="max_length", max_length=32, return_tensors="np")
    assert padded["input_ids"].shape == padded["attention_mask"].shape == (2, 32)
    assert processor(text=texts, padding=True, pad_to_multiple_of=8)["input_ids"][0].__len__() == 8


def test_images_alone(processor, make_image):
    inputs = processor(images=[make_image(20, 20), make_image(113, 500)], return_tensors="pt")
    assert set(inputs) == {"pixel_values", "tile_positions"} and len(inputs["pixel_values"]) == 2 + 3


@pytest.mark.parametrize("name", ["max_tiles", "max_pixels", "min_pixels"])
def test_arguments_directly_and_in_a_dictionary(processor, chat, name):
    value = {"max_tiles": 2, "max_pixels": 300 * 300, "min_pixels": 800 * 800}[name]
    turns = [("user", (520, 520), "which?")]
    made = [
        chat(turns, **{name: value}),
        chat(turns, processor_kwargs={name: value}),
        chat(turns, images_kwargs={name: value}),
        chat(turns, processor_kwargs={"images_kwargs": {name: value}}),
    ]
    expected = processor._get_num_multimodal_tokens([(520, 520)], **{name: value})
    assert expected.num_image_patches != processor._get_num_multimodal_tokens([(520, 520)]).num_image_patches
    for inputs in made:
        assert [len(inputs["pixel_values"])] == expected.num_image_patches
        assert [int((inputs["input_ids"] >= START).sum())] == expected.num_image_tokens


def test_part_styles(processor, chat, make_image, web):
    """Each names the image in another way, OpenAI's among them."""
    folder, url = web
    file = io.BytesIO()
    Image.fromarray(make_image(*SMALL)).save(file, "PNG")
    (folder / "style.png").write_bytes(file.getvalue())
    encoded = base64.b64encode(file.getvalue()).decode()
    data_uri = f"data:image/png;base64,{encoded}"
    expected = chat([("user", {"type": "image", "image": make_image(*SMALL)}, "?")])
    for part in (
        {"type": "image", "image": folder / "style.png"},
        {"type": "image", "path": str(folder / "style.png")},
        {"type": "image", "url": f"{url}/style.png"},
        {"type": "image", "url": data_uri},
        {"type": "image", "base64": encoded},
        {"type": "image_url", "image_url": {"url": f"{url}/style.png"}},
        {"type": "image_url", "image_url": {"url": data_uri, "detail": "high"}},
        {"type": "image_url", "image_url": data_uri},
    ):
        inputs = chat([("user", part, "?")])
        assert all(torch.equal(inputs[key], expected[key]) for key in expected), part


# Assistant masks


def masked(processor, inputs) -> list[list[str]]:
    """For each sample, the runs of text that its assistant mask marks."""
    masks = torch.as_tensor(inputs["assistant_masks"])
    assert masks.shape == inputs["input_ids"].shape
    samples = []
    for ids, mask in zip(inputs["input_ids"].tolist(), masks.tolist(), strict=True):
        runs = groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1])
        samples.append(
            [processor.tokenizer.decode([token_id for token_id, _ in run]) for marked, run in runs if marked]
        )
    return samples


MASKED = {
    "text": [("user", "hi"), ("assistant", "the fox")],
    "image before": [("user", SMALL, "hi"), ("assistant", "the fox")],
    "image after": [("user", "hi"), ("assistant", "the fox"), ("user", WIDE)],
    "image between": [("user", "hi"), ("assistant", "the"), ("user", SMALL, WIDE), ("assistant", "fox")],
    "image right before": [
        ("user", "hi", SMALL),
        ("assistant", "the fox"),
        ("user", SMALL, "and"),
        ("assistant", "dog"),
    ],
    "parts": [("system", "s"), ("user", SMALL), ("assistant", "the", "fox"), ("user", "hi")],
    "empty": [("user", WIDE, "hi"), ("assistant", ""), ("user", "hi"), ("assistant", "dog")],
    "beyond ASCII": [("user", SMALL, "größe 日本"), ("assistant", "ja, 日本"), ("user", "é"), ("assistant", "ß")],
    "nothing": [("user", SMALL, "hi")],
}


def answers(turns: list) -> list[str]:
    """The last one ends as it would if it were generated; an empty one before it marks nothing."""
    spoken = [f" {' '.join(parts)}" for role, *parts in turns if role == "assistant" and any(parts)]
    return [*spoken[:-1], f"{spoken[-1]}{BOS}"] if turns[-1][0] == "assistant" else spoken


@pytest.mark.parametrize("name", list(MASKED))
def test_assistant_mask(processor, chat, name):
    inputs = chat(MASKED[name], return_assistant_tokens_mask=True)
    assert masked(processor, inputs) == [answers(MASKED[name])]
    assert "offset_mapping" not in inputs and "text_replacement_offsets" not in inputs
    assert torch.equal(inputs["input_ids"], chat(MASKED[name])["input_ids"])


@pytest.mark.parametrize("sanitize", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_assistant_masks_of_a_batch(processor, chat, side, sanitize):
    inputs = chat(
        list(MASKED.values()),
        return_assistant_tokens_mask=True,
        padding=True,
        padding_side=side,
        sanitize_control_tokens=sanitize,
    )
    assert masked(processor, inputs) == [answers(turns) for turns in MASKED.values()]


# Texts without places for images


@pytest.mark.parametrize("bos", ["", BOS])
def test_one_image_needs_no_place(processor, make_image, bos):
    """It stands in front, as in the release."""
    image, text = make_image(*SMALL), " User: which? Assistant:"
    kwargs = {"images": image, "return_tensors": "pt", "return_offsets_mapping": True}
    placed = processor(text=f"{bos}<|image|>{text}", **kwargs)
    found = processor(text=f"{bos}{text}", **kwargs)
    assert torch.equal(found["input_ids"], placed["input_ids"])
    assert found["input_ids"][0].tolist() == expected_ids(processor, BOS, SMALL, text)
    start, length = len(bos), len(BLOCKS[SMALL])
    spans = found["offset_mapping"][0].tolist()
    assert spans[0] == [0, start] and spans[1 : 1 + length] == [[start, start]] * length
    whole = bos + text
    assert "".join(whole[a:b] for a, b in spans[1 + length :]) == text


def test_texts_without_places_in_a_batch(processor, make_image):
    images, texts = [make_image(*SMALL), make_image(*WIDE)], ["which?", "the fox"]
    expected = processor(text=[f"<|image|>{text}" for text in texts], images=images)
    for given in (images, [[image] for image in images]):
        assert processor(text=texts, images=given)["input_ids"] == expected["input_ids"]
    mixed = processor(text=["which?", "hi", "a <|image|>"], images=[images[:1], [], images[1:]])
    alone = [processor(text="which?", images=images[0]), processor(text="hi")]
    alone.append(processor(text="a <|image|>", images=images[1]))
    assert mixed["input_ids"] == [one["input_ids"][0] for one in alone]


def test_several_images_need_their_places(processor, make_image):
    images = [make_image(*SMALL)] * 2
    for text, given in (("which?", images), (["a", "b"], [images, []]), (["a", "b", "c"], images)):
        with pytest.raises(ValueError, match="has 0 .* 2 images. Write .* once for each image, where it belongs"):
            processor(text=text, images=given)


# Marks on request


def test_mm_token_type_ids(processor, chat):
    turns = [CHATS["two images"][0], CHATS["string"][0]]
    inputs = chat(turns, padding=True, return_mm_token_type_ids=True)
    types, ids = inputs["mm_token_type_ids"], inputs["input_ids"]
    assert torch.equal(types.bool(), (ids >= START) & (ids <= COLUMN))
    assert types.sum(dim=1).tolist() == [len(BLOCKS[WIDE]) + len(BLOCKS[SMALL]), 0]
    sizes = processor._get_num_multimodal_tokens([WIDE, SMALL])
    assert sizes.num_image_tokens == [len(BLOCKS[WIDE]), len(BLOCKS[SMALL])]
    assert "mm_token_type_ids" not in chat(turns, padding=True)


@pytest.mark.parametrize("bos", ["", BOS])
def test_offsets(processor, make_image, bos):
    """Of every token in the text as it was given."""
    text = f"{bos} User: é<|image|> and <|image|>which fox?"
    given = {"text": text, "images": [make_image(*SMALL), make_image(*WIDE)], "return_offsets_mapping": True}
    inputs = processor(**given)
    pieces = [text[start:end] for start, end in inputs["offset_mapping"][0]]
    ids = inputs["input_ids"][0]
    assert pieces[0] == bos
    places = [match.span() for match in re.finditer(r"<\|image\|>", text)]
    for token_id, piece, span in list(zip(ids, pieces, inputs["offset_mapping"][0], strict=True))[1:]:
        if token_id >= START:
            assert tuple(span) in places
        elif piece != "é":  # two tokens
            assert piece == processor.tokenizer.decode([token_id])
    first = [token_id >= START for token_id in ids].index(True)
    assert {tuple(span) for span in inputs["offset_mapping"][0][first : first + len(BLOCKS[SMALL])]} == {places[0]}

    # With the library's record of what was replaced they are those of the text that this makes, as it expects of
    # processors.
    both = processor(**given, return_text_replacement_offsets=True)
    assert both["input_ids"][0] == ids
    replaced = both["text_replacement_offsets"][0]
    assert [tuple(item["span"]) for item in replaced] == places
    written = text
    for item in reversed(replaced):
        written = written[: item["span"][0]] + item["replacement"] + written[item["span"][1] :]
    for item in replaced:
        assert written[slice(*item["new_span"])] == item["replacement"]
    for token_id, (start, end) in list(zip(ids, both["offset_mapping"][0], strict=True))[1:]:
        if written[start:end] != "é":
            assert written[start:end] == processor.tokenizer.decode([token_id])
    for item, size in zip(replaced, (SMALL, WIDE), strict=True):
        assert item["replacement"] == processor.tokenizer.decode(BLOCKS[size])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_offsets(processor, side):
    texts = ["the fox", "the quick brown fox jumps"]
    inputs = processor(text=texts, return_offsets_mapping=True, padding=True, padding_side=side, return_tensors="pt")
    assert inputs["offset_mapping"].shape == (*inputs["input_ids"].shape, 2)
    for text, spans in zip(texts, inputs["offset_mapping"].tolist(), strict=True):
        assert "".join(text[start:end] for start, end in spans) == text


def test_truncation(processor, make_image):
    whole = processor(text="the quick brown fox jumps")["input_ids"][0]
    assert processor(text="the quick brown fox jumps", truncation=True, max_length=3)["input_ids"] == [whole[:3]]
    assert (
        processor(text="the fox", truncation=True, max_length=30)["input_ids"]
        == processor(text="the fox")["input_ids"]
    )
    cut = processor(text="<|image|>the quick brown fox", images=make_image(*SMALL), truncation=True, max_length=427)
    assert len(cut["input_ids"][0]) == 427 and cut["input_ids"][0].count(PATCH) == 392


@pytest.mark.parametrize("text", ["the fox", f"{BOS}the fox", "", BOS, "<|image|> fox", f"{BOS}<|image|> fox"])
def test_begins_once_unless_nothing_is_to_be_added(processor, make_image, text):
    images = [make_image(*SMALL)] if "<|image|>" in text else None
    plain = text.removeprefix(BOS)
    parts = [SMALL, " fox"] if images else [plain]
    opened = expected_ids(processor, BOS, *parts)
    for settings in (
        {},
        {"add_special_tokens": True},
        {"add_special_tokens": None},
        {"text_kwargs": {"add_special_tokens": True}},
    ):
        assert processor(text=text, images=images, **settings)["input_ids"] == [opened]
    for settings in ({"add_special_tokens": False}, {"text_kwargs": {"add_special_tokens": False}}):
        as_written = processor(text=text, images=images, return_offsets_mapping=True, **settings)
        assert as_written["input_ids"] == [opened if text.startswith(BOS) else opened[1:]]
        assert len(as_written["offset_mapping"][0]) == len(as_written["input_ids"][0])


def test_pieces_of_a_text_make_the_whole(processor):
    """What trainers encode in parts, and what continues an answer."""
    pieces = ["the quick", " brown", " fox", BOS]
    whole = processor(text="".join(pieces))["input_ids"][0]
    first, *others = [
        processor(text=text, add_special_tokens=index == 0)["input_ids"][0] for index, text in enumerate(pieces)
    ]
    assert [*first, *sum(others, [])] == whole


# Settings, templates


def test_a_saved_tokenizer_opens_texts(tmp_path, released_folder, new_processor, conversation):
    """What encodes texts by itself, such as vLLM or lm-eval, has no processor to put `<|endoftext|>` in front of
    them."""
    assert (
        AutoTokenizer.from_pretrained(released_folder)("the fox")["input_ids"][0]
        != expected_ids(new_processor, BOS)[0]
    )
    new_processor.save_pretrained(tmp_path)
    messages = conversation([("user", "hi")])
    for tokenizer in (
        new_processor.tokenizer,
        AutoTokenizer.from_pretrained(tmp_path),
        AutoTokenizer.from_pretrained(tmp_path, add_bos_token=True),
        JinaVLMProcessor.from_pretrained(tmp_path).tokenizer,
        AutoTokenizer.from_pretrained(TINY),
    ):
        bos = tokenizer.convert_tokens_to_ids(BOS)
        plain = tokenizer("the fox", add_special_tokens=False)["input_ids"]
        assert tokenizer.bos_token == BOS and bos not in plain
        assert tokenizer("the fox")["input_ids"] == [bos, *plain]
        chat = tokenizer.apply_chat_template(messages, chat_template=new_processor.chat_template)["input_ids"]
        assert chat[0] == bos and chat.count(bos) == 1
    for processor in (
        new_processor,
        JinaVLMProcessor.from_pretrained(tmp_path),
        JinaVLMProcessor.from_pretrained(TINY),
    ):
        for text in ("the fox", f"{BOS}the fox"):
            assert processor(text=text)["input_ids"] == [processor.tokenizer("the fox")["input_ids"]]


def test_save_and_load(tmp_path, new_processor, chat, conversation):
    new_processor.image_processor.max_tiles = 3
    new_processor.always_start_with_space = False
    new_processor.save_pretrained(tmp_path)
    loaded = JinaVLMProcessor.from_pretrained(tmp_path)
    assert loaded.image_processor.max_tiles == 3 and loaded.always_start_with_space is False
    assert loaded.chat_template == new_processor.chat_template
    messages = conversation([("user", (520, 520), "the fox")])
    inputs, again = (
        one.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
        for one in (new_processor, loaded)
    )
    assert all(torch.equal(inputs[key], again[key]) for key in inputs)
    assert torch.equal(inputs["input_ids"], chat([("user", (520, 520), "the fox")], max_tiles=3)["input_ids"])
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "processor_config.json").read_text() == (
        tmp_path / "processor_config.json"
    ).read_text()


@pytest.mark.parametrize("space", [True, False])
def test_a_releases_template_is_given_what_it_expects(tmp_path, new_processor, conversation, space):
    """Its variables, and the `<|endoftext|>` that its processor adds: engines that render it by themselves have
    neither."""
    new_processor.always_start_with_space = space
    messages = conversation([("user", SMALL, "hi")])
    for template in (RELEASED_TEMPLATE, {"default": RELEASED_TEMPLATE}):
        new_processor.chat_template = template
        expected = f"{BOS}{' ' * space}User: <|image|>hi "
        assert new_processor.apply_chat_template(messages) == expected
        for settings in ({}, {"add_special_tokens": False}):  # by TRL
            inputs = new_processor.apply_chat_template(
                messages, tokenize=True, return_dict=True, processor_kwargs=settings
            )
            assert inputs["input_ids"] == [expected_ids(new_processor, f"{BOS}{' ' * space}User: ", SMALL, "hi ")]
        other = new_processor.apply_chat_template(messages, always_start_with_space=not space)
        assert other == f"{BOS}{' ' * (not space)}User: <|image|>hi "
        JinaVLMProcessor(new_processor.image_processor, new_processor.tokenizer, template, space).save_pretrained(
            tmp_path
        )
        assert AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(messages, tokenize=False) == expected
    new_processor.chat_template = "{{ messages[0]['content'] }}"
    assert new_processor.apply_chat_template(messages, chat_template=RELEASED_TEMPLATE) == expected
    assert new_processor.apply_chat_template(conversation([("user", "hi")])) == "hi", (
        "of other templates nothing is known"
    )


def test_nothing_given_is_changed(chat, processor, conversation, make_image):
    messages = conversation(
        [("user", SMALL, {"type": "image_url", "image_url": {"url": "x"}}, "<|image|>"), ("assistant", "a")]
    )
    messages[0]["content"].pop(1)
    before = copy.deepcopy(messages)
    arguments = {"processor_kwargs": {"max_tiles": 2, "images_kwargs": {}}, "max_pixels": 90000}
    saved = copy.deepcopy(arguments)
    processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **arguments
    )
    assert messages == before and arguments == saved
    array, images, text = make_image(*SMALL), [make_image(*SMALL)], ["<|image|>"]
    processor(images=images, text=text)
    assert len(images) == 1 and np.array_equal(images[0], array) and text == ["<|image|>"]


def test_not_one_call(processor, conversation, chat):
    """Ids alone, and lists rather than tensors."""
    messages = conversation([("user", SMALL, "hi")])
    expected = chat([("user", SMALL, "hi")])["input_ids"]
    assert torch.equal(
        processor.apply_chat_template(messages, tokenize=True, return_tensors="pt", return_dict=False), expected
    )
    assert processor.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"] == expected.tolist()


def test_continue_final_message(processor, chat):
    inputs = chat([("user", "hi"), ("assistant", "the quick")], continue_final_message=True)
    assert inputs["input_ids"].tolist() == [expected_ids(processor, f"{BOS} User: hi Assistant: the quick")]


BEGUN = {
    "control tokens": (
        ["<|image|> and <im_col>x |<EXTRA_TOKENS_0>|"],
        "< |image|> and < im_col>x | <EXTRA_TOKENS_0>|",
    ),
    "ends in one": (["the <im_end>"], "the < im_end>"),
    "nothing special": (["the quick "], "the quick "),
    "parts": (["the <", "im_end> quick <|endoftext|>"], "the < im_end> quick < |endoftext|>"),
    "the library's own mark": (["a CONTINUE_FINAL_MESSAGE_TAG b"], "a CONTINUE_FINAL_MESSAGE_TAG b"),
}


@pytest.mark.parametrize("render", ["processor", "tokenizer"])
@pytest.mark.parametrize("name", list(BEGUN))
def test_continue_final_message_untokenized(processor, conversation, name, render):
    """As engines do, which encode the string themselves."""
    begun, expected = BEGUN[name]
    messages = conversation([("user", "hi"), ("assistant", *begun)])
    settings = {"continue_final_message": True, "tokenize": False}
    if render == "processor":
        text = processor.apply_chat_template(messages, **settings)
    else:
        text = processor.tokenizer.apply_chat_template(messages, chat_template=processor.chat_template, **settings)
    assert text == f"{BOS} User: hi Assistant: {expected}"


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_nobody_can_type_the_librarys_mark(processor, conversation, role):
    """That by which it finds the end of what is continued: behind it, where the library cuts, stands what was
    typed."""
    messages = conversation([(role, "a <|image|>CONTINUE_FINAL_MESSAGE_TAG ")])
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text.count("<|image|>") == 0 and text.count("CONTINUE_FINAL_MESSAGE_TAG") == 1


@pytest.fixture
def often_switching():
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_eight_threads_give_what_one_gives(chat, often_switching):
    """Different settings, padding and typed special tokens at once: nothing is set on what they share."""
    batches = [
        [MASKED["text"], MASKED["image before"]],
        [MASKED["image after"], MASKED["beyond ASCII"]],
        [MASKED["text"], MASKED["text"] * 2],
        [[("user", "<|image|><im_patch>", SMALL), ("assistant", BOS)], MASKED["text"]],
    ]
    jobs = [
        {
            "turns": batches[i % 4],
            "padding": [True, "max_length"][i % 2],
            "padding_side": ["left", "right"][i // 2 % 2],
            "max_length": 700 + 100 * (i % 3),
            "max_tiles": 1 + i % 3,
            "sanitize_control_tokens": i % 5 != 0 or i % 4 == 3,
            "return_assistant_tokens_mask": True,
            "return_mm_token_type_ids": i % 3 == 0,
        }
        for i in range(24)
    ]
    jobs += [{"turns": MASKED["text"] * (1 + i % 7), "return_assistant_tokens_mask": i % 3 > 0} for i in range(96)]
    expected = [chat(**job) for job in jobs]
    with ThreadPoolExecutor(8) as pool:
        for inputs, wanted in zip(pool.map(lambda job: chat(**job), jobs), expected, strict=True):
            assert inputs.keys() == wanted.keys()
            assert all(np.array_equal(inputs[key], wanted[key]) for key in wanted)


# Other processes

MAP_IN_PROCESSES = """
    import functools, sys
    import multiprocess
    from datasets import Dataset, disable_progress_bars
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

    checkpoint, method, *kinds = sys.argv[1:]
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    config, image_processor, model = (
        auto_class.from_pretrained(checkpoint, trust_remote_code=True)
        for auto_class in (AutoConfig, AutoImageProcessor, AutoModelForImageTextToText)
    )
    others = [config, image_processor, type(model)]

    def encode(row, processor, others):
        import sys
        from PIL import Image

        for item in (processor, *others):  # classes are found by their names, and are no copies
            item_class = item if isinstance(item, type) else type(item)
            assert getattr(sys.modules[item_class.__module__], item_class.__name__) is item_class
        return {"ids": processor(text=row["text"], images=Image.new("RGB", (20, 30)))["input_ids"][0]}

    class Encoder:
        def __init__(self, processor):
            self.processor = processor

        def __call__(self, row):
            return encode(row, self.processor, others)

    disable_progress_bars()
    multiprocess.set_start_method(method)
    rows = Dataset.from_dict({"text": [f"<|image|>the {word}" for word in ("fox", "star", "ring", "cat")]})
    expected = [encode(row, processor, others)["ids"] for row in rows]
    given = {"processor": processor, "others": others}
    ways = {
        "arguments": (encode, given),
        "closure": (lambda row: encode(row, processor, others), None),
        "partial": (functools.partial(encode, **given), None),
        "callable": (Encoder(processor), None),
        "method": (Encoder(processor).__call__, None),
    }
    for kind in kinds:
        function, arguments = ways[kind]
        found = rows.map(function, fn_kwargs=arguments, num_proc=2, load_from_cache_file=False)
        assert found["ids"][:] == expected, kind
    print("done")
"""


@pytest.mark.parametrize(
    ("method", "kinds"),
    [
        ("fork", ["arguments", "closure", "partial", "callable", "method"]),
        pytest.param("spawn", ["arguments"], marks=pytest.mark.slow),
    ],
)
def test_remote_code_reaches_other_processes(tmp_path, method, kinds):
    """`datasets` sends the function and what it refers to by dill."""
    assert python(MAP_IN_PROCESSES, TINY, method, *kinds, HF_HOME=str(tmp_path)).stdout.strip() == "done"


# The library's pipeline


@pytest.mark.filterwarnings("ignore")
def test_pipeline(model, processor, conversation, chat):
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    turns = [("user", SMALL, "What is shown?")]
    new = model.generate(**chat(turns, add_generation_prompt=True), max_new_tokens=5, do_sample=False)[0, -5:]
    settings = {"max_new_tokens": 5, "do_sample": False}
    answer = processor.decode(new, skip_special_tokens=True)
    assert (
        pipe(text=conversation(turns), return_full_text=False, generate_kwargs=settings)[0]["generated_text"] == answer
    )
    image = conversation(turns)[0]["content"][0]["image"]
    text = " User: <|image|>What is shown? Assistant:"
    assert (
        pipe(images=image, text=text, return_full_text=False, generate_kwargs=settings)[0]["generated_text"] == answer
    )
