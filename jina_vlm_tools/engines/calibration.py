"""Tiles of pages, by which a quantizer learns how large a tower's numbers become."""

import random
from collections.abc import Iterator
from pathlib import Path

import torch
from jina_vlm import JinaVLMProcessor
from jina_vlm.tiling_jina_vlm import find_distinct_tiles
from PIL import Image

from jina_vlm_tools.extras import needing


TILES = 32
TILES_OF_A_PAGE = 4  # at most, so that there are several pages


def collect_tiles(processor: JinaVLMProcessor, folder: Path | None) -> list[torch.Tensor]:
    """
    Tiles of the images and PDFs in a folder; without one, of drawn pages.

    Returns:
        At most `TILES` of [1, 3, 378, 378], no two of an image alike.

    Raises:
        OSError: what reads PDFs, or draws pages, is not installed.
        ValueError: the folder has no image that can be read.
    """
    tiles: list[torch.Tensor] = []
    for image in _drawn() if folder is None else _found(folder, processor.image_processor.max_pixels):
        pixels = processor.image_processor(image, return_tensors="pt")["pixel_values"]
        distinct, _ = find_distinct_tiles(pixels)
        tiles += [pixels[index : index + 1] for index in distinct[:TILES_OF_A_PAGE]]
        if len(tiles) >= TILES:
            break
    if not tiles:
        raise ValueError(f"{folder} has no image or PDF that can be read, in it or its subfolders.")
    return tiles[:TILES]


def _drawn() -> Iterator[Image.Image]:
    try:
        from jina_vlm_tools.synthetic.page_questions import TASKS
        from jina_vlm_tools.synthetic.pages import draw_page
        from jina_vlm_tools.synthetic.pages_data import task_page
        from jina_vlm_tools.synthetic.shapes import TRAINING_PAIRS
    except ImportError as error:  # of the font that pages are written in
        raise OSError(
            f"Drawn pages need `pip install matplotlib` ({error}). Or name pages of your own: --calibrate DIR."
        ) from error
    rng = random.Random("calibration")
    while True:
        for task in TASKS:
            yield draw_page(task_page(task, rng, TRAINING_PAIRS))


def _found(folder: Path, max_pixels: int) -> Iterator[Image.Image]:
    with needing("search", "`jina-vlm convert --calibrate`"):
        from jina_vlm_tools.retrieval.documents import Document, find_files
    for name in find_files(folder):
        try:
            with Document(folder / name, max_pixels) as document:
                yield document.draw(1)
        except (OSError, ValueError):
            continue
