# Copyright 2026 The jina-vlm-transformers authors. Licensed under the Apache License, Version 2.0.
"""Image processor of jina-vlm: an image becomes a thumbnail and up to twelve overlapping tiles."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ImagesKwargs, Unpack

from .conversion_jina_vlm import convert_image_processor_config, is_released_image_processor_config
from .image_loading_jina_vlm import flatten, open_images, to_rgb, to_tensor
from .tiling_jina_vlm import (
    MAX_ASPECT_RATIO,
    get_canvas_size,
    get_stride,
    get_token_grid,
    get_tokens_per_side,
    select_tiling,
    smart_resize,
)


BAND_ROWS = 64  # that are taken out of an image at a time


class JinaVLMImageProcessorKwargs(ImagesKwargs, total=False):
    """
    max_tiles (`int`, *optional*, defaults to 12):
        At most so many tiles, 1 to 12, beside the thumbnail.
    min_pixels (`int`, *optional*, defaults to 3136):
        Images with fewer pixels are enlarged to about this many.
    max_pixels (`int`, *optional*, defaults to 1003520):
        Images with more pixels are shrunk to at most this many.
    tile_size (`int`, *optional*, defaults to 378):
        Side of a tile in pixels.
    patch_size (`int`, *optional*, defaults to 14):
        Side of a patch in pixels.
    overlap_margin (`int`, *optional*, defaults to 4):
        Patches at each inner side of a tile that its neighbor shows as well.
    pooling_size (`int`, *optional*, defaults to 2):
        Side, in patches, of the windows that the connector pools to one token.
    """

    max_tiles: int
    min_pixels: int
    max_pixels: int
    tile_size: int
    patch_size: int
    overlap_margin: int
    pooling_size: int


class JinaVLMImageProcessor(BaseImageProcessor):
    """
    Makes [tiles, 3, 378, 378] float32 pixels in [-1, 1] and, for each tile, its place in its image.

    An image is fitted to a budget of pixels, stretched to a canvas of overlapping tiles, and cut; its thumbnail comes
    before its tiles (arXiv 2512.04032, section 3.1; resizing as in the released checkpoint: bilinear, without
    antialiasing). Any arithmetic is done in float32, with the same bits for any number of threads.

    Images may be PIL images, numpy arrays or torch tensors (height x width, with 1, 3 or 4 channels first or last;
    uint8, uint16, bool, or floats between 0 and 1), paths, http(s) URLs, data URIs or base64 strings. EXIF rotation is
    applied, transparency is put onto white, of several frames the first is taken.
    """

    model_input_names = ["pixel_values", "tile_positions"]
    valid_kwargs = JinaVLMImageProcessorKwargs
    _auto_class = "AutoImageProcessor"

    max_tiles = 12
    min_pixels = 3136
    max_pixels = 1003520
    tile_size = 378
    patch_size = 14
    overlap_margin = 4
    pooling_size = 2

    def __init__(self, **kwargs: Unpack[JinaVLMImageProcessorKwargs]):
        if is_released_image_processor_config(kwargs):
            kwargs = convert_image_processor_config(kwargs)
        kwargs.pop("auto_map", None)  # written anew on saving
        super().__init__(**kwargs)
        self._set_attributes(**kwargs)
        self._settings({})
        self.size = self._size_of_most_tokens()

    def preprocess(self, images: Any, **kwargs: Unpack[JinaVLMImageProcessorKwargs]) -> BatchFeature:
        """
        Args:
            images: One image, or a (nested) list of them.
            max_tiles, min_pixels, max_pixels (`int`, *optional*): Override the processor's settings.
            input_data_format (`str`, *optional*): `"channels_first"` or `"channels_last"`, for arrays.
            device (`str` or `torch.device`, *optional*): Where to compute. Only the CPU gives the release's exact bits.
            return_tensors (`str`, *optional*): `"pt"` or `"np"`.

        Returns:
            `BatchFeature`: `pixel_values` [tiles, 3, 378, 378] and `tile_positions` [tiles, 4] int64: (row, column, rows,
            columns) of each tile in its image, (-1, -1, rows, columns) for the thumbnail that opens each image.

        Raises:
            ValueError, TypeError: what was given is not an image that can be used; the message says why.
        """
        return super().preprocess(images, **kwargs)

    def _preprocess_image_like_inputs(self, images: Any, **kwargs) -> BatchFeature:
        # Not `_preprocess`, which would be given all images as RGB tensors of their full size: here each one is decoded,
        # fitted and dropped before the next, and Pillow's are read in bands (see `resize_image`).
        settings = self._settings(kwargs)
        images = flatten(self.fetch_images(images))
        if not images:
            raise ValueError("Got an empty list of images. Pass at least one, or leave `images` out.")
        # Fitted images are small: with all of them there, the output is made once, in its full size.
        fitted, grids = [], []
        for image in images:
            rgb = self._to_rgb(image, kwargs.get("input_data_format"), kwargs.get("device"))
            size, grid = self.get_tiling(*_size(rgb), **settings)
            fitted.append(resize_image(rgb, *size) if size != _size(rgb) else to_tensor(rgb))
            grids.append(grid)
        counts = [1 + rows * columns for rows, columns in grids]
        shape, device = (sum(counts), 3, self.tile_size, self.tile_size), fitted[0].device
        # numpy asks for huge pages: fresh memory costs more time than writing to it does.
        on_cpu = device.type == "cpu"
        pixel_values = torch.from_numpy(np.empty(shape, np.float32)) if on_cpu else torch.empty(shape, device=device)
        positions = []
        for image, (rows, columns), tiles in zip(fitted, grids, pixel_values.split(counts), strict=True):
            self._tile(image, tiles, rows, columns)
            positions.append((-1, -1, rows, columns))
            positions.extend((row, column, rows, columns) for row in range(rows) for column in range(columns))
        data = {"pixel_values": pixel_values, "tile_positions": torch.tensor(positions, dtype=torch.int64)}
        return BatchFeature(data=data, tensor_type=kwargs.get("return_tensors"))

    def _tile(self, image: torch.Tensor, tiles: torch.Tensor, rows: int, columns: int) -> None:
        """Write the normalized thumbnail and tiles of a fitted image, [3, height, width] uint8, to `tiles`
        [1 + rows * columns, 3, 378, 378]."""
        side, stride = self.tile_size, self.stride
        grid = tiles[1:].unflatten(0, (rows, columns))
        # A channel at a time, which a processor's cache holds, and normalized before tiles repeat a part of it.
        for index, channel in enumerate(image):
            channel = channel.float().div_(255)  # not a multiplication by 1 / 255: that gives other bits
            canvas = _normalize(resize(channel, *get_canvas_size(rows, columns, side, stride)))
            grid[:, :, index] = canvas.unfold(0, side, stride).unfold(1, side, stride)
            tiles[0, index] = _normalize(resize(channel, side, side))

    # ------------------------------------------------------------------------------------------------------------------
    # Geometry, by this processor's settings
    # ------------------------------------------------------------------------------------------------------------------

    def get_tiling(self, height: int, width: int, **settings) -> tuple[tuple[int, int], tuple[int, int]]:
        """((fitted height, fitted width) in pixels, (rows, columns) of tiles) of an image of `height` x `width` pixels.
        `max_tiles`, `min_pixels` and `max_pixels` may be given."""
        settings = self._settings(settings)
        fitted = smart_resize(height, width, self.patch_size, settings["min_pixels"], settings["max_pixels"])
        return fitted, select_tiling(*fitted, self.tile_size, self.stride, settings["max_tiles"])

    def _size_of_most_tokens(self) -> dict[str, int]:
        """Height and width, in pixels, of an image that takes as many tokens as any. Engines set memory aside for it; of
        themselves they would try a square, which takes fewer than a strip."""
        sizes = []
        for rows in range(1, self.max_tiles + 1):
            height = get_canvas_size(rows, 1, self.tile_size, self.stride)[0]
            width = min(self.tile_size, self.max_pixels // height // self.patch_size * self.patch_size)
            sizes += [(height, max(width, -(-height // MAX_ASPECT_RATIO))), (height, height)]

        def tokens(size: tuple[int, int]) -> int:
            rows, columns = self.get_token_grid(*self.get_tiling(*size)[1])
            return rows * (columns + 1)

        return dict(zip(("height", "width"), max(sizes, key=tokens), strict=True))

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict | None = None) -> int:
        """Tiles, the thumbnail included, that an image of `height` x `width` pixels becomes."""
        rows, columns = self.get_tiling(height, width, **(images_kwargs or {}))[1]
        return 1 + rows * columns

    @property
    def stride(self) -> int:
        """Pixels from one tile to the next: 266."""
        return get_stride(self.tile_size, self.patch_size, self.overlap_margin)

    @property
    def tokens_per_side(self) -> int:
        """Tokens along a side of one tile: 14."""
        return get_tokens_per_side(self.tile_size, self.patch_size, self.pooling_size)

    @property
    def token_overlap(self) -> int:
        """Tokens that are dropped at each inner side of a tile: 2."""
        return self.overlap_margin // self.pooling_size

    def get_token_grid(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns of tokens that the tiles of an image have together, once their overlaps are dropped."""
        return get_token_grid(rows, columns, self.tokens_per_side, self.token_overlap)

    def _settings(self, given: dict[str, Any]) -> dict[str, int]:
        """What was given of these settings, else this processor's own, checked."""
        names = ("max_tiles", "min_pixels", "max_pixels")
        settings = {name: getattr(self, name) if given.get(name) is None else given[name] for name in names}
        max_tiles, min_pixels, max_pixels = settings.values()
        if not 1 <= max_tiles <= 12:
            raise ValueError(f"`max_tiles` must be between 1 and 12, got {max_tiles}.")
        if not 1 <= min_pixels <= max_pixels:
            raise ValueError(f"Expected 1 <= `min_pixels` <= `max_pixels`, got {min_pixels} and {max_pixels}.")
        return settings

    # ------------------------------------------------------------------------------------------------------------------
    # The library's hooks for loading
    # ------------------------------------------------------------------------------------------------------------------

    def fetch_images(self, images: Any) -> Any:
        """Open paths, URLs, data URIs and base64 strings in a (nested) list of images."""
        return open_images(images)

    def process_image(self, image: Any, input_data_format: str | None = None, device: Any = None) -> torch.Tensor:
        """One PIL image, array or tensor to [3, H, W] uint8 RGB."""
        return to_tensor(self._to_rgb(image, input_data_format, device))

    def _to_rgb(self, image: Any, input_data_format: str | None, device: Any) -> Image.Image | torch.Tensor:
        rgb = to_rgb(image, input_data_format)
        return rgb if device is None else to_tensor(rgb).to(device)

    def to_dict(self) -> dict[str, Any]:
        settings = super().to_dict()
        # Only what this processor uses; the base class adds every setting that any processor has.
        own = {
            name: settings[name] for name in JinaVLMImageProcessorKwargs.__annotations__ if name in vars(type(self))
        }
        own["image_processor_type"] = type(self).__name__
        own["auto_map"] = {"AutoImageProcessor": "image_processing_jina_vlm.JinaVLMImageProcessor"}
        return own


