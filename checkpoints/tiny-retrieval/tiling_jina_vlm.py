# Copyright 2026 The jina-vlm-transformers authors. Licensed under the Apache License, Version 2.0.
"""Geometry of jina-vlm (arXiv 2512.04032, section 3.1) as pure functions: where an image's tiles and tokens lie.

An image is stretched to a canvas of `rows` x `columns` tiles: squares of `tile_size` pixels, one every `stride`
pixels, so that neighbors overlap. Each has `tokens_per_side` x `tokens_per_side` tokens. Along an edge with a
neighbor, `overlap` rows or columns of these are dropped, as the neighbor shows them too. One more tile, the thumbnail,
shows the whole image.
"""

import math

import torch


MAX_ASPECT_RATIO = 200
MAX_IMAGE_TOKENS = 40_960  # of one image: as many as the released model has positions


def check_geometry(tile_size: int, patch_size: int, overlap_margin: int, pooling_size: int) -> None:
    """Raise ValueError if a tile and a patch (pixels), a margin and a pooled window (patches) do not fit together."""
    for name, value in (("patch_size", patch_size), ("pooling_size", pooling_size)):
        if value < 1:
            raise ValueError(f"`{name}` is {value}; expected 1 or more.")
    if tile_size % patch_size:
        raise ValueError(f"`tile_size` ({tile_size}) must be a multiple of `patch_size` ({patch_size}).")
    if not 0 <= 2 * overlap_margin < tile_size // patch_size:
        raise ValueError(
            f"`overlap_margin` is {overlap_margin}; expected 0 or more, and less than half of a tile's "
            f"{tile_size // patch_size} patches."
        )
    if overlap_margin % pooling_size:
        raise ValueError(
            f"`overlap_margin` ({overlap_margin} patches) must be a multiple of `pooling_size` ({pooling_size})."
        )


def check_size(height: int, width: int) -> None:
    """Raise ValueError if an image has no pixels."""
    if height < 1 or width < 1:
        raise ValueError(f"The image is {width} x {height} pixels; both sides must be at least 1.")


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Fit an image to a budget of pixels.

    Args:
        height, width: Size of the image, in pixels.
        factor: Both sides of the result are multiples of this: the side of a patch.
        min_pixels, max_pixels: The budget. Very elongated images may miss it.

    Returns:
        (height, width) in pixels, of about the same aspect ratio.

    Raises:
        ValueError: a side is 0, or one is more than 200 times the other.
    """
    check_size(height, width)
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(
            f"The image is {width} x {height} pixels; its longer side may be at most {MAX_ASPECT_RATIO} times the "
            "shorter. Crop it."
        )
    fitted_height, fitted_width = round(height / factor) * factor, round(width / factor) * factor
    if fitted_height * fitted_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        fitted_height = max(factor, math.floor(height / shrink / factor) * factor)
        fitted_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif fitted_height * fitted_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        fitted_height = math.ceil(height * grow / factor) * factor
        fitted_width = math.ceil(width * grow / factor) * factor
    return fitted_height, fitted_width


def select_tiling(height: int, width: int, tile_size: int, stride: int, max_tiles: int) -> tuple[int, int]:
    """Choose the grid, (rows, columns), whose canvas changes the scale of an image least. Sizes in pixels.

    That is the smallest enlargement or, if each grid of at most `max_tiles` shrinks the image, the largest scale. Of
    grids with one scale, the one with fewer tiles is chosen, then the one with fewer rows.
    """
    check_size(height, width)
    margin = tile_size - stride

    def scale(rows: int, columns: int) -> float:
        return min(
            math.inf if side == margin else stride * count / (side - margin)
            for side, count in ((height, rows), (width, columns))
        )

    # More rows or columns would only enlarge more, however many `max_tiles` allows.
    most_rows, most_columns = (max(1, math.ceil((side - margin) / stride) + 1) for side in (height, width))
    grids = [
        (rows, columns)
        for rows in range(1, min(max_tiles, most_rows) + 1)
        for columns in range(1, min(max_tiles // rows, most_columns) + 1)
    ]
    grids.sort(key=lambda grid: (grid[0] * grid[1], grid[0]))
    scales = [scale(*grid) for grid in grids]
    if all(value < 1 for value in scales):
        return grids[scales.index(max(scales))]
    scales = [value if value >= 1 else 1e10 for value in scales]
    return grids[scales.index(min(scales))]


def get_stride(tile_size: int, patch_size: int, overlap_margin: int) -> int:
    """Compute the pixels from one tile to the next, whose `overlap_margin` patches each lie in the other."""
    return tile_size - 2 * overlap_margin * patch_size


def get_canvas_size(rows: int, columns: int, tile_size: int, stride: int) -> tuple[int, int]:
    """Compute the (height, width), in pixels, that `rows` x `columns` tiles cover."""
    return tile_size + stride * (rows - 1), tile_size + stride * (columns - 1)


def get_tokens_per_side(tile_size: int, patch_size: int, pooling_size: int) -> int:
    """Count the tokens along a side of a tile: one for each `pooling_size` patches, and for a rest."""
    return math.ceil(tile_size // patch_size / pooling_size)


def get_kept_tokens(
    row: int, column: int, rows: int, columns: int, tokens_per_side: int, overlap: int
) -> tuple[int, int, int, int]:
    """Find a tile's tokens in use: (top, left, bottom, right) in tokens, bottom and right excluded."""
    return (
        overlap * (row > 0),
        overlap * (column > 0),
        tokens_per_side - overlap * (row < rows - 1),
        tokens_per_side - overlap * (column < columns - 1),
    )


