"""A page that shows what becomes of an image."""

from PIL import Image, ImageDraw, ImageFont

from .tiling import Tile, Tiling


INK, GRAY, PALE, BLUE = (32, 38, 50), (112, 120, 134), (226, 229, 235), (38, 110, 200)
VEIL, FADE, LINE = (128, 138, 158), (205, 209, 217), (184, 191, 202)  # to be seen on white paper as well
TILE_COLORS = (
    (214, 57, 70),
    (235, 140, 30),
    (58, 148, 82),
    (38, 110, 200),
    (128, 74, 176),
    (205, 75, 145),
    (0, 134, 139),
    (140, 90, 50),
    (88, 96, 200),
    (120, 140, 20),
    (190, 60, 20),
    (70, 110, 130),
)

# In pixels of the page
LEFT, RIGHT, TOP, MARGIN = 50, 760, 150, 70
LEFT_WIDTH, LEAST_RIGHT_WIDTH = 600, 910
TILE, GAP = 280, 35
CAPTION = 171  # between what is above and what is below
VEILED = 110  # of 255


def get_tile_color(index: int) -> tuple[int, int, int]:
    return TILE_COLORS[index % len(TILE_COLORS)]


def draw_page(tiling: Tiling) -> Image.Image:
    """Four parts: the image; the canvas with its tiles and their overlaps; the thumbnail and the sum of all tokens;
    the tiles, each with the region of it that is kept."""
    width = RIGHT + max(LEAST_RIGHT_WIDTH, tiling.columns * (TILE + GAP) - GAP) + MARGIN
    canvas_height = tiling.canvas[1]
    # A small image is enlarged, a tall one shown no taller than the canvas.
    scale = min(LEFT_WIDTH / tiling.image.width, max(canvas_height, tiling.tile_side) / tiling.image.height)
    small_size = [max(1, round(side * scale)) for side in tiling.image.size]
    middle = TOP + max(canvas_height, small_size[1]) + CAPTION
    height = middle + max(tiling.rows * (TILE + GAP) - GAP + 80, tiling.tile_side + 297)
    page = Image.new("RGB", (width, height), "white")
    canvas = ImageDraw.Draw(page)
    side, dropped = tiling.tile_side, (tiling.tile_side - tiling.stride) // 2 // tiling.token_side

    caption(
        canvas,
        LEFT,
        TOP,
        "1",
        "The image",
        f"{tiling.image.width} x {tiling.image.height} pixels, {tiling.fit}",
    )
    page.paste(tiling.image.resize(small_size, Image.LANCZOS), (LEFT, TOP))

    caption(
        canvas,
        RIGHT,
        TOP,
        "2",
        f"The canvas: {tiling.rows} x {tiling.columns} {'tile' if len(tiling.tiles) == 1 else 'tiles'}",
        f"stretched to {tiling.canvas[0]} x {canvas_height} pixels; "
        f"tiles of {side}, one every {tiling.stride}: they overlap by {side - tiling.stride}",
    )
    page.paste(draw_canvas(tiling), (RIGHT, TOP))

    caption(canvas, LEFT, middle, "3", "The thumbnail", f"the whole image at {side} x {side} pixels")
    page.paste(draw_tokens(tiling.thumbnail, tiling.token_side, INK), (LEFT, middle))
    canvas.text((LEFT, middle + side + 26), count(tiling.thumbnail), font=font(27), fill=INK, anchor="lm")

    caption(
        canvas,
        RIGHT,
        middle,
        "4",
        "What is kept of each tile",
        f"{dropped} tokens of {tiling.token_side} x {tiling.token_side} pixels are dropped at each inner side: "
        "a neighbor shows them",
    )
    for index, tile in enumerate(tiling.tiles):
        x = RIGHT + index % tiling.columns * (TILE + GAP)
        y = middle + index // tiling.columns * (TILE + GAP)
        page.paste(
            draw_tokens(tile, tiling.token_side, get_tile_color(index)).resize((TILE, TILE), Image.LANCZOS), (x, y)
        )
        canvas.rectangle((x - 1, y - 1, x + TILE, y + TILE), outline=PALE)
        label(canvas, x + TILE / 2, y + TILE / 2, count(tile).removesuffix(" tokens"), get_tile_color(index))

    y = middle + side + 70
    canvas.line((LEFT, y, LEFT + LEFT_WIDTH, y), fill=PALE, width=3)
    rows, columns = tiling.token_grid
    for step, (text, size, color) in enumerate(
        (
            (f"{tiling.thumbnail.tokens:,}  of the thumbnail", 29, INK),
            (f"{tiling.tile_tokens:,}  of the tiles: {rows} rows of {columns}", 29, INK),
            (f"{tiling.structural_tokens}  that begin, end and break rows", 29, INK),
            (f"{tiling.tokens:,} tokens stand for this image", 36, BLUE),
        )
    ):
        canvas.text((LEFT, y + 42 + 45 * step), text, font=font(size), fill=color, anchor="lm")
    return page


