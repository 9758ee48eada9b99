"""Drawn images and questions as files, in the layouts that `layouts` reads."""

import io
import json
from collections.abc import Iterable
from pathlib import Path

import datasets
from PIL import Image

from .questions import Turn


def write_images(path: Path, samples: Iterable[tuple[Image.Image, list[Turn]]]) -> None:
    """Images with conversations, as `images` and `texts`, to a parquet file."""
    rows = [
        {"images": [_png(image)], "texts": [{"user": turn.question, "assistant": turn.answer} for turn in turns]}
        for image, turns in samples
    ]
    turn = {"user": datasets.Value("string"), "assistant": datasets.Value("string")}
    features = datasets.Features(images=datasets.List(datasets.Image()), texts=datasets.List(turn))
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)


def write_questions(path: Path, samples: Iterable[tuple[Image.Image, Turn]]) -> None:
    """Images with a question each, as `image` and `conversations`, to a parquet file."""
    rows = [
        {
            "image": _png(image),
            "conversations": [
                {"from": "human", "value": f"<image>\n{turn.question}"},
                {"from": "gpt", "value": turn.answer},
            ],
        }
        for image, turn in samples
    ]
    turn = {"from": datasets.Value("string"), "value": datasets.Value("string")}
    features = datasets.Features(image=datasets.Image(), conversations=datasets.List(turn))
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)


def write_texts(path: Path, conversations: Iterable[list[Turn]]) -> None:
    """Conversations without images, as `messages`, to a JSONL file."""
    with open(path, "w", encoding="utf-8") as file:
        for turns in conversations:
            messages = [
                {"role": role, "content": content}
                for turn in turns
                for role, content in (("user", turn.question), ("assistant", turn.answer))
            ]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def _png(image: Image.Image) -> dict:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return {"bytes": file.getvalue(), "path": None}
