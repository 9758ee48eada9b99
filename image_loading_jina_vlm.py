# Copyright 2026 The jina-vlm-transformers authors. Licensed under the Apache License, Version 2.0.
"""From what users have (path, URL, data URI, base64, PIL image, array, tensor) to an RGB image of 8 bits, within limits.

Ours, because the library's own loading drops transparency, and changed between its versions: the same image must give the
same pixels on each. What is promised of files and servers that were made to do harm is in `docs/robustness.md`.
"""

import base64
import binascii
import os
import re
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent import futures
from http.client import HTTPException
from io import BytesIO
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from transformers.image_utils import ChannelDimension, infer_channel_dimension_format, is_valid_image


URL_TIMEOUT_SECONDS = 20  # without a byte
DOWNLOAD_SECONDS = 60  # in all
MAX_DOWNLOAD_BYTES = 256 * 2**20
# What is decoded, of all that Pillow can: an EPS file is a program, which Ghostscript would run, and rare formats have
# rarely been attacked. HEIF and JXL are read where a plugin for Pillow is registered.
FORMATS = (
    "AVIF", "BMP", "DIB", "GIF", "HEIF", "ICO", "JPEG", "JPEG2000", "JXL", "MPO", "PNG", "PPM", "TIFF", "WEBP",
)  # fmt: skip
# Of a JPEG file, as in libtiff. A scan can take 250 bytes, and the time of going over the whole image.
MAX_JPEG_SCANS = 100
# Neither stuffed bytes of a scan's data, nor markers without a length.
_JPEG_MARKER = re.compile(rb"\xff([\x02-\xcf\xd9-\xfe])")

T = TypeVar("T")


# ----------------------------------------------------------------------------------------------------------------------
# Nested lists of images
# ----------------------------------------------------------------------------------------------------------------------


def open_images(images: Any) -> Any:
    """Open the paths, URLs, data URIs and base64 strings in a (nested) list of images.

    Raises:
        TypeError: something in it is no image.
        FileNotFoundError, ValueError: as by [`open_image`].
    """
    if isinstance(images, (list, tuple)):
        return [open_images(image) for image in images]
    if isinstance(images, (str, os.PathLike)):
        return open_image(images)
    if is_valid_image(images):
        return images
    raise TypeError(
        f"Expected an image (PIL image, numpy array, torch tensor, path, URL or data URI), got {type(images).__name__}."
    )


def flatten(images: Any) -> list:
    """List an image, or images in nested lists or stacked in one array."""
    if isinstance(images, (list, tuple)):
        return [image for item in images for image in flatten(item)]
    if not isinstance(images, Image.Image) and images.ndim == 4:
        return list(images)
    return [images]


# ----------------------------------------------------------------------------------------------------------------------
# Names of images to files that Pillow has opened, and not decoded yet
# ----------------------------------------------------------------------------------------------------------------------


def open_image(source: str | os.PathLike) -> Image.Image:
    """Open a path, an http(s) URL, a data URI or a base64 string.

    Raises:
        FileNotFoundError, ValueError: nothing there, or not an image that Pillow can open.
    """
    source = os.fspath(source)
    shown = source if len(source) <= 100 else f"{source[:80]}..."
    if source.startswith(("http://", "https://")):
        data = BytesIO(_download(source))
    elif source.startswith("data:"):
        header, comma, payload = source.partition(",")
        if not comma or not header.endswith(";base64"):
            raise ValueError(f"Expected a data URI of the form `data:image/...;base64,...`, got {shown!r}.")
        data = BytesIO(_decode_base64(payload, shown))
    elif os.path.isfile(source):
        data = source
    elif len(source) > 255 or not os.path.splitext(source)[1]:
        # a path cannot be so long, and base64 knows no dot
        data = BytesIO(_decode_base64(source, shown))
    else:
        raise FileNotFoundError(f"No such image: {shown!r}. Expected a file, an http(s) URL, a data URI or base64.")
    Image.init()  # registers all formats
    return _guarded(lambda: Image.open(data, formats=[name for name in FORMATS if name in Image.OPEN]), shown)


