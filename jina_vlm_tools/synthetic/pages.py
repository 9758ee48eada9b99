"""Pages: images with printed numbers and words, tables, bar charts and small print, for the small model to grow on.

Everything is drawn from a seed. Texts are upper case letters and digits in DejaVu Sans Mono Bold, which Matplotlib
brings. A page knows what it shows: each task's question is asked about it, and each character's place is known to
`seeing`.
"""

import dataclasses
import functools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from .shapes import COLORS, PLACES, Scene, draw_scene, make_scene


CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LONGEST = 6  # characters of a number or word
ADVANCE = 0.602  # of a character, as a part of the font's size: all have the same
CAP_HEIGHT = 0.729
SIZES = (22, 34)  # of the font, in pixels
HIGHEST = 9  # bar
COLUMNS = "ABCD"
# Wide, tall and large ones. What stands there in small print is lost where they are squeezed into one tile.
SMALL_PRINT_SIZES = ((910, 378), (1176, 378), (378, 910), (378, 1176), (644, 644))

# Nouns in capitals, so that neither case nor accents matter. Every fifth is held out for evaluation.
WORDS = {
    "en": (
        "APPLE BREAD CHAIR DOOR EGG FISH GARDEN HOUSE ISLAND JACKET KEY LEMON MOON NIGHT OWL PAPER QUEEN RIVER SPOON "
        "TREE UNCLE VOICE WATER YARD ZEBRA BOOK CLOUD DREAM FOREST HORSE"
    ),
    "de": (
        "APFEL BROT DORF ENGEL FENSTER GARTEN HAUS INSEL JACKE KATZE LICHT MOND NACHT OFEN PFERD QUELLE REGEN STUHL "
        "TISCH UHR VOGEL WALD ZUG BAUM DACH ERDE FISCH GABEL HUND KIND"
    ),
    "es": (
        "AGUA BARCO CASA DEDO ESPEJO FLOR GATO HOJA ISLA JUEGO LIBRO MESA NOCHE OJO PERRO QUESO RELOJ SILLA TORO UVA "
        "VASO YEMA ZORRO BOSQUE CAMINO DINERO FUEGO LUNA MANO NUBE"
    ),
    "fr": (
        "ARBRE BATEAU CHIEN DENT EAU FLEUR GANT HERBE JARDIN LAMPE MAISON NUIT OISEAU PAIN QUAI RUE SOLEIL TABLE "
        "USINE VERRE YEUX ZONE BOIS CHAT DOIGT FEU GARE LIVRE MER NEIGE"
    ),
    "it": (
        "ALBERO BARCA CANE DADO ERBA FIORE GATTO HOTEL ISOLA LIBRO MANO NOTTE OCCHIO PANE QUADRO RUOTA SEDIA TAVOLO "
        "UOVO VINO ZAINO BOSCO CASA DENTE FUOCO GIOCO LUNA MARE NEVE PONTE"
    ),
    "pt": (
        "AREIA BARCO CHUVA DEDO ESTRADA FOGO GATO HORA ILHA JANELA LIVRO MESA NOITE OVO PEIXE QUEIJO RUA SAPATO TERRA "
        "UVA VENTO XALE ZEBRA BOLO CASA DIA FLOR JOGO LUA MAR"
    ),
}
WORDS = {language: [word for word in words.split() if len(word) <= LONGEST] for language, words in WORDS.items()}
HELD_OUT_WORDS = {language: words[::5] for language, words in WORDS.items()}
TRAINING_WORDS = {
    language: [word for word in words if not any(word in held_out for held_out in HELD_OUT_WORDS.values())]
    for language, words in WORDS.items()
}


@dataclass(frozen=True)
class Text:
    """A number or word: its middle (x, y) in pixels and the font's size. `place` is its cell of a board, `cell` its
    column and row of a table, counted from 0."""

    text: str
    middle: tuple[float, float]
    size: int
    place: str = ""
    cell: tuple[int, int] | None = None

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom, in pixels."""
        width, height = ADVANCE * self.size * len(self.text), CAP_HEIGHT * self.size
        (x, y) = self.middle
        return x - width / 2, y - height / 2, x + width / 2, y + height / 2


@dataclass(frozen=True)
class Bar:
    """A bar of a chart: left, top, right and bottom in pixels, its color's name and its height, 1 to 9."""

    box: tuple[float, float, float, float]
    color: str
    height: int