def get_token_grid(rows: int, columns: int, tokens_per_side: int, overlap: int) -> tuple[int, int]:
    """Compute the (rows, columns) of tokens of `rows` x `columns` tiles, without their overlaps."""
    step = tokens_per_side - 2 * overlap
    return step * rows + 2 * overlap, step * columns + 2 * overlap


def count_tokens(rows: int, columns: int, tokens_per_side: int, overlap: int) -> int:
    """Count an image's tokens in a prompt, with an `<im_start>` and `<im_end>` for each of thumbnail and tiles, and an
    `<im_col>` for each row."""
    grids = [get_token_grid(*size, tokens_per_side, overlap) for size in ((1, 1), (rows, columns))]
    return sum(2 + height * (width + 1) for height, width in grids)


def get_tile_positions(rows: int, columns: int) -> list[list[int]]:
    """List (row, column, rows, columns) of an image's tiles, after its thumbnail's (-1, -1, rows, columns)."""
    tiles = [[row, column, rows, columns] for row in range(rows) for column in range(columns)]
    return [[-1, -1, rows, columns], *tiles]


def get_image_lengths(tile_positions: torch.Tensor, tokens_per_side: int, overlap: int) -> list[int]:
    """Count the tokens of each image that carry a feature.

    Args:
        tile_positions: [tiles, 4] (row, column, rows, columns), or (-1, -1, rows, columns) for an image's thumbnail.

    Raises:
        ValueError: the tiles are not those of whole images, in order.
    """
    positions = tile_positions.tolist()
    lengths, start = [], 0
    while start < len(positions):
        _, _, rows, columns = positions[start]
        expected = get_tile_positions(rows, columns)
        given = positions[start : start + len(expected)]
        if rows < 1 or columns < 1 or given != expected:
            raise ValueError(
                f"`tile_positions` from tile {start} on is {given}, expected {expected}: an image's thumbnail, then "
                "its rows x columns tiles. Pass both image tensors as the processor made them, or slice them by whole "
                "images."
            )
        height, width = get_token_grid(rows, columns, tokens_per_side, overlap)
        lengths.append(tokens_per_side**2 + height * width)
        start += len(expected)
    return lengths


def get_image_token_indices(tile_positions: torch.Tensor, tokens_per_side: int, overlap: int) -> torch.Tensor:
    """Find the order in which a prompt has the tokens of its tiles. Traceable: no value is read.

    Args:
        tile_positions: [tiles, 4] (row, column, rows, columns), or (-1, -1, rows, columns) for an image's thumbnail.

    Returns:
        [tiles * tokens_per_side ** 2] indices of all tokens: for each image its thumbnail's, then those kept of its
        tiles, row by row across the grid. After the last image come the dropped ones.
    """
    side = tokens_per_side
    row, column, rows, columns = tile_positions[:, :, None, None].unbind(1)
    y = torch.arange(side, device=tile_positions.device)[:, None]
    x = y.T
    is_kept = (
        (y >= overlap * (row > 0))
        & (y < side - overlap * (row < rows - 1))
        & (x >= overlap * (column > 0))
        & (x < side - overlap * (column < columns - 1))
    )
    step = side - 2 * overlap
    in_grid = side**2 + (row * step + y) * (columns * step + 2 * overlap) + column * step + x
    is_thumbnail = row < 0
    place = torch.where(is_thumbnail, y * side + x, torch.where(is_kept, in_grid, 2**60))
    return (is_thumbnail.cumsum(0) * 2**32 + place).flatten().argsort()