def _download(url: str) -> bytes:
    # In a thread: the time-out of a connection begins anew with each byte, and looking a name up has none.
    outcome = futures.Future()

    def run():
        try:
            outcome.set_result(_read_url(url))
        except Exception as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return outcome.result(timeout=DOWNLOAD_SECONDS)
    except futures.TimeoutError as error:
        reason = str(error) or f"it took more than {DOWNLOAD_SECONDS} seconds"
        raise ValueError(f"Could not download the image at {url!r}: {reason}.") from error
    except (HTTPException, OSError, ValueError) as error:
        raise ValueError(f"Could not download the image at {url!r}: {error or type(error).__name__}.") from error


def _read_url(url: str) -> bytes:
    deadline = time.monotonic() + DOWNLOAD_SECONDS
    request = urllib.request.Request(url, headers={"User-Agent": "jina-vlm-transformers"})
    with urllib.request.urlopen(request, timeout=URL_TIMEOUT_SECONDS) as response:
        announced, data = response.length or 0, bytearray()
        if announced > MAX_DOWNLOAD_BYTES:
            raise ValueError(f"it is larger than {MAX_DOWNLOAD_BYTES} bytes")
        while (part := response.read1()) and time.monotonic() < deadline:
            data += part
            if len(data) > MAX_DOWNLOAD_BYTES:
                raise ValueError(f"it is larger than {MAX_DOWNLOAD_BYTES} bytes")
    if len(data) < announced:
        raise ValueError(f"the connection ended after {len(data)} of {announced} bytes")
    return bytes(data)


