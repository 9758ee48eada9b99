# Copyright 2026 The jina-vlm-transformers authors. Licensed under the Apache License, Version 2.0.
"""Tiles by sample, for trainers that slice, shuffle and repeat the rows of every tensor; and back."""

import torch
from torch.nn.utils.rnn import pad_sequence

from .tiling_jina_vlm import get_tile_positions, get_token_grid


def pad_samples(pixel_values: torch.Tensor, tile_positions: torch.Tensor, images: list[int]) -> torch.Tensor:
    """Put each sample's tiles into a row of its own, filled up with zeros, which no tile consists of.

    Args:
        pixel_values: [tiles, 3, height, width].
        tile_positions: [tiles, 4].
        images: How many of the images each sample has.

    Returns:
        [samples, most tiles, 3, height, width].
    """
    image_of_tile = (tile_positions[:, 0] < 0).cumsum(0) - 1
    sample_of_image = torch.arange(len(images)).repeat_interleave(torch.tensor(images))
    counts = torch.bincount(sample_of_image[image_of_tile], minlength=len(images)).tolist()
    return pad_sequence(pixel_values.split(counts), True)


def to_tiles(
    pixel_values: torch.Tensor,
    input_ids: torch.Tensor,
    token_ids: tuple[int, int, int, int],
    tokens_per_side: int,
    overlap: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the place of each tile by the tokens of its image.

    Args:
        pixel_values: [tiles, 3, height, width], or [samples, most tiles, 3, height, width].
        input_ids: [samples, length], whole prompts.
        token_ids: Of `<im_start>`, `<im_end>`, `<im_patch>` and `<im_col>`.

    Returns:
        `pixel_values` [tiles, 3, height, width] and `tile_positions` [tiles, 4], without what fills up.

    Raises:
        ValueError: a sample's tokens are no image's, or show other tiles than it has.
    """
    samples = read_tile_positions(input_ids, token_ids, tokens_per_side, overlap)
    counts = [len(sample) for sample in samples]
    shown: list[int] | int
    given: list[int] | int
    if pixel_values.ndim == 5:
        is_tile = pixel_values.flatten(2).any(-1)
        shown, given = counts, is_tile.sum(1).tolist()
        pixel_values = pixel_values[is_tile]
    else:
        shown, given = sum(counts), len(pixel_values)
    if given != shown:
        raise ValueError(
            f"The prompts show images of {shown} tiles, but `pixel_values` has {given}. Pass text and images of the "
            "same samples, in the same order."
        )
    positions = torch.tensor([tile for sample in samples for tile in sample], dtype=torch.int64)
    return pixel_values, positions.reshape(-1, 4).to(pixel_values.device)


def read_tile_positions(
    input_ids: torch.Tensor, token_ids: tuple[int, int, int, int], tokens_per_side: int, overlap: int
) -> list[list[list[int]]]:
    """Read the tiles of each sample's images off its tokens.

    Returns:
        For each sample, (row, column, rows, columns) of each tile.

    Raises:
        ValueError: tokens of an image are not those that the processor writes.
    """
    start, end, patch, line = token_ids
    step = tokens_per_side - 2 * overlap
    samples = []
    for index, ids in enumerate(input_ids.tolist()):
        grids, begin = [], None
        for place, token in enumerate(ids):
            if token == start:
                begin = place
            elif token == end and begin is not None:
                block, begin = ids[begin + 1 : place], None
                height = max(1, block.count(line))
                grids.append((height, block.count(patch) // height))
        positions: list[list[int]] = []
        is_whole = len(grids) % 2 == 0
        for thumbnail, grid in zip(grids[::2], grids[1::2], strict=False):
            rows, columns = ((side - 2 * overlap) // step for side in grid)
            is_whole &= thumbnail == 2 * (tokens_per_side,)
            is_whole &= grid == get_token_grid(rows, columns, tokens_per_side, overlap)
            positions += get_tile_positions(rows, columns)
        if not is_whole:
            raise ValueError(
                f"The grids of sample {index}'s images cannot be read off its tokens: their blocks are {grids} (rows, "
                f"columns), expected {2 * (tokens_per_side,)} for a thumbnail, then a grid's, for each image. Pass "
                "`tile_positions`, or tokens as the processor made them."
            )
        samples.append(positions)
    return samples
