"""Draw the guide's images: `make figures`. `docs/tiling.png` shows how an image becomes tiles and tokens, as `jina-vlm
tiles` shows it for any image; `docs/shapes.png` is one that the guide's examples ask about."""

import argparse

from jina_vlm import JinaVLMImageProcessor
from PIL import Image, ImageDraw

from jina_vlm_tools.files import ROOT
from jina_vlm_tools.inference.drawing import draw_page
from jina_vlm_tools.inference.tiling import compute_tiling
from jina_vlm_tools.synthetic.questions import evaluation_sample
from jina_vlm_tools.synthetic.shapes import draw_scene


TILING = ROOT / "docs" / "tiling.png"
SHAPES = ROOT / "docs" / "shapes.png"
SHAPES_SEED = 76
SIZE = (900, 640)


def draw_landscape() -> Image.Image:
    """Something with detail near the tiles' seams."""
    width, height = (2 * side for side in SIZE)  # averaged down in the end, for smooth edges
    image = Image.new("RGB", (width, height))
    canvas = ImageDraw.Draw(image)
    for y in range(height):
        share = y / height
        canvas.line((0, y, width, y), fill=(int(120 + 125 * share), int(180 + 40 * share), int(235 - 45 * share)))
    canvas.ellipse((1330, 130, 1570, 370), fill=(255, 226, 120))
    for x, y, scale in ((250, 190, 1.0), (820, 120, 0.8), (1180, 330, 0.6)):
        for dx, dy, radius in ((0, 0, 70), (80, -30, 85), (165, 0, 65), (80, 25, 70)):
            box = [
                x + scale * (dx - radius),
                y + scale * (dy - radius),
                x + scale * (dx + radius),
                y + scale * (dy + radius),
            ]
            canvas.ellipse(box, fill=(250, 251, 253))
    canvas.polygon(
        [(0, 860), (330, 430), (620, 760), (940, 380), (1330, 800), (1560, 560), (1800, 800), (1800, 1280), (0, 1280)],
        fill=(110, 132, 168),
    )
    for x, y, spread in ((330, 430, 88), (940, 380, 100), (1560, 560, 70)):
        canvas.polygon(
            [(x, y), (x - 0.72 * spread, y + spread), (x, y + 0.72 * spread), (x + 0.9 * spread, y + spread)],
            fill="white",
        )
    canvas.ellipse((-700, 760, 1300, 1900), fill=(92, 156, 92))
    canvas.ellipse((600, 850, 2500, 2000), fill=(116, 178, 98))
    canvas.polygon(
        [(880, 1280), (1010, 1000), (1060, 870), (1084, 870), (1075, 1000), (1120, 1280)], fill=(222, 200, 156)
    )
    canvas.rectangle((360, 800, 640, 1010), fill=(246, 236, 216))
    canvas.polygon([(325, 805), (500, 660), (675, 805)], fill=(186, 70, 58))
    canvas.rectangle((470, 890, 540, 1010), fill=(120, 78, 50))
    for x in (390, 570):
        canvas.rectangle((x, 850, x + 48, 905), fill=(96, 150, 200), outline="white", width=6)
    for x, y, size in ((150, 1000, 1.2), (760, 930, 0.9), (1330, 990, 1.3), (1530, 940, 1.0), (1690, 1050, 1.4)):
        canvas.rectangle((x - 12 * size, y, x + 12 * size, y + 90 * size), fill=(104, 72, 48))
        for lift, spread in ((0, 90), (70, 72), (135, 52)):
            tip = (x, y - size * (lift + 130))
            canvas.polygon(
                [tip, (x - size * spread, y - size * lift), (x + size * spread, y - size * lift)], fill=(36, 104, 70)
            )
    return image.reduce(2)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    page = draw_page(compute_tiling(draw_landscape(), JinaVLMImageProcessor()))
    # 128 colors are plenty for a drawing
    page.quantize(128, dither=Image.Dither.NONE).save(TILING, optimize=True)
    draw_scene(evaluation_sample(SHAPES_SEED, "position", "en").scene).save(SHAPES, optimize=True)
    for path in (TILING, SHAPES):
        print(f"Wrote {path} ({path.stat().st_size // 1024} KiB)")


if __name__ == "__main__":
    main()
