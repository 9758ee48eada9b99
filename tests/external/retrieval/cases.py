"""What the engines embed, in each of the environments: a role, and a text, images or both."""

from functools import lru_cache

from jina_vlm_tools.files import TINY


CHECKPOINT = str(TINY)
MAX_TILES = 4
TOLERANCE = 1e-5
DIMS = 32
# What each folder of the reference holds; see `reference`
ALL, DECODER, DENSE, MULTI = "all", "decoder", "dense", "multi"
VECTORS = "vectors.npz"


@lru_cache
def shapes(seed: int, width: int = 378, height: int = 378):
    """An image of a few colored shapes. Its size decides the number of its tiles."""
    from jina_vlm_tools.synthetic.questions import evaluation_sample
    from jina_vlm_tools.synthetic.shapes import draw_scene

    return draw_scene(evaluation_sample(seed, "count", "en").scene).resize((width, height))


@lru_cache
def cases() -> dict[str, tuple[str, dict]]:
    """Role and content by name."""
    return {
        "short query": ("query", {"text": "a red circle"}),
        "long query": ("query", {"text": "Which page shows two green triangles beside a blue star? " * 4}),
        "text": ("document", {"text": "Ein roter Kreis liegt über einem grünen Dreieck."}),
        "2 tiles": ("document", {"image": [shapes(1)]}),
        "5 tiles": ("document", {"image": [shapes(2, 640, 480)]}),
        "both": ("document", {"image": [shapes(3, 300, 500)], "text": "a red circle"}),
        "two images": ("document", {"image": [shapes(4), shapes(5, 640, 480)], "text": "and a text"}),
    }


def of_role(role: str) -> list[str]:
    return [name for name, (wanted, _) in cases().items() if wanted == role]
