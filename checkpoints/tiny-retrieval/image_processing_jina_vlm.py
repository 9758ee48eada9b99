# Copyright 2026 The jina-vlm-transformers authors. Licensed under the Apache License, Version 2.0.
"""Image processor of jina-vlm: an image becomes a thumbnail and overlapping tiles, twelve at most by default."""

import os
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import PILImageResampling
from transformers.processing_utils import Unpack

from .arguments_jina_vlm import (
    NO_SETTINGS,
    OF_LOADERS,
    OF_THE_MODEL,
    PER_CALL,
    JinaVLMImageProcessorKwargs,
    get_given,
    get_settings,
    refuse_unknown,
    to_integer,
)
from .compatibility_jina_vlm import put_into_package
from .conversion_jina_vlm import convert_image_processor_config, is_released_image_processor_config
from .image_loading_jina_vlm import flatten, open_images, to_rgb, to_tensor
from .resizing_jina_vlm import get_size, resize, resize_image
from .tiling_jina_vlm import (
    check_geometry,
    get_canvas_size,
    get_size_of_most_tokens,
    get_stride,
    get_tile_positions,
    get_tiling,
    get_token_grid,
    get_tokens_per_side,
)


class JinaVLMImageProcessor(BaseImageProcessor):
    """
    Makes tiles [tiles, 3, 378, 378], float32 in [-1, 1], and the place of each in its image.

    An image is fitted to a budget of pixels (unless `do_resize=False`), stretched to a canvas of overlapping tiles,
    and cut; its thumbnail comes before its tiles (arXiv 2512.04032, section 3.1). Resizing is the released
    checkpoint's: bilinear without antialiasing, with the same bits for any number of threads.

    Images may be PIL images, numpy arrays or torch tensors (height x width, with 1, 3 or 4 channels first or last;
    uint8, uint16, bool, or floats between 0 and 1), paths, http(s) URLs, data URIs or base64 strings. EXIF rotation is
    applied, transparency becomes white, and the first of several frames is used.
    """

    model_input_names = ["pixel_values", "tile_positions"]
    valid_kwargs = JinaVLMImageProcessorKwargs
    _auto_class = "AutoImageProcessor"

    do_resize = True
    max_tiles = 12
    min_pixels = 3136
    max_pixels = 1003520
    tile_size = 378
    patch_size = 14
    overlap_margin = 4
    pooling_size = 2
    crop_to_patches = None

    # The only supported values, where libraries and engines read them
    do_convert_rgb = True
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = (0.5, 0.5, 0.5)
    image_std = (0.5, 0.5, 0.5)
    resample = PILImageResampling.BILINEAR
    do_center_crop = False
    crop_size = None
    do_pad = False
    pad_size = None
    data_format = "channels_first"
    image_seq_length = None

    def __init__(self, **kwargs: Unpack[JinaVLMImageProcessorKwargs]) -> None:
        if is_released_image_processor_config(kwargs):
            kwargs = convert_image_processor_config(kwargs)
        kwargs = get_given({name: value for name, value in kwargs.items() if name not in NO_SETTINGS})
        refuse_unknown(kwargs, self.valid_kwargs.__annotations__, f"of {type(self).__name__}")
        size, crops = (kwargs.pop(name, None) for name in ("size", "crop_to_patches"))  # of which calls ask
        super().__init__(**kwargs)
        self._set_attributes(**kwargs)
        for name in OF_THE_MODEL:
            setattr(self, name, to_integer(name, getattr(self, name), least=0 if name == "overlap_margin" else 1))
        check_geometry(**self._geometry)
        for name, value in self._settings({}).items():
            setattr(self, name, value)
        # Engines reserve memory for an image of `size`. A square, as they would assume, makes fewer tokens.
        most_tokens = get_size_of_most_tokens(**self._settings({}), **self._geometry)
        self.size = dict(zip(("height", "width"), most_tokens, strict=True))
        self._settings({"size": size, "crop_to_patches": crops})

    def preprocess(self, images: Any, **kwargs: Unpack[JinaVLMImageProcessorKwargs]) -> BatchFeature:
        """
        Args:
            images: One image, or a (nested) list of them.
            do_resize, max_tiles, min_pixels, max_pixels (*optional*): Override the processor's settings. Any other
                argument of the library is refused unless it asks for what is done anyway.
            crop_to_patches (`bool`, *optional*): `True`, in a call, to be given `num_patches` too.
            input_data_format (`str`, *optional*): `"channels_first"` or `"channels_last"`, for arrays.
            device (`str` or `torch.device`, *optional*): Where to compute. Only a CPU gives the release's exact bits.
            return_tensors (`str`, *optional*): `"pt"` or `"np"`.

        Returns:
            `BatchFeature`: `pixel_values` [tiles, 3, 378, 378] and `tile_positions` [tiles, 4] int64: (row, column,
            rows, columns) of each tile in its image, (-1, -1, rows, columns) of the thumbnail that opens each image.
            On request `num_patches` [images], the tiles of each.

        Raises:
            ValueError, TypeError: something is not a usable image, an argument is not supported, or an image would
                make more tokens than the model takes.
        """
        return super().preprocess(images, **{**get_given(kwargs), **self._settings(kwargs)})

    def _preprocess_image_like_inputs(self, images: Any, **kwargs) -> BatchFeature:
        # `_preprocess` would get all images at full size. Here each is decoded, resized and dropped before the next.
        settings = self._settings(kwargs)
        images = flatten(self.fetch_images(images))
        if not images:
            raise ValueError("Got an empty list of images. Pass at least one, or leave `images` out.")
        # Resized images are small: all are kept, so that the output can be allocated once.
        resized, grids = [], []
        for image in images:
            rgb = self._to_rgb(image, kwargs.get("input_data_format"), kwargs.get("device"))
            height, width = get_size(rgb)
            size, grid = get_tiling(height, width, **settings, **self._geometry)
            resized.append(resize_image(rgb, *([size] if settings["do_resize"] else self._get_view_sizes(*grid))))
            grids.append(grid)
        counts = [1 + rows * columns for rows, columns in grids]
        shape, device = (sum(counts), 3, self.tile_size, self.tile_size), resized[0][0].device
        # Fresh memory costs more time than writing to it, and numpy asks for huge pages.
        on_cpu = device.type == "cpu"
        pixel_values = torch.from_numpy(np.empty(shape, np.float32)) if on_cpu else torch.empty(shape, device=device)
        positions = []
        for views, (rows, columns), tiles in zip(resized, grids, pixel_values.split(counts), strict=True):
            self._tile(views, tiles, rows, columns)
            positions += get_tile_positions(rows, columns)
        data = {"pixel_values": pixel_values, "tile_positions": torch.tensor(positions, dtype=torch.int64)}
        if kwargs.get("crop_to_patches"):
            data["num_patches"] = torch.tensor(counts)
        return BatchFeature(data=data, tensor_type=kwargs.get("return_tensors"))

    def _tile(self, views: list[torch.Tensor], tiles: torch.Tensor, rows: int, columns: int) -> None:
        """Write an image's normalized thumbnail and tiles to `tiles` [1 + rows * columns, 3, 378, 378].

        `views`, each [3, height, width] uint8, are the fitted image, or, without a fit, thumbnail and canvas.
        """
        side, stride, sizes = self.tile_size, self.stride, self._get_view_sizes(rows, columns)
        grid = tiles[1:].unflatten(0, (rows, columns))
        needs_resize = sizes != [get_size(view) for view in views]
        # One channel fits a CPU's cache. It is normalized before tiles repeat parts of it.
        for index in range(3):
            # Multiplying by 1 / 255 would give other bits.
            planes = [view[index].float().div_(255) for view in views]
            if needs_resize:
                planes = [resize(planes[0], *size) for size in sizes]
            planes = [plane.clamp_(0, 1).mul_(2).sub_(1) for plane in planes]
            grid[:, :, index] = planes[-1].unfold(0, side, stride).unfold(1, side, stride)
            tiles[0, index] = planes[0]

    def _get_view_sizes(self, rows: int, columns: int) -> list[tuple[int, int]]:
        """Compute (height, width), in pixels, of a thumbnail and of a canvas: one where they are the same."""
        canvas = get_canvas_size(rows, columns, self.tile_size, self.stride)
        return list(dict.fromkeys([(self.tile_size, self.tile_size), canvas]))

    # Geometry, by this processor's settings

    def get_tiling(self, height: int, width: int, **settings: Any) -> tuple[tuple[int, int], tuple[int, int]]:
        """
        Compute what an image of `height` x `width` pixels becomes.

        Args:
            settings: Arguments of a call, such as `max_tiles` and `do_resize`.

        Returns:
            (height, width) of the image, fitted or as it was, in pixels; (rows, columns) of tiles.

        Raises:
            ValueError, TypeError: as from a call with such an image.
        """
        return get_tiling(height, width, **self._settings(settings), **self._geometry)

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict | None = None) -> int:
        """Count the tiles, with the thumbnail, of an image of `height` x `width` pixels."""
        rows, columns = self.get_tiling(height, width, **(images_kwargs or {}))[1]
        return 1 + rows * columns

    @property
    def _geometry(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in OF_THE_MODEL}

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
        """Tokens that are dropped at each inner edge of a tile: 2."""
        return self.overlap_margin // self.pooling_size

    def get_token_grid(self, rows: int, columns: int) -> tuple[int, int]:
        """Compute the (rows, columns) of tokens of `rows` x `columns` tiles, without their overlaps."""
        return get_token_grid(rows, columns, self.tokens_per_side, self.token_overlap)

    def _settings(self, given: dict[str, Any]) -> dict[str, Any]:
        return get_settings(self, given)

    # Loading

    @classmethod
    def get_image_processor_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        is_from_pipeline = "_from_pipeline" in kwargs
        settings, kwargs = super().get_image_processor_dict(pretrained_model_name_or_path, **kwargs)
        if is_from_pipeline:  # it passes the model's loading arguments to every part
            known = {*cls.valid_kwargs.__annotations__, "return_unused_kwargs"}
            kwargs = {name: value for name, value in kwargs.items() if name in known}
        return settings, kwargs

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """
        Make an image processor as [`~ImageProcessingMixin.from_dict`] does, from released settings too.

        Raises:
            TypeError: an argument is unknown, and `return_unused_kwargs` is not set.
        """
        if is_released_image_processor_config(image_processor_dict):
            image_processor_dict = convert_image_processor_config(image_processor_dict)
        known = cls.valid_kwargs.__annotations__
        unused = {name: kwargs.pop(name) for name in list(kwargs) if name not in known}
        return_unused = unused.pop("return_unused_kwargs", False)
        if not return_unused:
            asked_for = {name: value for name, value in unused.items() if name not in OF_LOADERS}
            refuse_unknown(asked_for, known, f"of {cls.__name__}")
        image_processor = super().from_dict(image_processor_dict, **get_given(kwargs))
        return (image_processor, unused) if return_unused else image_processor

    # The library's hooks

    def fetch_images(self, images: Any) -> Any:
        """Open paths, URLs, data URIs and base64 strings in a (nested) list of images."""
        return open_images(images)

    def process_image(self, image: Any, input_data_format: str | None = None, device: Any = None) -> torch.Tensor:
        """Convert a PIL image, array or tensor to RGB [3, H, W], uint8."""
        return to_tensor(self._to_rgb(image, input_data_format, device))

    def _to_rgb(self, image: Any, input_data_format: str | None, device: Any) -> Image.Image | torch.Tensor:
        rgb = to_rgb(image, input_data_format)
        return rgb if device is None else to_tensor(rgb).to(device)

    def to_dict(self) -> dict[str, Any]:
        settings = super().to_dict()
        # The base class adds every setting of any processor: keep what can differ.
        own = {name: settings[name] for name in (*PER_CALL, *OF_THE_MODEL)}
        own["image_processor_type"] = type(self).__name__
        own["auto_map"] = {"AutoImageProcessor": "image_processing_jina_vlm.JinaVLMImageProcessor"}
        return own


__all__ = ["JinaVLMImageProcessor"]

put_into_package(__name__)