def find_distinct_tiles(pixel_values: torch.Tensor) -> tuple[list[int], list[int]]:
    """Find tiles with the same bits: an image of one tile is its own thumbnail, and pages have blank ones.

    Args:
        pixel_values: [tiles, 3, height, width], of a floating-point type.

    Returns:
        Indices of the first tile of each kind, ascending; for each tile, the place of its kind among these.
    """
    flat = pixel_values.flatten(1)
    # Eight bytes at a time, where there are as many: sums of narrower integers take a hundred times as long.
    bits = flat.view(torch.int16 if flat.shape[1] * flat.element_size() % 8 else torch.int64)
    distinct: list[int] = []
    places: list[int] = []
    first_with: dict[int, int] = {}
    for index, total in enumerate(bits.sum(1).tolist()):  # integers sum to the same in any order
        first = first_with.setdefault(total, index)
        if first != index and torch.equal(bits[first], bits[index]):
            places.append(places[first])
        else:
            places.append(len(distinct))
            distinct.append(index)
    return distinct, places


def get_tiling(
    height: int,
    width: int,
    do_resize: bool,
    max_tiles: int,
    min_pixels: int,
    max_pixels: int,
    tile_size: int,
    patch_size: int,
    overlap_margin: int,
    pooling_size: int,
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Fit an image, if `do_resize`, and choose its grid.

    Returns:
        (height, width) of the image, fitted or as it was, in pixels; (rows, columns) of tiles.

    Raises:
        ValueError: the image has no pixels, is too elongated to be fitted, or makes more tokens than the model takes.
    """
    size = smart_resize(height, width, patch_size, min_pixels, max_pixels) if do_resize else (height, width)
    rows, columns = select_tiling(*size, tile_size, get_stride(tile_size, patch_size, overlap_margin), max_tiles)
    tokens_per_side = get_tokens_per_side(tile_size, patch_size, pooling_size)
    if (tokens := count_tokens(rows, columns, tokens_per_side, overlap_margin // pooling_size)) > MAX_IMAGE_TOKENS:
        raise ValueError(
            f"The image is {width} x {height} pixels and becomes {rows} x {columns} tiles, {tokens:,} tokens; the "
            f"model takes {MAX_IMAGE_TOKENS:,}. Lower `max_tiles` ({max_tiles}), or shrink the image."
        )
    return size, (rows, columns)


def get_size_of_most_tokens(
    do_resize: bool,
    max_tiles: int,
    min_pixels: int,
    max_pixels: int,
    tile_size: int,
    patch_size: int,
    overlap_margin: int,
    pooling_size: int,
) -> tuple[int, int]:
    """Find the (height, width), in pixels, of an image that makes the most tokens by these settings.

    With the released sizes it still does if a call overrides `do_resize`, or sets `max_tiles` to 34 or less.
    """
    stride, overlap = get_stride(tile_size, patch_size, overlap_margin), overlap_margin // pooling_size
    tokens_per_side = get_tokens_per_side(tile_size, patch_size, pooling_size)

    def count(size: tuple[int, int]) -> int:
        grid = get_tiling(
            *size, do_resize, max_tiles, min_pixels, max_pixels, tile_size, patch_size, overlap_margin, pooling_size
        )[1]
        return count_tokens(*grid, tokens_per_side, overlap)

    sizes = []
    for columns in range(1, math.isqrt(max_tiles) + 1):
        # As narrow as an image with this many columns can be that has room for as many rows as the budget of tokens,
        # and as tall as the budgets allow.
        rows = min(get_most_rows(columns, tokens_per_side, overlap), max_tiles // columns)
        tall_enough = math.ceil(get_canvas_size(rows, columns, tile_size, stride)[0] / MAX_ASPECT_RATIO / patch_size)
        narrowest = min(math.isqrt(max_pixels // MAX_ASPECT_RATIO) // patch_size, tall_enough) * patch_size
        width = tile_size - stride + stride * (columns - 1) + patch_size * (columns > 1)
        width = max(width, narrowest, patch_size)
        height = min(max_pixels // width, MAX_ASPECT_RATIO * width)
        columns = max(columns, math.ceil((width - tile_size + stride) / stride))
        most_rows = get_most_rows(columns, tokens_per_side, overlap)
        if not most_rows:
            break
        if not do_resize:
            rows = min(most_rows, max_tiles // columns)
            height = max(height, get_canvas_size(rows, columns, tile_size, stride)[0])
        height = min(height, get_canvas_size(most_rows, columns, tile_size, stride)[0])
        height = max(height // patch_size, 1) * patch_size
        if not do_resize or width <= MAX_ASPECT_RATIO * height:
            sizes.append((height, width))
    return max(sizes, key=count)


def get_most_rows(columns: int, tokens_per_side: int, overlap: int) -> int:
    """Count the rows of `columns` tiles that make at most [`MAX_IMAGE_TOKENS`] tokens; 0 if one row makes more."""
    token_columns = get_token_grid(1, columns, tokens_per_side, overlap)[1]
    token_rows = (MAX_IMAGE_TOKENS - 2 - tokens_per_side * (tokens_per_side + 1) - 2) // (token_columns + 1)
    return max(0, token_rows - 2 * overlap) // (tokens_per_side - 2 * overlap)
