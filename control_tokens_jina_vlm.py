# Copyright 2026 The jina-vlm-transformers authors. Licensed under the Apache License, Version 2.0.
"""Control tokens that somebody typed stay text.

A chat template writes control tokens (`<|image|>`, `<|endoftext|>`, ...) around texts that may hold the same characters,
and the rendered string does not tell which is which. So typed ones are replaced before a chat is rendered (`mark_chat`,
`mark`), each by an escape and a character that stands for it, and `encode` turns these into the tokens of the characters
that were typed.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerFast


# Both are private to Unicode's plane 16. The escape itself is escaped where it occurs in a text.
_ESCAPE = "\U0010fffd"
_FIRST_STAND_IN = 0x100000
_ESCAPED = re.compile(f"{_ESCAPE}(.)", re.DOTALL)
# From 5.24 on the library has marks of its own, and replaces no `<|image|>` behind this one. Typed, it is marked as well.
_LIBRARY_MARK = "\U000f0000"

# Where a part of a message names its image: paths and URLs, which no template writes out
_MEDIA_KEYS = {"image", "image_url", "url", "path", "base64", "video", "audio"}


class Edit(NamedTuple):
    """Two spans of characters, (start, end), that stand for each other: in an edited text, and in the one before."""

    edited: tuple[int, int]
    source: tuple[int, int]


class Encoding(NamedTuple):
    """Token ids of a text, and the (start, end) of each in its characters."""

    ids: list[int]
    offsets: list[tuple[int, int]]


def control_tokens(tokenizer: PreTrainedTokenizerFast, structural_tokens: Iterable[str]) -> tuple[str, ...]:
    """
    List the tokens that stay text where somebody types them.

    These are the checkpoint's own: the tokenizer's special tokens up to the last structural token. Whoever adds tokens to a
    tokenizer gives them higher ids, which saving and loading keep, so that they are told from the checkpoint's own by their
    ids alone. (Making a token special that the checkpoint had already adds none: it is the checkpoint's own.) Of those that
    were added, special or not, the ones count that `tokenizer.chat_control_tokens` names, an argument of the library's
    tokenizers that is saved with them.

    Returns:
        `tuple[str, ...]`: The longest first, so that a token is looked for before those it contains.
    """
    last = max(tokenizer.convert_tokens_to_ids(list(structural_tokens)))
    # Before 5.24 the library keeps the argument, and does not know it.
    asked = getattr(tokenizer, "chat_control_tokens", None) or tokenizer.init_kwargs.get("chat_control_tokens") or ()
    tokens = {
        token.content
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if (token.special and token_id <= last) or token.content in asked
    }
    return tuple(sorted(tokens, key=lambda token: (-len(token), token)))


def mark(value: Any, tokens: tuple[str, ...]) -> Any:
    """Copy a string, or nested lists and dictionaries of strings, with the `tokens` typed in it marked."""
    if isinstance(value, str):
        pattern, stand_ins = _stand_ins(tokens)
        return pattern.sub(lambda match: _ESCAPE + stand_ins[match.group()], value)
    if isinstance(value, dict):
        return {mark(name, tokens): mark(item, tokens) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [mark(item, tokens) for item in value]
    return value


def mark_chat(conversation: list, tokens: tuple[str, ...]) -> list:
    """Copy a conversation, or a list of conversations, with the `tokens` typed in its messages marked."""
    if isinstance(conversation, list):
        return [mark_chat(item, tokens) for item in conversation]
    message = {name: mark(value, tokens) for name, value in conversation.items() if name != "content"}
    content = conversation.get("content")
    if isinstance(content, list):
        content = [
            {
                name: value if name in _MEDIA_KEYS and part["type"] != "text" else mark(value, tokens)
                for name, value in part.items()
            }
            for part in content
        ]
    else:
        content = mark(content, tokens)
    return {**message, "content": content}


def typed_tokens(conversation: list, tokens: tuple[str, ...]) -> list[str]:
    """List those of the `tokens` that are typed in the text of messages, also across parts, which a template joins."""
    text = "\0".join(_written(conversation))
    return [token for token in tokens if token in text]


def encode(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], tokens: tuple[str, ...] | None = None
) -> list[Encoding]:
    """
    Encode texts without adding anything to them, or padding or cutting them.

    Args:
        tokenizer: It is left as it is: other threads may be using it.
        texts (`list[str]`): Any texts; or marked ones, with their `tokens`.
        tokens (`tuple[str, ...]`, *optional*): What was given to `mark`. Without it nothing in a text is a mark.

    Returns:
        `list[Encoding]`: For each text, token ids and their places in the text as it was given, marks included.
    """
    plain_texts, all_edits = zip(*(_unmark(text, tokens) if tokens else (text, []) for text in texts), strict=True)
    encoded = tokenizer(
        list(plain_texts),
        add_special_tokens=False,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    encodings = []
    for index, (plain, edits) in enumerate(zip(plain_texts, all_edits, strict=True)):
        ids = list(encoded["input_ids"][index])
        offsets = [tuple(offset) for offset in encoded["offset_mapping"][index]]
        if edits:
            ids, offsets = _as_text(tokenizer, ids, offsets, plain, edits, set(tokens))
        encodings.append(Encoding(ids, [in_source(offset, edits) for offset in offsets]))
    return encodings


def in_source(span: tuple[int, int], edits: list[Edit]) -> tuple[int, int]:
    """Where a span of an edited text is in the one before. `edits` are in order; a span inside one stands for all of it."""
    index = bisect_right(edits, span[0], key=lambda edit: edit.edited[0]) - 1
    if index < 0:
        return span
    (_, edited_end), source = edits[index]
    if span[0] < edited_end:
        return source
    return span[0] - edited_end + source[1], span[1] - edited_end + source[1]


def _written(conversation: list) -> Iterator[str]:
    """What is written in each message of a conversation, or of several."""
    for message in conversation:
        if isinstance(message, list):
            yield from _written(message)
        else:
            content = message.get("content") or ""
            parts = [content] if isinstance(content, str) else [part.get("text") for part in content]
            yield "".join(part for part in parts if isinstance(part, str))


@lru_cache
def _stand_ins(tokens: tuple[str, ...]) -> tuple[re.Pattern, dict[str, str]]:
    """What to mark in a text, and the character that stands for each: tokens and, where half of one ends the text, its
    first character: the template may put the other half, from a message's next part, right behind it."""
    halves = {token[:length] for token in tokens for length in range(1, len(token))}
    heads = [f"{re.escape(half[0])}(?={re.escape(half[1:])}\\Z)" for half in sorted(halves)]
    end = (
        rf"(?=[\s\S]{{0,{max(map(len, tokens), default=0)}}}\Z)(?:{'|'.join(heads)})"  # elsewhere not tried, for speed
    )
    pattern = re.compile("|".join([*map(re.escape, [_ESCAPE, _LIBRARY_MARK, *tokens]), end]))
    originals = [_LIBRARY_MARK, *tokens, *sorted({token[0] for token in tokens})]
    return pattern, {_ESCAPE: _ESCAPE, **{text: chr(_FIRST_STAND_IN + i) for i, text in enumerate(originals)}}


def _unmark(text: str, tokens: tuple[str, ...]) -> tuple[str, list[Edit]]:
    """The text as it was typed, and where in it stood marks."""
    if _ESCAPE not in text:
        return text, []
    originals = {stand_in: original for original, stand_in in _stand_ins(tokens)[1].items()}
    pieces, edits, last, length = [], [], 0, 0
    for match in _ESCAPED.finditer(text):
        pieces += [text[last : match.start()], originals.get(match[1], match[1])]
        start = length + match.start() - last
        length = start + len(pieces[-1])
        last = match.end()
        edits.append(Edit((start, length), match.span()))
    return "".join([*pieces, text[last:]]), edits


def _as_text(
    tokenizer, ids: list[int], offsets: list[tuple[int, int]], text: str, edits: list[Edit], tokens: set[str]
) -> Encoding:
    """Put the tokens of ordinary text in the place of control tokens that cover the start of a typed one."""
    starts = [edit.edited[0] for edit in edits]
    control = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.content in tokens}
    encoding = Encoding([], [])
    for token_id, (start, end) in zip(ids, offsets, strict=True):
        typed = token_id in control and bisect_left(starts, start) < bisect_left(starts, end)
        written = _encode_characters(tokenizer, text[start:end]) if typed else [token_id]
        encoding.ids.extend(written)
        encoding.offsets.extend([(start, end)] * len(written))
    return encoding


def _encode_characters(tokenizer, text: str) -> list[int]:
    # The tokenizer's parts, without its table of added tokens. Its own switch for this is a state that threads share.
    backend = tokenizer.backend_tokenizer
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    return [
        token.id
        for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)
        for token in backend.model.tokenize(piece)
    ]
