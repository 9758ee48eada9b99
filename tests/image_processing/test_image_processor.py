"""From an image, whatever it comes as, to tiles."""

import base64
import hashlib
import io
import json
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
import torch
from conftest import TURNS
from hypothesis import given, settings
from hypothesis import strategies as st
from jina_vlm import JinaVLMImageProcessor
from jina_vlm.resizing_jina_vlm import resize_exactly
from PIL import Image


SIZES = json.loads((Path(__file__).parents[1] / "golden" / "geometry.json").read_text())
SIDE = 378  # an image of this size becomes a thumbnail and one tile, both without any resizing


@pytest.fixture(scope="module")
def rgb(make_image):
    return make_image(SIDE, SIDE, seed=4)


def pixels(tiler, image, **kwargs) -> torch.Tensor:
    return tiler(image, return_tensors="pt", **kwargs)["pixel_values"]


def assert_shows(tiler, image, expected: np.ndarray, levels: int = 0, **kwargs):
    """`image` becomes the pixels of `expected` [378, 378, 3], or differs from them by so many levels of 255."""
    expected = torch.from_numpy(np.array(expected)).permute(2, 0, 1).float() / 255 * 2 - 1
    actual = pixels(tiler, image, **kwargs)
    assert actual.shape == (2, 3, SIDE, SIDE)
    for shown in actual:
        if levels:
            torch.testing.assert_close(shown, expected, rtol=0, atol=levels * 2 / 255 + 1e-6)
        else:
            assert torch.equal(shown, expected)


# Geometry


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size['height']}x{size['width']}")
def test_geometry(processor, make_image, size):
    height, width = size["height"], size["width"]
    tiler = processor.image_processor
    if "error" in size:
        for attempt in (
            lambda: tiler.get_tiling(height, width),
            lambda: processor._get_num_multimodal_tokens([(height, width)]),
            lambda: tiler(Image.fromarray(make_image(height, width))),
        ):
            with pytest.raises(ValueError, match=f"{width} x {height} pixels.* 200 times"):
                attempt()
        return
    assert [list(pair) for pair in tiler.get_tiling(height, width)] == [size["resized"], size["tiling"]]
    assert tiler.get_number_of_image_patches(height, width) == size["n_tiles"]
    counted = processor._get_num_multimodal_tokens([(height, width)])
    assert (counted.num_image_tokens, counted.num_image_patches) == ([size["n_tokens"]], [size["n_tiles"]])
    if height * width > 1500 * 1000:
        return
    made = processor(images=make_image(height, width), text="<|image|>", return_tensors="pt")
    rows, columns = size["tiling"]
    places = [[-1, -1], *([row, column] for row in range(rows) for column in range(columns))]
    assert made["tile_positions"].tolist() == [[*place, rows, columns] for place in places]
    assert made["tile_positions"].dtype == torch.int64
    assert made["pixel_values"].shape == (size["n_tiles"], 3, SIDE, SIDE)
    ids = made["input_ids"][0, 1:].numpy().astype("<i4")
    assert (len(ids), (ids == processor.patch_token_id).sum()) == (size["n_tokens"], size["n_patch_tokens"])
    assert hashlib.sha256(ids.tobytes()).hexdigest()[:16] == size["tokens_sha256"]


def reference_tiling(height: int, width: int, max_tiles: int) -> tuple[int, int]:
    """The paper's rule for a fitted image: the grid that changes the scale least, and enlarges if any does."""
    scale = {
        (rows, columns): min(
            float("inf") if side == 112 else 266 * count / (side - 112)
            for side, count in ((height, rows), (width, columns))
        )
        for rows in range(1, max_tiles + 1)
        for columns in range(1, max_tiles + 1)
        if rows * columns <= max_tiles
    }
    in_order = sorted(scale, key=lambda grid: (grid[0] * grid[1], grid[0]))
    enlarging = [grid for grid in in_order if scale[grid] >= 1]
    return min(enlarging, key=scale.get) if enlarging else max(in_order, key=scale.get)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(1, 30))
