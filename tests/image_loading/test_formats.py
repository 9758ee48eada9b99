"""Every format and oddity of images, and what becomes of each: by PIL, path and URL, and through the library's
pipeline, which opens and converts images by itself. One table, [`EXPECTED`]; the files are made here."""

import io
import shutil
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import TURNS
from PIL import Image, features
from transformers import pipeline


SIDE = 378  # an image of this size becomes a thumbnail and one tile, both without any resizing
Y, X = np.mgrid[:SIDE, :SIDE]
# Smooth, so that lossy formats keep it; not symmetric, so that no turn goes unseen
RGB = np.dstack([X * 255 // 377, Y * 255 // 377, (X + 2 * Y) * 255 // 1131]).astype(np.uint8)
GRAY = RGB[..., 0]
ALPHA = RGB[..., 1]
WHITE = np.full_like(RGB, 255)
PALETTE = (np.arange(768).reshape(256, 3) * 5 % 256).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def saved(image: np.ndarray | Image.Image, file_format: str, mode: str | None = None, **options) -> bytes:
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    file = io.BytesIO()
    (image.convert(mode) if mode else image).save(file, file_format, **options)
    return file.getvalue()


def turned(file_format: str, orientation: int, **options) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(RGB, file_format, exif=exif, **options)


def moving(file_format: str, **options) -> bytes:
    """RGB, then white."""
    return saved(RGB, file_format, save_all=True, append_images=[Image.fromarray(WHITE)], **options)


def png(samples: np.ndarray, depth: int, color_type: int, interlaced: bool = False, **chunks: bytes) -> bytes:
    """A PNG file of [height, width, channels] samples; Pillow writes neither interlaced ones nor 16 bits of color."""

    def rows(part: np.ndarray) -> bytes:
        if depth == 16:
            lines = part.astype(">u2").reshape(len(part), -1).view(np.uint8)
        else:
            bits = np.unpackbits(part.astype(np.uint8)[..., None], axis=-1)[..., 8 - depth :]
            lines = np.packbits(bits.reshape(len(part), -1), axis=1)
        return b"".join(b"\0" + line.tobytes() for line in lines)

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    samples = samples if samples.ndim == 3 else samples[..., None]
    adam7 = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    parts = [samples[y::down, x::right] for y, x, down, right in adam7] if interlaced else [samples]
    header = struct.pack(">IIBBBBB", samples.shape[1], samples.shape[0], depth, color_type, 0, 0, interlaced)
    body = [(b"IHDR", header), *((name.encode(), value) for name, value in chunks.items())]
    body += [(b"IDAT", zlib.compress(b"".join(map(rows, parts)), 1)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*item) for item in body)


def tiff(samples: np.ndarray, sample_format: int, photometric: int, order: str = "<") -> bytes:
    """An uncompressed TIFF file of [height, width, channels] samples (format 1: unsigned, 2: signed, 3: float)."""
    samples = samples if samples.ndim == 3 else samples[..., None]
    height, width, channels = samples.shape
    pixels = samples.astype(samples.dtype.newbyteorder(order)).tobytes()
    # Where a tag has several values, they stand behind the pixels.
    bits, formats = ([value] * channels for value in (samples.dtype.itemsize * 8, sample_format))
    extra = struct.pack(f"{order}{2 * channels}H", *bits, *formats)
    behind = 8 + len(pixels)

    def short(values: list[int], offset: int) -> bytes:
        return (
            struct.pack(f"{order}I", offset)
            if channels > 2
            else struct.pack(f"{order}{channels}H", *values).ljust(4, b"\0")
        )

    tags = {
        256: (4, 1, struct.pack(f"{order}I", width)), 257: (4, 1, struct.pack(f"{order}I", height)),
        258: (3, channels, short(bits, behind)), 259: (3, 1, struct.pack(f"{order}HH", 1, 0)),
        262: (3, 1, struct.pack(f"{order}HH", photometric, 0)), 273: (4, 1, struct.pack(f"{order}I", 8)),
        277: (3, 1, struct.pack(f"{order}HH", channels, 0)), 278: (4, 1, struct.pack(f"{order}I", height)),
        279: (4, 1, struct.pack(f"{order}I", len(pixels))), 339: (3, channels, short(formats, behind + 2 * channels)),
    }  # fmt: skip
    entries = b"".join(
        struct.pack(f"{order}HHI", tag, kind, count) + value for tag, (kind, count, value) in tags.items()
    )
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", behind + len(extra))
    return head + pixels + extra + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)


def flat(width: int, height: int) -> bytes:
    """A PNG of one color, small whatever its sides."""
    return saved(Image.new("1", (width, height), 1), "PNG")


# ---------------------------------------------------------------------------------------------------------------------
# What is expected
# ---------------------------------------------------------------------------------------------------------------------


def gray(values: np.ndarray) -> np.ndarray:
    return np.repeat(values.astype(np.uint8)[..., None], 3, axis=2)


def on_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return np.rint(rgb * share + 255 * (1 - share)).astype(np.uint8)


def unmultiplied(cmyk: np.ndarray) -> np.ndarray:
    return np.rint((255.0 - cmyk[..., :3]) * (255.0 - cmyk[..., 3:]) / 255).astype(np.uint8)


@dataclass
class Case:
    """
    A file, and what it becomes.

    Args:
        make: Makes the file; `None` where this Pillow lacks the format.
        shows: The image seen, [378, 378, 3]; a (rows, columns) grid of tiles, of images of other sizes; or what the
            message says that refuses it.
        levels: By so many of 255 a pixel may be off: what the format or Pillow's rounding loses.
        in_pipeline: The same through the library's own opening, where that differs.
    """

    make: Callable[[], bytes] | None
    shows: np.ndarray | tuple[int, int] | str
    levels: int = 0
    in_pipeline: np.ndarray | str | None = None


has_avif = features.check("avif")
has_jpeg2000 = features.check("jpg_2000")
CMYK = np.dstack([RGB, GRAY // 2])
SIXTEEN = GRAY.astype(np.uint16) * 256 + ALPHA
CLIPPED = np.minimum(SIXTEEN, 255).astype(np.uint8)[..., None].repeat(3, axis=2)  # nearly all white
KEY, KEY_OF_16 = RGB[5, 5], SIXTEEN[5, 5]  # colors that are declared transparent
SIXTEEN_RGB = RGB.astype(np.uint16) * 256 + 200
PAST_LIMIT = "more pixels than Pillow's limit against decompression bombs"
TOO_LONG = "its longer side may be at most 200 times the shorter"

EXPECTED = {
    # JPEG
    "baseline.jpg": Case(lambda: saved(RGB, "JPEG", quality=95), RGB, 8),
    "progressive.jpg": Case(lambda: saved(RGB, "JPEG", quality=95, progressive=True), RGB, 8),
    "gray.jpg": Case(lambda: saved(GRAY, "JPEG", quality=95), gray(GRAY), 8),
    "cmyk.jpg": Case(lambda: saved(Image.fromarray(CMYK, "CMYK"), "JPEG", quality=95), unmultiplied(CMYK), 10),
    "several.mpo": Case(lambda: moving("MPO", quality=95), RGB, 8),
    **{
        f"turned-{turn}.jpg": Case(lambda turn=turn: turned("JPEG", turn, quality=95), TURNS[turn](RGB), 8)
        for turn in TURNS
    },
    # PNG
    "1-bit.png": Case(lambda: png(GRAY > 99, 1, 0), gray((GRAY > 99) * 255)),
    "2-bit.png": Case(lambda: png(GRAY // 64, 2, 0), gray(GRAY // 64 * 85)),
    "4-bit.png": Case(lambda: png(GRAY // 16, 4, 0), gray(GRAY // 16 * 17)),
    "8-bit.png": Case(lambda: png(GRAY, 8, 0), gray(GRAY)),
    "16-bit.png": Case(lambda: png(SIXTEEN, 16, 0), gray(np.rint(SIXTEEN / 257)), in_pipeline=CLIPPED),
    "16-bit-transparent.png": Case(
        lambda: png(SIXTEEN, 16, 0, tRNS=struct.pack(">H", KEY_OF_16)),
        gray(np.where(SIXTEEN == KEY_OF_16, 255, np.rint(SIXTEEN / 257))),
        in_pipeline=CLIPPED,
    ),
    "colors.png": Case(lambda: png(RGB, 8, 2), RGB),
    "16-bit-colors.png": Case(lambda: png(SIXTEEN_RGB, 16, 2), RGB),  # Pillow keeps the upper half
    "one-transparent.png": Case(
        lambda: png(RGB, 8, 2, tRNS=struct.pack(">3H", *KEY)),
        np.where((RGB == KEY).all(-1, keepdims=True), 255, RGB),
    ),
    "palette.png": Case(lambda: png(GRAY, 8, 3, PLTE=PALETTE.tobytes()), PALETTE[GRAY]),
    "1-bit-palette.png": Case(
        lambda: png(GRAY > 99, 1, 3, PLTE=PALETTE[3:5].tobytes()), PALETTE[3:5][(GRAY > 99) * 1]
    ),
    "transparent-palette.png": Case(
        lambda: png(GRAY, 8, 3, PLTE=PALETTE.tobytes(), tRNS=bytes(range(256))),
        on_white(PALETTE[GRAY], GRAY),
        1,
        in_pipeline=PALETTE[GRAY],
    ),
    "gray-alpha.png": Case(
        lambda: png(np.dstack([GRAY, ALPHA]), 8, 4), on_white(gray(GRAY), ALPHA), 1, in_pipeline=gray(GRAY)
    ),
    "alpha.png": Case(lambda: png(np.dstack([RGB, GRAY]), 8, 6), on_white(RGB, GRAY), 1, in_pipeline=RGB),
    "16-bit-alpha.png": Case(
        lambda: png(np.dstack([SIXTEEN_RGB, GRAY.astype(np.uint16) * 257]), 16, 6),
        on_white(RGB, GRAY),
        1,
        in_pipeline=RGB,
    ),
    "interlaced.png": Case(lambda: png(RGB, 8, 2, interlaced=True), RGB),
    "interlaced-1-bit.png": Case(lambda: png(GRAY > 99, 1, 0, interlaced=True), gray((GRAY > 99) * 255)),
    "interlaced-16-bit-alpha.png": Case(
        lambda: png(np.dstack([SIXTEEN_RGB, GRAY.astype(np.uint16) * 257]), 16, 6, interlaced=True),
        on_white(RGB, GRAY),
        1,
        in_pipeline=RGB,
    ),
    "animated.png": Case(lambda: moving("PNG"), RGB),
    # WebP
    "lossy.webp": Case(lambda: saved(RGB, "WEBP", quality=95), RGB, 10),
    "lossless.webp": Case(lambda: saved(RGB, "WEBP", lossless=True), RGB),
    "alpha.webp": Case(
        lambda: saved(np.dstack([RGB, GRAY]), "WEBP", lossless=True, exact=True),
        on_white(RGB, GRAY),
        1,
        in_pipeline=RGB,
    ),
    "animated.webp": Case(lambda: moving("WEBP", lossless=True), RGB),
    "turned-6.webp": Case(lambda: turned("WEBP", 6, lossless=True), TURNS[6](RGB)),
    # GIF, of 256 colors
    "still.gif": Case(lambda: saved(GRAY, "GIF"), gray(GRAY)),
    "transparent.gif": Case(
        lambda: saved(Image.frombytes("L", (SIDE, SIDE), GRAY.tobytes()), "GIF", transparency=7),
        gray(np.where(GRAY == 7, 255, GRAY)),
    ),
    "animated.gif": Case(
        lambda: saved(GRAY, "GIF", save_all=True, append_images=[Image.fromarray(255 - GRAY)]), gray(GRAY)
    ),
    # TIFF
    "plain.tiff": Case(lambda: saved(RGB, "TIFF"), RGB),
    "lzw-alpha.tiff": Case(
        lambda: saved(np.dstack([RGB, GRAY]), "TIFF", compression="tiff_lzw"), on_white(RGB, GRAY), 1, in_pipeline=RGB
    ),
    "fax.tiff": Case(lambda: saved(GRAY > 99, "TIFF", compression="group4"), gray((GRAY > 99) * 255)),
    "pages.tiff": Case(lambda: moving("TIFF"), RGB),
    "cmyk.tiff": Case(lambda: tiff(CMYK, 1, 5), unmultiplied(CMYK), 1),
    "16-bit.tiff": Case(lambda: tiff(SIXTEEN, 1, 1), gray(np.rint(SIXTEEN / 257)), in_pipeline=CLIPPED),
    "16-bit-big-endian.tiff": Case(
        lambda: tiff(SIXTEEN, 1, 1, ">"), gray(np.rint(SIXTEEN / 257)), in_pipeline=CLIPPED
    ),
    "16-bit-colors.tiff": Case(lambda: tiff(SIXTEEN_RGB, 1, 2), RGB),
    "32-bit.tiff": Case(
        lambda: tiff(SIXTEEN.astype(np.int32), 2, 1),
        gray(np.rint(SIXTEEN / 257)),
        in_pipeline=CLIPPED,
    ),
    "negative.tiff": Case(
        lambda: tiff(-GRAY.astype(np.int32), 2, 1),
        "integers must lie in 0 .. 65535, got -255 .. 0",
        in_pipeline=gray(GRAY * 0),
    ),
    "float.tiff": Case(lambda: tiff(GRAY / np.float32(255), 3, 1), gray(GRAY), in_pipeline=gray(GRAY // 255)),
    "float-to-255.tiff": Case(
        lambda: tiff(GRAY.astype(np.float32), 3, 1),
        "floats must lie in 0 .. 1 without NaN, got 0.0 .. 255.0",
        in_pipeline=gray(GRAY),
    ),
    "float-nan.tiff": Case(
        lambda: tiff(GRAY * np.float32("nan"), 3, 1),
        "floats must lie in 0 .. 1 without NaN, got nan",
        in_pipeline=gray(GRAY * 0),
    ),
    "double.tiff": Case(lambda: tiff(GRAY / 255, 3, 1), "not an image in a format that Pillow can read"),
    "turned-5.tiff": Case(lambda: turned("TIFF", 5), TURNS[5](RGB)),
    # Others
    "plain.bmp": Case(lambda: saved(RGB, "BMP"), RGB),
    "palette.bmp": Case(lambda: saved(GRAY, "BMP"), gray(GRAY)),
    "1-bit.bmp": Case(lambda: saved(GRAY > 99, "BMP"), gray((GRAY > 99) * 255)),
    "lossless.jp2": Case((lambda: saved(RGB, "JPEG2000")) if has_jpeg2000 else None, RGB),
    "lossy.avif": Case((lambda: saved(RGB, "AVIF", quality=95, speed=10)) if has_avif else None, RGB, 12),
    "alpha.avif": Case(
        (lambda: saved(np.dstack([RGB, GRAY]), "AVIF", quality=100, subsampling="4:4:4", speed=10))
        if has_avif
        else None,
        on_white(RGB, GRAY),
        6,
        in_pipeline=RGB,
    ),
    "animated.avif": Case((lambda: moving("AVIF", quality=95, speed=10)) if has_avif else None, RGB, 12),
    "turned-8.avif": Case((lambda: turned("AVIF", 8, quality=95, speed=10)) if has_avif else None, TURNS[8](RGB), 12),
    # An ending says nothing
    "really-png.jpg": Case(lambda: saved(RGB, "PNG"), RGB),
    "really-tiff": Case(lambda: saved(RGB, "TIFF"), RGB),
    # Formats that Pillow can read and that are not read here
    "program.eps": Case(
        lambda: saved(RGB, "EPS"), "not an image in a format .*that is read here", in_pipeline="Ghostscript"
    ),
    "targa.tga": Case(lambda: saved(RGB, "TGA"), "not an image in a format .*that is read here", in_pipeline=RGB),
    # Sides, from 1 to 20,000 pixels
    "1x1.png": Case(lambda: flat(1, 1), (1, 1)),
    "1x2.png": Case(lambda: flat(1, 2), (1, 1)),
    "13x15.png": Case(lambda: flat(13, 15), (1, 1)),
    "200x1.png": Case(lambda: flat(200, 1), (1, 1)),
    "201x1.png": Case(lambda: flat(201, 1), TOO_LONG),
    "1x20000.png": Case(lambda: flat(1, 20000), TOO_LONG),
    "20000x99.png": Case(lambda: flat(20000, 99), TOO_LONG),
    "20000x100.png": Case(lambda: flat(20000, 100), (1, 1)),
    "100x20000.png": Case(lambda: flat(100, 20000), (1, 1)),
    "2500x20000.png": Case(lambda: flat(2500, 20000), (11, 1)),
    "20000x20000.png": Case(lambda: flat(20000, 20000), PAST_LIMIT),
}


@pytest.fixture(scope="module")
def pipe(model, processor):
    return pipeline("image-text-to-text", model=model, processor=processor)


@pytest.fixture(scope="module")
def ways(web, tiler, pipe):
    """The function `ways(name)`: by the name of each way in, a call that makes tiles of the file."""
    folder, url = web

    def give(name: str) -> dict[str, Callable]:
        path = folder / name
        if not path.exists():
            path.write_bytes(EXPECTED[name].make())

        def in_pipeline():
            return pipe.preprocess({"text": "<|image|>", "images": str(path)})

        return {
            "PIL": lambda: tiler(Image.open(path), return_tensors="pt"),
            "path": lambda: tiler(path, return_tensors="pt"),
            "URL": lambda: tiler(f"{url}/{name}", return_tensors="pt"),
            "pipeline": in_pipeline,
        }

    return give


def assert_shows(made: dict, expected: np.ndarray | tuple, levels: int):
    if isinstance(expected, tuple):
        assert made["tile_positions"][0].tolist() == [-1, -1, *expected]
        return
    expected = torch.from_numpy(expected.copy()).permute(2, 0, 1).float() / 255 * 2 - 1
    assert made["pixel_values"].shape == (2, 3, SIDE, SIDE)
    for shown in made["pixel_values"]:
        torch.testing.assert_close(shown, expected, rtol=0, atol=levels * 2 / 255 + 1e-6)


@pytest.mark.filterwarnings("ignore")  # Pillow's, of large images
@pytest.mark.parametrize("way", ["PIL", "path", "URL", "pipeline"])
@pytest.mark.parametrize("name", list(EXPECTED))
def test_formats(ways, name, way):
    case = EXPECTED[name]
    if case.make is None:
        pytest.skip("this Pillow lacks the format")
    if name == "program.eps" and way == "pipeline" and shutil.which("gs"):
        pytest.skip("the library lets Ghostscript run it")
    attempt = ways(name)[way]
    expected = case.shows
    if way == "pipeline" and case.in_pipeline is not None:
        expected = case.in_pipeline
    if not isinstance(expected, str):
        assert_shows(attempt(), expected, case.levels)
        return
    if way != "path" and way != "URL":  # Pillow opens it, or refuses it, in its own words
        expected = f"{expected}|cannot identify|could be decompression bomb|are not read"
    with pytest.raises((ValueError, OSError, Image.DecompressionBombError), match=expected):
        attempt()