def _decode_base64(payload: str, shown: str) -> bytes:
    try:
        return base64.b64decode("".join(payload.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(
            f"{shown!r} is neither an existing file, nor an http(s) URL, a data URI or base64 ({error})."
        ) from error


def _guarded(step: Callable[[], T], shown: str) -> T:
    """Run a step of Pillow's decoding, and give its errors one type and a message that says what to do."""
    try:
        return step()
    except Image.UnidentifiedImageError as error:
        raise ValueError(
            f"{shown}: not an image in a format that Pillow can read and that is read here ({', '.join(FORMATS)})."
        ) from error
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{shown}: more pixels than Pillow's limit against decompression bombs ({error}) Shrink it, or raise "
            "`PIL.Image.MAX_IMAGE_PIXELS`."
        ) from error
    except Exception as error:  # of any type: what a decoder meets in a damaged file, each says in its own way
        raise ValueError(f"{shown}: the image is damaged or incomplete ({error or type(error).__name__}).") from error


# ----------------------------------------------------------------------------------------------------------------------
# Images to RGB
# ----------------------------------------------------------------------------------------------------------------------


def to_rgb(image: Any, input_data_format: str | None = None) -> Image.Image | torch.Tensor:
    """Decode an image and convert it to 8-bit RGB.

    Args:
        image: A PIL image, or an array or tensor of [height, width], or with 1, 3 or 4 channels first or last.
        input_data_format: `"channels_first"` or `"channels_last"`, for an array that could be read as either.

    Returns:
        An upright RGB image of Pillow's, or [3, height, width] uint8.

    Raises:
        ValueError: it is damaged, or not of a shape, type or range of values that an image has.
    """
    return _from_pil(image) if isinstance(image, Image.Image) else _from_array(image, input_data_format)


def to_tensor(image: Image.Image | torch.Tensor) -> torch.Tensor:
    """[3, height, width] uint8 of what [`to_rgb`] returns."""
    if isinstance(image, torch.Tensor):
        return image
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # a copy: Pillow's memory is read-only


def _from_pil(image: Image.Image) -> Image.Image | torch.Tensor:
    """Turn an image as its EXIF says, put transparency onto white, and round 16 bits to 8, then as a tensor."""
    shown = f"{type(image).__name__} {getattr(image, 'filename', '')}".strip()

    def decode() -> Image.Image:
        image.load()
        is_upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
        return image if is_upright else ImageOps.exif_transpose(image)  # which makes a copy in any case

    def convert() -> Image.Image:
        if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
            colored = image if image.mode == "RGBA" else image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", image.size, "white"), colored).convert("RGB")
        return image if image.mode == "RGB" else image.convert("RGB")

    _check_file(image, shown)
    image = _guarded(decode, shown)
    if image.mode.startswith(("I", "F")):  # 16-bit, 32-bit and float grayscale
        values = np.asarray(image)
        if (transparent := image.info.get("transparency")) is not None:
            values = np.where(values == transparent, 65535, values)
        return _from_array(values if image.mode == "F" else _checked_uint16(values))
    return _guarded(convert, shown)


def _check_file(image: Image.Image, shown: str) -> None:
    """Refuse what should not be decoded at all, of an image that Pillow has opened and not decoded yet."""
    if not getattr(image, "tile", None):
        return
    if image.format not in FORMATS:
        raise ValueError(
            f"{shown}: images in the format {image.format} are not read. Convert it to one of {', '.join(FORMATS)}."
        )
    if image.format in ("JPEG", "MPO"):
        image.fp.seek(0)
        if (scans := _count_scans(image.fp.read())) > MAX_JPEG_SCANS:
            raise ValueError(
                f"{shown}: a JPEG file of {scans} scans; there may be at most {MAX_JPEG_SCANS}. Save it anew."
            )


def _count_scans(jpeg: bytes) -> int:
    scans = position = 0
    # Up to the image's end; more may follow.
    while (marker := _JPEG_MARKER.search(jpeg, position)) and marker[1] != b"\xd9":
        scans += marker[1] == b"\xda"
        position = marker.end() + int.from_bytes(jpeg[marker.end() : marker.end() + 2], "big")
    return scans


def _checked_uint16(values: np.ndarray) -> np.ndarray:
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise ValueError(
            f"A grayscale image of integers must lie in 0 .. 65535, got {values.min()} .. {values.max()}."
        )
    return values.astype(np.uint16)


def _from_array(image: Any, input_data_format: str | None = None) -> torch.Tensor:
    image = image.detach().cpu().numpy() if isinstance(image, torch.Tensor) else np.asarray(image)
    if image.ndim == 2:
        image = image[None]
    elif image.ndim == 3:
        if input_data_format is None:
            try:
                input_data_format = infer_channel_dimension_format(image, num_channels=(1, 3, 4))
            except ValueError:
                raise ValueError(
                    "Expected an image with 1, 3 or 4 channels, first or last, got an array of shape "
                    f"{list(image.shape)}."
                ) from None
        if ChannelDimension(input_data_format) is ChannelDimension.LAST:
            image = image.transpose(2, 0, 1)
    if image.ndim != 3 or image.shape[0] not in (1, 3, 4):
        raise ValueError(
            "Expected an image of shape [height, width] with 1, 3 or 4 channels, first or last, got "
            f"{list(image.shape)}."
        )
    image = _to_uint8(image)
    if image.shape[0] == 4:
        channels_last = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)), "RGBA")
        return to_tensor(_from_pil(channels_last))
    # a copy: the array may be read-only, or not contiguous
    return torch.from_numpy(np.array(np.broadcast_to(image, (3, *image.shape[1:])), order="C"))


def _to_uint8(image: np.ndarray) -> np.ndarray:
    if image.dtype == np.uint8:
        return image
    if image.dtype == np.bool_:
        return image.astype(np.uint8) * 255
    if image.dtype == np.uint16:
        return ((image.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    if not image.size:
        return image.astype(np.uint8)
    low, high = image.min(), image.max()  # NaN if there is one
    if np.issubdtype(image.dtype, np.floating):
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"An image of floats must lie in 0 .. 1 without NaN, got {low} .. {high}. Divide by its maximum, or "
                "pass uint8."
            )
        return np.rint(image.astype(np.float32) * 255).astype(np.uint8)
    if np.issubdtype(image.dtype, np.integer):
        if low < 0 or high > 255:
            raise ValueError(
                f"An image of type {image.dtype} must lie in 0 .. 255, got {low} .. {high}. Pass uint8 or uint16."
            )
        return image.astype(np.uint8)
    raise ValueError(f"An image cannot be made of {image.dtype}.")
