"""Ask a checkpoint about fresh pages: `python -m experiments.eval_pages --checkpoint runs/small_stage2`.

Each question is about a page of its own, drawn from a seed, with shapes and words that training never draws. It is
answered greedily, and right if the answer's words are exactly the expected ones. Intervals are Wilson's, of 95 %.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from jina_vlm_tools import markdown
from jina_vlm_tools.files import ROOT
from jina_vlm_tools.synthetic.page_questions import LANGUAGES, TASKS
from jina_vlm_tools.synthetic.pages_data import held_out_samples

from .eval_tiny import ask


def evaluate(model, processor, samples: int, batch_size: int, tasks: tuple[str, ...] = TASKS) -> list[dict]:
    """What [`ask`] gives for `samples` questions, the same number for each task and language, of these tasks alone."""
    chosen = [sample for sample in held_out_samples(samples) if sample.turn.task in tasks]
    chosen.sort(
        key=lambda sample: (TASKS.index(sample.turn.task), math.prod(sample.page.scene.size))
    )  # batches of pages alike
    return ask(model, processor, chosen, batch_size)


def wilson(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson, 1927), of 95 %."""
    share, spread = right / total, z * z / total
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return max(0.0, middle - half), min(1.0, middle + half)


def cell(results: list[dict], **where: str) -> str:
    """ "91.2 (89.0 to 93.1; 1000)": percent right of the results with these values, its interval, and their number."""
    right = [result["right"] for result in results if all(result[key] == value for key, value in where.items())]
    if not right:
        return "-"
    low, high = wilson(sum(right), len(right))
    return f"{100 * sum(right) / len(right):.1f} ({100 * low:.1f} to {100 * high:.1f}; {len(right):,})"


def table(results: list[dict]) -> str:
    """Accuracy per task and per language, as markdown."""
    lines = [[task, cell(results, task=task)] for task in TASKS if any(r["task"] == task for r in results)]
    lines += [[f"in {name}", cell(results, language=language)] for language, name in LANGUAGES.items()]
    return markdown.table(["Task", "Per cent right (interval; samples)"], [*lines, ["all", cell(results)]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", default=str(ROOT / "training" / "runs" / "small_stage2"))
    parser.add_argument(
        "--samples",
        type=int,
        default=6_000,
        help="questions, of all tasks and languages in turn (default: %(default)s)",
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, help="ask these alone")
    parser.add_argument("--max-tiles", type=int, help="of an image; otherwise the checkpoint's own")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--json", type=Path, help="write all answers here")
    args = parser.parse_args()

    processor = AutoProcessor.from_pretrained(args.checkpoint, trust_remote_code=True)
    if args.max_tiles:
        processor.image_processor.max_tiles = args.max_tiles
    model = AutoModelForImageTextToText.from_pretrained(
        args.checkpoint, trust_remote_code=True, dtype=torch.float32
    ).eval()
    started = time.perf_counter()
    results = evaluate(model, processor, args.samples, args.batch_size, tuple(args.tasks))
    print(table(results))
    print(
        f"\n{len(results):,} questions in {time.perf_counter() - started:.0f} s. "
        "Right means: exactly the expected words."
    )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
