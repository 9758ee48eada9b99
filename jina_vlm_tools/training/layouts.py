"""Rows of data sets to conversations. A row is in one of the layouts that the paper's sources use:

images, texts           FineVision and the Cauldron: images, and pairs {"user": ..., "assistant": ...}
image, conversations    LLaVA-OneVision: one image or several, and turns {"from": "human", "value": ...}
messages                chats: {"role": ..., "content": ...}, their images inside, or beside them in `images`
image_url, caption      PixMo-Cap: an image, by its URL or in `image`, and what it shows
inputs, targets         Aya: a question and its answer
text                    common_corpus: a document, which nobody asked for

A layout goes by its last column, but for Aya's. Other columns do not matter.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jina_vlm.image_loading_jina_vlm import is_url, open_image
from PIL import Image


IMAGES = ("images", "image", "image_url")
LLAVA_PLACE = "<image>"  # in LLaVA's texts
_LLAVA_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
CAPTION_QUESTION = "Describe this image in detail."  # ours: such rows bring none


class BadSample(ValueError):
    """A row that nothing can be learned from, with the reason."""


def layout_of(columns) -> str | None:
    """The column that the layout goes by; None where there is none."""
    return next((layout for layout in LAYOUTS if layout in columns), None)


def is_document(conversation: list[dict]) -> bool:
    """Whether a conversation is one text that nobody asked for."""
    return [message["role"] for message in conversation] == ["assistant"] and all(
        part["type"] == "text" for part in conversation[0]["content"]
    )


def to_conversation(row: dict, folder: str | Path | None = ".") -> list[dict]:
    """
    Args:
        row (`dict`): In one of the layouts. Images are PIL images, paths, URLs, or {"bytes": ..., "path": ...} as
            `datasets` holds them undecoded.
        folder (`str` or `Path`, *optional*): What the paths of images are relative to; None to refuse such paths.

    Returns:
        `list[dict]`: Messages for the chat template, whose images are PIL images that are not decoded yet. Images
        without a place of their own come first. A document is an assistant's only turn.

    Raises:
        BadSample: the row has none of the layouts, its images and their places do not agree, an image cannot be
            opened, or no assistant says anything.
    """
    layout = layout_of(row)
    if layout is None:
        raise BadSample(
            f"Expected a column {', '.join(LAYOUTS[:-1])} or {LAYOUTS[-1]}, got {', '.join(map(str, row)) or 'none'}."
        )
    messages = _READERS[layout](row)
    if not any(message["role"] == "assistant" and _says_something(message) for message in messages):
        raise BadSample("No assistant says anything: there is nothing to learn.")
    images = _images(row)
    if layout == "caption" and not images:
        raise BadSample(f"It has a caption, but no image: expected one in {', '.join(IMAGES[:-1])} or {IMAGES[-1]}.")
    if layout == "text" and images:
        raise BadSample("A document in `text` has no images. Call the column `caption` if it says what they show.")
    _fill_places(messages, images, folder)
    return messages


def _of_turns(column: str, read: Callable[[Any], list[dict]]) -> Callable[[dict], list[dict]]:
    """The reader of rows whose column holds a list of turns."""

    def messages(row: dict) -> list[dict]:
        turns = row[column]
        if not isinstance(turns, (list, tuple)) or not turns:
            raise BadSample(f"`{column}` is {_short(turns)}, expected a list of turns.")
        return [message for turn in turns for message in read(turn)]

    return messages


def _from_caption(row: dict) -> list[dict]:
    return _exchange(CAPTION_QUESTION, _column(row, "caption"))


def _from_aya(row: dict) -> list[dict]:
    return _exchange(_column(row, "inputs"), _column(row, "targets"))


def _from_document(row: dict) -> list[dict]:
    return [_message("assistant", [_text_part(_column(row, "text"))])]


def _from_texts(turn: Any) -> list[dict]:
    return _exchange(*(_text(turn, name, "texts") for name in ("user", "assistant")))


def _from_llava(turn: Any) -> list[dict]:
    role, value = (_text(turn, name, "conversations") for name in ("from", "value"))
    if role not in _LLAVA_ROLES:
        raise BadSample(f"`conversations` has a turn from {role!r}, expected one of {', '.join(_LLAVA_ROLES)}.")
    content = []
    # Only people show images: an answer that happens to write the mark means its letters.
    for index, text in enumerate(value.split(LLAVA_PLACE) if _LLAVA_ROLES[role] == "user" else [value]):
        if index:
            content.append({"type": "image"})
            text = text.removeprefix("\n")
        if text:
            content.append(_text_part(text.removesuffix("\n") if _LLAVA_ROLES[role] == "user" else text))
    return [_message(_LLAVA_ROLES[role], content)]


def _from_messages(turn: Any) -> list[dict]:
    role = _text(turn, "role", "messages")
    if role not in ("system", "user", "assistant"):
        raise BadSample(f"`messages` has a turn of {role!r}, expected system, user or assistant.")
    content = turn.get("content")
    if isinstance(content, str):
        return [_message(role, [_text_part(content)])]
    if not isinstance(content, (list, tuple)):
        raise BadSample(f"`messages` has the content {_short(content)}, expected a text or a list of parts.")
    parts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") not in ("text", "image"):
            raise BadSample(f"`messages` has the part {_short(part)}, expected one of type text or image.")
        # `datasets` gives all parts all keys
        part = {name: value for name, value in part.items() if value is not None}
        parts.append(part if part["type"] == "image" else _text_part(_text(part, "text", "messages")))
    return [_message(role, parts)]


# By the column that tells them apart. Of several the first counts: chats may have a `text` or a `caption` beside them.
_READERS: dict[str, Callable[[dict], list[dict]]] = {
    "texts": _of_turns("texts", _from_texts),
    "conversations": _of_turns("conversations", _from_llava),
    "messages": _of_turns("messages", _from_messages),
    "caption": _from_caption,
    "inputs": _from_aya,
    "text": _from_document,
}
LAYOUTS = tuple(_READERS)


def _exchange(question: str, answer: str) -> list[dict]:
    return [_message("user", [_text_part(question)]), _message("assistant", [_text_part(answer)])]


def _message(role: str, content: list[dict]) -> dict:
    return {"role": role, "content": content}


def _text_part(text: str) -> dict:
    return {"type": "text", "text": text}


def _text(turn: Any, name: str, column: str) -> str:
    value = turn.get(name) if isinstance(turn, dict) else None
    if not isinstance(value, str):
        raise BadSample(f"`{column}` has the turn {_short(turn)}, expected a text under {name!r}.")
    return value


def _column(row: dict, name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise BadSample(f"`{name}` is {_short(value)}, expected a text.")
    return value


def _says_something(message: dict) -> bool:
    return any(part.get("text", "").strip() for part in message["content"])


def _images(row: dict) -> list:
    given = [name for name in IMAGES if row.get(name) is not None]
    if len(given) > 1:
        raise BadSample(f"Got images both in `{given[0]}` and in `{given[1]}`.")
    images = row[given[0]] if given else []
    return list(images) if isinstance(images, (list, tuple)) else [images]


def _fill_places(messages: list[dict], images: list, folder: str | Path | None) -> None:
    """Put the images, opened, where they belong."""
    parts = [part for message in messages for part in message["content"] if part["type"] == "image"]
    places = [part for part in parts if not {"image", "path", "url", "base64"} & part.keys()]
    if not places and images:
        first = next((message for message in messages if message["role"] == "user"), messages[0])
        places = [{"type": "image"} for _ in images]
        first["content"][:0] = places
        parts += places
    if len(places) != len(images):
        raise BadSample(f"{len(places)} places for images, but {len(images)} images.")
    for place, image in zip(places, images, strict=True):
        place["image"] = image
    for part in parts:
        image = part.pop("image", None)
        others = [part.pop(name, None) for name in ("path", "url")]
        part["image"] = load_image(next((given for given in (image, *others) if given is not None), None), folder)


def load_image(image: Any, folder: str | Path | None = ".") -> Image.Image:
    """A PIL image of a PIL image, bytes, a path, a URL, or {"bytes": ..., "path": ...}; it is not decoded yet.

    Raises:
        BadSample: it cannot be opened.
    """
    if isinstance(image, dict):
        image = image["bytes"] if image.get("bytes") is not None else image.get("path")
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, str) and not is_url(image):
        if folder is None and not Path(image).is_absolute():
            raise BadSample(
                f"An image is {image!r}, but the source's files lie in several folders. Make each folder a source, or "
                "name images by whole paths."
            )
        image = Path(folder or ".") / image
    if not isinstance(image, (Path, str, bytes)):
        raise BadSample(f"An image is {_short(image)}, expected an image, its bytes, a path or a URL.")
    try:
        return open_image(image)
    except (OSError, ValueError) as error:
        raise BadSample(f"An image cannot be opened: {error}") from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