@dataclass(frozen=True)
class Page:
    """What an image shows. `scene` has its size, its background and its shapes."""

    kind: str
    scene: Scene
    texts: tuple[Text, ...] = ()  # that are asked for
    labels: tuple[Text, ...] = ()  # of a table's or chart's sides
    bars: tuple[Bar, ...] = ()
    lines: tuple[tuple[float, float, float, float], ...] = ()


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSansMono-Bold.ttf", size)


def draw_page(page: Page) -> Image.Image:
    """The page as an RGB image."""
    image = draw_scene(page.scene)
    canvas = ImageDraw.Draw(image)
    for line in page.lines:
        canvas.line(line, fill=(150, 150, 150), width=1)
    for bar in page.bars:
        canvas.rectangle(bar.box, fill=COLORS[bar.color])
    for text in (*page.texts, *page.labels):
        left, _, _, bottom = text.box
        canvas.text((left, bottom), text.text, font=font(text.size), fill=(20, 20, 24), anchor="ls")
    return image


def characters(page: Page) -> Iterator[tuple[str, tuple[float, float, float, float]]]:
    """Each character and its box in pixels."""
    for text in (*page.texts, *page.labels):
        left, top, right, bottom = text.box
        width = (right - left) / len(text.text)
        for index, character in enumerate(text.text):
            yield character, (left + index * width, top, left + (index + 1) * width, bottom)


# ---------------------------------------------------------------------------------------------------------------------
# Pages
# ---------------------------------------------------------------------------------------------------------------------


def random_number(rng: random.Random, digits: int | None = None) -> str:
    digits = digits or rng.randint(1, 4)
    return str(rng.randint(10 ** (digits - 1) if digits > 1 else 0, 10**digits - 1))


def random_word(rng: random.Random, words: list[str] | None) -> str:
    """One of the words; of none: letters in any order, half of the time the training words' too."""
    if words is not None:
        return rng.choice(words)
    if rng.random() < 0.5:
        return rng.choice(TRAINING_WORDS[rng.choice(list(TRAINING_WORDS))])
    return "".join(rng.choices(CHARACTERS[10:], k=rng.randint(3, LONGEST)))


def _empty(rng: random.Random, size: tuple[int, int]) -> Scene:
    gray = rng.randint(222, 255)
    return Scene(size, tuple(min(255, gray + rng.randint(-12, 12)) for _ in range(3)), ())


def _side(rng: random.Random) -> int:
    return rng.randint(300, 378) if rng.random() < 0.8 else rng.randint(379, 560)


def _place_text(
    rng: random.Random, text: str, place: str, size: tuple[int, int], sizes: tuple[int, int] = SIZES
) -> Text:
    """Anywhere in the cell where it fits."""
    row, column = divmod(PLACES.index(place), 3)
    width, height = size[0] / 3, size[1] / 3
    font_size = rng.randint(sizes[0] - 2, max(sizes[0] - 2, min(sizes[1], int(0.94 * width / ADVANCE / len(text)))))
    play = max(0, 0.96 * width - ADVANCE * font_size * len(text)), max(0, 0.9 * height - CAP_HEIGHT * font_size)
    x = (column + 0.5) * width + rng.uniform(-0.5, 0.5) * play[0]
    y = (row + 0.5) * height + rng.uniform(-0.5, 0.5) * play[1]
    return Text(text, (x, y), font_size, place=place)


def make_board(
    rng: random.Random, pairs, words: list[str] | None = None, filled: int | None = None, numbers: float = 0.5
) -> Page:
    """Texts, of which `numbers` is the share of numbers, and a few shapes, each in a cell of its own; `filled` cells
    of nine, 2 to 7 where that is None."""
    size = (_side(rng), _side(rng))
    filled = filled or rng.randint(2, 7)
    places = rng.sample(PLACES, filled)
    number_of_shapes = min(filled - 1, rng.choice((0, 1, 1, 2)))
    scene = make_scene(rng, pairs, number=max(1, number_of_shapes))
    shapes = [
        dataclasses.replace(shape, place=place)
        for shape, place in zip(scene.shapes, places[:number_of_shapes], strict=False)
    ]
    texts = [
        _place_text(rng, random_number(rng) if rng.random() < numbers else random_word(rng, words), place, size)
        for place in places[len(shapes) :]
    ]
    shapes = tuple(sorted(shapes, key=lambda shape: PLACES.index(shape.place)))
    return Page("board", Scene(size, scene.background, shapes), tuple(texts))


