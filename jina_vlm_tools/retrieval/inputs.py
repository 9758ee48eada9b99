"""What is embedded, as a chat: what role it has in the system's turn, and its text and images in the user's."""

from typing import Any

from transformers import BatchFeature


PROMPTS = {"query": "Query:", "document": "Passage:"}


def to_chat(content: str | Any | dict, role: str) -> list[dict]:
    """
    Args:
        content: A text, or an image as the processor takes it, or {"text": ..., "image": ...} with one image or a
            list of them.
        role (`str`): "query" or "document".
    """
    if isinstance(content, str):
        content = {"text": content}
    elif not isinstance(content, dict):
        content = {"image": content}
    images = content.get("image", [])
    parts = [{"type": "image", "image": image} for image in (images if isinstance(images, list) else [images])]
    if content.get("text"):
        parts.append({"type": "text", "text": content["text"]})
    return [
        {"role": "system", "content": [{"type": "text", "text": PROMPTS[role]}]},
        {"role": "user", "content": parts},
    ]


def prepare(processor, contents: list, role: str, **kwargs) -> BatchFeature:
    """Model inputs of a batch, padded on the right."""
    return processor.apply_chat_template(
        [to_chat(content, role) for content in contents],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
        padding_side="right",
        **kwargs,
    )
