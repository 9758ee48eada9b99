# Copyright 2026 The jina-vlm-transformers authors. Licensed under the Apache License, Version 2.0.
"""From what users have (path, URL, data URI, base64, PIL image, array, tensor) to an 8-bit RGB image, within limits.

The library's own loading drops transparency and differs between versions; here an image gives the same pixels on each.
`docs/robustness.md` says what holds against malicious files and servers.
"""

import base64
import binascii
import errno
import os
import re
import time
import zlib
from collections.abc import Callable
from io import BytesIO
from typing import Any, TypeVar
from urllib.parse import unquote

import numpy as np
import torch
from huggingface_hub.utils import httpx  # version 2 of the hub's client brings it by another name
from PIL import ExifTags, Image, ImageOps
from transformers.image_utils import ChannelDimension, infer_channel_dimension_format, is_valid_image


URL_TIMEOUT_SECONDS = 20  # without a byte
DOWNLOAD_SECONDS = 60  # in all
MAX_DOWNLOAD_BYTES = 256 * 2**20  # as sent, and decompressed
MAX_REDIRECTS = 10
_ENCODINGS = ("identity", "gzip", "x-gzip", "deflate")
_HEADERS = {"User-Agent": "jina-vlm-transformers", "Accept-Encoding": "gzip, deflate"}
# Of Pillow's formats: an EPS file is a program that Ghostscript would run, and decoders of rare formats are little
# tested. HEIF and JXL need a plugin for Pillow.
FORMATS = (
    "AVIF", "BMP", "DIB", "GIF", "HEIF", "ICO", "JPEG", "JPEG2000", "JXL", "MPO", "PNG", "PPM", "TIFF", "WEBP",
)  # fmt: skip
# In a JPEG file, as in libtiff. A scan of 250 bytes may take as long as a whole image.
MAX_JPEG_SCANS = 100
_CREDENTIALS = re.compile(r"^(https?://)[^/?#@]*@", re.IGNORECASE)  # in a URL: not shown in messages
# Neither stuffed bytes of a scan's data, nor markers without a length
_JPEG_MARKER = re.compile(rb"\xff([\x02-\xcf\xd9-\xfe])")

T = TypeVar("T")


# -------------------------------------------------------------------------------------------------------------------
# Nested lists of images
# -------------------------------------------------------------------------------------------------------------------


def open_images(images: Any) -> Any:
    """Open the paths, URLs, data URIs and base64 strings in a (nested) list of images. None beside lists is a data
    set's way to say that a sample has no images.

    Raises:
        TypeError: something in it is no image.
        FileNotFoundError, ValueError: as by [`open_image`].
    """
    if isinstance(images, (list, tuple)):
        is_nested = any(isinstance(image, (list, tuple)) for image in images)
        return [[] if image is None and is_nested else open_images(image) for image in images]
    if isinstance(images, (str, os.PathLike)):
        return open_image(images)
    if is_valid_image(images):
        return images
    raise TypeError(
        "Expected an image (PIL image, numpy array, torch tensor, path, URL or data URI), got "
        f"{type(images).__name__}."
    )


def flatten(images: Any) -> list:
    """List an image, or images in nested lists or stacked in one array."""
    if isinstance(images, (list, tuple)):
        return [image for item in images for image in flatten(item)]
    if not isinstance(images, Image.Image) and images.ndim == 4:
        return list(images)
    return [images]


# -------------------------------------------------------------------------------------------------------------------
# Names of images to files that Pillow has opened, and not decoded yet
# -------------------------------------------------------------------------------------------------------------------


def is_url(source: str) -> bool:
    """Tell whether the name of an image is an http(s) URL or a data URI, which no file of this machine can be."""
    return source[:8].lower().startswith(("http://", "https://", "data:"))


