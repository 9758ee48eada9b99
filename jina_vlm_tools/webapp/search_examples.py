"""Pages to search, drawn as those of [`examples`]: some as images, some as a PDF."""

import random
from pathlib import Path

from PIL import Image

from jina_vlm_tools.synthetic.shapes import HELD_OUT_PAIRS, draw_scene, make_scene


SEED, IMAGES, PAGES, SHAPES = 3, 4, 6, 3  # pages are those of the PDF
QUESTION = "Where is the pink star?"


def draw_examples() -> list[Image.Image]:
    rng = random.Random(SEED)
    return [draw_scene(make_scene(rng, HELD_OUT_PAIRS, SHAPES)) for _ in range(IMAGES + PAGES)]


def save_examples(folder: Path) -> list[Path]:
    """Their files, in `folder`."""
    images = draw_examples()
    paths = [folder / f"drawing-{number}.png" for number in range(1, IMAGES + 1)] + [folder / "drawings.pdf"]
    for image, path in zip(images, paths[:-1], strict=False):
        image.save(path)
    first, *others = images[IMAGES:]
    first.save(paths[-1], save_all=True, append_images=others, resolution=72, quality=95)
    return paths