def draw_canvas(tiling: Tiling) -> Image.Image:
    """The stretched image, put together from its tiles, their frames on it, and a veil where they overlap."""
    stretched, side = Image.new("RGB", tiling.canvas), tiling.tile_side
    for tile in tiling.tiles:
        stretched.paste(tile.image, tile.corner)
    overlap = Image.new("L", stretched.size, 0)
    veil, thickness = ImageDraw.Draw(overlap), side - tiling.stride
    for column in range(1, tiling.columns):
        x = tiling.stride * column
        veil.rectangle((x, 0, x + thickness, stretched.height), fill=VEILED)
    for row in range(1, tiling.rows):
        y = tiling.stride * row
        veil.rectangle((0, y, stretched.width, y + thickness), fill=VEILED)
    shown = Image.composite(Image.new("RGB", stretched.size, VEIL), stretched, overlap)
    marks = ImageDraw.Draw(shown)
    for index, tile in enumerate(tiling.tiles):
        x, y = tile.corner
        inset = (
            3 + 5 * (index % 2) + 4 * (index // tiling.columns % 2)
        )  # so that neighbors' frames do not hide each other
        marks.rectangle(
            (x + inset, y + inset, x + side - 1 - inset, y + side - 1 - inset), outline=get_tile_color(index), width=5
        )
    for index, tile in enumerate(tiling.tiles):
        label(
            marks, tile.corner[0] + side / 2, tile.corner[1] + side / 2, f"tile {index + 1}", get_tile_color(index), 28
        )
    return shown


def draw_tokens(tile: Tile, token_side: int, color) -> Image.Image:
    """A tile under its tokens: kept ones in a grid, the others faded."""
    image = tile.image.copy()
    faded = Image.blend(image, Image.new("RGB", image.size, FADE), 0.78)
    canvas = ImageDraw.Draw(image)
    for row, masks in enumerate(tile.kept.tolist()):
        for column, is_kept in enumerate(masks):
            left, top = column * token_side, row * token_side
            box = (left, top, min(left + token_side, image.width), min(top + token_side, image.height))
            if is_kept:
                canvas.rectangle(box, outline=LINE)
            else:
                image.paste(faded.crop(box), box[:2])
    canvas.rectangle([min(edge * token_side, image.width - 1) for edge in tile.kept_box], outline=color, width=5)
    return image


def count(tile: Tile) -> str:
    left, top, right, bottom = tile.kept_box
    return f"{bottom - top} x {right - left} = {tile.tokens} tokens"


def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def caption(canvas: ImageDraw.ImageDraw, x: int, y: int, number: str, title: str, text: str) -> None:
    """A numbered heading that ends above y, and a line below it."""
    canvas.ellipse((x, y - 92, x + 44, y - 48), fill=INK)
    canvas.text((x + 22, y - 70), number, font=font(27), fill="white", anchor="mm")
    canvas.text((x + 58, y - 70), title, font=font(33), fill=INK, anchor="lm")
    canvas.text((x, y - 24), text, font=font(25), fill=GRAY, anchor="lm")


def label(canvas: ImageDraw.ImageDraw, x: float, y: float, text: str, color, size: int = 25) -> None:
    """Text on a plate of a color, about (x, y)."""
    left, top, right, bottom = canvas.textbbox((x, y), text, font=font(size), anchor="mm")
    canvas.rounded_rectangle((left - 10, top - 7, right + 10, bottom + 7), radius=8, fill=color)
    canvas.text((x, y), text, font=font(size), fill="white", anchor="mm")
