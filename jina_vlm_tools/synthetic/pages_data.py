"""Draw what the small model grows on: `python -m jina_vlm_tools.synthetic.pages_data --output runs/pages`.

stage1/pages.parquet      everything on a page described, as `images` and `texts` stage1/text.jsonl         such a
description in the place of a page, and a question about it, as `messages` stage2/<task>.parquet     pages of each task
with questions, as `images` and `texts` stage2/text.jsonl         as above held_out.parquet          one question each,
of shapes and words that training never draws, as `image` and `conversations`
"""

import argparse
import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .page_questions import LANGUAGES, TASKS, ask_page, describe
from .pages import HELD_OUT_WORDS, Page, draw_page, make_board, make_chart, make_small_print, make_table
from .questions import EVALUATION_SEEDS, Turn, show
from .shapes import HELD_OUT_PAIRS, TRAINING_PAIRS, make_scene
from .writing import write_images, write_questions, write_texts


# Questions about one page
MOST = {"shapes": 6, "numbers": 6, "words": 6, "tables": 6, "charts": 4, "small print": 1}


def task_page(task: str, rng: random.Random, pairs, words: list[str] | None = None) -> Page:
    """A page that a task's questions can be asked about."""
    match task:
        case "shapes":
            return Page("shapes", make_scene(rng, pairs))
        case "numbers" | "words":
            return make_board(rng, pairs, words, numbers=0.75 if task == "numbers" else 0.25)
        case "tables":
            return make_table(rng)
        case "charts":
            return make_chart(rng)
        case "small print":
            return make_small_print(rng, pairs, words)
    raise ValueError(f"Expected one of {', '.join(TASKS)}, got {task!r}.")


def stage1_turns(seed: int) -> tuple[Page, list[Turn]]:
    """A page and its description."""
    rng = random.Random(f"stage 1, {seed}")
    task = rng.choices(("shapes", "numbers", "words", "tables", "charts"), (20, 25, 30, 12, 13))[0]
    page = task_page(task, rng, TRAINING_PAIRS)
    return page, [describe(page, rng.choice(list(LANGUAGES)))]


def stage2_turns(task: str, seed: int) -> tuple[Page, list[Turn]]:
    """A page of a task, and questions in mixed languages; no fact is asked for twice."""
    rng = random.Random(f"{task}, {seed}")
    turns = []
    while not turns:
        page = task_page(task, rng, TRAINING_PAIRS)
        tries = (ask_page(page, task, rng.choice(list(LANGUAGES)), rng) for _ in range(4 * MOST[task]))
        if task == "shapes":  # half of them have the same answers
            turns = list(dict.fromkeys(turn for turn in tries if turn))[: MOST[task]]
        else:
            turns = list({turn.answer: turn for turn in tries if turn}.values())[: MOST[task]]
    return page, turns


def text_turn(seed: int) -> Turn:
    """A question about a page that is described in words."""
    rng = random.Random(f"text, {seed}")
    language, turn = rng.choice(list(LANGUAGES)), None
    while turn is None:
        task = rng.choice([task for task in TASKS if task != "small print"])
        page = task_page(task, rng, TRAINING_PAIRS)
        turn = ask_page(page, task, language, rng)
    return dataclasses.replace(turn, question=f"{describe(page, language).answer} {turn.question}")


class PageSample(NamedTuple):
    """A page and a question about it."""

    page: Page
    turn: Turn

    def question(self) -> list[dict]:
        """The conversation for a chat template, up to the question."""
        return show(draw_page(self.page), self.turn)


def held_out_sample(seed: int, task: str, language: str) -> PageSample:
    """A page of shapes, or with words, that training never draws, and one question. Seeds count from 0 here too, and
    are moved out of training's reach."""
    rng = random.Random(f"held out, {EVALUATION_SEEDS + seed}")
    turn = None
    while turn is None:
        page = task_page(task, rng, HELD_OUT_PAIRS, HELD_OUT_WORDS[language])
        turn = ask_page(page, task, language, rng)
    return PageSample(page, turn)


def held_out_samples(number: int) -> Iterator[PageSample]:
    """So many, of all tasks and languages in turn."""
    kinds = [(task, language) for language in LANGUAGES for task in TASKS]
    for seed in range(number):
        yield held_out_sample(seed, *kinds[seed % len(kinds)])


def write(output: Path, stage1: int, stage2: int, texts: int, held_out: int) -> None:
    """All files: pages for stage one and for each task of stage two, texts for each stage, and held-out questions."""
    for stage in ("stage1", "stage2"):
        (output / stage).mkdir(parents=True, exist_ok=True)
    described = map(stage1_turns, range(stage1))
    write_images(output / "stage1" / "pages.parquet", ((draw_page(page), turns) for page, turns in described))
    write_texts(output / "stage1" / "text.jsonl", ([text_turn(seed)] for seed in range(texts)))
    for task in TASKS:
        asked = (stage2_turns(task, seed) for seed in range(stage2))
        write_images(
            output / "stage2" / f"{task.replace(' ', '_')}.parquet",
            ((draw_page(page), turns) for page, turns in asked),
        )
    write_texts(output / "stage2" / "text.jsonl", ([text_turn(seed)] for seed in range(texts, 2 * texts)))
    write_questions(
        output / "held_out.parquet", ((draw_page(sample.page), sample.turn) for sample in held_out_samples(held_out))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--stage1", type=int, default=10_000, help="pages of stage one (default: %(default)s)")
    parser.add_argument(
        "--stage2", type=int, default=3_000, help="pages of each task of stage two (default: %(default)s)"
    )
    parser.add_argument("--texts", type=int, default=2_000, help="of each stage (default: %(default)s)")
    parser.add_argument("--held-out", type=int, default=180)
    args = parser.parse_args()
    write(args.output, args.stage1, args.stage2, args.texts, args.held_out)


if __name__ == "__main__":
    main()