def open_image(source: str | os.PathLike | bytes) -> Image.Image:
    """Open a path, an http(s) URL, a data URI, a base64 string, or the content of a file.

    Raises:
        FileNotFoundError, ValueError: nothing there, or not an image that Pillow can open.
    """
    if isinstance(source, bytes):
        return _open(BytesIO(source), f"{len(source):,} bytes")
    source = os.fspath(source)
    data: BytesIO | str
    shown = _CREDENTIALS.sub(r"\1***@", source)
    shown = shown if len(shown) <= 100 else f"{shown[:80]}..."
    if is_url(source) and source[:5].lower() != "data:":
        data = BytesIO(_download(source, shown))
    elif is_url(source):
        header, comma, payload = source.partition(",")
        if not comma or not header.lower().endswith(";base64"):
            raise ValueError(f"Expected a data URI of the form `data:image/...;base64,...`, got {shown!r}.")
        data = BytesIO(_decode_base64(unquote(payload), shown))
    elif os.path.isfile(source):
        data = source
    elif os.path.isdir(source) or not source.strip():
        what = "is a folder" if source.strip() else "is empty"
        raise ValueError(f"{shown!r} {what}. Expected a file, an http(s) URL, a data URI or base64.")
    elif len(source) > 255 or not os.path.splitext(source)[1]:
        # No path is so long, and base64 has no dot.
        data = BytesIO(_decode_base64(source, shown))
    else:
        raise FileNotFoundError(f"No such image: {shown!r}. Expected a file, an http(s) URL, a data URI or base64.")
    return _open(data, shown)


def _open(data: BytesIO | str, shown: str) -> Image.Image:
    Image.init()  # registers all formats
    return _guarded(lambda: Image.open(data, formats=[name for name in FORMATS if name in Image.OPEN]), shown)


def _download(url: str, shown: str) -> bytes:
    deadline = _Deadline()
    try:
        with (
            httpx.Client(
                follow_redirects=True, max_redirects=MAX_REDIRECTS, event_hooks={"request": [deadline.begin]}
            ) as client,
            client.stream("GET", url, headers=_HEADERS, extensions={"trace": deadline.trace}) as response,
        ):
            return _read_body(response)
    except Exception as error:  # of any type: of the URL, of the connection, of the file of certificates
        reason = str(deadline if deadline.has_passed() else error) or type(error).__name__
        raise ValueError(f"Could not download the image at {shown!r}: {reason.rstrip('.')}.") from error


class _Deadline:
    """The deadline of a download. httpx's own timeouts start again with each byte."""

    def __init__(self) -> None:
        self.end = time.monotonic() + DOWNLOAD_SECONDS

    def __str__(self) -> str:
        return f"it took more than {DOWNLOAD_SECONDS} seconds"

    def has_passed(self) -> bool:
        return time.monotonic() >= self.end

    def timeout(self) -> float:
        if self.has_passed():
            raise TimeoutError(str(self))
        return min(URL_TIMEOUT_SECONDS, self.end - time.monotonic())

    def begin(self, request: httpx.Request) -> None:
        """Limit a request, the first or one by a redirect."""
        request.extensions["timeout"] = httpx.Timeout(self.timeout()).as_dict()

    def trace(self, event: str, info: dict) -> None:
        """Limit each read of a new connection to the time that is left."""
        if event.endswith((".connect_tcp.complete", ".start_tls.complete")):
            stream = info["return_value"]
            read = stream.read
            stream.read = lambda max_bytes, timeout=None: read(max_bytes, self.timeout())


