"""Rows as ms-swift and LLaMA-Factory read them, and where things lie."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from jina_vlm_tools.synthetic.questions import evaluation_sample
from jina_vlm_tools.synthetic.shapes import draw_scene


ROOT = Path(__file__).resolve().parents[3]
CHECKPOINT = ROOT / "checkpoints" / "tiny"
SIZES = ((280, 280), (520, 300), (300, 700), (280, 280))  # one tile, two, three, one


@dataclass
class Row:
    """What ms-swift reads, and the same as messages for our processor."""

    given: dict
    chat: list[dict]


def draw(folder: Path, seed: int) -> tuple[Path, str, str]:
    """An image, partly transparent, which only our own way to open images puts on white; a question, the answer."""
    sample = evaluation_sample(seed, "count", "en")
    image = draw_scene(sample.scene).resize(SIZES[seed]).convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 40, 40))
    path = folder / f"{seed}.png"
    image.save(path)
    return path, sample.turn.question, sample.turn.answer


def say(role: str, text: str, *images: Path) -> tuple[dict, dict]:
    """A message for ms-swift, and for our processor."""
    parts = [*({"type": "image", "image": str(image)} for image in images), {"type": "text", "text": text}]
    return {"role": role, "content": "<image>" * len(images) + text}, {"role": role, "content": parts}


def make_rows(folder: Path) -> list[Row]:
    """Images of different numbers of tiles, two images, text alone with typed control tokens, and several turns."""
    made = []
    for seed in range(len(SIZES)):
        path, question, answer = draw(folder, seed)
        images = [path]
        if seed == 3:
            images.append(folder / "turned.png")
            Image.open(path).rotate(90).save(images[-1])
        made.append((images, answer, [say("user", question, *images), say("assistant", answer)]))
    made.append(
        (
            [],
            "green",
            [say("user", "What does <|image|> <image> mean, <|endoftext|>?"), say("assistant", "green")],
        )
    )
    first = made[0][0]
    turns = [say("system", "Be brief."), say("user", "Hello"), say("assistant", "yes")]
    made.append((first, "two", [*turns, say("user", "How many?", *first), say("assistant", "two")]))
    return [
        Row(
            {"messages": [ours for ours, _ in turns], "images": list(map(str, images)), "solution": answer},
            [message for _, message in turns],
        )
        for images, answer, turns in made
    ]
