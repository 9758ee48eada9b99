# Copyright 2026 The jina-vlm-transformers authors. Licensed under the Apache License, Version 2.0.
"""Image processor of jina-vlm: an image becomes a thumbnail and overlapping tiles, twelve at most by default."""

import operator
import os
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import ChannelDimension, PILImageResampling
from transformers.processing_utils import ImagesKwargs, Unpack

from .conversion_jina_vlm import convert_image_processor_config, is_released_image_processor_config
from .image_loading_jina_vlm import flatten, open_images, to_rgb, to_tensor
from .resizing_jina_vlm import get_size, resize, resize_image
from .tiling_jina_vlm import (
    check_geometry,
    get_canvas_size,
    get_size_of_most_tokens,
    get_stride,
    get_tiling,
    get_token_grid,
    get_tokens_per_side,
)


# Settings that a call may override, and those that belong to the model
_PER_CALL = ("do_resize", "max_tiles", "min_pixels", "max_pixels")
_OF_THE_MODEL = ("tile_size", "patch_size", "overlap_margin", "pooling_size")
# What files and loaders give besides settings: the class, and where its code comes from
_NO_SETTINGS = ("auto_map", "image_processor_type", "processor_class", "feature_extractor_type")
_OF_LOADERS = ("trust_remote_code", "code_revision", "use_fast", "backend")
# The library's arguments with one supported value, and what to know or do instead of giving another
_FIXED = {
    "do_convert_rgb": "Images of any mode are converted.",
    "do_rescale": "Images of floats between 0 and 1 need no other: leave it out.",
    "rescale_factor": "Images of floats must lie between 0 and 1; integers are divided by the largest of their type.",
    "do_normalize": "The model was trained with it.",
    "image_mean": "The model was trained with it.",
    "image_std": "The model was trained with it.",
    "resample": "The model was trained with it.",
    "default_to_square": "`min_pixels` and `max_pixels` bound an image's size.",
    "do_center_crop": "Crop images before you pass them.",
    "crop_size": "Crop images before you pass them.",
    "do_pad": "All tiles are of one size.",
    "pad_size": "All tiles are of one size.",
    "data_format": "The model takes no other.",
    "image_seq_length": "An image's number of tokens follows from its size.",
}


class JinaVLMImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """
    do_resize (`bool`, *optional*, defaults to `True`):
        Fit an image to `min_pixels` and `max_pixels` before its grid of tiles is chosen. If `False`, as in the
        release's own command, the grid is chosen by the image's own size, of any aspect ratio.
    max_tiles (`int`, *optional*, defaults to 12):
        The most tiles besides the thumbnail. The model was trained with 12; more show smaller print.
    max_crops (`int`, *optional*):
        The release's name for `max_tiles`.
    min_pixels (`int`, *optional*, defaults to 3136):
        Images with fewer pixels are enlarged to about this many.
    max_pixels (`int`, *optional*, defaults to 1003520):
        Images with more pixels are shrunk to at most this many.
    tile_size (`int`, *optional*, defaults to 378):
        Side of a tile in pixels.
    patch_size (`int`, *optional*, defaults to 14):
        Side of a patch in pixels.
    overlap_margin (`int`, *optional*, defaults to 4):
        Patches at each inner edge of a tile that its neighbor shows too.
    pooling_size (`int`, *optional*, defaults to 2):
        Side, in patches, of a window that the connector pools to one token.
    """

    max_tiles: int | None
    max_crops: int | None
    min_pixels: int | None
    max_pixels: int | None
    tile_size: int | None
    patch_size: int | None
    overlap_margin: int | None
    pooling_size: int | None


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

    # The values of `_FIXED`, where libraries and engines read them
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
        kwargs = _get_given({name: value for name, value in kwargs.items() if name not in _NO_SETTINGS})
        self._refuse_unknown(kwargs)
        size = kwargs.pop("size", None)
        super().__init__(**kwargs)
        self._set_attributes(**kwargs)
        for name in _OF_THE_MODEL:
            setattr(self, name, _to_integer(name, getattr(self, name), least=0 if name == "overlap_margin" else 1))
        check_geometry(**self._geometry)
        for name, value in self._settings({}).items():
            setattr(self, name, value)
        # Engines reserve memory for an image of `size`. A square, as they would assume, makes fewer tokens.
        most_tokens = get_size_of_most_tokens(**self._settings({}), **self._geometry)
        self.size = dict(zip(("height", "width"), most_tokens, strict=True))
        self._settings({"size": size})

    def preprocess(self, images: Any, **kwargs: Unpack[JinaVLMImageProcessorKwargs]) -> BatchFeature:
        """
        Args:
            images: One image, or a (nested) list of them.
            do_resize, max_tiles, min_pixels, max_pixels (*optional*): Override the processor's settings. Any other
                argument of the library is refused unless it asks for what is done anyway.
            input_data_format (`str`, *optional*): `"channels_first"` or `"channels_last"`, for arrays.
            device (`str` or `torch.device`, *optional*): Where to compute. Only a CPU gives the release's exact bits.
            return_tensors (`str`, *optional*): `"pt"` or `"np"`.

        Returns:
            `BatchFeature`: `pixel_values` [tiles, 3, 378, 378] and `tile_positions` [tiles, 4] int64: (row, column,
            rows, columns) of each tile in its image, (-1, -1, rows, columns) of the thumbnail that opens each image.

        Raises:
            ValueError, TypeError: something is not a usable image, an argument is not supported, or an image would
                make more tokens than the model takes.
        """
        return super().preprocess(images, **{**_get_given(kwargs), **self._settings(kwargs)})

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
            positions.append((-1, -1, rows, columns))
            positions.extend((row, column, rows, columns) for row in range(rows) for column in range(columns))
        data = {"pixel_values": pixel_values, "tile_positions": torch.tensor(positions, dtype=torch.int64)}
        return BatchFeature(data=data, tensor_type=kwargs.get("return_tensors"))

    def _tile(self, views: list[torch.Tensor], tiles: torch.Tensor, rows: int, columns: int) -> None:
        """Write an image's normalized thumbnail and tiles to `tiles` [1 + rows * columns, 3, 378, 378].

        `views`, each [3, height, width] uint8, are the fitted image, or, without a fit, thumbnail and canvas.
        """
        side, stride = self.tile_size, self.stride
        grid = tiles[1:].unflatten(0, (rows, columns))
        # One channel fits a CPU's cache. It is normalized before tiles repeat parts of it.
        for index in range(3):
            # Multiplying by 1 / 255 would give other bits.
            planes = [view[index].float().div_(255) for view in views]
            if len(planes) == 1:
                planes = [resize(planes[0], *size) for size in self._get_view_sizes(rows, columns)]
            thumbnail, canvas = (plane.clamp_(0, 1).mul_(2).sub_(1) for plane in planes)
            grid[:, :, index] = canvas.unfold(0, side, stride).unfold(1, side, stride)
            tiles[0, index] = thumbnail

    def _get_view_sizes(self, rows: int, columns: int) -> list[tuple[int, int]]:
        """Compute (height, width), in pixels, of an image's thumbnail and of its canvas."""
        return [(self.tile_size, self.tile_size), get_canvas_size(rows, columns, self.tile_size, self.stride)]

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
        return {name: getattr(self, name) for name in _OF_THE_MODEL}

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

    # Arguments: honored, or refused by name

    def _settings(self, given: dict[str, Any]) -> dict[str, Any]:
        """Find the settings of a call: those given to it, and this processor's own for the rest.

        Raises:
            TypeError: an argument is unknown, or of the wrong type.
            ValueError: an argument is not supported, or a setting is out of range.
        """
        given = _get_given(given)
        self._refuse_unknown(given)
        for name, advice in _FIXED.items():
            value, expected = given.get(name, getattr(self, name)), getattr(type(self), name)
            if not _means(value, expected):
                raise ValueError(f"`{name}` is {value!r}; jina-vlm supports only {expected!r}. {advice}")
        if not _means(size := given.get("size", self.size), self.size):
            raise ValueError(
                f"`size` is {size!r}; jina-vlm supports only {self.size!r}. What an image is resized to follows from "
                "`min_pixels`, `max_pixels` and `max_tiles`: give one of these."
            )
        for name in _OF_THE_MODEL:
            if given.get(name, own := getattr(self, name)) != own:
                raise ValueError(
                    f"`{name}` is {given[name]!r} in a call, and {own} in this image processor. It belongs to the "
                    "model: set it where the image processor is made."
                )
        if (data_format := given.get("input_data_format")) is not None:
            ChannelDimension(data_format)  # raises ValueError
        settings = {name: given.get(name, getattr(self, name)) for name in _PER_CALL}
        if not isinstance(settings["do_resize"], bool):
            raise TypeError(f"`do_resize` must be True or False, got {settings['do_resize']!r}.")
        settings |= {name: _to_integer(name, settings[name]) for name in ("max_tiles", "min_pixels", "max_pixels")}
        if settings["min_pixels"] > settings["max_pixels"]:
            raise ValueError(
                f"Expected 1 <= `min_pixels` <= `max_pixels`, got {settings['min_pixels']} and "
                f"{settings['max_pixels']}."
            )
        return settings

    @classmethod
    def _refuse_unknown(cls, given: dict[str, Any]) -> None:
        known = cls.valid_kwargs.__annotations__
        if unknown := sorted(set(given) - set(known)):
            raise TypeError(
                f"Unknown argument {', '.join(map(repr, unknown))} of {cls.__name__}. Known are: "
                f"{', '.join(sorted(known))}."
            )

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
        unused = {name: kwargs.pop(name) for name in list(kwargs) if name not in cls.valid_kwargs.__annotations__}
        return_unused = unused.pop("return_unused_kwargs", False)
        if not return_unused:
            cls._refuse_unknown({name: value for name, value in unused.items() if name not in _OF_LOADERS})
        image_processor = super().from_dict(image_processor_dict, **_get_given(kwargs))
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
        own = {name: settings[name] for name in (*_PER_CALL, *_OF_THE_MODEL)}
        own["image_processor_type"] = type(self).__name__
        own["auto_map"] = {"AutoImageProcessor": "image_processing_jina_vlm.JinaVLMImageProcessor"}
        return own


def _get_given(arguments: dict[str, Any]) -> dict[str, Any]:
    """Drop arguments that are None, and replace the release's name for `max_tiles` by ours."""
    given = {name: value for name, value in arguments.items() if value is not None}
    max_crops = given.pop("max_crops", None)
    if max_crops is not None and given.setdefault("max_tiles", max_crops) != max_crops:
        raise ValueError(
            f"Got `max_tiles` {given['max_tiles']!r} and `max_crops` {max_crops!r}, which are one setting. Give one "
            "of them."
        )
    return given


def _to_integer(name: str, value: Any, least: int = 1) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"`{name}` must be an integer, got {value!r}.") from None
    if number < least:
        raise ValueError(f"`{name}` must be at least {least}, got {number}.")
    return number


def _means(value: Any, expected: Any) -> bool:
    """Compare an argument with a fixed value, which it may also give as one number for all channels, or rounded."""
    try:
        if isinstance(expected, (float, tuple)):
            return value == expected or np.allclose(value, expected, rtol=1e-6)
        return dict(value) == expected if isinstance(expected, dict) else bool(value == expected)
    except (TypeError, ValueError):
        return False


__all__ = ["JinaVLMImageProcessor"]
