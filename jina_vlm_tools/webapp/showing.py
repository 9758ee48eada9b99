"""What the page shows beside the chat, as HTML: how an image was tiled, tokens, times, and errors."""

import base64
import html
import io

from PIL import Image

from jina_vlm_tools.inference.drawing import INK, count, draw_canvas, draw_tokens, get_tile_color
from jina_vlm_tools.inference.tiling import Tiling

from .answering import Turn


QUALITY = 88  # of the images' WebP
NO_TILING = '<p class="quiet">Show an image, and see here how the model sees it.</p>'
NO_TURN = '<p class="quiet">Ask a question, and see here what it took.</p>'
NOT_YET = "–"


def show_error(what: str, message: str) -> str:
    """A message that stays on the page. Both are plain text."""
    return f'<div class="error" role="alert"><strong>{html.escape(what)}</strong> {html.escape(message)}</div>'


def show_tiling(tiling: Tiling) -> str:
    """The canvas with its tiles, the thumbnail, what is kept of each tile, and a table of sizes and tokens."""
    number, side = len(tiling.tiles), tiling.tile_side
    overlap = f"They overlap by {side - tiling.stride}, where it is gray." if number > 1 else "It is one tile."
    canvas = _figure(
        draw_canvas(tiling),
        f"The image with its {number} {'tile' if number == 1 else 'tiles'}",
        f"stretched to {_size(tiling.canvas)} pixels and cut into {tiling.rows} × {tiling.columns} of {side}. "
        f"{overlap}",
    )
    thumbnail = _figure(
        draw_tokens(tiling.thumbnail, tiling.token_side, INK), "The thumbnail", f"all of it at {side} × {side} pixels"
    )
    rows, columns = tiling.token_grid
    table = _table(
        "Tokens of the image",
        [
            ("Size", f"{_size(tiling.image.size)}"),
            ("Fitted to", f"{_size(tiling.fitted)}"),
            ("Tiles", f"{tiling.rows} × {tiling.columns} and a thumbnail"),
            ("Distinct tiles, computed once each", f"{tiling.distinct} of {1 + number}"),
            ("Tokens of the thumbnail", f"{tiling.thumbnail.tokens:,}"),
            (f"Tokens of the tiles, {rows} × {columns}", f"{tiling.tile_tokens:,}"),
            ("Tokens that begin, end and break rows", f"{tiling.structural_tokens:,}"),
        ],
        ("Image tokens", f"{tiling.tokens:,}"),
    )
    kept = "".join(
        _figure(
            draw_tokens(tile, tiling.token_side, get_tile_color(index)),
            f"Tile {index + 1}",
            count(tile).replace(" x ", " × "),
        )
        for index, tile in enumerate(tiling.tiles)
    )
    return (
        f'<div class="tiling"><div class="canvas">{canvas}</div><div class="beside">{thumbnail}{table}</div></div>'
        '<details class="kept"><summary>What is kept of each tile</summary>'
        f'<div class="grid" style="--columns: {tiling.columns}">{kept}</div></details>'
    )


def show_turn(turn: Turn) -> str:
    """Tokens and times of an answer, as far as it has come."""
    speed = f"{turn.tokens_per_second:,.0f} tokens/s" if turn.tokens_per_second else NOT_YET
    is_kept = turn.seconds_encoded is None and turn.seconds_first_token is not None
    parts = [
        ("Making tiles and token ids", turn.seconds_prepared, None),
        ("Tower and connector", turn.seconds_encoded, "kept from before" if is_kept else None),
        ("Prompt, to the first token", turn.seconds_first_token, None),
        ("The other tokens", turn.seconds_decoded, None),
    ]
    longest = max((seconds for _, seconds, _ in parts if seconds), default=1)
    times = "".join(
        f'<tr><th scope="row">{name}</th>'
        f'<td class="bar"><i style="width: {100 * (seconds or 0) / longest:.1f}%"></i></td>'
        f"<td>{instead or _time(seconds)}</td></tr>"
        for name, seconds, instead in parts
    )
    tokens = _table(
        "Tokens",
        [
            ("Image tokens", f"{turn.image_tokens:,}"),
            ("Text tokens", f"{turn.text_tokens:,}" if turn.prompt_tokens else NOT_YET),
            ("Tokens of the answer", f"{turn.tokens:,}"),
        ],
        ("Speed, after the first token", speed),
    )
    return (
        f'<div class="turn"><table class="times"><caption>Time</caption><tbody>{times}</tbody>'
        '<tfoot><tr><th scope="row">In all, with showing it</th>'
        f'<td class="bar"></td><td>{_time(turn.seconds)}</td></tr></tfoot></table>{tokens}</div>'
    )


def image_uri(image: Image.Image) -> str:
    """An image as a page holds it, so that no file of it is made."""
    file = io.BytesIO()
    image.save(file, "WEBP", quality=QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def _table(caption: str, rows: list[tuple[str, str]], total: tuple[str, str]) -> str:
    def line(name: str, value: str) -> str:
        return f'<tr><th scope="row">{name}</th><td>{value}</td></tr>'

    body = "".join(line(*row) for row in rows)
    return f"<table><caption>{caption}</caption><tbody>{body}</tbody><tfoot>{line(*total)}</tfoot></table>"


def _figure(image: Image.Image, title: str, text: str) -> str:
    return (
        f"<figure><figcaption><strong>{title}</strong> <span>{text}</span></figcaption>"
        f'<img src="{image_uri(image)}" alt="{title}" width="{image.width}" height="{image.height}"></figure>'
    )


def _size(pixels: tuple[int, int]) -> str:
    return "{:,} × {:,}".format(*pixels)


def _time(seconds: float | None) -> str:
    if seconds is None:
        return NOT_YET
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"