def test_tiling_is_the_papers(height, width, max_tiles):
    tiler = JinaVLMImageProcessor()
    assert tiler.get_tiling(height, width, do_resize=False, max_tiles=max_tiles) == (
        (height, width),
        reference_tiling(height, width, max_tiles),
    )
    if max(height, width) > 200 * min(height, width):
        return
    (fitted_height, fitted_width), tiling = tiler.get_tiling(height, width, max_tiles=max_tiles)
    assert fitted_height % 14 == fitted_width % 14 == 0
    assert 3136 <= fitted_height * fitted_width <= max(1003520, 14 * 14 * 200)
    assert tiling == reference_tiling(fitted_height, fitted_width, max_tiles)


@pytest.mark.parametrize("max_tiles", [*range(1, 13), 16, 24, 1000])
def test_max_tiles(processor, make_image, max_tiles):
    tiler = processor.image_processor
    rows, columns = reference_tiling(714, 1274, max_tiles)
    assert rows * columns <= max_tiles
    made = tiler(make_image(720, 1280), max_tiles=max_tiles, return_tensors="np")
    assert made["tile_positions"][0].tolist() == [-1, -1, rows, columns]
    assert len(made["pixel_values"]) == len(made["tile_positions"]) == 1 + rows * columns
    assert tiler.get_number_of_image_patches(720, 1280, {"max_tiles": max_tiles}) == 1 + rows * columns
    counted = processor._get_num_multimodal_tokens([(720, 1280)], max_tiles=max_tiles)
    assert counted.num_image_patches == [1 + rows * columns]
    assert tiler.max_tiles == 12


@pytest.mark.parametrize(
    ("setting", "fitted"),
    [
        ({"max_pixels": 400 * 400}, (392, 392)),
        ({"min_pixels": 1_000_000}, (1008, 1008)),
        ({"max_tiles": 4}, (770, 770)),
        ({"do_resize": False}, (775, 770)),
        ({"do_resize": False, "max_tiles": 16}, (775, 770)),
    ],
)
def test_settings_per_call_and_saved(tmp_path, make_image, setting, fitted):
    image = make_image(775, 770)
    tiling = reference_tiling(*fitted, setting.get("max_tiles", 12))
    changed = JinaVLMImageProcessor(**setting)
    changed.save_pretrained(tmp_path)
    loaded = JinaVLMImageProcessor.from_pretrained(tmp_path)
    expected = pixels(changed, image)
    assert len(expected) == 1 + tiling[0] * tiling[1]
    assert loaded.to_dict() == changed.to_dict()
    plain = JinaVLMImageProcessor()
    assert plain.get_tiling(775, 770, **setting) == loaded.get_tiling(775, 770) == (fitted, tiling)
    assert torch.equal(pixels(plain, image, **setting), expected)
    assert torch.equal(pixels(loaded, image), expected)
    assert not torch.equal(pixels(plain, image), expected)
    assert JinaVLMImageProcessor.from_pretrained(tmp_path, max_tiles=2).max_tiles == 2


# Pixels


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_pixels_do_not_depend_on_threads(tiler, make_image, threads):
    image = make_image(500, 700, seed=9)
    made = []
    for count in (1, 2, 4):
        threads(count)
        made.append(pixels(tiler, image))
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])


def plainly(rgb: np.ndarray, fitted: tuple[int, int], rows: int, columns: int) -> torch.Tensor:
    """The same tiles by whole images in float32."""

    def resize(channels, *size):
        return torch.cat([resize_exactly(channel, *size)[None, None] for channel in channels])[:, 0]

    channels = torch.from_numpy(rgb).permute(2, 0, 1).float()
    channels = resize(channels, *fitted).round() / 255
    canvas = resize(channels, 266 * rows + 112, 266 * columns + 112)
    tiles = canvas.unfold(1, SIDE, 266).unfold(2, SIDE, 266).permute(1, 2, 0, 3, 4).flatten(0, 1)
    return torch.cat([resize(channels, SIDE, SIDE)[None], tiles]).clamp(0, 1) * 2 - 1


@pytest.mark.parametrize("size", [(2160, 3840), (3508, 2480), (7000, 61), (90, 9000), (700, 2000), (31, 47)], ids=str)
def test_untouched_pixels_are_left_out_and_no_others(tiler, size):
    # Of noise, where every row that is taken for another shows.
    rgb = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    fitted, grid = tiler.get_tiling(*size)
    expected = plainly(rgb, fitted, *grid)
    for image in (Image.fromarray(rgb), rgb, torch.from_numpy(rgb)):
        assert torch.equal(pixels(tiler, image), expected)


