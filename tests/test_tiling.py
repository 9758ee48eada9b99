"""Geometry, by itself: the grid of tiles, and the tokens that are kept of each."""

import json

import numpy as np
import pytest
from conftest import GOLDEN
from jina_vlm.tiling_jina_vlm import (
    count_tokens,
    get_canvas_size,
    get_kept_tokens,
    get_stride,
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
