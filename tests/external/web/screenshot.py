"""Draw the guide's images of the page: `python tests/external/web/screenshot.py`, with a folder in all its looks.

What is on them happened: `docs/page.png` is a chat with `checkpoints/tiny` about an example, as tall as it needs to be
for the tiles; `docs/search_tab.png` a search in drawn pages with its adapter.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from browsing import DONE, PHONE, User, chromium
from PIL import Image

from jina_vlm_tools.files import TINY_RETRIEVAL
from jina_vlm_tools.inference.loading import load_on_device, load_processor_and_class, quiet_libraries
from jina_vlm_tools.webapp.examples import EXAMPLES
from jina_vlm_tools.webapp.layout import Page, launch_arguments


ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs"
QUESTIONS = ("Where is the cross?", "What colour is the circle?")
LOOKS = {"light": {"color_scheme": "light"}, "dark": {"color_scheme": "dark"}, "phone": PHONE}


def chat(user: User, page: Page) -> None:
    user.upload(EXAMPLES[2].save(Path(page.folder.name)))
    user.canvas.wait_for()
    for number, question in enumerate(QUESTIONS, 1):
        user.ask(question)
        print(f"{question} {user.wait(number)}")


def search(user: User, page: Page) -> None:
    user.page.get_by_role("tab", name="Search").click()
    user.page.locator("#search-example").click()
    user.page.get_by_text("Read 10 pages").wait_for(timeout=DONE)
    user.page.locator("#search-send").click()
    user.page.locator("#search-stop").wait_for(state="hidden", timeout=DONE)
    user.page.locator("#answer p").wait_for(timeout=DONE)
    print(user.page.locator("#source").inner_text(), user.page.locator("#answer").inner_text())


def take(user: User, target: Path, colors: int | None) -> None:
    user.page.mouse.move(0, 0)
    user.page.wait_for_timeout(1000)  # until nothing moves
    user.page.screenshot(path=target, full_page=True)
    with Image.open(target) as opened:
        shot = opened.convert("RGB")
    (shot.quantize(colors, dither=Image.Dither.NONE) if colors else shot).save(target, optimize=True)
    print(f"Wrote {target} ({target.stat().st_size // 1024} KiB)")


def draw(
    page: Page, name: str, act: Callable[[User, Page], None], folder: Path | None, colors: int | None = None
) -> None:
    """`colors`: as many as are plenty for it; all, where it is None."""
    blocks = page.build()
    _, url, _ = blocks.launch(prevent_thread_lock=True, quiet=True, **launch_arguments())
    with chromium() as browser:
        for look, options in LOOKS.items() if folder else [("light", LOOKS["light"])]:
            user = User(browser, url, **options)
            act(user, page)
            take(user, folder / f"{name}-{look}.png" if folder else DOCS / f"{name}.png", colors)
    blocks.close(verbose=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="for all looks, and none of the guide's")
    parser.add_argument("--retrieval", default=str(TINY_RETRIEVAL), help="(default: %(default)s)")
    parser.add_argument("--only", choices=("page", "search_tab"), help="one of them (default: both)")
    args = parser.parse_args()
    quiet_libraries()
    processor, load_model = load_processor_and_class(str(ROOT / "checkpoints" / "tiny"))
    model = load_on_device(load_model, "cpu")
    if args.only != "search_tab":
        draw(Page(model, processor, "checkpoints/tiny"), "page", chat, args.folder, 192)
    if args.only != "page":
        from jina_vlm_tools.webapp.search_tab import SearchTab
        from jina_vlm_tools.webapp.searching import load_embedder

        tab = SearchTab(load_embedder(model, args.retrieval), model, processor)
        draw(Page(model, processor, "checkpoints/tiny", search=tab), "search_tab", search, args.folder)


if __name__ == "__main__":
    main()
