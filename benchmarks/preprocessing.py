"""The image processor beside the same arithmetic in straight torch calls: `python -m benchmarks.preprocessing`.

From a decoded picture of Pillow's to tiles, for five sizes of noise and for all five in one call, with one thread and with two. Beside it
stands the least that any way must do: the output written once. And how far memory rises above what the process held with the picture,
in a process of its own each, against the output. With `--device cuda`: the pixels that the card computes, against the CPU's.
"""

import argparse

import numpy as np
import torch
from jina_vlm import JinaVLMImageProcessor
from PIL import Image
from torch.nn import functional as F

from .results import markdown, save
from .side_by_side import Peak, in_fresh_process, medians, ratio, take_turns


SIZES = {"480 x 640": (480, 640), "1080p": (1080, 1920), "4K": (2160, 3840), "A4, 300 dpi": (3508, 2480), "12 MP": (3000, 4000)}
ALL = "all five"


def picture(name: str) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*SIZES[name], 3), np.uint8))


def straight(tiler: JinaVLMImageProcessor, image: Image.Image) -> torch.Tensor:
    """The tiles by three `interpolate`s, an `unfold` and a normalisation of whole pictures."""
    fitted, (rows, columns) = tiler.get_tiling(image.height, image.width)
    channels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    channels = F.interpolate(channels, size=fitted, mode="bilinear").round() / 255
    thumbnail = F.interpolate(channels, size=(378, 378), mode="bilinear")
    canvas = F.interpolate(channels, size=(266 * rows + 112, 266 * columns + 112), mode="bilinear")[0]
    tiles = canvas.unfold(1, 378, 266).unfold(2, 378, 266).permute(1, 2, 0, 3, 4).flatten(0, 1)
    return torch.cat([thumbnail, tiles]) * 2 - 1


def measure(names: list[str], threads: int, rounds: int) -> dict:
    torch.set_num_threads(threads)
    tiler, images = JinaVLMImageProcessor(), [picture(name) for name in names]
    shape = tiler(images, return_tensors="pt")["pixel_values"].shape
    seconds = take_turns(
        {
            "ours": lambda: tiler(images, return_tensors="pt"),
            "straight": lambda: torch.cat([straight(tiler, image) for image in images]),
            "written": lambda: torch.zeros(shape).add_(1),
        },
        rounds,
    )
    return {
        "picture": ALL if len(names) > 1 else names[0],
        "threads": threads,
        "tiles": shape[0],
        "milliseconds": {name: 1e3 * value for name, value in medians(seconds).items()},
        "to_straight": ratio(seconds, "ours", "straight"),
        "to_written": ratio(seconds, "ours", "written"),
    }


def memory(name: str) -> tuple[int, int]:
    """Bytes of the output, and how far anonymous memory rose, the output included; of a first call, in a process that has imported all."""
    torch.set_num_threads(1)
    tiler, image = JinaVLMImageProcessor(), picture(name)
    tiler(Image.new("RGB", (40, 30)), return_tensors="pt")
    with Peak() as peak:
        pixels = tiler(image, return_tensors="pt")["pixel_values"]
    return pixels.nbytes, peak.bytes


def on_gpu(names: list[str], rounds: int) -> dict:
    """The CPU's time to the card's, pictures and tiles carried there included, and the largest difference of a pixel, in levels of 255."""
    torch.set_num_threads(1)
    tiler, images = JinaVLMImageProcessor(), [picture(name) for name in names]
    seconds = take_turns(
        {
            "ours": lambda: tiler(images, return_tensors="pt", device="cuda"),
            "cpu": lambda: tiler(images, return_tensors="pt")["pixel_values"].to("cuda"),
        },
        rounds,
        "cuda",
    )
    there, here = (tiler(images, return_tensors="pt", **kwargs)["pixel_values"].cpu() for kwargs in ({"device": "cuda"}, {}))
    return {
        "picture": ALL if len(names) > 1 else names[0],
        "tiles": len(here),
        "milliseconds": {name: 1e3 * value for name, value in medians(seconds).items()},
        "to_cpu": ratio(seconds, "ours", "cpu"),
        "levels": float((there - here).abs().max() * 255 / 2),
    }


def gpu_table(rows: list[dict]) -> str:
    head = ["Picture", "Tiles", "One CPU thread and the way there, ms", "On the card, ms", "Ratio", "Largest difference, levels of 255"]
    lines = [
        [row["picture"], str(row["tiles"]), f"{row['milliseconds']['cpu']:.1f}", f"{row['milliseconds']['ours']:.1f}", f"**{row['to_cpu']:.2f}**", f"{row['levels']:.2f}"]
        for row in rows
    ]
    return markdown(head, lines)


def table(rows: list[dict]) -> str:
    if "to_cpu" in rows[0]:
        return gpu_table(rows)
    head = ["Picture", "Tiles", "Threads", "Straight torch calls, ms", "Ours, ms", "Ratio", "To the output written once", "Memory / output"]
    return markdown(
        head,
        [
            [
                row["picture"],
                str(row["tiles"]),
                str(row["threads"]),
                f"{row['milliseconds']['straight']:.1f}",
                f"{row['milliseconds']['ours']:.1f}",
                f"**{row['to_straight']:.2f}**",
                f"{row['to_written']:.1f}",
                f"{row['memory']:.2f}" if "memory" in row else "",
            ]
            for row in rows
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
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
