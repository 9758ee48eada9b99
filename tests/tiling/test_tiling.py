"""Geometry, by itself: the grid of tiles, and the tokens that are kept of each."""

import json
import random
import time

import numpy as np
import pytest
from conftest import GOLDEN
from jina_vlm.tiling_jina_vlm import (
    count_tokens,
    get_canvas_size,
    get_kept_tokens,
    get_most_rows,
    get_size_of_most_tokens,
    get_stride,
    get_tiling,
    get_token_grid,
    get_tokens_per_side,
    select_tiling,
    smart_resize,
)


SIZES = json.loads((GOLDEN / "geometry.json").read_text())
GEOMETRIES = {  # tile size, patch size, overlap margin, pooling size: of the release, and of small models
    "released": (378, 14, 4, 2),
    "no overlap": (64, 8, 0, 2),
    "no pooling": (84, 14, 1, 1),
    "windows that fit": (112, 14, 2, 2),
}


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size['height']}x{size['width']}")
def test_released_sizes(size):
    height, width = size["height"], size["width"]
    if "error" in size:
        with pytest.raises(ValueError, match=f"{width} x {height} pixels.* 200 times"):
            smart_resize(height, width, 14, 3136, 1003520)
        return
    fitted = smart_resize(height, width, 14, 3136, 1003520)
    grid = select_tiling(*fitted, 378, 266, 12)
    assert [list(fitted), list(grid)] == [size["resized"], size["tiling"]]
    assert count_tokens(*grid, 14, 2) == size["n_tokens"]


@pytest.mark.parametrize("geometry", list(GEOMETRIES.values()), ids=list(GEOMETRIES))
@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (4, 1), (2, 2), (3, 4), (5, 7)], ids=str)
def test_kept_tokens_make_up_the_grid(geometry, grid):
    """Those of a row of tiles are as high, those of a column as wide; together they are the grid's."""
    tile_size, patch_size, overlap_margin, pooling_size = geometry
    side, overlap = get_tokens_per_side(tile_size, patch_size, pooling_size), overlap_margin // pooling_size
    rows, columns = grid
    kept = [
        [get_kept_tokens(row, column, rows, columns, side, overlap) for column in range(columns)]
        for row in range(rows)
    ]
    heights = {tuple(bottom - top for top, _, bottom, _ in column) for column in zip(*kept, strict=True)}
    widths = {tuple(right - left for _, left, _, right in row) for row in kept}
    assert len(heights) == len(widths) == 1
    token_grid = get_token_grid(rows, columns, side, overlap)
    assert (sum(heights.pop()), sum(widths.pop())) == token_grid
    assert count_tokens(rows, columns, side, overlap) == 2 + side * (side + 1) + 2 + token_grid[0] * (
        token_grid[1] + 1
    )
    stride = get_stride(tile_size, patch_size, overlap_margin)
    assert get_canvas_size(rows, columns, tile_size, stride) == tuple(
        tile_size + stride * (count - 1) for count in grid
    )


def test_kept_tokens_of_the_release():
    assert (get_stride(378, 14, 4), get_tokens_per_side(378, 14, 2)) == (266, 14)
    assert get_kept_tokens(0, 0, 1, 1, 14, 2) == (0, 0, 14, 14)
    assert get_kept_tokens(0, 1, 3, 3, 14, 2) == (0, 2, 12, 12)
    assert get_kept_tokens(2, 2, 3, 3, 14, 2) == (2, 2, 14, 14)
    assert (count_tokens(1, 1, 14, 2), count_tokens(3, 4, 14, 2)) == (424, 1744)


@pytest.mark.parametrize(
    "case", json.loads((GOLDEN / "cases" / "index.json").read_text()), ids=lambda case: case["name"]
)
def test_kept_tokens_are_those_that_the_release_uses(processor, case):
    if not case["images"]:
        return
    used = (np.load(GOLDEN / "cases" / f"{case['name']}.npz")["image_input_idx"] >= 0).reshape(-1, 14, 14)
    kept = np.zeros_like(used)
    start = 0
    for image in case["images"]:
        rows, columns = processor.image_processor.get_tiling(image["height"], image["width"])[1]
        kept[start] = True
        for index in range(rows * columns):
            top, left, bottom, right = get_kept_tokens(*divmod(index, columns), rows, columns, 14, 2)
            kept[start + 1 + index, top:bottom, left:right] = True
        start += 1 + rows * columns
    assert start == len(used) and np.array_equal(used, kept)


def test_more_tiles_than_an_image_can_use():
    """The number of grids that are tried is bounded by the image's size."""
    start = time.process_time()
    assert select_tiling(480, 640, 378, 266, 10**9) == (2, 2)
    assert select_tiling(13_377, 13_377, 378, 266, 10**9) == (50, 50)
    assert select_tiling(1, 10**6, 378, 266, 10**9) == (1, 1)
    assert time.process_time() - start < 1


