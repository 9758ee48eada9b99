"""Images and questions to begin with. The images are drawn: of the kind that `checkpoints/tiny` was trained on, from
pairs of color and shape that training never drew."""

import random
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from jina_vlm_tools.synthetic.shapes import HELD_OUT_PAIRS, draw_scene, make_scene


@dataclass(frozen=True)
class Example:
    """An image of `shapes` shapes, drawn from `seed`; `size` is (width, height) in pixels. And a question about it."""

    seed: int
    shapes: int
    size: tuple[int, int]
    question: str

    def draw(self) -> Image.Image:
        scene = make_scene(random.Random(self.seed), HELD_OUT_PAIRS, self.shapes)
        return draw_scene(replace(scene, size=self.size))

    def save(self, folder: Path) -> Path:
        """The file of its image, in `folder`."""
        path = folder / f"shapes-{self.seed}-{self.size[0]}x{self.size[1]}.png"
        self.draw().save(path)
        return path


# They take one, twelve, four and one tiles.
EXAMPLES = (
    Example(17, 5, (360, 320), "Describe the picture."),
    Example(23, 5, (1280, 720), "¿Qué color tiene la cruz?"),
    Example(26, 5, (640, 480), "Où est la croix ?"),
    Example(24, 5, (300, 340), "Wie viele Formen gibt es?"),
)
