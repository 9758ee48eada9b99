# Copyright 2026 The jina-vlm-transformers authors. Licensed under the Apache License, Version 2.0.
"""Geometry of jina-vlm (arXiv 2512.04032, section 3.1): where an image's tiles lie, and its tokens. Pure functions.

An image is stretched to a canvas of `rows` x `columns` tiles: squares of `tile_size` pixels, one every `stride` pixels,
so that neighbors overlap. Each tile has `tokens_per_side` x `tokens_per_side` tokens; at a side where it has a neighbor,
`overlap` of them are dropped, as the neighbor shows them too. A thumbnail, one more tile, shows the whole image.
"""

import math

import torch


MAX_ASPECT_RATIO = 200


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Fit an image to a budget of pixels.

    Args:
        height, width: Of the image, in pixels.
        factor: What both sides of the result are multiples of: the side of a patch.
        min_pixels, max_pixels: The budget. Very elongated images may miss it.

    Returns:
        (height, width) in pixels, of about the same aspect ratio.

    Raises:
        ValueError: a side is 0, or one is more than 200 times the other.
    """
    if height < 1 or width < 1:
        raise ValueError(f"The image is {width} x {height} pixels; both sides must be at least 1.")
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
    """Choose the grid of tiles whose canvas changes the scale of an image least.

    That is the smallest enlargement or, where every grid of at most `max_tiles` shrinks the image, the largest scale. Of
    equal grids it is the one with fewer tiles, then fewer rows. Sizes in pixels.

    Returns:
        (rows, columns)
    """
    margin = tile_size - stride

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


def get_stride(tile_size: int, patch_size: int, overlap_margin: int) -> int:
    """Pixels from one tile to the next. `overlap_margin`: patches at a side of a tile that count as its neighbor's."""
    return tile_size - 2 * overlap_margin * patch_size


def get_canvas_size(rows: int, columns: int, tile_size: int, stride: int) -> tuple[int, int]:
    """(height, width), in pixels, of what `rows` x `columns` tiles cover."""
    return tile_size + stride * (rows - 1), tile_size + stride * (columns - 1)


def get_tokens_per_side(tile_size: int, patch_size: int, pooling_size: int) -> int:
    """Tokens along a side of a tile: one for each window of `pooling_size` patches, the last of which may be cut off."""
    return math.ceil(tile_size // patch_size / pooling_size)


def get_kept_tokens(
    row: int, column: int, rows: int, columns: int, tokens_per_side: int, overlap: int
) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) of the tokens of a tile that are used, in tokens; bottom and right are the first that
    are not."""
    return (
        overlap * (row > 0),
        overlap * (column > 0),
        tokens_per_side - overlap * (row < rows - 1),
        tokens_per_side - overlap * (column < columns - 1),
    )


def get_token_grid(rows: int, columns: int, tokens_per_side: int, overlap: int) -> tuple[int, int]:
    """Rows and columns of tokens that `rows` x `columns` tiles have together, once their overlaps are dropped."""
    return tuple(tokens_per_side * count - 2 * overlap * (count - 1) for count in (rows, columns))


def count_tokens(rows: int, columns: int, tokens_per_side: int, overlap: int) -> int:
    """Tokens of an image in a prompt: of its thumbnail and of its tiles, each with one that opens it, one that closes it,
    and one at the end of each row."""
    grids = [get_token_grid(*size, tokens_per_side, overlap) for size in ((1, 1), (rows, columns))]
    return sum(2 + height * (width + 1) for height, width in grids)


def get_image_lengths(tile_positions: torch.Tensor, tokens_per_side: int, overlap: int) -> list[int]:
    """Count the tokens of each image that carry a feature.

    Args:
        tile_positions: [tiles, 4] (row, column, rows, columns), (-1, -1, rows, columns) for the thumbnails that open images.

    Raises:
        ValueError: the tiles are not those of whole images, in order.
    """
    positions = tile_positions.tolist()
    lengths, start = [], 0
    while start < len(positions):
        _, _, rows, columns = positions[start]
        expected = [[-1, -1, rows, columns]]
        expected += [[row, column, rows, columns] for row in range(rows) for column in range(columns)]
        given = positions[start : start + len(expected)]
        if rows < 1 or columns < 1 or given != expected:
            raise ValueError(
                f"`tile_positions` from tile {start} on is {given}, expected {expected}: an image's thumbnail, then its "
                "rows x columns tiles. Pass both image tensors as the processor made them, or slice them by whole images."
            )
        height, width = get_token_grid(rows, columns, tokens_per_side, overlap)
        lengths.append(tokens_per_side**2 + height * width)
        start += len(expected)
    return lengths


def get_image_token_indices(tile_positions: torch.Tensor, tokens_per_side: int, overlap: int) -> torch.Tensor:
    """Find the order in which a prompt has the tokens of its tiles.

    Args:
        tile_positions: [tiles, 4] (row, column, rows, columns), (-1, -1, rows, columns) for the thumbnails that open images.

    Returns:
        [tiles * tokens_per_side ** 2] indices of all tokens: of each image those of the thumbnail, then, row by row across
        the grid, those of its tiles that no neighbor shows. Dropped ones come last. No value is read, so that graphs can
        be traced.
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
