# Copyright 2026 The jina-vlm-transformers authors. Licensed under the Apache License, Version 2.0.
"""Bilinear resizing with the released checkpoint's bits, on each version of torch and each CPU.

torch's own kernel gave these bits from 2.10 to 2.14 on x86-64. Before and after it rounded sampling positions
differently, which moves values by up to 0.01 of 255.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from .image_loading_jina_vlm import to_tensor


BAND_ROWS = 64  # taken out of an image at a time


def resize(channel: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resize [H, W] to [height, width], float32: bilinear, half-pixel centers, no antialiasing."""
    channel = channel.float()
    if channel.device.type == "cpu" and not kernel_rounds_as_released():
        return resize_exactly(channel, height, width)
    return _by_kernel(channel, height, width)


def resize_exactly(channel: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resize like [`resize`], step by step: slower than torch's kernel, but with the same bits everywhere.

    Args:
        channel: [H, W] float32, on the CPU. Rows that the result does not depend on are not read.
    """
    values = channel.numpy()
    (above, below, above_weight, below_weight) = _neighbors(values.shape[0], height)
    (left, right, left_weight, right_weight) = _neighbors(values.shape[1], width)
    rows = np.unique(np.concatenate([above, below]))
    values = values[rows]
    values = _weighted_sum(values[:, left], left_weight, values[:, right], right_weight)
    above, below = np.searchsorted(rows, above), np.searchsorted(rows, below)
    values = _weighted_sum(values[above], above_weight[:, None], values[below], below_weight[:, None])
    return torch.from_numpy(values)


@lru_cache
def kernel_rounds_as_released() -> bool:
    """Try on small images, once, whether torch's kernel gives the released bits here."""
    generator = np.random.default_rng(0)
    for size, resized in (((60, 40), (378, 378)), ((480, 16), (476, 14)), ((16, 500), (14, 378))):
        channel = torch.from_numpy(generator.integers(0, 256, size).astype(np.float32))
        if not torch.equal(_by_kernel(channel, *resized), resize_exactly(channel, *resized)):
            return False
    return True


def _by_kernel(channel: torch.Tensor, height: int, width: int) -> torch.Tensor:
    # One channel: with [1, 3, H, W] and one thread, torch chooses another kernel, with other bits.
    return F.interpolate(channel[None, None], size=(height, width), mode="bilinear", align_corners=False)[0, 0]


def _neighbors(length: int, resized_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Find for each pixel of a resized line the two that it lies between, and their weights."""
    scale = np.float32(length) / np.float32(resized_length)
    centers = np.arange(resized_length, dtype=np.float32) + np.float32(0.5)
    # Product and difference are rounded once, as by a CPU's fused instruction.
    places = (centers.astype(np.float64) * scale - 0.5).astype(np.float32).clip(min=0)
    first = places.astype(np.int64).clip(max=length - 1)
    second_weight = (places - first.astype(np.float32)).clip(0, 1)
    return first, (first + 1).clip(max=length - 1), 1 - second_weight, second_weight


def _weighted_sum(one: np.ndarray, weight: np.ndarray, other: np.ndarray, other_weight: np.ndarray) -> np.ndarray:
    """Compute one * weight + other * other_weight in float32, without rounding the first product."""
    return (one.astype(np.float64) * weight + (other * other_weight)).astype(np.float32)


def resize_image(image: Image.Image | torch.Tensor, *sizes: tuple[int, int]) -> list[torch.Tensor]:
    """Resize an RGB image, or its [3, H, W] uint8, to [3, height, width] uint8 for each (height, width)."""
    if sizes == (get_size(image),):
        return [to_tensor(image)]
    if isinstance(image, torch.Tensor) and image.device.type != "cpu":
        return [torch.stack([resize(channel, *size).round_().to(torch.uint8) for channel in image]) for size in sizes]
    resized = [torch.empty(3, *size, dtype=torch.uint8) for size in sizes]
    full_height, full_width = get_size(image)
    rows = np.unique(np.concatenate([_rows_in_use(full_height, height) for height, _ in sizes]))
    # Many rows of a large image are not used: they are not converted, and their places here take no memory.
    plane = torch.empty(full_height, full_width)
    written = plane.numpy()
    for index in range(3):
        for top, band in bands(image, index):
            first, last = np.searchsorted(rows, (top, top + len(band)))
            if last - first == len(band):  # quicker without indices
                written[top : top + len(band)] = band
            else:
                written[rows[first:last]] = band[rows[first:last] - top]
        for view, size in zip(resized, sizes, strict=True):
            view[index].copy_(resize(plane, *size).round_())
    return resized


def bands(image: Image.Image | torch.Tensor, index: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield one channel of an image in bands: the index of the first row, and [rows, W] uint8."""
    if isinstance(image, torch.Tensor):
        yield 0, image[index].numpy()
        return
    # Pillow separates channels many times faster than numpy or torch; a band is copied while caches hold it.
    for top in range(0, image.height, BAND_ROWS):
        band = image.crop((0, top, image.width, min(top + BAND_ROWS, image.height)))
        yield top, np.frombuffer(band.tobytes("raw", "RGB"[index]), np.uint8).reshape(band.height, band.width)


def _rows_in_use(height: int, resized_height: int) -> np.ndarray:
    """Find the rows that resized rows lie between, with those that float32 may round to."""
    centers = (np.arange(resized_height) + 0.5) * height / resized_height - 0.5
    above = np.floor(np.concatenate([centers - 1e-6 * height, centers + 1e-6 * height])).astype(np.int64)
    return np.unique(np.concatenate([above, above + 1]).clip(0, height - 1))


def get_size(image: Image.Image | torch.Tensor) -> tuple[int, int]:
    """Return (height, width)."""
    height, width = image.size[::-1] if isinstance(image, Image.Image) else image.shape[1:]
    return height, width
