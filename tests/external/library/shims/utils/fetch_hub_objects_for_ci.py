"""Lost: tests that open media from the Hub, except for images, one drawn here taking the place of each."""

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image


_FOLDER = tempfile.TemporaryDirectory()


def url_to_local_path(url: str) -> str:
    """The path of a drawn image in the place of one on the Hub; other URLs as they are."""
    if not url.endswith((".png", ".jpg")):
        return url
    path = Path(_FOLDER.name, "image.png")
    if not path.exists():
        y, x = np.mgrid[:480, :640]
        pixels = np.stack([x * 255 // 639, y * 255 // 479, (x // 32 + y // 32) % 2 * 255], axis=-1)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return str(path)
