"""What is saved by computing no tile twice: `python -m benchmarks.distinct_tiles`.

Four blocks of the 2.4B model's tower (its 25 cost the same each) with random weights in bfloat16, on an image's tiles,
beside as many tiles that all differ: what the image cost before. Finding the ones that look the same is timed alone,
and compared with 25 blocks. The features are compared with those of each tile in a pass of its own. With `--pdfs
FOLDER` (and `pip install pypdfium2`) up to `--pages` pages of each PDF file there, at 100 dots an inch, are cut into
tiles, too, to count how many differ.
"""

from pathlib import Path

import numpy as np
import torch
from jina_vlm import JinaVLMConfig, JinaVLMImageProcessor
from jina_vlm.modeling_jina_vlm import JinaVLMVisionModel
from jina_vlm.tiling_jina_vlm import find_distinct_tiles
from PIL import Image

from jina_vlm_tools import markdown
from jina_vlm_tools.files import ROOT

from .full_model import build
from .results import arguments, save
from .side_by_side import medians, ratio, take_turns
from .tower import make_tiles


DOTS_AN_INCH = 100
BLOCKS = 4


def images() -> dict[str, Image.Image]:
    """Noise stands for what tells tiles apart."""
    noise = np.random.default_rng(0).integers(0, 256, (1169, 827, 3), np.uint8)
    page = np.full_like(noise, 255)
    page[80:390, 80:-80] = noise[80:390, 80:-80]
    return {
        "300 x 300": Image.fromarray(noise[:300, :300]),
        "A4 page, text in its upper third": Image.fromarray(page),
        "photo of that size": Image.fromarray(noise),
    }


@torch.inference_mode()
def measure(name: str, image: Image.Image, tower: JinaVLMVisionModel, rounds: int, device: str) -> dict:
    pixels = JinaVLMImageProcessor()(image, return_tensors="pt")["pixel_values"].to(device, torch.bfloat16)
    all_differ = make_tiles(len(pixels), device)
    seconds = take_turns(
        {
            "ours": lambda: tower(pixels),
            "before": lambda: tower(all_differ),
            "finding": lambda: find_distinct_tiles(pixels),
        },
        rounds,
        device,
    )
    alone = torch.cat([tower(tile).last_hidden_state for tile in pixels.split(1)])
    return {
        "image": name,
        "tiles": len(pixels),
        "distinct": len(find_distinct_tiles(pixels)[0]),
        "seconds": medians(seconds),
        "to_before": ratio(seconds, "ours", "before"),
        "finding_to_before": ratio(seconds, "finding", "before")
        * BLOCKS
        / JinaVLMConfig().vision_config.num_hidden_layers,
        "difference": (tower(pixels).last_hidden_state - alone).abs().max().item(),
    }


def count(file: Path, most: int) -> dict:
    """Tiles of a file's pages, and how many of each page differ."""
    import pypdfium2

    tiler, tiles, distinct = JinaVLMImageProcessor(), 0, 0
    document = pypdfium2.PdfDocument(file)
    pages = min(most, len(document))
    for number in range(pages):
        image = document[number].render(scale=DOTS_AN_INCH / 72).to_pil()
        pixels = tiler(image, return_tensors="pt")["pixel_values"]
        tiles, distinct = tiles + len(pixels), distinct + len(find_distinct_tiles(pixels)[0])
    return {"file": file.name, "pages": pages, "tiles": tiles, "distinct": distinct}


def total(counted: list[dict]) -> dict:
    """All files as one row, with the lowest, middle and highest share of tiles that repeat in a file."""
    shares = sorted(1 - row["distinct"] / row["tiles"] for row in counted)
    sums = {name: sum(row[name] for row in counted) for name in ("pages", "tiles", "distinct")}
    return {"files": len(counted), **sums, "shares": [shares[0], shares[len(shares) // 2], shares[-1]]}


def table(rows: list[dict]) -> str:
    timed = [row for row in rows if "image" in row]
    text = markdown.table(
        [
            "Image",
            "Distinct tiles",
            "Tower, s",
            "As many that differ, s",
            "Ratio",
            "Finding them",
            "Largest difference",
        ],
        [
            [
                row["image"],
                f"{row['distinct']} of {row['tiles']}",
                *(f"{row['seconds'][name]:.3g}" for name in ("ours", "before")),
                f"**{row['to_before']:.2f}**",
                f"{row['finding_to_before']:.2%}",
                f"{row['difference']:.2g}",
            ]
            for row in timed
        ],
    )
    for row in rows:
        if "files" in row:
            least, middle, most = row["shares"]
            text += (
                f"\n\nOf {row['pages']} pages of {row['files']} PDF files {row['tiles'] - row['distinct']:,} of "
                f"{row['tiles']:,} tiles ({1 - row['distinct'] / row['tiles']:.1%}) are not computed: by file "
                f"{least:.0%} to {most:.0%}, median {middle:.0%}."
            )
    return text


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--pdfs", type=Path, help="folder with files whose pages are counted, too")
    parser.add_argument("--pages", type=int, default=5, help="of each file, at most (default: %(default)s)")
    args = parser.parse_args()
    files = sorted(args.pdfs.rglob("*.pdf")) if args.pdfs else []
    if args.pdfs and not files:
        parser.error(f"--pdfs {args.pdfs}: no PDF file is there")
    config = JinaVLMConfig.from_pretrained(ROOT)
    config.vision_config.num_hidden_layers, config.vision_feature_layers = BLOCKS, [BLOCKS - 1, 1]
    tower = build(lambda: JinaVLMVisionModel(config), torch.bfloat16, args.device)
    rows = [measure(name, image, tower, args.rounds, args.device) for name, image in images().items()]
    if files:
        rows.append(total([count(file, args.pages) for file in files]))
    print(table(rows))
    save("distinct_tiles", rows, args.device)


if __name__ == "__main__":
    main()
