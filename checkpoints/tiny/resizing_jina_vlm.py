# Copyright 2026 The jina-vlm-transformers authors. Licensed under the Apache License, Version 2.0.
"""Bilinear resizing with the released checkpoint's bits, on each version of torch and each processor.

torch's own kernel gave these bits from 2.10 to 2.14 on x86-64. Where a pixel is read from was rounded otherwise before and
after, which moves values by up to 0.01 of 255.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from .image_loading_jina_vlm import to_tensor


BAND_ROWS = 64  # that are taken out of an image at a time


def resize(channel: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """[H, W] -> [height, width], float32: bilinear, half-pixel centers, no antialiasing."""
    channel = channel.float()
    if channel.device.type == "cpu" and not kernel_rounds_as_released():
        return resize_exactly(channel, height, width)
    return _by_kernel(channel, height, width)


def resize_exactly(channel: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The same as [`resize`], step by step: slower than torch's kernel, and with the same bits everywhere.

    Args:
        channel: [H, W] float32, on the CPU. Rows that no row of the result lies between are not read.
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
    """Whether torch's kernel gives the released bits here: tried on small images, once."""
    generator = np.random.default_rng(0)
    for size, resized in (((60, 40), (378, 378)), ((480, 16), (476, 14)), ((16, 500), (14, 378))):
        channel = torch.from_numpy(generator.integers(0, 256, size).astype(np.float32))
        if not torch.equal(_by_kernel(channel, *resized), resize_exactly(channel, *resized)):
            return False
    return True


def _by_kernel(channel: torch.Tensor, height: int, width: int) -> torch.Tensor:
    # One channel: as [1, 3, H, W] torch takes another kernel when it has one thread, with other bits.
    return F.interpolate(channel[None, None], size=(height, width), mode="bilinear", align_corners=False)[0, 0]


def _neighbors(length: int, resized_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """For each pixel of a resized line the two that it lies between, and their weights."""
    scale = np.float32(length) / np.float32(resized_length)
    centers = np.arange(resized_length, dtype=np.float32) + np.float32(0.5)
    # A product and a difference that are rounded once, as one instruction of the processor does.
    places = (centers.astype(np.float64) * scale - 0.5).astype(np.float32).clip(min=0)
    first = places.astype(np.int64).clip(max=length - 1)
    second_weight = (places - first.astype(np.float32)).clip(0, 1)
    return first, (first + 1).clip(max=length - 1), 1 - second_weight, second_weight


def _weighted_sum(one: np.ndarray, weight: np.ndarray, other: np.ndarray, other_weight: np.ndarray) -> np.ndarray:
    """one * weight + other * other_weight in float32, the first product not rounded before the sum."""
    return (one.astype(np.float64) * weight + (other * other_weight)).astype(np.float32)


def resize_image(image: Image.Image | torch.Tensor, *sizes: tuple[int, int]) -> list[torch.Tensor]:
    """An RGB image, or its [3, H, W] uint8, to [3, height, width] uint8 of each (height, width), each channel as by
    [`resize`]."""
    if sizes == (get_size(image),):
        return [to_tensor(image)]
    if isinstance(image, torch.Tensor) and image.device.type != "cpu":
        return [torch.stack([resize(channel, *size).round_().to(torch.uint8) for channel in image]) for size in sizes]
    resized = [torch.empty(3, *size, dtype=torch.uint8) for size in sizes]
    full_height, full_width = get_size(image)
    rows = np.unique(np.concatenate([_rows_in_use(full_height, height) for height, _ in sizes]))
    # Of a large image, many rows are not used: they are never made floats, and their places here never take memory.
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
    """One channel of an image in bands: the number of the first row, and [rows, W] uint8."""
    if isinstance(image, torch.Tensor):
        yield 0, image[index].numpy()
        return
    # Pillow takes channels apart many times faster than numpy or torch do; a band is copied while caches hold it.
    for top in range(0, image.height, BAND_ROWS):
        band = image.crop((0, top, image.width, min(top + BAND_ROWS, image.height)))
        yield top, np.frombuffer(band.tobytes("raw", "RGB"[index]), np.uint8).reshape(band.height, band.width)


def _rows_in_use(height: int, resized_height: int) -> np.ndarray:
    """The rows of an image that its resized rows lie between, and those beside them where float32 may round to either
    side."""
    centers = (np.arange(resized_height) + 0.5) * height / resized_height - 0.5
    above = np.floor(np.concatenate([centers - 1e-6 * height, centers + 1e-6 * height])).astype(np.int64)
    return np.unique(np.concatenate([above, above + 1]).clip(0, height - 1))


def get_size(image: Image.Image | torch.Tensor) -> tuple[int, int]:
    """(height, width)"""
    return image.size[::-1] if isinstance(image, Image.Image) else tuple(image.shape[1:])
