# Copyright 2026 The jina-vlm-transformers authors. Licensed under the Apache License, Version 2.0.
"""Tiles by sample, for trainers that slice, shuffle and repeat the rows of every tensor; and back."""

import torch
from torch.nn.utils.rnn import pad_sequence

from .tiling_jina_vlm import get_image_lengths, get_token_grid


PADDING = -2  # row and column of a tile that only fills up its sample


def pad_samples(
    pixel_values: torch.Tensor, tile_positions: torch.Tensor, images: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put each sample's tiles into a row of its own.

    Args:
        pixel_values: [tiles, 3, height, width].
        tile_positions: [tiles, 4].
        images: How many of the images each sample has.

    Returns:
        [samples, most tiles, 3, height, width], filled up with zeros, and [samples, most tiles, 4], with -2 in row and
        column.
    """
    image_of_tile = (tile_positions[:, 0] < 0).cumsum(0) - 1
    sample_of_image = torch.arange(len(images)).repeat_interleave(torch.tensor(images))
    counts = torch.bincount(sample_of_image[image_of_tile], minlength=len(images)).tolist()
    positions = pad_sequence(tile_positions.split(counts), True, 0)
    positions[..., :2][positions[..., 2] == 0] = PADDING
    return pad_sequence(pixel_values.split(counts), True), positions


def to_tiles(
    pixel_values: torch.Tensor,
    tile_positions: torch.Tensor | None,
    input_ids: torch.Tensor | None,
    token_ids: tuple[int, int, int, int],
    tokens_per_side: int,
    overlap: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Bring tiles by sample, and tiles without their positions, into the form that the model computes in.

    Args:
        pixel_values: [tiles, 3, height, width], or [samples, most tiles, 3, height, width].
        tile_positions: [tiles, 4] or [samples, most tiles, 4]. If None, they are read off `input_ids`.
        input_ids: [samples, length] of whole prompts, if known.
        token_ids: Of `<im_start>`, `<im_end>`, `<im_patch>` and `<im_col>`.

    Returns:
        [tiles, 3, height, width] and [tiles, 4], without padding; None as positions if neither tells them.

    Raises:
        ValueError: tiles, positions and prompts contradict each other.
    """
    by_sample = pixel_values.ndim == 5
    if tile_positions is None and input_ids is not None:
        samples = read_tile_positions(input_ids, token_ids, tokens_per_side, overlap)
        tile_positions = torch.tensor(sum(samples, []), dtype=torch.int64).reshape(-1, 4)
        counts = [len(sample) for sample in samples]
        given = f"{list(pixel_values.shape[: 1 + by_sample])} tiles"
        if by_sample and (len(counts) != len(pixel_values) or max(counts) > pixel_values.shape[1]):
            raise ValueError(f"Got {given}, but the prompts show {counts}. Pass text and images of the same samples.")
        if not by_sample and sum(counts) != len(pixel_values):
            raise ValueError(f"Got {given}, but the prompts show {sum(counts)}. Pass text and images together.")
        if by_sample:
            most = torch.arange(pixel_values.shape[1], device=pixel_values.device)
            pixel_values = pixel_values[most < torch.tensor(counts, device=most.device)[:, None]]
        return pixel_values, tile_positions.to(pixel_values.device)
    if not by_sample or tile_positions is None:
        return pixel_values, tile_positions
    if tile_positions.shape != (*pixel_values.shape[:2], 4):
        raise ValueError(
            f"Expected `tile_positions` {[*pixel_values.shape[:2], 4]} for `pixel_values` {list(pixel_values.shape)}, "
            f"got {list(tile_positions.shape)}. Pass both as the processor made them."
        )
    is_tile = tile_positions[..., 0] != PADDING
    if input_ids is not None:
        places = (input_ids == token_ids[2]).sum(dim=1).tolist()
        features = [
            sum(get_image_lengths(positions[kept], tokens_per_side, overlap))
            for positions, kept in zip(tile_positions, is_tile, strict=True)
        ]
        if places != features:
            raise ValueError(
                f"The samples' texts have {places} places (`<im_patch>`) for image features, but their images make "
                f"{features}. Pass text and images of the same samples, in the same order."
            )
    return pixel_values[is_tile.to(pixel_values.device)], tile_positions[is_tile]


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
        positions = []
        for thumbnail, grid in zip(grids[::2], grids[1::2], strict=False):
            rows, columns = ((side - 2 * overlap) // step for side in grid)
            if thumbnail != 2 * (tokens_per_side,) or grid != get_token_grid(rows, columns, tokens_per_side, overlap):
                positions = None
                break
            positions.append([-1, -1, rows, columns])
            positions += [[row, column, rows, columns] for row in range(rows) for column in range(columns)]
        if positions is None or len(grids) % 2:
            raise ValueError(
                f"The grids of sample {index}'s images cannot be read off its tokens: their blocks are {grids} (rows, "
                f"columns), expected {2 * (tokens_per_side,)} for a thumbnail, then a grid's, for each image. Pass "
                "`tile_positions`, or tokens as the processor made them."
            )
        samples.append(positions)
    return samples
