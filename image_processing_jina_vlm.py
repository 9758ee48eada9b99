# Copyright 2026 The jina-vlm-transformers authors. Licensed under the Apache License, Version 2.0.
"""Image processor of jina-vlm: one picture becomes a thumbnail and up to twelve overlapping tiles."""

import base64
import binascii
import math
import os
import re
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent import futures
from http.client import HTTPException
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch.nn import functional as F
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import ChannelDimension, infer_channel_dimension_format, is_valid_image
from transformers.processing_utils import ImagesKwargs, Unpack

from .conversion_jina_vlm import convert_image_processor_config, is_released_image_processor_config


MAX_ASPECT_RATIO = 200
BAND_ROWS = 64  # that are taken out of a picture at a time
URL_TIMEOUT_SECONDS = 20  # without a byte
DOWNLOAD_SECONDS = 60  # in all
MAX_DOWNLOAD_BYTES = 256 * 2**20
# What is decoded, of all that Pillow can: an EPS file is a program, which Ghostscript would run, and rare formats have rarely
# been attacked. HEIF and JXL are read where a plugin for Pillow is registered.
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "HEIF", "ICO", "JPEG", "JPEG2000", "JXL", "MPO", "PNG", "PPM", "TIFF", "WEBP")
# Of a JPEG file, as in libtiff. A scan can take 250 bytes, and the time of going over the whole picture.
MAX_JPEG_SCANS = 100
# Neither stuffed bytes of a scan's data, nor markers without a length.
_JPEG_MARKER = re.compile(rb"\xff([\x02-\xcf\xd9-\xfe])")


class JinaVLMImageProcessorKwargs(ImagesKwargs, total=False):
    """
    max_tiles (`int`, *optional*, defaults to 12):
        At most so many tiles, 1 to 12, beside the thumbnail.
    min_pixels (`int`, *optional*, defaults to 3136):
        Pictures with fewer pixels are enlarged to about this many.
    max_pixels (`int`, *optional*, defaults to 1003520):
        Pictures with more pixels are shrunk to at most this many.
    tile_size (`int`, *optional*, defaults to 378):
        Side of a tile in pixels.
    patch_size (`int`, *optional*, defaults to 14):
        Side of a patch in pixels.
    overlap_margin (`int`, *optional*, defaults to 4):
        Patches at each inner side of a tile that its neighbour shows as well.
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


def fit_to_budget(height: int, width: int, patch_size: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size to which a picture is resized first: multiples of `patch_size`, between `min_pixels` and `max_pixels`
    where that is possible. Sizes in pixels.

    Raises:
        ValueError: a side is 0, or one is more than 200 times the other.
    """
    if height < 1 or width < 1:
        raise ValueError(f"The picture is {width} x {height} pixels; both sides must be at least 1.")
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(
            f"The picture is {width} x {height} pixels; its longer side may be at most {MAX_ASPECT_RATIO} times the shorter. Crop it."
        )
    fitted_height, fitted_width = round(height / patch_size) * patch_size, round(width / patch_size) * patch_size
    if fitted_height * fitted_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        fitted_height = max(patch_size, math.floor(height / shrink / patch_size) * patch_size)
        fitted_width = max(patch_size, math.floor(width / shrink / patch_size) * patch_size)
    elif fitted_height * fitted_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        fitted_height = math.ceil(height * grow / patch_size) * patch_size
        fitted_width = math.ceil(width * grow / patch_size) * patch_size
    return fitted_height, fitted_width


