"""Ask a checkpoint before and after a training the same questions: `python -m experiments.compare runs/grpo_counting`.

The questions are about fresh drawings of what training never draws: of each task in the four languages that
`checkpoints/tiny` was taught, and in Italian. What changes is given with its interval of 95 %, by resampling the
questions (bootstrap), and is paired: each question is asked of both.
"""

import argparse
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from jina_vlm_tools import markdown
from jina_vlm_tools.files import TINY
from jina_vlm_tools.synthetic.questions import LANGUAGES, TASKS, Sample, evaluation_sample
from jina_vlm_tools.synthetic.shapes_data import held_out_turn

from .eval_tiny import ask


RESAMPLES = 10_000


def questions(of_each: int) -> list[Sample]:
    """As many of each task in the taught languages together as in Italian."""
    kinds = [(task, language) for task in TASKS for language in LANGUAGES]
    taught = [evaluation_sample(seed, *kinds[seed % len(kinds)]) for seed in range(of_each * len(TASKS))]
    return taught + [Sample(*held_out_turn(seed)) for seed in range(of_each * len(TASKS))]


def interval(changes: list[int]) -> tuple[float, float]:
    """Of the mean, 95 %, in points."""
    rng, values = np.random.default_rng(0), np.array(changes)
    means = rng.choice(values, (RESAMPLES, len(values))).mean(axis=1)
    low, high = np.percentile(100 * means, [2.5, 97.5])
    return float(low), float(high)


def table(before: list[dict], after: list[dict]) -> str:
    """Right answers per task, in the taught languages and in Italian, and their changes."""

    def group(pair: tuple[dict, dict]) -> tuple[bool, int]:
        return pair[0]["language"] == "it", TASKS.index(pair[0]["task"])

    lines = []
    for (is_italian, task), pairs in groupby(sorted(zip(before, after, strict=True), key=group), key=group):
        right = [(one["right"], other["right"]) for one, other in pairs]
        changes = [int(other) - int(one) for one, other in right]
        low, high = interval(changes)
        shares = [f"{100 * np.mean(side):.1f}" for side in zip(*right, strict=True)]
        lines.append(
            [
                f"{TASKS[task]}, {'Italian' if is_italian else 'taught languages'}",
                *shares,
                f"{100 * np.mean(changes):+.1f} ({low:+.1f} to {high:+.1f})",
                str(len(right)),
            ]
        )
    return markdown.table(["Task", "Before, % right", "After", "Change in points (interval)", "Questions"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("trained", type=Path, help="an adapter of the small checkpoint, or a checkpoint")
    parser.add_argument("--questions", type=int, default=240, help="of each task, in Italian and in the others")
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args()

    processor = AutoProcessor.from_pretrained(TINY, trust_remote_code=True)
    is_adapter = (args.trained / "adapter_config.json").is_file()
    asked, results = questions(args.questions), []
    for trained in (None, args.trained):
        model = AutoModelForImageTextToText.from_pretrained(
            TINY if trained is None or is_adapter else trained, trust_remote_code=True, dtype=torch.float32
        )
        if trained is not None and is_adapter:
            model.load_adapter(str(trained))
        results.append(ask(model.eval(), processor, asked, args.batch_size))
    print(table(*results))


if __name__ == "__main__":
    main()
