"""A soak: many requests with mixed images, from several threads, on one model and one processor in one process.

Every distinct request is answered once before, alone; each later answer must be the same. The memory that the process
holds is read when a tenth of the requests are done, and at the end.

    python -m benchmarks.soak [--requests 2000] [--threads 8]
"""

import argparse
import io
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from PIL import Image

from benchmarks.fuzz import mutate, seeds
from benchmarks.side_by_side import memory_bytes
from jina_vlm_tools.files import TINY
from jina_vlm_tools.synthetic.shapes import TRAINING_PAIRS, draw_scene, make_scene


QUESTIONS = ("How many shapes are there?", "Welche Farbe?", "Describe the picture.", "¿Dónde está la estrella?")
GROWTH = 64 * 2**20  # bytes between a tenth of the requests and the end, that are no leak


def distinct_requests(number: int) -> list[tuple[bytes, str]]:
    """Files and questions: images of shapes in several formats and sizes, small files of all kinds, damaged ones."""
    kinds, requests = list(seeds().values()), []
    for index in range(number):
        rng = random.Random(index)
        if index % 5 == 3:
            data = kinds[index // 5 % len(kinds)]
        elif index % 5 == 4:
            data = mutate(rng, kinds)
        else:
            image, file = draw_scene(make_scene(rng, TRAINING_PAIRS)), io.BytesIO()
            scale = rng.choice((0.2, 0.5, 1, 1.5))
            image = image.resize((round(image.width * scale), round(image.height * scale)))
            image.save(file, rng.choice(("PNG", "JPEG", "WEBP", "GIF")))
            data = file.getvalue()
        requests.append((data, QUESTIONS[index % len(QUESTIONS)]))
    return requests


def answer(model, processor, data: bytes, question: str) -> str:
    """What the model says, or why the image cannot be used."""
    try:
        content = [{"type": "image", "image": Image.open(io.BytesIO(data))}, {"type": "text", "text": question}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            max_tiles=2,
        )
    except (ValueError, OSError) as error:
        return type(error).__name__
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :])


def soak(model, processor, requests: int, threads: int, distinct: int) -> tuple[int, int, int, int]:
    """Memory at a tenth and at the end, in bytes; answers unlike the first pass's; files refused in that pass."""
    asked = distinct_requests(distinct)
    first = [answer(model, processor, *request) for request in asked]
    wrong, early = 0, 0

    def one(index: int) -> bool:
        return answer(model, processor, *asked[index % distinct]) == first[index % distinct]

    with ThreadPoolExecutor(threads) as executor:
        for done, right in enumerate(executor.map(one, range(requests)), 1):
            wrong += not right
            if done == max(1, requests // 10):
                early = memory_bytes("VmRSS")
    return (
        early,
        memory_bytes("VmRSS"),
        wrong,
        sum(text in ("ValueError", "UnidentifiedImageError", "OSError") for text in first),
    )


def load():
    import jina_vlm

    model = jina_vlm.JinaVLMForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32).eval()
    return model, jina_vlm.JinaVLMProcessor.from_pretrained(TINY)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=8, help="default: %(default)s")
    parser.add_argument(
        "--distinct", type=int, default=100, help="different requests among them (default: %(default)s)"
    )
    args = parser.parse_args()
    start = time.perf_counter()
    early, late, wrong, refused = soak(*load(), args.requests, args.threads, args.distinct)
    print(
        f"{args.requests:,} requests, {args.distinct} distinct ({refused} of them refused), {args.threads} threads, "
        f"{time.perf_counter() - start:,.0f} s\n"
        f"memory held: {early / 2**20:,.0f} MiB at a tenth, {late / 2**20:,.0f} MiB at the end "
        f"({(late - early) / 2**20:+,.0f})\nanswers that differ from the first pass: {wrong}"
    )
    sys.exit(bool(wrong or late - early > GROWTH))


if __name__ == "__main__":
    main()
