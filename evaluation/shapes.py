"""The small checkpoint's questions as a file that the harnesses read: `python -m evaluation.shapes`.

They are those of `python -m experiments.eval_tiny`, in its order: images of seeds and color-shape pairs that training
never draws, and one question about each.
"""

import argparse
from pathlib import Path

from datasets import Dataset, Features, Image, Value

from jina_vlm_tools.synthetic.questions import LANGUAGES, TASKS, evaluation_sample
from jina_vlm_tools.synthetic.shapes import draw_scene


PATH = Path("build/evaluation/shapes.parquet")
FEATURES = Features(
    {"image": Image(), **{name: Value("string") for name in ("question", "answer", "task", "language")}}
)


def rows(samples: int) -> list[dict]:
    """`samples` rows of `FEATURES`, tasks and languages in turn."""
    kinds = [(task, language) for task in TASKS for language in LANGUAGES]
    result = []
    for seed in range(samples):
        sample = evaluation_sample(seed, *kinds[seed % len(kinds)])
        turn = sample.turn
        result.append(
            {
                "image": draw_scene(sample.scene),
                "question": turn.question,
                "answer": turn.answer,
                "task": turn.task,
                "language": turn.language,
            }
        )
    return result


def write(path: Path, samples: int) -> None:
    """Writes the questions to a parquet file; its folders are made where they are missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows(samples), features=FEATURES).to_parquet(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=PATH, help="(default: %(default)s)")
    parser.add_argument("--samples", type=int, default=240, help="(default: %(default)s)")
    args = parser.parse_args()
    if args.samples < 1:
        parser.error(f"--samples must be at least 1, got {args.samples}")
    write(args.output, args.samples)
    print(f"{args.samples} questions: {args.output}")


if __name__ == "__main__":
    main()
