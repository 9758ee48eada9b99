"""Draw the guide's image of the page, `docs/page.png`: `python -m tests/external/web/screenshot.py`, or, with a
folder, in all its looks.

What is on it happened: a chat with `checkpoints/tiny` about an example, as tall as it needs to be for the tiles.
"""

import sys
from pathlib import Path

from browsing import PHONE, User, chromium
from PIL import Image

from jina_vlm_tools.inference.loading import load_on_device, load_processor_and_class, quiet_libraries
from jina_vlm_tools.webapp.examples import EXAMPLES
from jina_vlm_tools.webapp.layout import Page, launch_arguments


ROOT = Path(__file__).parents[3]
TARGET = ROOT / "docs" / "page.png"
QUESTIONS = ("Where is the cross?", "What colour is the circle?")
LOOKS = {"light": {"color_scheme": "light"}, "dark": {"color_scheme": "dark"}, "phone": PHONE}


def take(user: User, image: Path, target: Path) -> None:
    user.upload(image)
    user.canvas.wait_for()
    for number, question in enumerate(QUESTIONS, 1):
        user.ask(question)
        print(f"{question} {user.wait(number)}")
    user.page.wait_for_timeout(1000)  # until nothing moves
    user.page.screenshot(path=target, full_page=True)
    with Image.open(target) as shot:
        # 192 colors are plenty for a page
        shot.convert("RGB").quantize(192, dither=Image.Dither.NONE).save(target, optimize=True)
    print(f"Wrote {target} ({target.stat().st_size // 1024} KiB)")


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    quiet_libraries()
    processor, load_model = load_processor_and_class(str(ROOT / "checkpoints" / "tiny"))
    page = Page(load_on_device(load_model, "cpu"), processor, "checkpoints/tiny")
    blocks = page.build()
    _, url, _ = blocks.launch(prevent_thread_lock=True, quiet=True, **launch_arguments())
    image = EXAMPLES[2].save(Path(page.folder.name))
    with chromium() as browser:
        for name, options in LOOKS.items() if folder else [("light", LOOKS["light"])]:
            take(User(browser, url, **options), image, folder / f"{name}.png" if folder else TARGET)
    blocks.close(verbose=False)


if __name__ == "__main__":
    main()
