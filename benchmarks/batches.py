"""Sixteen images of 1 to 12 tiles, answered 1, 4 and 16 at a time: `python -m benchmarks.batches`.

Mixed as they come, and with those of like size together: what a batch costs beside its images is the padding of its
shorter prompts. On `checkpoints/tiny`; with `--device cuda` the 2.4B model with random weights. Tiles are counted as
they pass through the tower, beside those of the images that look different: none passes for padding, and none twice,
with beams and several answers neither.
"""

import jina_vlm
import torch
from jina_vlm.tiling_jina_vlm import find_distinct_tiles
from PIL import Image

from jina_vlm_tools import markdown
from jina_vlm_tools.files import TINY
from jina_vlm_tools.synthetic.questions import evaluation_sample
from jina_vlm_tools.synthetic.shapes import draw_scene

from . import full_model
from .results import arguments, save
from .side_by_side import medians, ratio, take_turns


SIZES = ((200, 300), (378, 378), (500, 700), (640, 480), (900, 640), (768, 1024), (1500, 500), (1080, 1920))
BATCHES = (1, 4, 16)
NEW_TOKENS = 8


def conversations(number: int) -> list[list[dict]]:
    """Questions about images of shapes, of mixed sizes."""
    samples = []
    for index in range(number):
        height, width = SIZES[index % len(SIZES)]
        image = draw_scene(evaluation_sample(index, "count", "en").scene).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        content = [{"type": "image", "image": image}, {"type": "text", "text": "How many shapes are there?"}]
        samples.append([{"role": "user", "content": content}])
    return samples


class Answerer:
    """Answers conversations in batches, and counts the tower's tiles."""

    def __init__(self, model, processor):
        self.model, self.processor, self.tiles, self.tokens, self.padding = model, processor, 0, 0, 0
        model.model.vision_model.tower.encoder.layers[0].register_forward_pre_hook(self._count)

    def _count(self, layer, args) -> None:
        self.tiles += len(args[0])

    @torch.inference_mode()
    def answer(self, chats: list, batch_size: int, **kwargs) -> None:
        for start in range(0, len(chats), batch_size):
            inputs = self.processor.apply_chat_template(
                chats[start : start + batch_size],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                padding=True,
            ).to(self.model.device)
            self.tokens += inputs["attention_mask"].numel()
            self.padding += int((inputs["attention_mask"] == 0).sum())
            if self.model.dtype != torch.float32:
                inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
            self.model.generate(
                **inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, **kwargs
            )

    def counts(self, chats: list, batch_size: int, **kwargs) -> dict[str, float]:
        """Tiles that passed through the tower, and the share of the prompts' tokens that is padding."""
        self.tiles = self.tokens = self.padding = 0
        self.answer(chats, batch_size, **kwargs)
        return {"tiles": self.tiles, "padding": self.padding / self.tokens}


def measure(answerer: Answerer, rounds: int, device: str) -> list[dict]:
    chats = conversations(max(BATCHES))
    tiler, images = answerer.processor.image_processor, [chat[0]["content"][0]["image"] for chat in chats]
    tiles = [tiler(image, return_tensors="pt")["pixel_values"] for image in images]
    needed = sum(len(find_distinct_tiles(of_image)[0]) for of_image in tiles)
    sorted_chats = [chats[index] for index in sorted(range(len(chats)), key=lambda index: len(tiles[index]))]
    middle = BATCHES[len(BATCHES) // 2]
    cases = {str(size): (chats, size) for size in BATCHES} | {f"{middle}, of like size": (sorted_chats, middle)}
    seconds = take_turns(
        {name: lambda case=case: answerer.answer(*case) for name, case in cases.items()}, rounds, device
    )
    rows = [
        {
            "batch": name,
            "images_per_second": len(chats) / medians(seconds)[name],
            "to_one_by_one": 1 / ratio(seconds, name, "1"),
            "needed": needed,
            **answerer.counts(*case),
        }
        for name, case in cases.items()
    ]
    for what, kwargs in (
        ("4 beams", {"num_beams": 4}),
        ("4 beams, 4 answers each", {"num_beams": 4, "num_return_sequences": 4}),
    ):
        rows.append({"batch": f"{middle}, {what}", "needed": needed, **answerer.counts(chats, middle, **kwargs)})
    return rows


def table(rows: list[dict]) -> str:
    head = [
        "Images at a time",
        "Images a second",
        "To one by one",
        "Padding",
        "Tiles through the tower / distinct ones of the images",
    ]
    return markdown.table(
        head,
        [
            [
                row["batch"],
                f"{row['images_per_second']:.1f}" if "images_per_second" in row else "",
                f"**{row['to_one_by_one']:.2f}**" if "to_one_by_one" in row else "",
                f"{row['padding']:.0%}",
                f"{row['tiles']} / {row['needed']}",
            ]
            for row in rows
        ],
    )


def main() -> None:
    args = arguments(__doc__, rounds=3).parse_args()
    processor = jina_vlm.JinaVLMProcessor.from_pretrained(TINY)
    if args.device == "cuda":
        model = full_model.jina_vlm(device="cuda")
    else:
        model = jina_vlm.JinaVLMForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32).eval()
    rows = measure(Answerer(model, processor), args.rounds, args.device)
    print(table(rows))
    save("batches", rows, args.device)


if __name__ == "__main__":
    main()
