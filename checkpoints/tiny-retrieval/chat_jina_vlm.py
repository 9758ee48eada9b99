# Copyright 2026 The jina-vlm-transformers authors. Licensed under the Apache License, Version 2.0.
"""Chats: what messages may look like, and what a template must bring with it.

Unchecked, templates print or skip what they cannot use.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any


# Where the library looks for the image of a part
IMAGE_KEYS = ("image", "url", "path", "base64")

_MESSAGES = "Expected a list of messages, each a dictionary with `role` and `content`"
_EXAMPLE = "{'type': 'text', 'text': '...'}"


def check_conversation(conversation: Any) -> list:
    """
    Copy a conversation, or a list of conversations, as lists and dictionaries without entries that are None.

    Data sets give each part all keys, most of them None. Clients of OpenAI's interface give objects.

    Raises:
        TypeError, ValueError: a message, its content or a part of it is not what a chat template expects.
    """
    conversation = getattr(conversation, "messages", conversation)  # the library's `Chat`
    if not isinstance(conversation, (list, tuple)):
        raise TypeError(f"{_MESSAGES}, got {_short(conversation)}.")
    if not conversation:
        raise ValueError(f"{_MESSAGES}, got an empty one.")
    if any(isinstance(item, (list, tuple)) or hasattr(item, "messages") for item in conversation):
        return [check_conversation(item) for item in conversation]
    return [_check_message(message) for message in conversation]


def uses(template: str, name: str) -> bool:
    """Tell whether a template mentions a variable or a key."""
    return re.search(rf"\b{name}\b", template) is not None


def check_template_uses(template: str, conversation: list, given: Mapping[str, Any]) -> None:
    """
    Refuse tools, their calls and documents if the template has no place for them: it would leave them out.

    Raises:
        ValueError: it names what was given.
    """
    messages = [turn for item in conversation for turn in (item if isinstance(item, list) else [item])]
    names = [name for name in ("tools", "documents") if given.get(name)]
    names += ["tool_calls"] if any(message.get("tool_calls") for message in messages) else []
    if unused := [name for name in names if not uses(template, name)]:
        raise ValueError(
            f"Got {' and '.join(f'`{name}`' for name in unused)}, which the chat template does not use. Write what "
            "the model shall know into a message, or set a chat template that a model was trained with."
        )


def _check_message(message: Any) -> dict:
    if (checked := _as_dictionary(message)) is None:
        raise TypeError(f"{_MESSAGES}, got {_short(message)}.")
    content = checked.get("content")
    if isinstance(content, (list, tuple)):
        checked["content"] = [_check_part(part) for part in content]
    elif content is not None and not isinstance(content, str):
        raise TypeError(
            f"Expected `content` to be a string or a list of parts such as {_EXAMPLE}, got {_short(content)}."
        )
    return checked


def _check_part(part: Any) -> dict:
    checked = _as_dictionary(part)
    if checked is None or "type" not in checked:
        raise TypeError(f"Expected a part of `content` to be a dictionary such as {_EXAMPLE}, got {_short(part)}.")
    if checked["type"] == "text" and not isinstance(checked.get("text"), str):
        raise ValueError(f"Expected a string under 'text', as in {_EXAMPLE}, got {_short(part)}.")
    if checked["type"] == "image" and len(given := [key for key in IMAGE_KEYS if key in checked]) > 1:
        raise ValueError(f"A part shows one image, got {' and '.join(map(repr, given))}. Leave one of them.")
    return checked


def _as_dictionary(value: Any) -> dict | None:
    """Convert a message or part, if it is a mapping, a dataclass or a pydantic model, as the library does."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif callable(getattr(value, "model_dump", None)):
        value = value.model_dump()
    return {key: item for key, item in value.items() if item is not None} if isinstance(value, Mapping) else None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def make_self_contained(template: str, image_token: str, bos_token: str, always_start_with_space: bool) -> str:
    """Give a release's template the variables and the `<|endoftext|>` that engines do not give it."""
    variables = {
        "image_prompt_token": f"'{image_token}'",
        "always_start_with_space": str(always_start_with_space).lower(),
    }
    defaults = [
        f"{{%- if {name} is not defined %}}{{%- set {name} = {value} %}}{{%- endif %}}"
        for name, value in variables.items()
        if name in template and f"{name} is not defined" not in template
    ]
    if not defaults:
        return template
    head = re.split(r"\{%-?\s*for\b", template)[0]
    opening = "" if bos_token in head or "bos_token" in head else f"{{{{- '{bos_token}' }}}}"
    return "".join([*defaults, opening, template])
