"""Draw the tiny stage's data as files: `python -m jina_vlm_tools.synthetic.shapes_data --output runs/shapes`.

    train.parquet              images with conversations, as `images` and `texts`
    text.jsonl                 questions about a caption in the place of an image, as `messages`
    held_out.parquet           one question each, of pairs of color and shape that training never draws, as `image` and
                               `conversations`
    counting.parquet           how many shapes there are, one question each, in the same layout: every second one in
                               Italian, the others in the four languages
    held_out_counting.parquet  the same of pairs that training never draws, in Italian

The questions are in Italian, which `checkpoints/tiny` has never read, and some of the images' in its own four
languages, so that these are not forgotten.
"""

import argparse
import dataclasses
import random
from pathlib import Path

from .page_questions import ask_shapes, describe
from .pages import Page
from .questions import EVALUATION_SEEDS, LANGUAGES, TASKS, Turn, ask
from .shapes import HELD_OUT_PAIRS, TRAINING_PAIRS, Scene, draw_scene, make_scene
from .writing import write_images, write_questions, write_texts


def training_turns(seed: int) -> tuple[Scene, list[Turn]]:
    """An image, up to six questions in Italian and two in other languages, in any order."""
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


def text_turn(seed: int) -> Turn:
    """A question about a description in the place of an image."""
    scene, (turn, *_) = training_turns(seed)
    return dataclasses.replace(turn, question=f"{describe(Page('shapes', scene), 'it').answer} {turn.question}")


def counting_turn(seed: int) -> tuple[Scene, Turn]:
    """How many shapes there are, by turns in Italian and in another language."""
    rng = random.Random(f"counting {seed}")
    scene = make_scene(rng, TRAINING_PAIRS)
    return scene, ask_shapes(scene, "count", "it" if seed % 2 else rng.choice(LANGUAGES), rng)


def write(output: Path, images: int, texts: int, held_out: int, counting: int) -> None:
    """Five files in a folder."""
    output.mkdir(parents=True, exist_ok=True)
    trained = map(training_turns, range(images))
    write_images(output / "train.parquet", ((draw_scene(scene), turns) for scene, turns in trained))
    asked = map(held_out_turn, range(held_out))
    write_questions(output / "held_out.parquet", ((draw_scene(scene), turn) for scene, turn in asked))
    write_texts(output / "text.jsonl", ([text_turn(seed)] for seed in range(images, images + texts)))
    counted = map(counting_turn, range(counting))
    write_questions(output / "counting.parquet", ((draw_scene(scene), turn) for scene, turn in counted))
    asked = map(held_out_turn, range(TASKS.index("count"), held_out, len(TASKS)))
    write_questions(output / "held_out_counting.parquet", ((draw_scene(scene), turn) for scene, turn in asked))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--texts", type=int, default=500)
    parser.add_argument("--held-out", type=int, default=1280)
    parser.add_argument("--counting", type=int, default=400)
    args = parser.parse_args()
    write(args.output, args.images, args.texts, args.held_out, args.counting)


if __name__ == "__main__":
    main()
