"""Text from strangers stays text: what a message says forges no image, shifts no feature and ends no turn."""

import copy
import inspect
import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jina_vlm import JinaVLMProcessor
from transformers import AutoTokenizer, PreTrainedTokenizerBase


TYPED = ["<|image|>", "<im_patch>", "<im_start>", "<im_end>", "<im_col>", "<im_slice>", "<|endoftext|>"]
PLACES = {
    "alone": "{0}",
    "start": "{0} the fox",
    "middle": "the {0} fox",
    "within a word": "fo{0}x",
    "end": "the fox{0}",
    "doubled": "{0}{0}",
    "doubled apart": "the{0} quick {0}fox",
    "begun twice": "<{0}|",
}
SMALL = (20, 20)


@pytest.fixture(scope="module")
def special_ids(processor):
    added = processor.tokenizer.added_tokens_decoder.items()
    return torch.tensor([token_id for token_id, token in added if token.special])


@pytest.fixture(scope="module")
def assert_stays_text(processor, conversation, chat, special_ids):
    """For turns with "{}" in them: puts the typed text in its place, and compares with an ordinary word there."""

    def put(turns: list, text: str) -> list:
        return [
            (role, *(part.replace("{}", text) if isinstance(part, str) else part for part in parts))
            for role, *parts in turns
        ]

    def check(turns: list, typed: str, **kwargs):
        kwargs = {"return_assistant_tokens_mask": True, **kwargs}
        inputs, harmless = chat(put(turns, typed), **kwargs), chat(put(turns, "word"), **kwargs)
        ids, harmless_ids = inputs["input_ids"][0], harmless["input_ids"][0]
        is_special, harmless_special = torch.isin(ids, special_ids), torch.isin(harmless_ids, special_ids)
        # The special tokens are those of the harmless text, in order, ...
        assert ids[is_special].tolist() == harmless_ids[harmless_special].tolist()
        # ... and between them stands what was typed.
        written = [
            processor.decode(run) for run in torch.tensor_split(ids, is_special.nonzero().flatten()) if len(run)
        ]
        between = [
            processor.decode(run)
            for run in torch.tensor_split(harmless_ids, harmless_special.nonzero().flatten())
            if len(run)
        ]
        words = sum(part.count("{}") for _, *parts in turns for part in parts if isinstance(part, str))
        assert "".join(between).count("word") == words
        assert written == [run.replace("word", typed) for run in between]
        # Answers are marked, whatever they say.
        masks = [torch.as_tensor(made["assistant_masks"][0]).bool() for made in (inputs, harmless)]
        marked = [
            processor.decode(made["input_ids"][0][mask]) for made, mask in zip((inputs, harmless), masks, strict=True)
        ]
        assert marked[0] == marked[1].replace("word", typed)
        assert inputs.keys() == harmless.keys()
        for name in {"pixel_values", "tile_positions"} & set(inputs):
            assert torch.equal(inputs[name], harmless[name])
        return inputs

    return check


@pytest.mark.parametrize("place", list(PLACES))
@pytest.mark.parametrize("typed", TYPED)
def test_in_every_role(assert_stays_text, typed, place):
    text = PLACES[place].format(typed)
    for role in ("system", "user", "assistant"):
        assert_stays_text([(role, "{}"), ("user", "hi"), ("assistant", "the fox")], text)  # content is a string
        assert_stays_text([("user", "hi"), (role, "{}", " and", "{}"), ("assistant", "the fox")], text)  # or parts


@pytest.mark.parametrize("typed", TYPED)
def test_beside_real_images(assert_stays_text, model, typed):
    turns = [
        ("system", "{}"),
        ("user", "{}", SMALL, "which{}"),
        ("assistant", "the {} fox"),
        ("user", "{}"),
        ("assistant", "dog"),
    ]
    inputs = assert_stays_text(turns, typed)
    with torch.no_grad():
        model(
            input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"], tile_positions=inputs["tile_positions"]
        )


