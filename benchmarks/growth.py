"""How cost grows with an image's size, the number of images and an answer's length: `python -m benchmarks.growth`.

The 2.4B model with random weights in bfloat16; seconds of each stage, each measured once after a warm-up: the image
processor, tower and connector, the decoder's prefill, and the tokens of an answer one by one. Beside it, to the first
token of its answer for the same images, the library's Qwen3-VL-2B with random weights, which takes images at their own
size.
"""

import argparse
import time

import torch
from jina_vlm import JinaVLMForConditionalGeneration, JinaVLMProcessor
from jina_vlm.compatibility_jina_vlm import CACHE_NAME

from jina_vlm_tools import markdown
from jina_vlm_tools.files import TINY

from . import full_model, peer
from .preprocessing import noise
from .results import save
from .side_by_side import wait


IMAGES = ((378, 378), (640, 480), (900, 640), (1920, 1080))
COUNTS = (1, 2, 4)
ANSWERS = (0, 16, 64)
QUESTION = "What is shown?"
STAGES = ("preprocessing", "tower and connector", "prefill", "answer")


class Stages:
    """Runs the stages of an answer one after the other, and keeps each one's seconds."""

    def __init__(self, model: JinaVLMForConditionalGeneration, processor: JinaVLMProcessor, device: str):
        self.model, self.processor, self.device = model, processor, device

    def _timed(self, function):
        start = time.perf_counter()
        result = function()
        wait(self.device)
        return result, time.perf_counter() - start

    @torch.inference_mode()
    def run(self, sizes: list[tuple[int, int]], answer_tokens: int) -> dict:
        # No two alike: the tiles of a second one that is the same would not be computed again.
        images = [noise(*size[::-1], seed) for seed, size in enumerate(sizes)]
        text = self.processor.image_token * len(images) + QUESTION
        inputs, preprocessing = self._timed(lambda: self.processor(text=text, images=images, return_tensors="pt"))
        inputs = inputs.to(self.device)
        pixels = inputs["pixel_values"].to(self.model.dtype)
        features, tower = self._timed(
            lambda: self.model.get_image_features(pixels, inputs["tile_positions"], return_dict=True)
        )
        output, prefill = self._timed(
            lambda: self.model(
                input_ids=inputs["input_ids"], mm_encoder_outputs={"image": features}, use_cache=True, logits_to_keep=1
            )
        )

        def decode() -> None:
            token = output.logits[:, -1:].argmax(-1)
            for _ in range(answer_tokens):
                logits = self.model(input_ids=token, cache=output[CACHE_NAME], use_cache=True).logits
                token = logits[:, -1:].argmax(-1)

        _, answer = self._timed(decode)
        return {
            "tiles": len(pixels),
            "tokens": inputs["input_ids"].shape[1],
            "answer_tokens": answer_tokens,
            "seconds": dict(zip(STAGES, (preprocessing, tower, prefill, answer), strict=True)),
        }


def measure(stages: Stages, other: peer.Peer) -> list[dict]:
    stages.run([IMAGES[0]], 1)
    rows = [
        {"grows": "image", "at": f"{width} x {height}", **stages.run([(width, height)], 0)} for width, height in IMAGES
    ]
    question = len(stages.processor.tokenizer(QUESTION, add_special_tokens=False)["input_ids"])
    other.first_token(noise(*IMAGES[0][::-1]), question)
    for row, size in zip(rows, IMAGES, strict=True):
        row["peer"] = other.first_token(noise(*size[::-1]), question)
    rows += [
        {"grows": "images", "at": f"{count} of 640 x 480", **stages.run(count * [(640, 480)], 0)} for count in COUNTS
    ]
    rows += [{"grows": "answer", "at": f"{tokens} tokens", **stages.run([IMAGES[0]], tokens)} for tokens in ANSWERS]
    return rows


def table(rows: list[dict]) -> str:
    head = [
        "What grows",
        "",
        "Tiles",
        "Tokens",
        *(f"{stage.capitalize()}, s" for stage in STAGES),
        "Together, s",
        f"{peer.NAME}: tokens",
        "Together, s",
    ]
    return markdown.table(
        head,
        [
            [row["grows"], row["at"], str(row["tiles"]), f"{row['tokens']:,}"]
            + [f"{row['seconds'][stage]:.2f}" for stage in STAGES]
            + [f"{sum(row['seconds'].values()):.1f}"]
            + ([f"{row['peer']['tokens']:,}", f"{row['peer']['seconds']:.1f}"] if "peer" in row else ["", ""])
            for row in rows
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    processor = JinaVLMProcessor.from_pretrained(TINY)
    rows = measure(Stages(full_model.jina_vlm(device=args.device), processor, args.device), peer.Peer(args.device))
    print(table(rows))
    save("growth", rows, args.device)


if __name__ == "__main__":
    main()
