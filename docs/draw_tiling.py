"""Draw the guide's pictures: `make pictures`. `docs/tiling.png` shows how a picture becomes tiles and tokens; `docs/shapes.png`
is one that its examples ask about.

Pixels come from the image processor, and which tokens are kept from the model: nothing here repeats their arithmetic.
"""

from pathlib import Path

import torch
from jina_vlm import JinaVLMConfig, JinaVLMImageProcessor, JinaVLMModel
from PIL import Image, ImageDraw, ImageFont

from training.questions import evaluation_sample
from training.shapes import draw_scene


TILING = Path(__file__).parent / "tiling.png"
SHAPES = Path(__file__).parent / "shapes.png"
SHAPES_SEED = 76
SIZE = (900, 640)
INK, GREY, PALE = (32, 38, 50), (112, 120, 134), (226, 229, 235)
TILE_COLOURS = ((214, 57, 70), (235, 140, 30), (58, 148, 82), (38, 110, 200), (128, 74, 176), (205, 75, 145))


def draw_landscape() -> Image.Image:
    """Something with detail near the tiles' seams."""
    width, height = (2 * side for side in SIZE)  # averaged down in the end, for smooth edges
    image = Image.new("RGB", (width, height))
    canvas = ImageDraw.Draw(image)
    for y in range(height):
        share = y / height
        canvas.line((0, y, width, y), fill=(int(120 + 125 * share), int(180 + 40 * share), int(235 - 45 * share)))
    canvas.ellipse((1330, 130, 1570, 370), fill=(255, 226, 120))
    for x, y, scale in ((250, 190, 1.0), (820, 120, 0.8), (1180, 330, 0.6)):
        for dx, dy, radius in ((0, 0, 70), (80, -30, 85), (165, 0, 65), (80, 25, 70)):
            box = [x + scale * (dx - radius), y + scale * (dy - radius), x + scale * (dx + radius), y + scale * (dy + radius)]
            canvas.ellipse(box, fill=(250, 251, 253))
    canvas.polygon([(0, 860), (330, 430), (620, 760), (940, 380), (1330, 800), (1560, 560), (1800, 800), (1800, 1280), (0, 1280)], fill=(110, 132, 168))
    for x, y, spread in ((330, 430, 88), (940, 380, 100), (1560, 560, 70)):
        canvas.polygon([(x, y), (x - 0.72 * spread, y + spread), (x, y + 0.72 * spread), (x + 0.9 * spread, y + spread)], fill="white")
    canvas.ellipse((-700, 760, 1300, 1900), fill=(92, 156, 92))
    canvas.ellipse((600, 850, 2500, 2000), fill=(116, 178, 98))
    canvas.polygon([(880, 1280), (1010, 1000), (1060, 870), (1084, 870), (1075, 1000), (1120, 1280)], fill=(222, 200, 156))
    canvas.rectangle((360, 800, 640, 1010), fill=(246, 236, 216))
    canvas.polygon([(325, 805), (500, 660), (675, 805)], fill=(186, 70, 58))
    canvas.rectangle((470, 890, 540, 1010), fill=(120, 78, 50))
    for x in (390, 570):
        canvas.rectangle((x, 850, x + 48, 905), fill=(96, 150, 200), outline="white", width=6)
    for x, y, size in ((150, 1000, 1.2), (760, 930, 0.9), (1330, 990, 1.3), (1530, 940, 1.0), (1690, 1050, 1.4)):
        canvas.rectangle((x - 12 * size, y, x + 12 * size, y + 90 * size), fill=(104, 72, 48))
        for lift, spread in ((0, 90), (70, 72), (135, 52)):
            tip = (x, y - size * (lift + 130))
            canvas.polygon([tip, (x - size * spread, y - size * lift), (x + size * spread, y - size * lift)], fill=(36, 104, 70))
    return image.reduce(2)