# ----------------------------------------------------------------------------------------------------------------------
# Pixels
# ----------------------------------------------------------------------------------------------------------------------


def resize(channel: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """[H, W] -> [height, width], float32: bilinear, half-pixel centers, no antialiasing."""
    # One channel: as [1, 3, H, W] torch takes another kernel when it has one thread, with other bits.
    return F.interpolate(channel.float()[None, None], size=(height, width), mode="bilinear", align_corners=False)[0, 0]


def resize_image(image: Image.Image | torch.Tensor, height: int, width: int) -> torch.Tensor:
    """An RGB image, or its [3, H, W] uint8, to [3, height, width] uint8, each channel as by [`resize`]."""
    if isinstance(image, torch.Tensor) and image.device.type != "cpu":
        return torch.stack([resize(channel, height, width).round_().to(torch.uint8) for channel in image])
    resized = torch.empty(3, height, width, dtype=torch.uint8)
    full_height, full_width = _size(image)
    rows = _rows_in_use(full_height, height)
    # Of a large image, many rows are not used: they are never made floats, and their places here never take memory.
    plane = torch.empty(full_height, full_width)
    written = plane.numpy()
    for index, channel in enumerate(resized):
        for top, band in bands(image, index):
            first, last = np.searchsorted(rows, (top, top + len(band)))
            if last - first == len(band):  # quicker without indices
                written[top : top + len(band)] = band
            else:
                written[rows[first:last]] = band[rows[first:last] - top]
        channel.copy_(resize(plane, height, width).round_())
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


def _size(image: Image.Image | torch.Tensor) -> tuple[int, int]:
    """(height, width)"""
    return image.size[::-1] if isinstance(image, Image.Image) else tuple(image.shape[1:])


def _normalize(channel: torch.Tensor) -> torch.Tensor:
    """From 0 .. 1 to -1 .. 1, in place."""
    return channel.clamp_(0, 1).mul_(2).sub_(1)


__all__ = ["JinaVLMImageProcessor"]