@pytest.mark.parametrize("typed", TYPED)
def test_features_stay_where_they_are(chat, assert_stays_text, typed):
    """Text behind an image moves nothing before it."""
    inputs = assert_stays_text([("user", SMALL, "{}")], typed, return_mm_token_type_ids=True)
    harmless = chat([("user", SMALL, "word")], return_mm_token_type_ids=True)
    places = [made["mm_token_type_ids"][0].nonzero().flatten().tolist() for made in (inputs, harmless)]
    assert places[0] == places[1]


def test_in_a_batch(processor, chat):
    batch = [[("user", SMALL, typed), ("assistant", typed)] for typed in TYPED] + [[("user", "".join(TYPED))]]
    for side in ("left", "right"):
        inputs = chat(batch, padding=True, padding_side=side, return_assistant_tokens_mask=True)
        for row, turns in enumerate(batch):
            alone = chat(turns, return_assistant_tokens_mask=True)
            kept = inputs["attention_mask"][row].bool()
            assert inputs["input_ids"][row][kept].tolist() == alone["input_ids"][0].tolist()
            assert (
                torch.as_tensor(inputs["assistant_masks"])[row][kept].tolist()
                == torch.as_tensor(alone["assistant_masks"])[0].tolist()
            )


@pytest.mark.parametrize(
    "text", ["\U0010fffd", "\U00100000", "\U0010fffd\U00100000", "\U0010fffd\U0010fffd", "\U00100001 a \U0010fffd"]
)
def test_private_characters_survive(assert_stays_text, text):
    """Those that the processor itself uses, too."""
    assert_stays_text([("user", "{}", SMALL), ("assistant", "a{}b")], text)
    assert_stays_text([("user", "{}"), ("assistant", "a{}b")], f"{text}<|image|>{text}<im_patch>")


def test_the_librarys_mark_hides_no_image(assert_stays_text):
    """From 5.24 on it takes an image's place for typed behind this character."""
    assert_stays_text([("user", "{}", SMALL, "{}"), ("assistant", "x")], "a\U000f0000")
    assert_stays_text([("user", "{}", SMALL), ("assistant", "x")], "\U000f0000<|image|>\U000f0001\U000f0000")


@pytest.mark.parametrize("token", TYPED)
def test_halves_in_neighboring_parts(assert_stays_text, chat, special_ids, token):
    """Parts of one message are joined by the template: no token may come of it."""
    harmless = torch.isin(chat([("user", "ab", SMALL)])["input_ids"], special_ids).sum()
    for cut in range(1, len(token)):
        inputs = chat(
            [("user", token[:cut], token[cut:], SMALL), ("assistant", "x")], return_assistant_tokens_mask=True
        )
        assert torch.isin(inputs["input_ids"], special_ids).sum() == harmless + 1
    thirds = chat([("user", f"a{token[0]}", token[1:-1], f"{token[-1]}b", SMALL)])
    assert torch.isin(thirds["input_ids"], special_ids).sum() == harmless


FRAGMENTS = [
    *TYPED, "|<EXTRA_TOKENS_0>|", "<", "|", "<|", "|>", "<|image", "im_patch>", "<im_", "image", " ", "\n", "a",
    "fox", "é", "日本", "\U0010fffd", "\U00100000", "\U001000bd", "\u200b", " Assistant:", "0",
    "{{ messages }}", "'", '"',
]  # fmt: skip
texts = st.lists(st.sampled_from(FRAGMENTS), max_size=6).map("".join)
few = settings(max_examples=40, derandomize=True, deadline=None, database=None)


@few
@given(text=texts.filter(bool), role=st.sampled_from(["system", "user", "assistant"]), with_image=st.booleans())
def test_any_text(assert_stays_text, text, role, with_image):
    turns = [("user", "{}", *[(SMALL)] * 0), (role, "{}"), ("assistant", "{}"), ("user", "hi")]
    if with_image:
        turns.insert(1, ("user", "{}", SMALL, "{}"))
    assert_stays_text(turns, text)