def select_tiling(height: int, width: int, stride: int, margin: int, max_tiles: int) -> tuple[int, int]:
    """Rows and columns of the grid of tiles that changes the scale of a fitted picture least: the smallest enlargement
    or, where every grid shrinks it, the largest scale. `stride` and `margin`, what the outer tiles add to it, in pixels.
    Of equal grids the one with fewer tiles, then fewer rows."""

    def scale(rows: int, columns: int) -> float:
        return min(
            math.inf if side == margin else stride * count / (side - margin)
            for side, count in ((height, rows), (width, columns))
        )

    grids = [(rows, columns) for rows in range(1, max_tiles + 1) for columns in range(1, max_tiles // rows + 1)]
    grids.sort(key=lambda grid: (grid[0] * grid[1], grid[0]))
    scales = [scale(*grid) for grid in grids]
    if all(value < 1 for value in scales):
        return grids[scales.index(max(scales))]
    scales = [value if value >= 1 else 1e10 for value in scales]
    return grids[scales.index(min(scales))]


def resize(channel: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """[H, W] -> [height, width], float32: bilinear, half-pixel centres, no antialiasing."""
    # One channel: as [1, 3, H, W] torch takes another kernel when it has one thread, with other bits.
    return F.interpolate(channel.float()[None, None], size=(height, width), mode="bilinear", align_corners=False)[0, 0]


def resize_picture(picture: Image.Image | torch.Tensor, height: int, width: int) -> torch.Tensor:
    """An RGB picture, or its [3, H, W] uint8, to [3, height, width] uint8, each channel as by [`resize`]."""
    if isinstance(picture, torch.Tensor) and picture.device.type != "cpu":
        return torch.stack([resize(channel, height, width).round_().to(torch.uint8) for channel in picture])
    resized = torch.empty(3, height, width, dtype=torch.uint8)
    full_height, full_width = _size(picture)
    rows = _rows_in_use(full_height, height)
    # Of a large picture, many rows are not used: they are never made floats, and their places in this plane never take memory.
    plane = torch.empty(full_height, full_width)
    written = plane.numpy()
    for index, channel in enumerate(resized):
        for top, band in _bands(picture, index):
            first, last = np.searchsorted(rows, (top, top + len(band)))
            if last - first == len(band):  # quicker without indices
                written[top : top + len(band)] = band
            else:
                written[rows[first:last]] = band[rows[first:last] - top]
        channel.copy_(resize(plane, height, width).round_())
    return resized


def _rows_in_use(height: int, resized_height: int) -> np.ndarray:
    """The rows of a picture that its resized rows lie between, and those beside them where float32 may round to either side."""
    centres = (np.arange(resized_height) + 0.5) * height / resized_height - 0.5
    above = np.floor(np.concatenate([centres - 1e-6 * height, centres + 1e-6 * height])).astype(np.int64)
    return np.unique(np.concatenate([above, above + 1]).clip(0, height - 1))


def _bands(picture: Image.Image | torch.Tensor, index: int) -> Iterator[tuple[int, np.ndarray]]:
    """One channel of a picture in bands: the number of the first row, and [rows, W] uint8."""
    if isinstance(picture, torch.Tensor):
        yield 0, picture[index].numpy()
        return
    # Pillow takes channels apart many times faster than numpy or torch do; a band is copied while caches hold it.
    for top in range(0, picture.height, BAND_ROWS):
        band = picture.crop((0, top, picture.width, min(top + BAND_ROWS, picture.height)))
        yield top, np.frombuffer(band.tobytes("raw", "RGB"[index]), np.uint8).reshape(band.height, band.width)


def _size(picture: Image.Image | torch.Tensor) -> tuple[int, int]:
    """(height, width)"""
    return picture.size[::-1] if isinstance(picture, Image.Image) else tuple(picture.shape[1:])


class JinaVLMImageProcessor(BaseImageProcessor):
    """
    Makes [tiles, 3, 378, 378] float32 pixels in [-1, 1] and, for each tile, its place in its picture.

    A picture is fitted to a budget of pixels, stretched to a canvas of overlapping tiles, and cut; its thumbnail comes
    before its tiles (arXiv 2512.04032, section 3.1; resizing as in the released checkpoint: bilinear, without
    antialiasing). Any arithmetic is done in float32, with the same bits for any number of threads.

    Pictures may be PIL images, numpy arrays or torch tensors (height x width, with 1, 3 or 4 channels first or last;
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
            images: One picture, or a (nested) list of them.
            max_tiles, min_pixels, max_pixels (`int`, *optional*): Override the processor's settings.
            input_data_format (`str`, *optional*): `"channels_first"` or `"channels_last"`, for arrays.
            device (`str` or `torch.device`, *optional*): Where to compute. Only the CPU gives the release's exact bits.
            return_tensors (`str`, *optional*): `"pt"` or `"np"`.

        Returns:
            `BatchFeature`: `pixel_values` [tiles, 3, 378, 378] and `tile_positions` [tiles, 4] int64: (row, column, rows,
            columns) of each tile in its picture, (-1, -1, rows, columns) for the thumbnail that opens each picture.

        Raises:
            ValueError, TypeError: what was given is not a picture that can be used; the message says why.
        """
        return super().preprocess(images, **kwargs)

    def _preprocess_image_like_inputs(self, images: Any, **kwargs) -> BatchFeature:
        settings = self._settings(kwargs)
        images = flatten(self.fetch_images(images))
        if not images:
            raise ValueError("Got an empty list of images. Pass at least one, or leave `images` out.")
        # Fitted pictures are small: with all of them there, the output is made once, in its full size.
        fitted, grids = [], []
        for image in images:
            picture = self._to_picture(image, kwargs.get("input_data_format"), kwargs.get("device"))
            size, grid = self.get_tiling(*_size(picture), **settings)
            fitted.append(resize_picture(picture, *size) if size != _size(picture) else _to_tensor(picture))
            grids.append(grid)
        counts = [1 + rows * columns for rows, columns in grids]
        shape, device = (sum(counts), 3, self.tile_size, self.tile_size), fitted[0].device
        # numpy asks for huge pages: fresh memory costs more time than writing to it does.
        on_cpu = device.type == "cpu"
        pixel_values = torch.from_numpy(np.empty(shape, np.float32)) if on_cpu else torch.empty(shape, device=device)
        positions = []
        for picture, (rows, columns), tiles in zip(fitted, grids, pixel_values.split(counts), strict=True):
            self._tile(picture, tiles, rows, columns)
            positions.append((-1, -1, rows, columns))
            positions.extend((row, column, rows, columns) for row in range(rows) for column in range(columns))
        data = {"pixel_values": pixel_values, "tile_positions": torch.tensor(positions, dtype=torch.int64)}
        return BatchFeature(data=data, tensor_type=kwargs.get("return_tensors"))

    def _tile(self, picture: torch.Tensor, tiles: torch.Tensor, rows: int, columns: int) -> None:
        """Writes a fitted picture's, [3, height, width] uint8, normalised thumbnail and tiles to [1 + rows * columns, 3, 378, 378]."""
        side, (stride, margin) = self.tile_size, self._stride_and_margin
        grid = tiles[1:].unflatten(0, (rows, columns))
        # A channel at a time, which a processor's cache holds, and normalised before tiles repeat a part of it.
        for index, channel in enumerate(picture):
            channel = channel.float().div_(255)  # not a multiplication by 1 / 255: that gives other bits
            canvas = _normalise(resize(channel, stride * rows + margin, stride * columns + margin))
            grid[:, :, index] = canvas.unfold(0, side, stride).unfold(1, side, stride)
            tiles[0, index] = _normalise(resize(channel, side, side))

    def get_tiling(self, height: int, width: int, **settings) -> tuple[tuple[int, int], tuple[int, int]]:
        """((fitted height, fitted width) in pixels, (rows, columns) of tiles) of a picture of `height` x `width` pixels.
        `max_tiles`, `min_pixels` and `max_pixels` may be given."""
        settings = self._settings(settings)
        fitted = fit_to_budget(height, width, self.patch_size, settings["min_pixels"], settings["max_pixels"])
        return fitted, select_tiling(*fitted, *self._stride_and_margin, settings["max_tiles"])

    def _size_of_most_tokens(self) -> dict[str, int]:
        """Height and width, in pixels, of a picture that takes as many tokens as any. Engines set memory aside for it; of
        themselves they would try a square, which takes fewer than a strip."""
        stride, margin = self._stride_and_margin
        sizes = []
        for rows in range(1, self.max_tiles + 1):
            height = stride * rows + margin
            width = min(self.tile_size, self.max_pixels // height // self.patch_size * self.patch_size)
            sizes += [(height, max(width, -(-height // MAX_ASPECT_RATIO))), (height, height)]

        def tokens(size: tuple[int, int]) -> int:
            rows, columns = self.get_token_grid(*self.get_tiling(*size)[1])
            return rows * (columns + 1)

        return dict(zip(("height", "width"), max(sizes, key=tokens), strict=True))

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict | None = None) -> int:
        """Tiles, the thumbnail included, that a picture of `height` x `width` pixels becomes."""
        rows, columns = self.get_tiling(height, width, **(images_kwargs or {}))[1]
        return 1 + rows * columns

    @property
    def tokens_per_side(self) -> int:
        """Tokens along a side of one tile: 14."""
        return math.ceil(self.tile_size // self.patch_size / self.pooling_size)

    def get_token_grid(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns of tokens that the tiles of a picture have together, once their overlaps are dropped."""
        dropped = 2 * self.overlap_margin // self.pooling_size
        side = self.tokens_per_side
        return tuple(side * count - dropped * (count - 1) for count in (rows, columns))

    @property
    def _stride_and_margin(self) -> tuple[int, int]:
        margin = 2 * self.overlap_margin * self.patch_size
        return self.tile_size // self.patch_size * self.patch_size - margin, margin

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
    # From what users have to pixels. Ours, because the library's own loading drops transparency, and changed between
    # its versions: the same picture must give the same pixels on each.
    # ------------------------------------------------------------------------------------------------------------------

    def fetch_images(self, images: Any) -> Any:
        """Opens paths, URLs, data URIs and base64 strings in a (nested) list of pictures."""
        if isinstance(images, (list, tuple)):
            return [self.fetch_images(image) for image in images]
        if isinstance(images, (str, os.PathLike)):
            return open_image(images)
        if is_valid_image(images):
            return images
        raise TypeError(
            f"Expected a picture (PIL image, numpy array, torch tensor, path, URL or data URI), got {type(images).__name__}."
        )

    def process_image(self, image: Any, input_data_format: str | None = None, device: Any = None) -> torch.Tensor:
        """One PIL image, array or tensor to [3, H, W] uint8 RGB."""
        return _to_tensor(self._to_picture(image, input_data_format, device))

    def _to_picture(self, image: Any, input_data_format: str | None, device: Any) -> Image.Image | torch.Tensor:
        """An RGB picture of Pillow's, or [3, H, W] uint8 on a device."""
        image = from_pil(image) if isinstance(image, Image.Image) else from_array(image, input_data_format)
        return image if device is None else _to_tensor(image).to(device)

    def to_dict(self) -> dict[str, Any]:
        settings = super().to_dict()
        # Only what this processor uses; the base class adds every setting that any processor has.
        own = {name: settings[name] for name in JinaVLMImageProcessorKwargs.__annotations__ if name in vars(type(self))}
        own["image_processor_type"] = type(self).__name__
        own["auto_map"] = {"AutoImageProcessor": "image_processing_jina_vlm.JinaVLMImageProcessor"}
        return own


def flatten(images: Any) -> list:
    """A picture, or pictures in nested lists or stacked in one array, as a flat list."""
    if isinstance(images, (list, tuple)):
        return [image for item in images for image in flatten(item)]
    if not isinstance(images, Image.Image) and images.ndim == 4:
        return list(images)
    return [images]


def open_image(source: str | os.PathLike) -> Image.Image:
    """Opens a path, an http(s) URL, a data URI or a base64 string.

    Raises:
        FileNotFoundError, ValueError: nothing there, or not a picture that Pillow can open.
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
        raise FileNotFoundError(f"No such picture: {shown!r}. Expected a file, an http(s) URL, a data URI or base64.")
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
        raise ValueError(f"Could not download the picture at {url!r}: {reason}.") from error
    except (HTTPException, OSError, ValueError) as error:
        raise ValueError(f"Could not download the picture at {url!r}: {error or type(error).__name__}.") from error


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


def _guarded(step, shown: str):
    """Runs a step of Pillow's decoding and gives its errors one type and a message that says what to do."""
    try:
        return step()
    except Image.UnidentifiedImageError as error:
        raise ValueError(
            f"{shown}: not a picture in a format that Pillow can read and that is read here ({', '.join(FORMATS)})."
        ) from error
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{shown}: more pixels than Pillow's limit against decompression bombs ({error}) Shrink it, or raise `PIL.Image.MAX_IMAGE_PIXELS`."
        ) from error
    except Exception as error:  # of any type: what a decoder meets in a damaged file, each says in its own way
        raise ValueError(f"{shown}: the picture is damaged or incomplete ({error or type(error).__name__}).") from error


def _check_file(image: Image.Image, shown: str) -> None:
    """Refuses what should not be decoded at all, of a picture that Pillow has opened and not decoded yet."""
    if not getattr(image, "tile", None):
        return
    if image.format not in FORMATS:
        raise ValueError(f"{shown}: pictures in the format {image.format} are not read. Convert it to one of {', '.join(FORMATS)}.")
    if image.format in ("JPEG", "MPO"):
        image.fp.seek(0)
        if (scans := _count_scans(image.fp.read())) > MAX_JPEG_SCANS:
            raise ValueError(f"{shown}: a JPEG file of {scans} scans; there may be at most {MAX_JPEG_SCANS}. Save it anew.")


def _count_scans(jpeg: bytes) -> int:
    scans = position = 0
    while (marker := _JPEG_MARKER.search(jpeg, position)) and marker[1] != b"\xd9":  # the picture's end; more may follow
        scans += marker[1] == b"\xda"
        position = marker.end() + int.from_bytes(jpeg[marker.end() : marker.end() + 2], "big")
    return scans


def from_pil(image: Image.Image) -> Image.Image | torch.Tensor:
    """Any PIL image to one in RGB, or, where it has more than 8 bits, [3, H, W] uint8: turned as its EXIF says, transparency onto
    white, 16 bits to 8."""
    shown = f"{type(image).__name__} {getattr(image, 'filename', '')}".strip()

    def decode() -> Image.Image:
        image.load()
        is_upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
        return image if is_upright else ImageOps.exif_transpose(image)  # which makes a copy in any case

    def to_rgb() -> Image.Image:
        if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
            coloured = image if image.mode == "RGBA" else image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", image.size, "white"), coloured).convert("RGB")
        return image if image.mode == "RGB" else image.convert("RGB")

    _check_file(image, shown)
    image = _guarded(decode, shown)
    if image.mode.startswith(("I", "F")):  # 16-bit, 32-bit and float greyscale
        values = np.asarray(image)
        if (transparent := image.info.get("transparency")) is not None:
            values = np.where(values == transparent, 65535, values)
        return from_array(values if image.mode == "F" else _checked_uint16(values))
    return _guarded(to_rgb, shown)


def _to_tensor(picture: Image.Image | torch.Tensor) -> torch.Tensor:
    if isinstance(picture, torch.Tensor):
        return picture
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)  # a copy: the picture's memory is read-only


def _normalise(channel: torch.Tensor) -> torch.Tensor:
    """From 0 .. 1 to -1 .. 1, in place."""
    return channel.clamp_(0, 1).mul_(2).sub_(1)


def _checked_uint16(values: np.ndarray) -> np.ndarray:
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise ValueError(f"A greyscale picture of integers must lie in 0 .. 65535, got {values.min()} .. {values.max()}.")
    return values.astype(np.uint16)


def from_array(image: Any, input_data_format: str | None = None) -> torch.Tensor:
    """A numpy array or tensor to [3, H, W] uint8 RGB.

    Raises:
        ValueError: its shape, type or values are not those of a picture.
    """
    image = image.detach().cpu().numpy() if isinstance(image, torch.Tensor) else np.asarray(image)
    if image.ndim == 2:
        image = image[None]
    elif image.ndim == 3:
        if input_data_format is None:
            try:
                input_data_format = infer_channel_dimension_format(image, num_channels=(1, 3, 4))
            except ValueError:
                raise ValueError(
                    f"Expected a picture with 1, 3 or 4 channels, first or last, got an array of shape {list(image.shape)}."
                ) from None
        if ChannelDimension(input_data_format) is ChannelDimension.LAST:
            image = image.transpose(2, 0, 1)
    if image.ndim != 3 or image.shape[0] not in (1, 3, 4):
        raise ValueError(
            f"Expected a picture of shape [height, width] with 1, 3 or 4 channels, first or last, got {list(image.shape)}."
        )
    image = _to_uint8(image)
    if image.shape[0] == 4:
        channels_last = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)), "RGBA")
        return _to_tensor(from_pil(channels_last))
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
                f"A picture of floats must lie in 0 .. 1 without NaN, got {low} .. {high}. Divide by its maximum, or pass uint8."
            )
        return np.rint(image.astype(np.float32) * 255).astype(np.uint8)
    if np.issubdtype(image.dtype, np.integer):
        if low < 0 or high > 255:
            raise ValueError(f"A picture of type {image.dtype} must lie in 0 .. 255, got {low} .. {high}. Pass uint8 or uint16.")
        return image.astype(np.uint8)
    raise ValueError(f"A picture cannot be made of {image.dtype}.")


__all__ = ["JinaVLMImageProcessor"]
