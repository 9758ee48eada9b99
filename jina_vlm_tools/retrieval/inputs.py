"""What is embedded, as a chat: what role it has in the system's turn, and its text and images in the user's."""

from pathlib import Path
from typing import Any, Literal

from PIL import Image
from transformers import BatchFeature


Role = Literal["query", "document"]
PROMPTS = {"query": "Query:", "document": "Passage:"}
PARTS = ("text", "image")


def check(content: Any, index: int) -> dict[str, Any]:
    """{"text": a text or "", "image": a list of images} of an input.

    Raises:
        TypeError, ValueError: it is none, or an empty one; the message names it by its index.
    """
    if isinstance(content, str):
        content = {"text": content}
    elif isinstance(content, (Image.Image, Path)):
        content = {"image": content}
    elif not isinstance(content, dict):
        raise TypeError(
            f"Input {index} is a {type(content).__name__}. Expected a text, a PIL image, a pathlib.Path of one, or "
            '{"text": ..., "image": ...} with an image, its path or URL, or a list of these.'
        )
    if unknown := sorted(str(name) for name in content if name not in PARTS):
        raise ValueError(f'Input {index} has {", ".join(unknown)}; an input is made of "text" and "image".')
    text, images = content.get("text") or "", content.get("image")
    images = list(images) if isinstance(images, (list, tuple)) else [] if images is None else [images]
    if not isinstance(text, str):
        raise TypeError(f'The "text" of input {index} is a {type(text).__name__}. Expected a string.')
    if not text.strip() and not images:
        raise ValueError(f"Input {index} is empty: it has neither a text nor an image.")
    return {"text": text, "image": [str(image) if isinstance(image, Path) else image for image in images]}


def to_chat(content: Any, role: Role, index: int = 0) -> list[dict]:
    """
    Args:
        content: See [`check`].
        role (`str`): "query" or "document".
        index (`int`): Of the input, for errors.
    """
    if role not in PROMPTS:
        raise ValueError(f"`role` must be one of {', '.join(PROMPTS)}, got {role!r}.")
    content = check(content, index)
    parts = [{"type": "image", "image": image} for image in content["image"]]
    if content["text"]:
        parts.append({"type": "text", "text": content["text"]})
    return [
        {"role": "system", "content": [{"type": "text", "text": PROMPTS[role]}]},
        {"role": "user", "content": parts},
    ]


def prepare(processor, contents: list, role: Role, **kwargs) -> BatchFeature:
    """Model inputs of a batch, padded on the right. `kwargs` are the processor's."""
    return processor.apply_chat_template(
        [to_chat(content, role, index) for index, content in enumerate(contents)],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
        padding_side="right",
        **kwargs,
    )