def plainly_without_fit(rgb: np.ndarray, rows: int, columns: int) -> torch.Tensor:
    """Thumbnail and tiles by whole images, each resized from the image itself and rounded to 8 bits."""
    channels = torch.from_numpy(rgb).permute(2, 0, 1).float()

    def resize(*size):
        resized = [resize_exactly(channel, *size)[None, None] for channel in channels]
        return torch.cat(resized)[:, 0].round() / 255 * 2 - 1

    tiles = resize(266 * rows + 112, 266 * columns + 112).unfold(1, SIDE, 266).unfold(2, SIDE, 266)
    return torch.cat([resize(SIDE, SIDE)[None], tiles.permute(1, 2, 0, 3, 4).flatten(0, 1)])


@pytest.mark.parametrize(
    "size",
    [(2160, 3840), (3508, 2480), (7000, 61), (90, 9000), (2, 900), (700, 2000), (31, 47), (378, 378), (910, 644)],
    ids=str,
)
@pytest.mark.parametrize("max_tiles", [12, 40])
def test_without_fit(tiler, size, max_tiles):
    rgb = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    fitted, grid = tiler.get_tiling(*size, do_resize=False, max_tiles=max_tiles)
    assert fitted == size
    expected = plainly_without_fit(rgb, *grid)
    for image in (Image.fromarray(rgb), rgb, torch.from_numpy(rgb)):
        assert torch.equal(pixels(tiler, image, do_resize=False, max_tiles=max_tiles), expected)
    small = rgb[:60, :90]
    both = pixels(tiler, [rgb, small], do_resize=False, max_tiles=max_tiles)
    assert torch.equal(both, torch.cat([expected, pixels(tiler, small, do_resize=False, max_tiles=max_tiles)]))


def test_without_fit_pixels_do_not_depend_on_threads(tiler, make_image, threads):
    made = []
    for count in (1, 2, 4):
        threads(count)
        made.append(pixels(tiler, make_image(500, 700, seed=9), do_resize=False))
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])


def test_images_of_more_tokens_than_positions_are_refused(tiler, processor):
    """Before memory is taken for their tiles; a small one takes no more for a large `max_tiles`."""
    large = Image.new("L", (9000, 9000))
    for attempt in (
        lambda: tiler(large, do_resize=False, max_tiles=10**9),
        lambda: tiler.get_tiling(9000, 9000, do_resize=False, max_tiles=10**9),
        lambda: processor(images=large, text="<|image|>", do_resize=False, max_tiles=10**9),
    ):
        with pytest.raises(
            ValueError, match=r"9000 x 9000 pixels and becomes 34 x 34 tiles, 118,\d+ tokens; the model takes 40,960"
        ):
            attempt()
    assert len(tiler(large, max_tiles=10**9)["pixel_values"]) == 1 + 4 * 4
    assert len(tiler(Image.new("L", (640, 480)), do_resize=False, max_tiles=10**9)["pixel_values"]) == 5


def test_tiles_overlap_and_cover(tiler, make_image):
    """Neighbors share 112 pixels, and the whole is the image stretched."""
    _, first, second, third, fourth = pixels(tiler, make_image(644, 644, seed=2))
    assert torch.equal(first[:, :, 266:], second[:, :, :112])
    assert torch.equal(first[:, 266:], third[:, :112])
    canvas = torch.cat(
        [torch.cat([first, second[:, :, 112:]], 2), torch.cat([third, fourth[:, :, 112:]], 2)[:, 112:]], 1
    )
    expected = (
        torch.from_numpy(make_image(644, 644, seed=2)).permute(2, 0, 1) / 255 * 2 - 1
    )  # 266 * 2 + 112 = 644: as it is
    torch.testing.assert_close(canvas, expected, rtol=0, atol=1e-6)


def test_return_tensors_and_device(tiler, rgb):
    as_torch, as_numpy, plain = (tiler(rgb, return_tensors=kind) for kind in ("pt", "np", None))
    for name in ("pixel_values", "tile_positions"):
        assert isinstance(as_torch[name], torch.Tensor) and isinstance(as_numpy[name], np.ndarray)
        assert np.array_equal(as_torch[name], as_numpy[name]) and np.array_equal(as_torch[name], plain[name])
    assert as_torch["pixel_values"].dtype == torch.float32
    assert torch.equal(pixels(tiler, rgb, device="cpu"), as_torch["pixel_values"])


