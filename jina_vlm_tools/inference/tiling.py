"""What becomes of an image. Pixels come from the image processor, and numbers from the geometry that it and the model
use: nothing here repeats their arithmetic."""

from dataclasses import dataclass

import torch
from jina_vlm import JinaVLMImageProcessor
from jina_vlm.tiling_jina_vlm import get_canvas_size, get_kept_tokens
from PIL import Image


@dataclass(frozen=True)
class Tile:
    """`corner`: (x, y) in pixels on the canvas; None for the thumbnail. `kept` [side, side]: which tokens are used."""

    image: Image.Image
    kept: torch.Tensor
    corner: tuple[int, int] | None = None

    @property
    def tokens(self) -> int:
        return int(self.kept.sum())

    @property
    def kept_box(self) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of the used tokens, in tokens. Right and bottom are exclusive."""
        columns, rows = (self.kept.any(dim=side).nonzero().flatten().tolist() for side in (0, 1))
        return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


@dataclass(frozen=True)
class Tiling:
    """Sizes are (width, height) in pixels. A tile begins every `stride` pixels of the canvas, and a token stands for
    `token_side` x `token_side` of them. Rows and columns of `token_grid` are those of all tiles together."""

    image: Image.Image
    fitted: tuple[int, int]
    canvas: tuple[int, int]
    rows: int
    columns: int
    tile_side: int
    stride: int
    token_side: int
    token_grid: tuple[int, int]
    thumbnail: Tile
    tiles: list[Tile]

    @property
    def fit(self) -> str:
        """What became of the image before its grid was chosen, in words."""
        return "not resized" if self.fitted == self.image.size else "fitted to {} x {}".format(*self.fitted)

    @property
    def tile_tokens(self) -> int:
        return sum(tile.tokens for tile in self.tiles)

    @property
    def structural_tokens(self) -> int:
        """Those that begin, end and break rows."""
        return 2 + len(self.thumbnail.kept) + 2 + self.token_grid[0]

    @property
    def tokens(self) -> int:
        return self.thumbnail.tokens + self.tile_tokens + self.structural_tokens

    def to_dict(self) -> dict:
        """For JSON. Boxes are [left, top, right, bottom]: tiles in the canvas's pixels, kept in the tile's tokens."""

        def size(pixels: tuple[int, int]) -> dict[str, int]:
            return dict(zip(("width", "height"), pixels, strict=True))

        return {
            "image": size(self.image.size),
            "fitted": size(self.fitted),
            "canvas": size(self.canvas),
            "grid": {"rows": self.rows, "columns": self.columns},
            "tile": {
                "side": self.tile_side,
                "stride": self.stride,
                "overlap": self.tile_side - self.stride,
                "token_side": self.token_side,
            },
            "thumbnail": {"tokens": self.thumbnail.tokens, "kept": list(self.thumbnail.kept_box)},
            "tiles": [
                {
                    "row": index // self.columns,
                    "column": index % self.columns,
                    "box": [*tile.corner, *(start + self.tile_side for start in tile.corner)],
                    "tokens": tile.tokens,
                    "kept": list(tile.kept_box),
                }
                for index, tile in enumerate(self.tiles)
            ],
            "tokens": {
                "thumbnail": self.thumbnail.tokens,
                "tiles": self.tile_tokens,
                "structural": self.structural_tokens,
                "total": self.tokens,
            },
        }


def compute_tiling(image: Image.Image, image_processor: JinaVLMImageProcessor, **settings) -> Tiling:
    """
    Args:
        settings: Arguments of the image processor, such as `max_tiles` and `do_resize`; None for its own.

    Raises:
        ValueError: the image is too elongated.
    """
    features = image_processor(image, return_tensors="pt", **settings)
    positions = features["tile_positions"].tolist()
    rows, columns = positions[0][2:]
    stride, per_side, overlap = image_processor.stride, image_processor.tokens_per_side, image_processor.token_overlap

    def make_tile(pixels: torch.Tensor, row: int, column: int) -> Tile:
        is_thumbnail = row < 0
        place = (0, 0, 1, 1) if is_thumbnail else (row, column, rows, columns)
        top, left, bottom, right = get_kept_tokens(*place, per_side, overlap)
        kept = torch.zeros(per_side, per_side, dtype=torch.bool)
        kept[top:bottom, left:right] = True
        return Tile(to_image(pixels), kept, None if is_thumbnail else (stride * column, stride * row))

    thumbnail, *tiles = (
        make_tile(pixels, row, column)
        for pixels, (row, column, _, _) in zip(features["pixel_values"], positions, strict=True)
    )
    return Tiling(
        image=image,
        fitted=image_processor.get_tiling(image.height, image.width, **settings)[0][::-1],
        canvas=get_canvas_size(rows, columns, image_processor.tile_size, stride)[::-1],
        rows=rows,
        columns=columns,
        tile_side=image_processor.tile_size,
        stride=stride,
        token_side=image_processor.patch_size * image_processor.pooling_size,
        token_grid=image_processor.get_token_grid(rows, columns),
        thumbnail=thumbnail,
        tiles=tiles,
    )


def to_image(pixels: torch.Tensor) -> Image.Image:
    """[3, H, W] in [-1, 1] -> an image."""
    return Image.fromarray(((pixels + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy())
