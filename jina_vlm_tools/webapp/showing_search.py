"""What the tab for searching shows, as HTML: what was read, a question's words, and pages with their heat maps."""

import dataclasses
import html
from collections.abc import Iterator

from .searching import MAX_PAGES, Found, Hit, Library
from .showing import image_uri


NOTHING_READ = f'<p class="quiet">Up to {MAX_PAGES} pages. Nobody else sees them, and they are not kept.</p>'
NOTHING_FOUND = '<p class="quiet">Ask, and see here the pages that match best, and where.</p>'
CARD_SIDE = 480  # pixels
# Tells which of the buttons was clicked, and keeps the keyboard on it when it is drawn anew.
CLICKS = """
let last = null;
element.addEventListener("click", event => {
    const button = event.target.closest("button[data-number]");
    if (!button) return;
    last = button.dataset.number;
    trigger("click", {number: Number(last)});
});
watch("value", () => {
    if (last !== null) element.querySelector(`button[data-number="${last}"]`)?.focus({preventScroll: true});
    last = null;
});
"""


def show_reading(library: Library) -> str:
    """How many pages were read, and what could not be."""
    if not library.files:
        return NOTHING_READ
    done, total = library.done, library.total
    state = "Reading" if library.is_reading else "Stopped" if library.is_stopped else "Read"
    of = f"{done:,} of {total:,}" if done < total else f"{done:,}"
    noun = "page" if total == 1 else "pages"
    problems = "".join(
        f"<li><b>{html.escape(name)}:</b> {html.escape(text)}</li>" for name, text in _problems(library)
    )
    return (
        f'<p class="state" role="status">{state} <b>{of} {noun}</b></p>'
        f'<div class="bar"><i style="width: {100 * done / max(total, 1):.1f}%"></i></div>'
        + (f'<ul class="problems">{problems}</ul>' if problems else "")
    )


def _problems(library: Library) -> Iterator[tuple[str, str]]:
    """Names of files, and what is wrong with them."""
    for file in library.files:
        if file.error:
            yield file.name, _without_name(file.error, file.name)
        for page, error in file.errors.items():
            where = f"page {page}: " if file.pages > 1 else ""
            yield file.name, where + _without_name(error, file.name)
    for file in library.left_out:
        which = f"pages {file.next_page} to {file.pages} are" if file.vectors or file.errors else "it is"
        yield (
            file.name,
            f"{which} left out, as {library.max_pages} pages in all are searched. `jina-vlm index` takes more.",
        )


def _without_name(message: str, name: str) -> str:
    return message.removeprefix(name).lstrip(": ")


def show_words(found: Found | None) -> str:
    """The words of the question as buttons: each shows where it matched. The first one, number -1, shows all."""
    if found is None or not found.words:
        return ""
    shown = -1 if found.word is None else found.word
    buttons = "".join(
        f'<button type="button" data-number="{number}" aria-pressed="{_is(number == shown)}">'
        f"{html.escape(word)}</button>"
        for number, word in enumerate(["All words", *found.words], -1)
    )
    return (
        '<div class="words" role="group" aria-label="Show where a word matched"><span>Show matches of</span>'
        f"{buttons}</div>"
    )


def show_hits(found: Found | None) -> str:
    """The pages that were found, as buttons: each answers from its page."""
    if found is None:
        return NOTHING_FOUND
    cards = "".join(_card(number, hit, found) for number, hit in enumerate(found.hits))
    noun = "page" if found.searched == 1 else "pages"
    return (
        f'<ol class="hits">{cards}</ol><p class="quiet">{found.searched:,} {noun} searched in {found.seconds:.2f} s. '
        "Choose another page to have it answer.</p>"
    )


def _card(number: int, hit: Hit, found: Found) -> str:
    return (
        f'<li><button type="button" data-number="{number}" aria-pressed="{_is(number == found.chosen)}">'
        f"{_image(hit, found.word, CARD_SIDE)}"
        f'<span class="name"><i>{number + 1}</i> <b>{html.escape(hit.file.name)}</b>{_page(hit)}</span>'
        f'<span class="score"><i><i style="width: {100 * max(0, hit.score):.1f}%"></i></i>'
        f'<b title="How well a word is matched, on the mean: at most 1">{hit.score:.3f}</b></span></button></li>'
    )


def show_chosen(found: Found | None) -> str:
    """The page that is answered from, large."""
    if found is None:
        return ""
    return f"<figure>{_image(found.hits[found.chosen], found.word, None)}</figure>"


def show_source(found: Found | None) -> str:
    """Where the answer is from."""
    if found is None:
        return ""
    hit = found.hits[found.chosen]
    return (
        f'<p class="asked">{html.escape(found.question)}</p>'
        f'<p class="source">Answered from <b>{html.escape(hit.file.name)}</b>{_page(hit)}</p>'
    )


def _page(hit: Hit) -> str:
    return f" <span>page {hit.page} of {hit.file.pages}</span>" if hit.file.pages > 1 else ""


def _image(hit: Hit, word: int | None, side: int | None) -> str:
    """With color where the word matched, all words where it is None. No larger than `side`."""
    if hit.heat_map is None:
        return f'<span class="gone">{html.escape(hit.error)}</span>'
    image = hit.heat_map.image.copy()
    if side is not None:
        image.thumbnail((side, side))
    drawn = dataclasses.replace(hit.heat_map, image=image).draw(None if word is None else [word])
    what = "all words match" if word is None else f"“{hit.heat_map.words[word]}” matches"
    return (
        f'<img src="{image_uri(drawn)}" width="{drawn.width}" height="{drawn.height}" '
        f'alt="{html.escape(f"{hit}, red where {what}")}">'
    )


def _is(value: bool) -> str:
    return str(value).lower()
