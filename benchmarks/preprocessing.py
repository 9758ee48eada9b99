"""The image processor beside the same arithmetic in straight torch calls: `python -m benchmarks.preprocessing`.

From a decoded image of Pillow's to tiles, for five sizes of noise and for all five in one call, with one thread and
with two. Beside it stands the least that any way must do: the output written once. The floor is what the same bits
cannot be had without: the channels taken out of Pillow's image, torch's own `interpolate`s, the output written; each
part is timed alone, on inputs that are ready. Memory is how far it rises above what the process held with the image,
in a process of its own each, against the output. Last, `do_resize=False`, by which tiles and thumbnail are made from
the image itself, beside the default. With `--device cuda`: the pixels that the card computes, against the CPU's.
"""

import numpy as np
import torch
from jina_vlm import JinaVLMImageProcessor
from jina_vlm.resizing_jina_vlm import bands, resize
from PIL import Image
from torch.nn import functional as F

from jina_vlm_tools import markdown

from .results import arguments, save
from .side_by_side import Peak, in_fresh_process, medians, ratio, take_turns, together


SIZES = {
    "480 x 640": (480, 640),
    "1080p": (1080, 1920),
    "4K": (2160, 3840),
    "A4, 300 dpi": (3508, 2480),
    "12 MP": (3000, 4000),
}
ALL = "all five"
# Of the floor: each one alone
PARTS = {
    "channels": "Channels out of Pillow",
    "fitted": "`interpolate` to the fitted size",
    "tiles": "`interpolate` to canvas and thumbnail",
    "written": "Output written",
}


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def draw(name: str) -> Image.Image:
    return noise(*SIZES[name])


def straight(tiler: JinaVLMImageProcessor, image: Image.Image) -> torch.Tensor:
    """The tiles by three `interpolate`s, an `unfold` and a normalization of whole images."""
    fitted, (rows, columns) = tiler.get_tiling(image.height, image.width)
    channels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    channels = F.interpolate(channels, size=fitted, mode="bilinear").round() / 255
    thumbnail = F.interpolate(channels, size=(378, 378), mode="bilinear")
    canvas = F.interpolate(channels, size=(266 * rows + 112, 266 * columns + 112), mode="bilinear")[0]
    tiles = canvas.unfold(1, 378, 266).unfold(2, 378, 266).permute(1, 2, 0, 3, 4).flatten(0, 1)
    return torch.cat([thumbnail, tiles]) * 2 - 1


def parts(tiler: JinaVLMImageProcessor, images: list[Image.Image]) -> dict:
    """Calls each of [`PARTS`] for the images, with inputs that are ready."""
    tilings = [tiler.get_tiling(image.height, image.width) for image in images]
    planes = [torch.rand(image.height, image.width) for image in images]
    fitted = [torch.rand(size) for size, _ in tilings]
    tiles = sum(1 + rows * columns for _, (rows, columns) in tilings)

    def channels() -> None:
        for image in images:
            for channel in range(3):
                for _ in bands(image, channel):
                    pass

    def to_fitted() -> None:
        for plane, (size, _) in zip(planes, tilings, strict=True):
            for _ in range(3):
                resize(plane, *size)

    def to_tiles() -> None:
        for plane, (_, (rows, columns)) in zip(fitted, tilings, strict=True):
            for _ in range(3):
                resize(plane, 266 * rows + 112, 266 * columns + 112)
                resize(plane, 378, 378)

    return {
        "channels": channels,
        "fitted": to_fitted,
        "tiles": to_tiles,
        "written": lambda: torch.empty(tiles, 3, 378, 378).fill_(1),
    }


def measure(names: list[str], threads: int, rounds: int) -> dict:
    torch.set_num_threads(threads)
    tiler, images = JinaVLMImageProcessor(), [draw(name) for name in names]
    seconds = take_turns(
        {
            "ours": lambda: tiler(images, return_tensors="pt"),
            "without_fit": lambda: tiler(images, return_tensors="pt", do_resize=False),
            "straight": lambda: torch.cat([straight(tiler, image) for image in images]),
            **parts(tiler, images),
        },
        rounds,
    )
    seconds["floor"] = together(seconds, PARTS)
    return {
        "image": ALL if len(names) > 1 else names[0],
        "threads": threads,
        "tiles": sum(tiler.get_number_of_image_patches(image.height, image.width) for image in images),
        "milliseconds": {name: 1e3 * value for name, value in medians(seconds).items()},
        "to_straight": ratio(seconds, "ours", "straight"),
        "floor_to_straight": ratio(seconds, "floor", "straight"),
        "to_written": ratio(seconds, "ours", "written"),
        "without_fit_to_ours": ratio(seconds, "without_fit", "ours"),
    }


