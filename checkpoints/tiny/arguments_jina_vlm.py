# Copyright 2026 The jina-vlm-transformers authors. Licensed under the Apache License, Version 2.0.
"""Arguments of processor and image processor: each is honored, or refused by name."""

import operator
from collections.abc import Iterable
from typing import Any

import numpy as np
from transformers import GenerationConfig
from transformers.image_utils import ChannelDimension
from transformers.processing_utils import ImagesKwargs


# Settings that a call may override, and those that belong to the model
PER_CALL = ("do_resize", "max_tiles", "min_pixels", "max_pixels")
OF_THE_MODEL = ("tile_size", "patch_size", "overlap_margin", "pooling_size")
# What files and loaders give besides settings: the class, and where its code comes from
NO_SETTINGS = ("auto_map", "image_processor_type", "processor_class", "feature_extractor_type")
OF_LOADERS = ("trust_remote_code", "code_revision", "use_fast", "backend")
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
    crop_to_patches (`bool`, *optional*):
        If `True` in a call, give `num_patches` [images] beside the tiles: how many tiles each image has, its thumbnail
        counted. InternVL's names, by which TRL's trainers ask.
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
    crop_to_patches: bool | None
    tile_size: int | None
    patch_size: int | None
    overlap_margin: int | None
    pooling_size: int | None


def get_given(arguments: dict[str, Any]) -> dict[str, Any]:
    """Drop arguments that are None, and replace the release's name for `max_tiles` by ours."""
    given = {name: value for name, value in arguments.items() if value is not None}
    max_crops = given.pop("max_crops", None)
    if max_crops is not None and given.setdefault("max_tiles", max_crops) != max_crops:
        raise ValueError(
            f"Got `max_tiles` {given['max_tiles']!r} and `max_crops` {max_crops!r}, which are one setting. Give one "
            "of them."
        )
    return given


def refuse_unknown(given: dict[str, Any], known: Iterable[str], where: str) -> None:
    """Raise TypeError if an argument is not known."""
    if unknown := sorted(set(given) - set(known)):
        message = f"Unknown argument {', '.join(map(repr, unknown))} {where}. Known are: {', '.join(sorted(known))}."
        if not set(unknown).isdisjoint(GenerationConfig().to_dict()):  # pipelines hand on what they do not know
            message += " Arguments of `generate` go to it; in a pipeline's call, as `generate_kwargs={...}`."
        raise TypeError(message)


def get_settings(processor: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Find the settings of a call: those given to it, and the image processor's own for the rest.

    Raises:
        TypeError: an argument is unknown, or of the wrong type.
        ValueError: an argument is not supported, or a setting is out of range.
    """
    given = get_given(given)
    refuse_unknown(given, processor.valid_kwargs.__annotations__, f"of {type(processor).__name__}")
    for name, advice in _FIXED.items():
        value, expected = given.get(name, getattr(processor, name)), getattr(type(processor), name)
        if not _means(value, expected):
            raise ValueError(f"`{name}` is {value!r}; jina-vlm supports only {expected!r}. {advice}")
    if (crops := given.get("crop_to_patches", processor.crop_to_patches)) not in (None, True):
        raise ValueError(
            f"`crop_to_patches` is {crops!r}; jina-vlm supports only True. With `max_tiles=1` an image has one tile "
            "beside its thumbnail."
        )
    if not _means(size := given.get("size", processor.size), processor.size):
        raise ValueError(
            f"`size` is {size!r}; jina-vlm supports only {processor.size!r}. What an image is resized to follows from "
            "`min_pixels`, `max_pixels` and `max_tiles`: give one of these."
        )
    for name in OF_THE_MODEL:
        if given.get(name, own := getattr(processor, name)) != own:
            raise ValueError(
                f"`{name}` is {given[name]!r} in a call, and {own} in this image processor. It belongs to the "
                "model: set it where the image processor is made."
            )
    if (data_format := given.get("input_data_format")) is not None:
        ChannelDimension(data_format)  # raises ValueError
    settings = {name: given.get(name, getattr(processor, name)) for name in PER_CALL}
    if not isinstance(settings["do_resize"], bool):
        raise TypeError(f"`do_resize` must be True or False, got {settings['do_resize']!r}.")
    settings |= {name: to_integer(name, settings[name]) for name in ("max_tiles", "min_pixels", "max_pixels")}
    if settings["min_pixels"] > settings["max_pixels"]:
        raise ValueError(
            f"Expected 1 <= `min_pixels` <= `max_pixels`, got {settings['min_pixels']} and {settings['max_pixels']}. "
            f"Give at least {settings['min_pixels']} as `max_pixels`, or a smaller `min_pixels` beside it."
        )
    return settings


def to_integer(name: str, value: Any, least: int = 1) -> int:
    """Take an argument for an integer.

    Raises:
        TypeError: it is none.
        ValueError: it is less than `least`.
    """
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