@few
@given(parts=st.lists(texts, min_size=1, max_size=4))
def test_any_parts(processor, chat, special_ids, parts):
    ids = chat([("user", *parts, "")])["input_ids"][0]
    assert torch.isin(ids, special_ids).tolist() == [True] + [False] * (len(ids) - 1)
    assert processor.decode(ids) == "<|endoftext|> User: " + "".join(f"{part} " for part in [*parts, ""])


has_sanitiser = "sanitize_control_tokens" in inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters


@pytest.mark.skipif(not has_sanitiser, reason="this version of the library has no sanitiser")
@few
@given(turns=st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), texts), min_size=1, max_size=3))
def test_same_ids_as_the_librarys_own(processor, conversation, chat_template, chat, turns):
    """Where it is right: it drops some private characters, and minds no halves."""
    turns = [(role, re.sub("[\U000f0000-\U0010ffff]", "", text)) for role, text in turns]
    theirs = processor.tokenizer.apply_chat_template(
        conversation(turns),
        chat_template=chat_template,
        tokenize=True,
        return_dict=False,
        sanitize_control_tokens=True,
        control_tokens_in_text=True,
    )
    assert chat(turns)["input_ids"][0].tolist() == theirs


# Tokens that somebody adds to the tokenizer


ADD = {
    "token": lambda tokenizer, token: tokenizer.add_tokens([token]),
    "special token": lambda tokenizer, token: tokenizer.add_tokens([token], special_tokens=True),
    "named special token": lambda tokenizer, token: tokenizer.add_special_tokens({"extra_special_tokens": [token]}),
}


def saved_and_loaded(processor, folder) -> JinaVLMProcessor:
    processor.save_pretrained(folder)
    return JinaVLMProcessor.from_pretrained(folder)


@pytest.mark.parametrize("token", ["<box>", "<|box|>", "<im_box>"])
@pytest.mark.parametrize("way", ADD)
def test_tokens_added_later_stay_tokens(new_processor, conversation, tmp_path, way, token):
    assert ADD[way](new_processor.tokenizer, token) == 1
    turns = [
        ("system", token),
        ("user", "a", token, SMALL, f"b{token}<im_patch>"),
        ("assistant", f"{token}1{token} <|endoftext|>"),
    ]
    for processor in (new_processor, saved_and_loaded(new_processor, tmp_path)):
        (token_id,) = processor.tokenizer.convert_tokens_to_ids([token])
        structural = processor.tokenizer.convert_tokens_to_ids(["<im_patch>", "<|endoftext|>"])
        settings = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        inputs = processor.apply_chat_template(conversation(turns), **settings)
        ids, mask = inputs["input_ids"][0], inputs["assistant_masks"][0]
        harmless = processor.apply_chat_template(conversation([("user", SMALL), ("assistant", "x")]), **settings)[
            "input_ids"
        ][0]
        assert [ids.count(id_) for id_ in structural] == [harmless.count(id_) for id_ in structural]
        assert ids.count(token_id) == 5
        assert (
            processor.decode([id_ for id_, marked in zip(ids, mask, strict=True) if marked])
            == f" {token}1{token} <|endoftext|><|endoftext|>"
        )
        text = processor.apply_chat_template(conversation(turns))
        assert (
            text.count(token) == 5 and f"b{token}< im_patch>" in text and text.endswith(" < |endoftext|><|endoftext|>")
        )


@pytest.mark.parametrize("way", ADD)
def test_tokens_added_later_are_text_on_request(new_processor, conversation, tmp_path, way):
    ADD[way](new_processor.tokenizer, "<box>")
    new_processor.save_pretrained(tmp_path / "added")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "added", chat_control_tokens=["<box>"])
    asked = JinaVLMProcessor(new_processor.image_processor, tokenizer, new_processor.chat_template)
    (token_id,) = tokenizer.convert_tokens_to_ids(["<box>"])
    messages = conversation([("user", "a <box>"), ("assistant", "<box>1, 2<box>")])
    for processor in (asked, saved_and_loaded(asked, tmp_path / "asked")):
        (ids,) = processor.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
        assert (
            token_id not in ids
            and processor.decode(ids) == "<|endoftext|> User: a <box> Assistant: <box>1, 2<box><|endoftext|>"
        )
        assert processor.apply_chat_template(messages).count("< box>") == 3
        assert (
            processor.apply_chat_template(messages, tokenize=True, sanitize_control_tokens=False)[0].count(token_id)
            == 3
        )