def memory(name: str) -> tuple[int, int]:
    """Bytes of the output, and how far a first call raises anonymous memory, the output included."""
    torch.set_num_threads(1)
    tiler, image = JinaVLMImageProcessor(), draw(name)
    tiler(Image.new("RGB", (40, 30)), return_tensors="pt")
    with Peak() as peak:
        pixels = tiler(image, return_tensors="pt")["pixel_values"]
    return pixels.nbytes, peak.bytes


def on_gpu(names: list[str], rounds: int) -> dict:
    """The CPU's time relative to the card's, copies included; and a pixel's largest difference, of 255 levels."""
    torch.set_num_threads(1)
    tiler, images = JinaVLMImageProcessor(), [draw(name) for name in names]
    seconds = take_turns(
        {
            "ours": lambda: tiler(images, return_tensors="pt", device="cuda"),
            "cpu": lambda: tiler(images, return_tensors="pt")["pixel_values"].to("cuda"),
        },
        rounds,
        "cuda",
    )
    there, here = (
        tiler(images, return_tensors="pt", **kwargs)["pixel_values"].cpu() for kwargs in ({"device": "cuda"}, {})
    )
    return {
        "image": ALL if len(names) > 1 else names[0],
        "tiles": len(here),
        "milliseconds": {name: 1e3 * value for name, value in medians(seconds).items()},
        "to_cpu": ratio(seconds, "ours", "cpu"),
        "levels": float((there - here).abs().max() * 255 / 2),
    }


def gpu_table(rows: list[dict]) -> str:
    head = [
        "Image",
        "Tiles",
        "One CPU thread and the way there, ms",
        "On the card, ms",
        "Ratio",
        "Largest difference, levels of 255",
    ]
    lines = [
        [
            row["image"],
            str(row["tiles"]),
            f"{row['milliseconds']['cpu']:.1f}",
            f"{row['milliseconds']['ours']:.1f}",
            f"**{row['to_cpu']:.2f}**",
            f"{row['levels']:.2f}",
        ]
        for row in rows
    ]
    return markdown.table(head, lines)


def table(rows: list[dict]) -> str:
    if "to_cpu" in rows[0]:
        return gpu_table(rows)
    head = [
        "Image",
        "Tiles",
        "Threads",
        "Straight torch calls, ms",
        "Ours, ms",
        "Ratio",
        "The floor's ratio",
        "To the output written once",
        "Memory / output",
    ]
    compared = [
        [
            row["image"],
            str(row["tiles"]),
            str(row["threads"]),
            f"{row['milliseconds']['straight']:.1f}",
            f"{row['milliseconds']['ours']:.1f}",
            f"**{row['to_straight']:.2f}**",
            f"{row['floor_to_straight']:.2f}",
            f"{row['to_written']:.1f}",
            f"{row['memory']:.2f}" if "memory" in row else "",
        ]
        for row in rows
    ]
    profile = [
        [
            row["image"],
            str(row["threads"]),
            *(f"{row['milliseconds'][part]:.1f}" for part in PARTS),
            f"{row['milliseconds']['floor']:.1f}",
            f"{row['milliseconds']['ours']:.1f}",
        ]
        for row in rows
    ]
    floor = markdown.table(["The floor, ms", "Threads", *PARTS.values(), "Together", "Ours"], profile)
    without_fit = [
        [
            row["image"],
            str(row["threads"]),
            f"{row['milliseconds']['without_fit']:.1f}",
            f"{row['milliseconds']['ours']:.1f}",
            f"**{row['without_fit_to_ours']:.2f}**",
        ]
        for row in rows
        if "without_fit_to_ours" in row
    ]
    routes = (
        [markdown.table(["Without a fit", "Threads", "`do_resize=False`, ms", "Default, ms", "Ratio"], without_fit)]
        if without_fit
        else []
    )
    return "\n\n".join([markdown.table(head, compared), floor, *routes])


def main() -> None:
    args = arguments(__doc__, rounds=15).parse_args()
    rows = []
    for names in [*([name] for name in SIZES), list(SIZES)]:
        if args.device == "cuda":
            rows.append(on_gpu(names, args.rounds))
            continue
        rows += [measure(names, threads, args.rounds) for threads in (1, 2)]
        if len(names) == 1:
            output, risen = in_fresh_process(memory, names[0])
            rows[-2]["memory"] = risen / output
    print(table(rows))
    save("preprocessing", rows, args.device)


if __name__ == "__main__":
    main()
