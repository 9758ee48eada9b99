"""Draw what the grids are trained on and asked: `python -m experiments.grid_data --output runs/grid/data`.

    stage1/     pages described, as `images` and `texts`; texts alone, as `messages`; mixture.yaml
    stage2/     questions about pages and about texts; mixture.yaml
    held_out/   one question each, about pages from other seeds, a file for each column of the results

A page is one tile of 126 pixels: a drawing of shapes, a board of shapes and numbers, a table or a bar chart. Each
sample has one task, one domain and one language, so that any of them can be left out.
"""

import argparse
import dataclasses
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml
from PIL import Image

from jina_vlm_tools.synthetic.page_questions import ask_page, ask_shapes, describe
from jina_vlm_tools.synthetic.pages import (
    ADVANCE,
    COLUMNS,
    HIGHEST,
    Bar,
    Page,
    Text,
    draw_page,
    random_number,
)
from jina_vlm_tools.synthetic.questions import Turn
from jina_vlm_tools.synthetic.shapes import ALL_PAIRS, COLORS, PLACES, Scene, make_scene
from jina_vlm_tools.synthetic.writing import write_images, write_questions, write_texts
from jina_vlm_tools.training.mixture import MixtureSettings, SourceSettings


SIDE = 126  # pixels of a page, and of a tile
MOST = 4  # questions about a page
LANGUAGES = {"English": ("en",), "not English": ("de", "es")}
NOT_ENGLISH = 0.3  # of all samples
TEXT = 0.15  # of all samples, as in the paper's first stage

# What is asked in which domain: (task, domain), and its share of the images of stage two
QUESTIONS = {
    ("questions", "drawings"): 0.25,
    ("counting", "drawings"): 0.12,
    ("questions", "boards"): 0.13,
    ("reading", "boards"): 0.15,
    ("reading", "tables"): 0.17,
    ("questions", "charts"): 0.18,
}
DOMAINS = {"drawings": 0.25, "boards": 0.25, "tables": 0.25, "charts": 0.25}  # of the images of stage one

# ---------------------------------------------------------------------------------------------------------------------
# Pages of one small tile
# ---------------------------------------------------------------------------------------------------------------------


def make_page(domain: str, rng: random.Random, crowded: bool = False) -> Page:
    """A page of a domain; drawings and boards may be `crowded`, so that more is learned from one."""
    match domain:
        case "drawings":
            return Page("shapes", _shapes(rng, rng.randint(4, len(PLACES)) if crowded else None))
        case "boards":
            return _board(rng, most=len(PLACES) - 2 if crowded else 3)
        case "tables":
            return _table(rng)
        case "charts":
            return _chart(rng)
    raise ValueError(f"Expected one of {', '.join(DOMAINS)}, got {domain!r}.")


def _shapes(rng: random.Random, number: int | None = None) -> Scene:
    return dataclasses.replace(make_scene(rng, ALL_PAIRS, number=number), size=(SIDE, SIDE))


def _board(rng: random.Random, most: int = 3) -> Page:
    """One or two shapes and up to so many numbers of one or two digits, each in a cell of its own."""
    scene = _shapes(rng, rng.randint(1, 2))
    free = [place for place in PLACES if all(shape.place != place for shape in scene.shapes)]
    numbers = []
    for place in rng.sample(free, rng.randint(1, most)):
        row, column = divmod(PLACES.index(place), 3)
        middle = ((column + 0.5) * SIDE / 3 + rng.uniform(-5, 5), (row + 0.5) * SIDE / 3 + rng.uniform(-8, 8))
        numbers.append(Text(random_number(rng, rng.randint(1, 2)), middle, rng.randint(20, 24), place=place))
    return Page("board", scene, tuple(numbers))


def _table(rng: random.Random) -> Page:
    """Two or three columns, from A, and two or three rows, from 1, of two-digit numbers."""
    columns, rows = rng.randint(2, 3), rng.randint(2, 3)
    width, height = SIDE / (columns + 1), SIDE / (rows + 1)
    size = min(24, int(0.9 * width / ADVANCE / 2))

    def middle(column: int, row: int) -> tuple[float, float]:
        return (column + 1.5) * width, (row + 1.5) * height

    cells = [(column, row) for row in range(rows) for column in range(columns)]
    numbers = [Text(random_number(rng, 2), middle(*cell), size, cell=cell) for cell in cells]
    labels = [Text(COLUMNS[column], middle(column, -1), size) for column in range(columns)]
    labels += [Text(str(row + 1), middle(-1, row), size) for row in range(rows)]
    lines = [((column + 1) * width, 0, (column + 1) * width, SIDE) for column in range(columns)]
    lines += [(0, (row + 1) * height, SIDE, (row + 1) * height) for row in range(rows)]
    return Page("table", empty(rng), tuple(numbers), tuple(labels), lines=tuple(lines))


def _chart(rng: random.Random) -> Page:
    """Two to four bars of different colors, 1 to 9 high."""
    number, unit = rng.randint(2, 4), (SIDE - 8) / HIGHEST
    width, bottom = SIDE / number, SIDE - 4
    bars = []
    for index, color in enumerate(rng.sample(list(COLORS), number)):
        height, left = rng.randint(1, HIGHEST), (index + 0.15) * width
        bars.append(Bar((left, bottom - height * unit, left + 0.7 * width, bottom), color, height))
    lines = [(0, bottom - value * unit, SIDE, bottom - value * unit) for value in range(HIGHEST + 1)]
    return Page("chart", empty(rng), bars=tuple(bars), lines=tuple(lines))