def _read_body(response: httpx.Response) -> bytes:
    if not response.is_success:
        raise ValueError(f"the server answered {response.status_code} {response.reason_phrase}")
    encoding = response.headers.get("content-encoding", "").strip().lower() or "identity"
    if encoding not in _ENCODINGS:
        raise ValueError(f"its Content-Encoding is {encoding!r}; expected one of {', '.join(_ENCODINGS)}")
    too_large = f"it is larger than {MAX_DOWNLOAD_BYTES} bytes"
    if int(response.headers.get("content-length", 0)) > MAX_DOWNLOAD_BYTES:
        raise ValueError(too_large)
    data = bytearray()
    for part in response.iter_raw():  # as sent: httpx would decompress to any size
        data += part
        if len(data) > MAX_DOWNLOAD_BYTES:
            raise ValueError(too_large)
    if encoding == "identity":
        return bytes(data)
    # Servers call two formats deflate: one with a header, which zlib tells from gzip's, and one without.
    header = int.from_bytes(data[:2], "big")
    is_bare = encoding == "deflate" and (header % 31 or header >> 8 & 15 != 8)
    decompressor = zlib.decompressobj(-zlib.MAX_WBITS if is_bare else zlib.MAX_WBITS | 32)
    decompressed = decompressor.decompress(data, MAX_DOWNLOAD_BYTES + 1)
    if len(decompressed) > MAX_DOWNLOAD_BYTES:
        raise ValueError(too_large)
    if not decompressor.eof:
        raise ValueError("its compressed data end too early")
    return decompressed


def _decode_base64(payload: str, shown: str) -> bytes:
    try:
        return base64.b64decode("".join(payload.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(
            f"{shown!r} is neither an existing file, nor an http(s) URL, a data URI or base64 ({error})."
        ) from error


def _guarded(step: Callable[[], T], shown: str) -> T:
    """Run a step of Pillow's decoding. Any error becomes a ValueError that says what to do."""
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
        # The system's errors are of no image, but that of an offset that the file itself gives.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise ValueError(
                f"{shown}: the file cannot be opened: {error.strerror}. Check who may read it, and how many may be "
                "open at once (`ulimit -n`): all of a call are."
            ) from error
        raise ValueError(f"{shown}: the image is damaged or incomplete ({error or type(error).__name__}).") from error


# -------------------------------------------------------------------------------------------------------------------
# Images to RGB
# -------------------------------------------------------------------------------------------------------------------


def to_rgb(image: Any, input_data_format: str | None = None) -> Image.Image | torch.Tensor:
    """Decode an image and convert it to 8-bit RGB.

    Args:
        image: A PIL image, or an array or tensor of [height, width], or with 1, 3 or 4 channels first or last.
        input_data_format: `"channels_first"` or `"channels_last"`, for an array that could be read as either.

    Returns:
        An upright RGB image of Pillow's, or [3, height, width] uint8.

    Raises:
        ValueError: the image is damaged, or its shape, type or range of values is not an image's.
    """
    return _from_pil(image) if isinstance(image, Image.Image) else _from_array(image, input_data_format)


def to_tensor(image: Image.Image | torch.Tensor) -> torch.Tensor:
    """Convert the result of [`to_rgb`] to [3, height, width] uint8."""
    if isinstance(image, torch.Tensor):
        return image
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # a copy: Pillow's memory is read-only


def _from_pil(image: Image.Image) -> Image.Image | torch.Tensor:
    """Turn an image as its EXIF says, and put transparency onto white. 16 bits become a tensor of 8."""
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
    """Refuse to decode some images, of those that Pillow has opened and not decoded yet."""
    if not getattr(image, "tile", None):
        return
    file = image.fp  # type: ignore[attr-defined]
    if file is None:
        raise ValueError(f"{shown}: its file was closed before its pixels were read. Call its `load()` before that.")
    if image.format not in FORMATS:
        raise ValueError(
            f"{shown}: images in the format {image.format} are not read. Convert it to one of {', '.join(FORMATS)}."
        )
    if image.format in ("JPEG", "MPO"):
        file.seek(0)
        if (scans := _count_scans(file.read())) > MAX_JPEG_SCANS:
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
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu().to_dense()
        if image.is_floating_point() and image.dtype not in (torch.float16, torch.float32, torch.float64):
            image = image.float()  # numpy knows neither bfloat16 nor floats of 8 bits
    image = np.asarray(image)
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
    # A copy: the array may be read-only, or not contiguous.
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