def make_lines(rng: random.Random) -> Page:
    """Lines of numbers and words, as many as there is room for: what `seeing` learns letters from."""
    size = (rng.randint(300, 440), rng.randint(300, 440))
    texts, y = [], rng.uniform(14, 44)
    while y < size[1] - 14:
        font_size, x = rng.randint(SIZES[0] - 2, SIZES[1]), rng.uniform(4, 40)
        while True:
            text = random_number(rng) if rng.random() < 0.4 else random_word(rng, None)
            width = ADVANCE * font_size * len(text)
            if x + width > size[0] - 2:
                break
            texts.append(Text(text, (x + width / 2, y), font_size))
            x += width + rng.uniform(18, 48)
        y += rng.uniform(32, 48)
    return Page("lines", _empty(rng, size), tuple(texts))


def make_table(rng: random.Random) -> Page:
    """2 to 4 columns, A to D, and 2 to 4 rows, from 1, of two-digit numbers, as a spreadsheet."""
    size = (rng.randint(300, 378), rng.randint(260, 378))
    columns, rows = rng.randint(2, 4), rng.randint(2, 4)
    width, height = size[0] / (columns + 1), size[1] / (rows + 1)
    font_size = rng.randint(SIZES[0], min(30, int(0.8 * width / ADVANCE / 2)))

    def middle(column: int, row: int) -> tuple[float, float]:
        return (column + 1.5) * width, (row + 1.5) * height

    texts = [
        Text(random_number(rng, 2), middle(column, row), font_size, cell=(column, row))
        for row in range(rows)
        for column in range(columns)
    ]
    labels = [Text(COLUMNS[column], middle(column, -1), font_size) for column in range(columns)]
    labels += [Text(str(row + 1), middle(-1, row), font_size) for row in range(rows)]
    lines = [((column + 1) * width, 0, (column + 1) * width, size[1]) for column in range(columns)]
    lines += [(0, (row + 1) * height, size[0], (row + 1) * height) for row in range(rows)]
    return Page("table", _empty(rng, size), tuple(texts), tuple(labels), lines=tuple(lines))


def make_chart(rng: random.Random) -> Page:
    """2 to 5 bars of different colors, 1 to 9 high, above a scale."""
    size = (rng.randint(300, 378), rng.randint(300, 378))
    left, bottom, top = 40, size[1] - 14, 16
    unit = (bottom - top) / HIGHEST
    labels = [Text(str(value), (18, bottom - value * unit), 22) for value in (0, 3, 6, 9)]
    lines = [(left, bottom - value * unit, size[0], bottom - value * unit) for value in range(HIGHEST + 1)]
    number = rng.randint(2, 5)
    width = (size[0] - left) / number
    bars = []
    for index, color in enumerate(rng.sample(list(COLORS), number)):
        height = rng.randint(1, HIGHEST)
        start = left + (index + 0.15) * width
        bars.append(Bar((start, bottom - height * unit, start + 0.7 * width, bottom), color, height))
    return Page("chart", _empty(rng, size), labels=tuple(labels), bars=tuple(bars), lines=tuple(lines))


def make_small_print(
    rng: random.Random, pairs, words: list[str] | None = None, size: tuple[int, int] | None = None
) -> Page:
    """One small number or word beside one to four large shapes, on a page of several tiles."""
    size = size or tuple(side - rng.randint(0, 24) for side in rng.choice(SMALL_PRINT_SIZES))
    scene = make_scene(rng, pairs, number=rng.randint(1, 4))
    place = rng.choice([place for place in PLACES if all(shape.place != place for shape in scene.shapes)])
    text = random_number(rng, rng.randint(2, 4)) if rng.random() < 0.5 else random_word(rng, words)
    return Page(
        "small print", Scene(size, scene.background, scene.shapes), (_place_text(rng, text, place, size, (24, 25)),)
    )