def empty(rng: random.Random) -> Scene:
    """A page's background."""
    gray = rng.randint(222, 255)
    return Scene((SIDE, SIDE), tuple(min(255, gray + rng.randint(-12, 12)) for _ in range(3)), ())


# ---------------------------------------------------------------------------------------------------------------------
# Samples
# ---------------------------------------------------------------------------------------------------------------------


def ask(page: Page, task: str, language: str, rng: random.Random) -> Turn | None:
    """A question of a task about a page; None where the page allows none."""
    if task == "reading":
        return ask_page(page, "tables" if page.kind == "table" else "numbers", language, rng)
    if page.kind == "chart":
        return ask_page(page, "charts", language, rng)
    kind = "count" if task == "counting" else rng.choice(("kind", "color", "position"))
    return ask_shapes(page.scene, kind, language, rng)


def described(domain: str, language: str, rng: random.Random) -> tuple[Page, list[Turn]]:
    """A page and its description."""
    page = make_page(domain, rng)
    return page, [describe(page, language)]


def questioned(task: str, domain: str, language: str, rng: random.Random) -> tuple[Page, list[Turn]]:
    """A page and up to `MOST` questions about it, none twice."""
    turns = []
    while not turns:
        page = make_page(domain, rng)
        tries = [ask(page, task, language, rng) for _ in range(2 * MOST)]
        turns = list({turn.question: turn for turn in tries if turn}.values())[:MOST]
    return page, turns


def texts(language: str, rng: random.Random) -> list[Turn]:
    """Two questions about a page that is described in words, before the first of them."""
    task, domain = rng.choice(list(QUESTIONS))
    page, turns = questioned(task, domain, language, rng)
    first = dataclasses.replace(turns[0], question=f"{describe(page, language).answer} {turns[0].question}")
    return [first, *turns[1:2]]


# What is asked after each training, and of which (task, domain) it is; English, but for the last
COLUMNS_ASKED = {
    "shapes": [("questions", "drawings")],
    "counting": [("counting", "drawings")],
    "shapes on boards": [("questions", "boards")],
    "numbers": [("reading", "boards")],
    "tables": [("reading", "tables")],
    "charts": [("questions", "charts")],
    "text": None,
    "not English": list(QUESTIONS),
}


def held_out_file(folder: Path, column: str) -> Path:
    return folder / f"{column}{'.jsonl' if COLUMNS_ASKED[column] is None else '.parquet'}"


def held_out(column: str, index: int) -> tuple[Page | None, Turn]:
    """A question of a column, and its page; None for text alone."""
    rng = random.Random(f"held out, {column}, {index}")
    kinds, language = COLUMNS_ASKED[column], LANGUAGES.get(column, ("en",))
    if kinds is None:
        return None, texts("en", rng)[0]
    page, turns = questioned(*kinds[index % len(kinds)], language[index // len(kinds) % len(language)], rng)
    return page, turns[0]


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def _draw(samples: Iterator[tuple[Page, list[Turn]]]) -> Iterator[tuple[Image.Image, list[Turn]]]:
    return ((draw_page(page), turns) for page, turns in samples)


def _sources(stage: int) -> Iterator[tuple[SourceSettings, Callable[[str, random.Random], tuple | list]]]:
    """Each source of a stage, and what makes a sample of it, in a language."""
    kinds = {("description", domain): share for domain, share in DOMAINS.items()} if stage == 1 else QUESTIONS
    for group in LANGUAGES:
        part = NOT_ENGLISH if group == "not English" else 1 - NOT_ENGLISH
        for (task, domain), share in kinds.items():
            name = f"{task}_{domain}_{group}".replace(" ", "_")
            weight = (1 - TEXT) * part * share
            source = SourceSettings(name, weight, task, domain, "image-text", group, f"{name}.parquet")
            if stage == 1:
                yield source, lambda language, rng, domain=domain: described(domain, language, rng)
            else:
                yield source, lambda language, rng, kind=(task, domain): questioned(*kind, language, rng)
        name = f"text_{group}".replace(" ", "_")
        yield SourceSettings(name, TEXT * part, "reading comprehension", "text", "text", group, f"{name}.jsonl"), texts


def write(output: Path, samples: int, questions: int) -> None:
    """All files: `samples` of each stage, over its sources by their weights, and `questions` of each column."""
    for stage in (1, 2):
        folder = output / f"stage{stage}"
        folder.mkdir(parents=True, exist_ok=True)
        sources = list(_sources(stage))
        for source, make in sources:
            languages = LANGUAGES[source.language]
            made = (
                make(languages[index % len(languages)], random.Random(f"stage {stage}, {source.name}, {index}"))
                for index in range(max(1, round(samples * source.weight)))
            )
            if source.modality == "text":
                write_texts(folder / source.path, made)
            else:
                write_images(folder / source.path, _draw(made))
        mixture = MixtureSettings([source for source, _ in sources], text_share=TEXT)
        (folder / "mixture.yaml").write_text(
            yaml.safe_dump(dataclasses.asdict(mixture), sort_keys=False), encoding="utf-8"
        )
    (output / "held_out").mkdir(exist_ok=True)
    for column, kinds in COLUMNS_ASKED.items():
        asked = [held_out(column, index) for index in range(questions)]
        file = held_out_file(output / "held_out", column)
        if kinds is None:
            write_texts(file, ([turn] for _, turn in asked))
        else:
            write_questions(file, ((draw_page(page), turn) for page, turn in asked))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=2_400, help="of each stage (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=64, help="of each column (default: %(default)s)")
    args = parser.parse_args()
    write(args.output, args.samples, args.questions)


if __name__ == "__main__":
    main()
