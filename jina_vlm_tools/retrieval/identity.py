"""What vectors depend on: two that were not made alike cannot be compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from .inputs import PROMPTS, to_chat


if TYPE_CHECKING:
    from .embedder import JinaVLMEmbedder


SAMPLES = 64  # of each tensor: another training changes nearly every number


def identify(embedder: JinaVLMEmbedder, task: str | None = None) -> dict[str, Any]:
    """What an embedder is, as JSON holds it; the same in float32 and in bfloat16, and wherever it lies."""
    task = task or embedder.task
    weights = {"base": [], "adapter": []}
    for name, tensor in sorted(embedder.model.named_parameters(), key=lambda item: _plain(item[0])):
        parts = name.split(".")
        if task in parts:
            weights["adapter"].append((_plain(name), tensor))
        elif not set(embedder.tasks) & set(parts):
            weights["base"].append((_plain(name), tensor))
    settings = embedder.processor.image_processor.to_dict()
    return {
        "base weights": _digest(weights["base"]),
        "adapter": _digest(weights["adapter"]) if weights["adapter"] else None,
        "projector": _digest([("projector", embedder.projector.weight)]) if embedder.projector is not None else None,
        "prompts": _digest_prompts(embedder.processor),
        # Of a call: an index has its own.
        "image settings": {name: value for name, value in settings.items() if name not in ("max_tiles", "auto_map")},
    }


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The names of what differs, in words."""
    found = []
    for name in before:
        one, other = (_as_json(each.get(name)) for each in (before, now))
        if one == other:
            continue
        if isinstance(one, dict) and isinstance(other, dict):
            changed = [key for key in one.keys() | other.keys() if one.get(key) != other.get(key)]
            shown = ", ".join(f"{key} {one.get(key)!r}, now {other.get(key)!r}" for key in sorted(changed))
            found.append(f"{name} ({shown})")
        else:
            found.append(f"{name} ({_shorten(one)}, now {_shorten(other)})")
    return found


def _plain(name: str) -> str:
    """What a parameter is called without adapters around it."""
    return name.replace(".base_layer.", ".")


def _digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Of numbers spread over each tensor, in bfloat16, to which a float32 checkpoint is rounded alike when loaded."""
    hashed = hashlib.sha256()
    for name, tensor in tensors:
        flat = tensor.detach().flatten()
        places = torch.linspace(0, len(flat) - 1, min(SAMPLES, len(flat))).long().to(flat.device)
        numbers = flat[places]
        numbers = numbers.to(torch.bfloat16).view(torch.int16) if numbers.is_floating_point() else numbers
        hashed.update(f"{name} {list(tensor.shape)}".encode())
        hashed.update(numbers.cpu().numpy().tobytes())
    return hashed.hexdigest()


def _digest_prompts(processor) -> str:
    """Of the tokens of a query and of a document: template, tokenizer and prompts."""
    contents = {"query": "Where is the red star?", "document": {"image": Image.new("RGB", (64, 64)), "text": "a page"}}
    ids = [
        processor.apply_chat_template([to_chat(contents[role], role)], tokenize=True, return_dict=True)["input_ids"]
        for role in PROMPTS
    ]
    return hashlib.sha256(json.dumps([[list(map(int, row)) for row in each] for each in ids]).encode()).hexdigest()


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _shorten(value: Any) -> str:
    return f"{value[:8]}" if isinstance(value, str) and len(value) == 64 else "none" if value is None else str(value)