def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def to_image(pixels: torch.Tensor) -> Image.Image:
    """[3, H, W] in [-1, 1] -> a picture."""
    return Image.fromarray(((pixels + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy())


def caption(canvas: ImageDraw.ImageDraw, x: int, y: int, number: str, title: str, text: str) -> None:
    """A numbered heading that ends above y, and a line below it."""
    canvas.ellipse((x, y - 92, x + 44, y - 48), fill=INK)
    canvas.text((x + 22, y - 70), number, font=font(27), fill="white", anchor="mm")
    canvas.text((x + 58, y - 70), title, font=font(33), fill=INK, anchor="lm")
    canvas.text((x, y - 24), text, font=font(25), fill=GREY, anchor="lm")


def draw_tokens(tile: Image.Image, kept: torch.Tensor, colour, side: int = 28) -> Image.Image:
    """A tile under its tokens, one for each `side` pixels: kept ones in a grid, the others faded."""
    tile = tile.copy()
    faded = Image.blend(tile, Image.new("RGB", tile.size, "white"), 0.78)
    canvas = ImageDraw.Draw(tile)
    for row, column in torch.cartesian_prod(torch.arange(len(kept)), torch.arange(len(kept))).tolist():
        box = (column * side, row * side, min((column + 1) * side, tile.width), min((row + 1) * side, tile.height))
        if kept[row, column]:
            canvas.rectangle((box[0], box[1], box[2], box[3]), outline=(255, 255, 255))
        else:
            tile.paste(faded.crop(box), box[:2])
    rows, columns = kept.any(dim=1).nonzero().flatten().tolist(), kept.any(dim=0).nonzero().flatten().tolist()
    edges = [columns[0] * side, rows[0] * side, (columns[-1] + 1) * side, (rows[-1] + 1) * side]
    canvas.rectangle([min(edge, tile.width - 1) for edge in edges], outline=colour, width=5)
    return tile


def label(canvas: ImageDraw.ImageDraw, x: float, y: float, text: str, colour, size: int = 25) -> None:
    """Text on a plate of a colour, about (x, y)."""
    left, top, right, bottom = canvas.textbbox((x, y), text, font=font(size), anchor="mm")
    canvas.rounded_rectangle((left - 10, top - 7, right + 10, bottom + 7), radius=8, fill=colour)
    canvas.text((x, y), text, font=font(size), fill="white", anchor="mm")


def main() -> None:
    picture = draw_landscape()
    processor = JinaVLMImageProcessor()
    features = processor(picture, return_tensors="pt")
    positions = features["tile_positions"]
    thumbnail, *tiles = map(to_image, features["pixel_values"])
    rows, columns = positions[0, 2:].tolist()
    (fitted_height, fitted_width), _ = processor.get_tiling(picture.height, picture.width)

    with torch.device("meta"):
        model = JinaVLMModel(JinaVLMConfig())
    order, _ = model.get_token_order(positions)
    kept = torch.zeros(len(positions), 14, 14, dtype=torch.bool)
    kept.view(-1)[order] = True

    side, (stride, _) = processor.tile_size, processor._stride_and_margin
    stretched = Image.new("RGB", (stride * (columns - 1) + side, stride * (rows - 1) + side))
    corners = [(stride * column, stride * row) for row in range(rows) for column in range(columns)]
    for tile, corner in zip(tiles, corners, strict=True):
        stretched.paste(tile, corner)

    page = Image.new("RGB", (1740, 1640), "white")
    canvas = ImageDraw.Draw(page)
    left, right, top, middle = 50, 760, 150, 965

    caption(canvas, left, top, "1", "The picture", f"{picture.width} x {picture.height} pixels, fitted to {fitted_width} x {fitted_height}")
    small = picture.resize((600, round(600 * picture.height / picture.width)), Image.LANCZOS)
    page.paste(small, (left, top))

    caption(
        canvas, right, top, "2", f"The canvas: {rows} x {columns} tiles",
        f"stretched to {stretched.width} x {stretched.height} pixels; tiles of {side}, one every {stride}: they overlap by {side - stride}",
    )  # fmt: skip
    overlap = Image.new("L", stretched.size, 0)
    shade = ImageDraw.Draw(overlap)
    for x in range(1, columns):
        shade.rectangle((stride * x, 0, stride * x + side - stride, stretched.height), fill=120)
    for y in range(1, rows):
        shade.rectangle((0, stride * y, stretched.width, stride * y + side - stride), fill=120)
    shown = Image.composite(Image.new("RGB", stretched.size, "white"), stretched, overlap)
    marks = ImageDraw.Draw(shown)
    for index, (x, y) in enumerate(corners):
        inset = 3 + 5 * (index % 2) + 4 * (index // columns)
        marks.rectangle((x + inset, y + inset, x + side - 1 - inset, y + side - 1 - inset), outline=TILE_COLOURS[index], width=5)
    for index, (x, y) in enumerate(corners):
        label(marks, x + side / 2, y + side / 2, f"tile {index + 1}", TILE_COLOURS[index], 28)
    page.paste(shown, (right, top))

    caption(canvas, left, middle, "3", "The thumbnail", f"the whole picture at {side} x {side} pixels")
    page.paste(draw_tokens(thumbnail, kept[0], INK), (left, middle))
    canvas.text((left, middle + side + 26), f"14 x 14 = {int(kept[0].sum())} tokens", font=font(27), fill=INK, anchor="lm")

    caption(
        canvas, right, middle, "4", "What is kept of each tile",
        "two tokens of 28 x 28 pixels are dropped at each inner side: no place counts twice",
    )  # fmt: skip
    scale, gap = 280, 35
    for index, (tile, mask) in enumerate(zip(tiles, kept[1:], strict=True)):
        x = right + index % columns * (scale + gap)
        y = middle + index // columns * (scale + gap)
        height, width = int(mask.any(dim=1).sum()), int(mask.any(dim=0).sum())
        page.paste(draw_tokens(tile, mask, TILE_COLOURS[index]).resize((scale, scale), Image.LANCZOS), (x, y))
        canvas.rectangle((x - 1, y - 1, x + scale, y + scale), outline=PALE)
        label(canvas, x + scale / 2, y + scale / 2, f"{height} x {width} = {int(mask.sum())}", TILE_COLOURS[index])

    grid = processor.get_token_grid(rows, columns)
    total = sum(2 + height * (width + 1) for height, width in ((14, 14), grid))
    y = middle + side + 70
    canvas.line((left, y, left + 600, y), fill=PALE, width=3)
    for step, (text, size, colour) in enumerate(
        (
            (f"{int(kept[0].sum()):,}  of the thumbnail", 29, INK),
            (f"{int(kept[1:].sum()):,}  of the tiles: {grid[0]} rows of {grid[1]}", 29, INK),
            (f"{total - int(kept.sum())}  that begin, end and break rows", 29, INK),
            (f"{total:,} tokens stand for this picture", 36, (38, 110, 200)),
        )
    ):
        canvas.text((left, y + 42 + 45 * step), text, font=font(size), fill=colour, anchor="lm")

    # 128 colours are plenty for a drawing
    page.quantize(128, dither=Image.Dither.NONE).save(TILING, optimize=True)
    draw_scene(evaluation_sample(SHAPES_SEED, "position", "en").scene).save(SHAPES, optimize=True)
    for path in (TILING, SHAPES):
        print(f"Wrote {path} ({path.stat().st_size // 1024} KiB)")


if __name__ == "__main__":
    main()
