"""`tiles`: what becomes of an image."""

import argparse
import json
import os
from io import BytesIO
from pathlib import Path

from jina_vlm_tools import sources
from jina_vlm_tools.files import write_whole

from . import options
from .progress import Progress


DESCRIPTION = """\
Show what becomes of an image: the grid of overlapping tiles and the
thumbnail that the model sees, the region that is kept of each tile, and how
many tokens stand for it all. No weights are needed.
"""
EXAMPLES = """\
examples:
  jina-vlm tiles photo.png
  jina-vlm tiles photo.png --save tiles.png --max-tiles 4
  jina-vlm tiles photo.png --json | jq .tokens.total
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", metavar="IMAGE", help="a path, an http(s) URL, a data URI, or - for stdin")
    parser.add_argument(
        "--save", type=Path, metavar="FILE", help="draw it here; the ending says the format, such as .png"
    )
    options.add_max_tiles(parser)
    options.add_no_resize(parser)
    parser.add_argument(
        "-m",
        "--model",
        default=os.environ.get(sources.MODEL_VARIABLE),
        help=(
            f"take this checkpoint's settings: {options.MODEL_HELP} (default: the environment variable "
            f"{sources.MODEL_VARIABLE}; without it the released one's, built in)"
        ),
    )
    options.add_json(
        parser, "one JSON object (sizes in pixels, grid, each tile's box on the canvas, tokens and kept region)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    sources.check_images([args.image])
    if args.model:
        sources.check_model(args.model)
    if args.save:
        check_target(args.save, args.image)
    progress = Progress()
    with progress.step("import", "Importing torch and transformers"):
        from jina_vlm import JinaVLMImageProcessor

        from jina_vlm_tools.inference.drawing import draw_page
        from jina_vlm_tools.inference.loading import load_image, load_image_processor
        from jina_vlm_tools.inference.tiling import compute_tiling

    image_processor = load_image_processor(args.model) if args.model else JinaVLMImageProcessor()
    image = load_image(args.image, image_processor)
    with progress.step("tiles", "Making tiles"):
        tiling = compute_tiling(image, image_processor, max_tiles=args.max_tiles, do_resize=args.do_resize)
    if args.save:
        with progress.step("draw", "Drawing them"):
            save_whole(draw_page(tiling), args.save)
    if args.json:
        print(
            json.dumps(
                {"name": args.image, **tiling.to_dict(), "saved": str(args.save) if args.save else None},
                ensure_ascii=False,
            )
        )
        return
    rows, columns = tiling.token_grid
    print(
        f"{tiling.image.width} x {tiling.image.height} pixels, {tiling.fit}, "
        f"stretched to {tiling.canvas[0]} x {tiling.canvas[1]}\n"
        f"{tiling.rows} x {tiling.columns} tiles of {tiling.tile_side} x {tiling.tile_side} pixels, "
        f"one every {tiling.stride}, and a thumbnail\n"
        f"{tiling.distinct:>6,} of these {1 + len(tiling.tiles)} computed: no two that are the same\n"
        f"{tiling.thumbnail.tokens:>6,} tokens of the thumbnail\n"
        f"{tiling.tile_tokens:>6,} of the tiles: {rows} rows of {columns}\n"
        f"{tiling.structural_tokens:>6,} that begin, end and break rows\n"
        f"{tiling.tokens:>6,} tokens in all"
    )
    if args.save:
        print(f"Drawn in {args.save}.")


def check_target(target: Path, image: str) -> None:
    """
    Raises:
        OSError, ValueError: an image cannot be written there, or the one that is asked about would be lost.
    """
    from PIL import Image

    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.SAVE}
    if target.suffix.lower() not in endings:
        raise ValueError(
            f"--save {target}: {target.suffix or 'no ending'} is no format that Pillow can write. "
            f"Try {target.with_suffix('.png')}."
        )
    if target.is_dir() or not target.parent.is_dir():
        raise FileNotFoundError(
            f"--save {target}: {'a folder' if target.is_dir() else 'its folder is not there'}. "
            "Name a file in a folder that exists."
        )
    if target.exists() and Path(image).exists() and target.samefile(image):
        raise ValueError(f"--save {target} would replace the image itself. Choose another name.")


def save_whole(page, target: Path) -> None:
    """
    Raises:
        OSError: there is no room.
    """
    from PIL import Image

    content = BytesIO()
    page.save(content, Image.registered_extensions()[target.suffix.lower()])
    try:
        write_whole(target, content.getvalue())
    except OSError as error:
        raise OSError(
            f"{target} could not be written: {error}. Make room there, or choose another place. "
            "Nothing was left behind."
        ) from error
