"""The images of the golden data (`golden/README.md`)."""

import numpy as np


def make_image(height: int, width: int, kind: str = "texture", seed: int = 0) -> np.ndarray:
    """[height, width, 3] uint8, from integers alone: no file is needed."""
    y, x = np.mgrid[:height, :width].astype(np.int64)
    channels = {
        "texture": lambda: (
            (7 * x + 13 * y + 29 * seed),
            (x * x // 31 + 5 * y + seed),
            (3 * x + y * y // 17 + 11 * seed),
        ),
        "gradient": lambda: (x * 255 // (width - 1), y * 255 // (height - 1), (x + y) * 255 // (height + width - 2)),
        "checker": lambda: [(x // 24 + y // 24 + seed) % 2 * 255] * 3,
        "black": lambda: [x * 0] * 3,
        "white": lambda: [x * 0 + 255] * 3,
        "halfblack": lambda: [(x < width // 2) * (c % 256) for c in (7 * x + 13 * y, 5 * x + 3 * y, x + 11 * y)],
    }[kind]()
    return (np.stack(channels, axis=-1) % 256).astype(np.uint8)
