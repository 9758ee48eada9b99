"""Draw the tiny stage's data as files: `python -m training.shapes_data --output training/runs/shapes`.

    train.parquet     pictures with conversations, as `images` and `texts`
    text.jsonl        questions about a caption in the place of a picture, as `messages`
    held_out.parquet  one question each, of pairs of colour and shape that training never draws, as `image` and `conversations`

The questions are in Italian, which `checkpoints/tiny` has never read, and some of the pictures' in its own four languages, so that
these are not forgotten.
"""

import argparse
import io
import json
import random
from pathlib import Path

import datasets

from .page_questions import ask_shapes, describe
from .pages import Page
from .questions import EVALUATION_SEEDS, LANGUAGES, TASKS, Turn, ask
from .shapes import HELD_OUT_PAIRS, TRAINING_PAIRS, Scene, draw_scene, make_scene


def training_turns(seed: int) -> tuple[Scene, list[Turn]]:
    """A picture, up to six questions in Italian and two in other languages, in any order."""
    rng = random.Random(f"italian {seed}")
    scene = make_scene(rng, TRAINING_PAIRS)
    turns = [ask_shapes(scene, rng.choice(TASKS), "it", rng) for _ in range(6)]
    turns += [ask(scene, rng.choice(TASKS), rng.choice(LANGUAGES), rng) for _ in range(2)]
    turns = [turn for turn in dict.fromkeys(turns) if turn] or [ask_shapes(scene, "count", "it", rng)]
    rng.shuffle(turns)
    return scene, turns


def held_out_turn(seed: int) -> tuple[Scene, Turn]:
    """Every task in turn, in Italian."""
    rng = random.Random(EVALUATION_SEEDS + seed)
    turn = None
    while turn is None:
        scene = make_scene(rng, HELD_OUT_PAIRS)
        turn = ask_shapes(scene, TASKS[seed % len(TASKS)], "it", rng)
    return scene, turn


def png(picture) -> dict:
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return {"bytes": file.getvalue(), "path": None}


def picture_rows(seeds: range):
    for seed in seeds:
        scene, turns = training_turns(seed)
        yield {"images": [png(draw_scene(scene))], "texts": [{"user": turn.question, "assistant": turn.answer} for turn in turns]}


def text_rows(seeds: range):
    for seed in seeds:
        scene, (turn, *_) = training_turns(seed)
        question = f"{describe(Page('shapes', scene), 'it').answer} {turn.question}"
        yield {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": turn.answer}]}


def held_out_rows(seeds: range):
    for seed in seeds:
        scene, turn = held_out_turn(seed)
        conversation = [{"from": "human", "value": f"<image>\n{turn.question}"}, {"from": "gpt", "value": turn.answer}]
        yield {"image": png(draw_scene(scene)), "conversations": conversation}


def write(output: Path, pictures: int, texts: int, held_out: int) -> None:
    """Three files in a folder."""
    output.mkdir(parents=True, exist_ok=True)
    turn = {"user": datasets.Value("string"), "assistant": datasets.Value("string")}
    datasets.Dataset.from_list(
        list(picture_rows(range(pictures))), features=datasets.Features(images=datasets.List(datasets.Image()), texts=datasets.List(turn))
    ).to_parquet(output / "train.parquet")
    turn = {"from": datasets.Value("string"), "value": datasets.Value("string")}
    datasets.Dataset.from_list(
        list(held_out_rows(range(held_out))), features=datasets.Features(image=datasets.Image(), conversations=datasets.List(turn))
    ).to_parquet(output / "held_out.parquet")
    with open(output / "text.jsonl", "w", encoding="utf-8") as file:
        for row in text_rows(range(pictures, pictures + texts)):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=3000)
    parser.add_argument("--texts", type=int, default=500)
    parser.add_argument("--held-out", type=int, default=400)
    args = parser.parse_args()
    write(args.output, args.pictures, args.texts, args.held_out)


if __name__ == "__main__":
    main()