SETTINGS = {"do_resize": True, "max_tiles": 12, "min_pixels": 3136, "max_pixels": 1003520}
PARTS = ("tile_size", "patch_size", "overlap_margin", "pooling_size")
PLANS = [
    *({"max_tiles": max_tiles} for max_tiles in (1, 3, 12, 16, 24, 40)),
    *({"max_tiles": max_tiles, "do_resize": False} for max_tiles in (1, 12, 24, 60)),
    {"min_pixels": 1_000_000},
    {"max_tiles": 4, "max_pixels": 20_000},
    {"max_pixels": 4_000_000, "max_tiles": 24},
    {"max_pixels": 10**9, "max_tiles": 60, "do_resize": False},
    {"tile_size": 64, "patch_size": 8, "overlap_margin": 0, "max_pixels": 60_000, "max_tiles": 60},
    {"tile_size": 64, "patch_size": 8, "overlap_margin": 3, "pooling_size": 1, "max_pixels": 60_000, "max_tiles": 60},
]


@pytest.mark.parametrize("changes", PLANS, ids=str)
def test_no_size_becomes_more_tokens_than_the_planned_one(changes):
    settings = {**SETTINGS, **dict(zip(PARTS, GEOMETRIES["released"], strict=True)), **changes}
    patch, sizes = settings["patch_size"], random.Random(0)

    def count(size: tuple[int, int]) -> int:
        rows, columns = get_tiling(*size, **settings)[1]
        side = get_tokens_per_side(settings["tile_size"], patch, settings["pooling_size"])
        return count_tokens(rows, columns, side, settings["overlap_margin"] // settings["pooling_size"])

    planned = count(get_size_of_most_tokens(**settings))
    if settings["do_resize"]:  # what is fitted stays as it is when it is fitted again: these are all that there are
        most = settings["max_pixels"] // patch**2
        fitted = [
            (rows * patch, columns * patch) for rows in range(1, most + 1) for columns in range(1, most // rows + 1)
        ]
        tried = sizes.sample(
            [size for size in fitted if max(size) <= 200 * min(size)], 3000 if most > 3000 else most // 2
        )
    else:
        tried = [(int(2 ** sizes.uniform(0, 15)), int(2 ** sizes.uniform(0, 15))) for _ in range(3000)]
    assert planned >= max(map(count, tried))


def test_the_planned_size_holds_for_calls_that_change_the_settings():
    """Engines read it once, and may override the settings for all calls."""
    released = dict(zip(PARTS, GEOMETRIES["released"], strict=True))
    size = get_size_of_most_tokens(**SETTINGS, **released)
    for max_tiles in range(1, 35):
        for do_resize in (True, False):
            grid = get_tiling(*size, **{**SETTINGS, **released, "max_tiles": max_tiles, "do_resize": do_resize})[1]
            assert grid == (max_tiles, 1)


@pytest.mark.parametrize("do_resize", [True, False])
@pytest.mark.parametrize(("max_tiles", "max_pixels"), [(34, 10**9), (300, 10**9), (1000, 10**8), (1000, 1003520)])
def test_a_plan_for_any_budget(max_tiles, max_pixels, do_resize):
    """However large the settings are, the planned image is one that the model takes."""
    released = dict(zip(PARTS, GEOMETRIES["released"], strict=True))
    settings = {**SETTINGS, **released, "max_tiles": max_tiles, "max_pixels": max_pixels, "do_resize": do_resize}
    rows, columns = get_tiling(*get_size_of_most_tokens(**settings), **settings)[1]
    assert rows * columns <= max_tiles
    if max_pixels > 1003520:  # it has room for as many tiles as there may be, or for as many tokens
        assert count_tokens(rows, columns, 14, 2) == {34: 5374, 300: 40_924, 1000: 40_954}[max_tiles]


@pytest.mark.parametrize(("max_tiles", "rows"), [(271, 271), (272, None)])
def test_tokens_of_one_image_are_bounded(max_tiles, rows):
    settings = {
        **SETTINGS,
        **dict(zip(PARTS, GEOMETRIES["released"], strict=True)),
        "max_tiles": max_tiles,
        "do_resize": False,
    }
    if rows:
        assert get_tiling(100_000, 112, **settings)[1] == (rows, 1)
        assert get_most_rows(1, 14, 2) == rows
        return
    message = (
        "The image is 112 x 100000 pixels and becomes 272 x 1 tiles, 41,074 tokens; the model takes 40,960. "
        r"Lower `max_tiles` \(272\)"
    )
    with pytest.raises(ValueError, match=message):
        get_tiling(100_000, 112, **settings)
    assert get_tiling(480, 640, **settings)[1] == (2, 2)