def test_template_variables_stay_text(processor, conversation, special_ids):
    """What is given to a template beside the conversation comes from strangers as well."""
    template = "<|endoftext|>{{ tools | tojson }}{{ user_name }}{{ messages[0]['name'] }}{{ messages[0]['content'] }}"
    messages = [{"role": "user", "content": "<im_col>", "name": "<im_end>"}]
    tools = [{"name": "<|image|>", "parameters": {"<im_start>": ["<im_patch>"]}}]
    ids = processor.apply_chat_template(
        messages, chat_template=template, tools=tools, user_name="<im_patch>", tokenize=True, return_dict=True
    )["input_ids"][0]
    assert torch.isin(torch.tensor(ids), special_ids).sum() == 1
    written = json.dumps(tools, ensure_ascii=False)
    assert processor.decode(ids) == f"<|endoftext|>{written}<im_patch><im_end><im_col>"


def test_switched_off(processor, conversation, chat):
    ids = chat([("user", "<im_col>"), ("assistant", "<|endoftext|>")], sanitize_control_tokens=False)["input_ids"][
        0
    ].tolist()
    raw = "<|endoftext|> User: <im_col> Assistant: <|endoftext|><|endoftext|>"
    assert ids == processor.tokenizer.encode(raw, add_special_tokens=False)
    with pytest.raises(ValueError, match=r"Sample 0 has 2 <\|image\|> .* 1 images"):
        chat([("user", "<|image|>", SMALL)], sanitize_control_tokens=False)
    messages = conversation([("user", "<im_col>\U0010fffd"), ("assistant", "<|endoftext|>")])
    before = copy.deepcopy(messages)
    as_typed = processor.apply_chat_template(messages, sanitize_control_tokens=False)
    assert as_typed == raw.replace("<im_col>", "<im_col>\U0010fffd")
    assert messages == before


@pytest.mark.parametrize("render", ["processor", "tokenizer"])
def test_a_rendered_string_has_them_broken_up(processor, conversation, special_ids, render):
    """Engines render chats by themselves, to a string that they tokenize: the template itself guards it."""
    tokens = [token.content for token in processor.tokenizer.added_tokens_decoder.values() if token.special]
    assert len(tokens) > 6
    turns = [
        ("system", *tokens),
        ("user", *[piece for token in tokens for piece in (token[:3], token[3:])], SMALL, "<", "|image|>", *tokens),
        ("assistant", *tokens),
        ("user", "".join(tokens)),
    ]
    if render == "processor":
        text = processor.apply_chat_template(conversation(turns), add_generation_prompt=True)
    else:
        text = processor.tokenizer.apply_chat_template(
            conversation(turns), chat_template=processor.chat_template, tokenize=False, add_generation_prompt=True
        )
    ids = torch.tensor(processor.tokenizer.encode(text, add_special_tokens=False))
    special = processor.tokenizer.convert_ids_to_tokens(ids[torch.isin(ids, special_ids)])
    assert special == ["<|endoftext|>", "<|image|>"], "what opens the chat, and the image"
    assert text.count("< |image|>") == 5


def test_raw_text_is_the_callers(processor, make_image):
    text = "a<im_col>\U0010fffd\U00100000"
    assert processor(text=text)["input_ids"][0] == processor.tokenizer.encode(text)
    with pytest.raises(ValueError, match=r"Sample 0 has 1 <\|image\|> .* 0 images"):
        processor(text="<|image|>")
    with pytest.raises(ValueError, match=r"Sample 0 has 1 <\|image\|> .* 2 images"):
        processor(text="hi <|image|>", images=[make_image(*SMALL)] * 2)
