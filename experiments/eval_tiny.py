"""Ask the small checkpoint about fresh images: `python -m experiments.eval_tiny`.

The images come from seeds and color-shape pairs that training never draws. Each is asked one question, answered
greedily, and right if the answer's words are exactly the expected ones.
"""

import argparse
import json
import time
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from jina_vlm_tools import markdown
from jina_vlm_tools.files import TINY
from jina_vlm_tools.synthetic.questions import LANGUAGES, TASKS, evaluation_sample, normalize
from jina_vlm_tools.training.answers import answer


LANGUAGE_NAMES = {"en": "English", "de": "German", "es": "Spanish", "fr": "French"}
MAX_NEW_TOKENS = 12


def ask(model, processor, samples: list, batch_size: int) -> list[dict]:
    """Of each sample, which has a `turn` and a `question()`: its task, language, question, expected and given answer,
    and whether they agree."""
    results = []
    for start in tqdm(range(0, len(samples), batch_size), unit="batch"):
        batch = samples[start : start + batch_size]
        given = answer(model, processor, [sample.question() for sample in batch], MAX_NEW_TOKENS)
        for sample, text in zip(batch, given, strict=True):
            turn = sample.turn
            results.append(
                {
                    "task": turn.task,
                    "language": turn.language,
                    "question": turn.question,
                    "expected": turn.answer,
                    "given": text.strip(),
                    "right": normalize(text) == normalize(turn.answer),
                }
            )
    return results


def choose(samples: int) -> list:
    """Fresh drawings with a question each, the same number for each task and language."""
    kinds = [(task, language) for task in TASKS for language in LANGUAGES]
    return [evaluation_sample(seed, *kinds[seed % len(kinds)]) for seed in range(samples)]


def evaluate(model, processor, samples: int, batch_size: int) -> list[dict]:
    """What [`ask`] gives for `samples` questions, the same number for each task and language."""
    return ask(model, processor, choose(samples), batch_size)


def accuracy(results: list[dict], **where: str) -> tuple[float, int]:
    """Share of right answers among the results with these values, and how many these are."""
    right = [result["right"] for result in results if all(result[key] == value for key, value in where.items())]
    return (sum(right) / len(right) if right else float("nan")), len(right)


def chance(results: list[dict], task: str) -> float:
    """Accuracy of always giving each language's most frequent answer."""
    frequent, number = 0, 0
    for language in LANGUAGES:
        answers = Counter(r["expected"] for r in results if r["task"] == task and r["language"] == language)
        frequent += max(answers.values(), default=0)
        number += answers.total()
    return frequent / number if number else float("nan")


def table(results: list[dict]) -> str:
    """Accuracy in per cent as a markdown table: tasks down, languages across, numbers of samples in brackets."""
    header = ["task", *(LANGUAGE_NAMES[language] for language in LANGUAGES), "all", "chance"]
    lines = []

    def cell(**where: str) -> str:
        share, number = accuracy(results, **where)
        return f"{100 * share:.1f} ({number})"

    for task in TASKS:
        cells = [cell(task=task, language=language) for language in LANGUAGES]
        lines.append([task, *cells, cell(task=task), f"{100 * chance(results, task):.1f}"])
    overall = sum(chance(results, task) for task in TASKS) / len(TASKS)
    lines.append(["all", *(cell(language=language) for language in LANGUAGES), cell(), f"{100 * overall:.1f}"])
    return markdown.table(header, lines)


def card_results(results: list[dict]) -> dict:
    """What a model card says of these: the command that prints them, and `huggingface_hub.EvalResult`'s arguments."""
    kinds = [("All tasks and languages", {})] + [(f"Task: {task}", {"task": task}) for task in TASKS]
    return {
        "command": "make eval-tiny",
        "results": [
            {
                "task_type": "image-text-to-text",
                "dataset_type": "colored-shapes",
                "dataset_name": f"Colored shapes, pairs never trained on. {name}",
                "dataset_split": "held out",
                "metric_type": "accuracy",
                "metric_name": "Accuracy, per cent",
                "metric_value": round(100 * accuracy(results, **where)[0], 1),
            }
            for name, where in kinds
            if accuracy(results, **where)[1]
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", default=str(TINY))
    parser.add_argument(
        "--samples", type=int, default=960, help="questions, of all tasks and languages in turn (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--json", type=Path, help="write all answers here")
    parser.add_argument("--results", type=Path, help="write the accuracy here, as the model card takes it")
    args = parser.parse_args()

    processor = AutoProcessor.from_pretrained(args.checkpoint, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(
        args.checkpoint, trust_remote_code=True, dtype=torch.float32
    ).eval()
    started = time.perf_counter()
    results = evaluate(model, processor, args.samples, args.batch_size)
    print(table(results))
    print(
        f"\n{len(results)} questions in {time.perf_counter() - started:.0f} s. "
        "Right means: exactly the expected words."
    )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if args.results:
        args.results.write_text(json.dumps(card_results(results), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
