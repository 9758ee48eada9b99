"""Prompts of MMMB. Rows: `question`, options `A` to `D` (some may be empty), `answer` (a letter), `image` (base64)."""

import base64
import binascii
import io

from PIL import Image, UnidentifiedImageError


def doc_to_image(doc: dict) -> list[Image.Image]:
    """The image.

    Raises:
        ValueError: what stands there is no image in base64.
    """
    try:
        return [Image.open(io.BytesIO(base64.b64decode(doc["image"])))]
    except (binascii.Error, UnidentifiedImageError) as error:
        raise ValueError(
            f"Expected an image in base64 as `image`, got {doc['image'][:40]!r}. Is the file MMMB's?"
        ) from error


def doc_to_text(doc: dict) -> str:
    """The question, its lettered options, and what to answer with."""
    options = [f"{letter}. {doc[letter]}" for letter in "ABCD" if doc.get(letter) not in (None, "")]
    lines = [doc["question"], *options, "Answer with the option's letter from the given choices directly."]
    return "<image>" + "\n".join(lines)
