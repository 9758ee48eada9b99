# Copyright 2026 The jina-vlm-transformers authors. Licensed under the Apache License, Version 2.0.
"""Control tokens that somebody typed stay text.

A chat template writes control tokens (`<|image|>`, `<|endoftext|>`, ...) around texts that may hold the same
characters, and the rendered string does not tell which is which. So `mark_chat` and `mark` replace typed ones before a
chat is rendered, each by an escape and a character that stands for it, and `encode` turns these into ordinary text.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerFast


# Both are private use characters, of Unicode's plane 16. An escape in a text is escaped itself.
_ESCAPE = "\U0010fffd"
_FIRST_STAND_IN = 0x100000
_ESCAPED = re.compile(f"{_ESCAPE}(.)", re.DOTALL)
# From 5.24 on the library replaces no `<|image|>` behind this mark of its own. Typed, it is marked too.
_LIBRARY_MARK = "\U000f0000"

# Keys by which a part of a message names its image: no template writes these paths and URLs
_MEDIA_KEYS = {"image", "image_url", "url", "path", "base64", "video", "audio"}


class Edit(NamedTuple):
    """A span of characters, (start, end), in an edited text, and the one it replaces in the source."""

    edited: tuple[int, int]
    source: tuple[int, int]


class Encoding(NamedTuple):
    """A text's token ids, and the (start, end) of each in characters."""

    ids: list[int]
    offsets: list[tuple[int, int]]


def control_tokens(tokenizer: PreTrainedTokenizerFast, structural_tokens: Iterable[str]) -> tuple[str, ...]:
    """
    List the tokens that stay text if somebody types them.

    These are the checkpoint's own special tokens, those up to the last structural token: tokens that somebody adds to
    a tokenizer get higher ids, which saving and loading keep. Of added tokens, special or not, those are listed that
    `tokenizer.chat_control_tokens` names, an argument of the library's tokenizers that is saved with them.

    Returns:
        `tuple[str, ...]`: The longest first, so that a token is looked for before those it contains.
    """
    last = max(tokenizer.convert_tokens_to_ids(list(structural_tokens)))
    # Before 5.24 the library keeps the argument among others that it does not know.
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
    """List the `tokens` that are typed in messages, also across parts, which a template joins."""
    text = "\0".join(_written(conversation))
    return [token for token in tokens if token in text]


def encode(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], tokens: tuple[str, ...] | None = None
) -> list[Encoding]:
    """
    Encode texts as they are: without special tokens, padding or truncation.

    Args:
        tokenizer: Nothing is set on it: other threads may be using it.
        texts (`list[str]`): Plain texts, or marked ones with their `tokens`.
        tokens (`tuple[str, ...]`, *optional*): As given to `mark`. Without it nothing in a text counts as a mark.

    Returns:
        `list[Encoding]`: For each text, token ids and their spans in the text as given, marks included.
    """
    tokens = tokens or ()
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
    """Find a span of an edited text in its source. `edits` are in order; a span inside one stands for all of it."""
    index = bisect_right(edits, span[0], key=lambda edit: edit.edited[0]) - 1
    if index < 0:
        return span
    (_, edited_end), source = edits[index]
    if span[0] < edited_end:
        return source
    return span[0] - edited_end + source[1], span[1] - edited_end + source[1]


def _written(conversation: list) -> Iterator[str]:
    """Yield the text of each message of a conversation, or of several."""
    for message in conversation:
        if isinstance(message, list):
            yield from _written(message)
        else:
            content = message.get("content") or ""
            parts = [content] if isinstance(content, str) else [part.get("text") for part in content]
            yield "".join(part for part in parts if isinstance(part, str))


@lru_cache
def _stand_ins(tokens: tuple[str, ...]) -> tuple[re.Pattern, dict[str, str]]:
    """Compile what to mark in a text, and choose a character for each: tokens, and the first character of half a token
    at the text's end, as the template may join the other half, from a message's next part, to it."""
    halves = {token[:length] for token in tokens for length in range(1, len(token))}
    heads = [f"{re.escape(half[0])}(?={re.escape(half[1:])}\\Z)" for half in sorted(halves)]
    # Near the end only, for speed.
    end = rf"(?=[\s\S]{{0,{max(map(len, tokens), default=0)}}}\Z)(?:{'|'.join(heads)})"
    pattern = re.compile("|".join([*map(re.escape, [_ESCAPE, _LIBRARY_MARK, *tokens]), end]))
    originals = [_LIBRARY_MARK, *tokens, *sorted({token[0] for token in tokens})]
    return pattern, {_ESCAPE: _ESCAPE, **{text: chr(_FIRST_STAND_IN + i) for i, text in enumerate(originals)}}


def _unmark(text: str, tokens: tuple[str, ...]) -> tuple[str, list[Edit]]:
    """Restore the text that was typed, and list where in it marks stood."""
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
    tokenizer: PreTrainedTokenizerFast,
    ids: list[int],
    offsets: list[tuple[int, int]],
    text: str,
    edits: list[Edit],
    tokens: set[str],
) -> Encoding:
    """Replace control tokens that cover the start of a typed one by the tokens of ordinary text."""
    starts = [edit.edited[0] for edit in edits]
    control = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.content in tokens}
    encoding = Encoding([], [])
    for token_id, (start, end) in zip(ids, offsets, strict=True):
        typed = token_id in control and bisect_left(starts, start) < bisect_left(starts, end)
        written = _encode_characters(tokenizer, text[start:end]) if typed else [token_id]
        encoding.ids.extend(written)
        encoding.offsets.extend([(start, end)] * len(written))
    return encoding


def _encode_characters(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    # By the tokenizer's parts, without its added tokens: its own switch for this is state that threads share.
    backend = tokenizer.backend_tokenizer
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    return [
        token.id
        for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)
        for token in backend.model.tokenize(piece)
    ]