@pytest.mark.parametrize(
    "group",
    [list, tuple, np.stack, lambda three: torch.from_numpy(np.stack(three)), lambda three: [[three[0]], three[1:]]],
    ids=["list", "tuple", "array", "tensor", "nested"],
)
def test_several_images(tiler, make_image, group):
    three = [make_image(60, 90, seed=seed) for seed in range(3)]
    assert torch.equal(pixels(tiler, group(three)), torch.cat([pixels(tiler, one) for one in three]))


# Every kind of image


def with_alpha(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return np.rint(rgb * (alpha[..., None] / 255) + 255 * (1 - alpha[..., None] / 255)).astype(np.uint8)


def gray(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=2)


def pil_kinds(rgb: np.ndarray) -> dict[str, tuple[Image.Image, np.ndarray, int]]:
    """Name: (image, its colors on white, levels by which Pillow may round differently)."""
    one, alpha = rgb[..., 0], rgb[..., 1]
    palette = (np.arange(768).reshape(256, 3) * 5 % 256).astype(np.uint8)

    def paletted(**info) -> Image.Image:
        image = Image.fromarray(one, "L").copy()
        image.putpalette(palette.tobytes())
        image.info.update(info)
        return image

    seen = palette[one]
    sixteen = one.astype(np.uint16) * 256 + alpha
    cmyk = np.dstack([rgb, one // 2])
    key = tuple(int(value) for value in rgb[5, 5])
    keyed = Image.fromarray(rgb)
    keyed.info["transparency"] = key
    return {
        "RGB": (Image.fromarray(rgb), rgb, 0),
        "L": (Image.fromarray(one), gray(one), 0),
        "1": (Image.fromarray(one > 99), gray((one > 99) * np.uint8(255)), 0),
        "LA": (Image.fromarray(np.dstack([one, alpha]), "LA"), with_alpha(gray(one), alpha), 1),
        "RGBA": (Image.fromarray(np.dstack([rgb, one]), "RGBA"), with_alpha(rgb, one), 1),
        "P": (paletted(), seen, 0),
        "P, one color transparent": (paletted(transparency=7), np.where((one == 7)[..., None], 255, seen), 0),
        "P, alpha for each color": (paletted(transparency=bytes(range(256))), with_alpha(seen, one), 1),
        "RGB, one color transparent": (keyed, np.where((rgb == key).all(-1, keepdims=True), 255, rgb), 0),
        "CMYK": (
            Image.fromarray(cmyk, "CMYK"),
            np.rint((255.0 - cmyk[..., :3]) * (255.0 - cmyk[..., 3:]) / 255).astype(np.uint8),
            1,
        ),
        "I;16": (Image.fromarray(sixteen), gray(np.rint(sixteen / 257).astype(np.uint8)), 0),
        "I": (Image.fromarray(sixteen.astype(np.int32)), gray(np.rint(sixteen / 257).astype(np.uint8)), 0),
        "F": (Image.fromarray(one.astype(np.float32) / 255), gray(one), 0),
    }


@pytest.mark.parametrize("kind", list(pil_kinds(np.zeros((9, 9, 3), np.uint8))))
def test_pil_modes(tiler, rgb, kind):
    image, expected, levels = pil_kinds(rgb)[kind]
    assert image.mode == kind.split(",")[0]
    before = image.copy()
    assert_shows(tiler, image, expected.astype(np.uint8), levels)
    assert image.mode == before.mode and image.tobytes() == before.tobytes()


ARRAYS = {
    "height, width, 3": lambda rgb: (rgb, rgb),
    "3, height, width": lambda rgb: (rgb.transpose(2, 0, 1), rgb),
    "height, width": lambda rgb: (rgb[..., 0], gray(rgb[..., 0])),
    "height, width, 1": lambda rgb: (rgb[..., :1], gray(rgb[..., 0])),
    "1, height, width": lambda rgb: (rgb[None, ..., 0], gray(rgb[..., 0])),
    "float32": lambda rgb: (rgb / np.float32(255), rgb),
    "float64": lambda rgb: (rgb / 255, rgb),
    "float16": lambda rgb: ((rgb / 255).astype(np.float16), rgb),
    "int64": lambda rgb: (rgb.astype(np.int64), rgb),
    "bool": lambda rgb: (rgb > 99, (rgb > 99) * np.uint8(255)),
    "uint16": lambda rgb: (rgb.astype(np.uint16) * 257, rgb),
    "uint16, rounded": lambda rgb: (
        rgb.astype(np.uint16) * 256 + 200,
        np.rint((rgb * 256.0 + 200) / 257).astype(np.uint8),
    ),
    "not contiguous": lambda rgb: (rgb[::-1, ::-1], rgb[::-1, ::-1]),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("as_tensor", [False, True], ids=["numpy", "torch"])
@pytest.mark.parametrize("kind", list(ARRAYS))
def test_arrays(tiler, rgb, kind, as_tensor):
    array, expected = ARRAYS[kind](rgb)
    assert_shows(tiler, torch.from_numpy(array.copy()) if as_tensor else array, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_tensors_of_types_that_numpy_lacks(tiler, rgb, dtype):
    tensor = torch.from_numpy(rgb // 64 * 64 / 256).to(dtype)  # quarters, which both hold exactly
    assert_shows(tiler, tensor, np.rint(rgb // 64 * 64 / 256 * 255).astype(np.uint8))


@pytest.mark.parametrize("channels", ["first", "last"])
def test_array_with_alpha(tiler, rgb, channels):
    array = np.dstack([rgb, rgb[..., 0]])
    assert_shows(
        tiler, array.transpose(2, 0, 1) if channels == "first" else array, with_alpha(rgb, rgb[..., 0]), levels=1
    )


def test_ambiguous_array(tiler, make_image):
    """3 rows or 3 channels? The caller may say."""
    array = make_image(3, 3, seed=1)
    last = pixels(tiler, array, input_data_format="channels_last")
    assert torch.equal(last, pixels(tiler, array.transpose(2, 0, 1), input_data_format="channels_first"))
    assert not torch.equal(last, pixels(tiler, array, input_data_format="channels_first"))


def png(rgb: np.ndarray, **kwargs) -> bytes:
    file = io.BytesIO()
    Image.fromarray(rgb).save(file, "PNG", compress_level=1, **kwargs)
    return file.getvalue()


@pytest.fixture
def ways_in(web):
    """The function `ways_in(data)`: the ways in which a file's bytes can be given, by name."""
    folder, url = web

    def give(data: bytes, name: str = "image.png") -> dict:
        path = folder / name
        path.write_bytes(data)
        encoded = base64.b64encode(data).decode()
        return {
            "PIL": Image.open(io.BytesIO(data)),
            "path": path,
            "str": str(path),
            "URL": f"{url}/{name}",
            "data URI": f"data:image/png;base64,{encoded}",
            "data URI as browsers take it": f"DATA:image/png;name=a.png;BASE64,{quote(encoded, safe='')}",
            "base64": encoded,
            "base64 in lines": "\n".join(encoded[i : i + 76] for i in range(0, len(encoded), 76)),
        }

    return give


@pytest.mark.parametrize("orientation", list(TURNS))
def test_exif_rotation_and_every_way_in(tiler, rgb, ways_in, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for image in ways_in(png(rgb, exif=exif)).values():
        assert_shows(tiler, image, TURNS[orientation](rgb))


def test_alpha_by_every_way_in(tiler, rgb, ways_in):
    for image in ways_in(png(np.dstack([rgb, rgb[..., 0]]))).values():
        assert_shows(tiler, image, with_alpha(rgb, rgb[..., 0]), levels=1)


def test_path_without_ending_and_relative(tiler, rgb, tmp_path, monkeypatch):
    (tmp_path / "image").write_bytes(png(rgb))
    monkeypatch.chdir(tmp_path)
    assert_shows(tiler, "image", rgb)


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame(tiler, make_image, tmp_path, file_format):
    frames = [Image.fromarray(make_image(SIDE, SIDE, "checker", seed=seed)) for seed in (0, 1)]
    path = tmp_path / f"moving.{file_format.lower()}"
    lossless = {"lossless": True} if file_format == "WEBP" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], **lossless)
    with Image.open(path) as image:
        assert image.n_frames == 2
    assert_shows(tiler, path, np.asarray(frames[0]))


def test_jpeg(tiler, rgb, tmp_path):
    path = tmp_path / "image.jpg"
    Image.fromarray(rgb[..., 0]).save(path, quality=90)
    with Image.open(path) as image:
        assert_shows(tiler, path, gray(np.asarray(image)))
