"""Questions about pages, in six languages, with their only right answers. For shapes these are `questions`', and a few
in Italian and Portuguese."""

import random

from .pages import COLUMNS, Page
from .questions import COLOR_NAMES, NOUNS, PLACE_NAMES, Turn, ask, where
from .questions import TASKS as SHAPE_TASKS
from .questions import a as a_shape
from .shapes import COLORS, KINDS, PLACES, Scene, Shape


TASKS = ("shapes", "numbers", "words", "tables", "charts", "small print")
LANGUAGES = {"en": "English", "de": "German", "es": "Spanish", "fr": "French", "it": "Italian", "pt": "Portuguese"}

COLORS_IN = COLOR_NAMES | {
    "it": dict(zip(COLORS, "rosso arancione giallo verde blu viola rosa nero".split(), strict=True)),
    "pt": dict(zip(COLORS, "vermelho laranja amarelo verde azul roxo rosa preto".split(), strict=True)),
}
KINDS_IN = {language: {kind: nouns[kind][1] for kind in KINDS} for language, nouns in NOUNS.items()} | {
    "it": dict(zip(KINDS, "cerchio quadrato triangolo stella croce anello".split(), strict=True)),
    "pt": dict(zip(KINDS, "círculo quadrado triângulo estrela cruz anel".split(), strict=True)),
}
FEMININE = ("star", "cross")  # in Italian and Portuguese
PLACES_IN = PLACE_NAMES | {
    "it": dict(
        zip(
            PLACES,
            (
                "in alto a sinistra,in alto,in alto a destra,a sinistra,al centro,a destra,"
                "in basso a sinistra,in basso,in basso a destra"
            ).split(","),
            strict=True,
        )
    ),
    "pt": dict(
        zip(
            PLACES,
            (
                "em cima à esquerda,em cima,em cima à direita,à esquerda,no centro,à direita,"
                "em baixo à esquerda,em baixo,em baixo à direita"
            ).split(","),
            strict=True,
        )
    ),
}
SHAPE_TEMPLATES = {
    "it": {
        "kind": "Che forma c'è {place}?",
        "color": "Di che colore è la forma {place}?",
        "position": "Dove vedi {a}?",
        "count": "Quante forme ci sono?",
    },
    "pt": {
        "kind": "Que forma há {place}?",
        "color": "De que cor é a forma {place}?",
        "position": "Onde vês {a}?",
        "count": "Quantas formas há?",
    },
}
# {place}: as said of what is there; {cell}: a table's cell, such as B2; {color}: its bare name; {height}: a number.
TEMPLATES = {
    "en": {
        "numbers": "Which number is {place}?",
        "words": "Which word is {place}?",
        "tables": "Which number is in cell {cell}?",
        "height": "How high is the bar in {color}?",
        "bar": "What colour is the bar of height {height}?",
        "small print": "What does the small print say?",
        "everything": "What is on the page?",
    },
    "de": {
        "numbers": "Welche Zahl steht {place}?",
        "words": "Welches Wort steht {place}?",
        "tables": "Welche Zahl steht in Zelle {cell}?",
        "height": "Wie hoch ist der Balken in {color}?",
        "bar": "Welche Farbe hat der Balken der Höhe {height}?",
        "small print": "Was steht im Kleingedruckten?",
        "everything": "Was ist auf der Seite?",
    },
    "es": {
        "numbers": "¿Qué número hay {place}?",
        "words": "¿Qué palabra hay {place}?",
        "tables": "¿Qué número hay en la celda {cell}?",
        "height": "¿Qué altura tiene la barra de color {color}?",
        "bar": "¿De qué color es la barra de altura {height}?",
        "small print": "¿Qué dice la letra pequeña?",
        "everything": "¿Qué hay en la página?",
    },
    "fr": {
        "numbers": "Quel nombre y a-t-il {place} ?",
        "words": "Quel mot y a-t-il {place} ?",
        "tables": "Quel nombre y a-t-il dans la case {cell} ?",
        "height": "Quelle est la hauteur de la barre de couleur {color} ?",
        "bar": "De quelle couleur est la barre de hauteur {height} ?",
        "small print": "Que dit le texte en petits caractères ?",
        "everything": "Qu'y a-t-il sur la page ?",
    },
    "it": {
        "numbers": "Che numero c'è {place}?",
        "words": "Che parola c'è {place}?",
        "tables": "Che numero c'è nella cella {cell}?",
        "height": "Quanto è alta la barra di colore {color}?",
        "bar": "Di che colore è la barra di altezza {height}?",
        "small print": "Che cosa dice il testo in piccolo?",
        "everything": "Che cosa c'è sulla pagina?",
    },
    "pt": {
        "numbers": "Que número há {place}?",
        "words": "Que palavra há {place}?",
        "tables": "Que número há na célula {cell}?",
        "height": "Que altura tem a barra de cor {color}?",
        "bar": "De que cor é a barra de altura {height}?",
        "small print": "O que dizem as letras pequenas?",
        "everything": "O que há na página?",
    },
}


def there(language: str, place: str) -> str:
    """The place in a sentence: "What is <on the left>?"."""
    return where(language, place) if language in PLACE_NAMES else PLACES_IN[language][place]


def a(language: str, shape: Shape) -> str:
    """ "a red star" """
    if language in NOUNS:
        return a_shape(language, shape.color, shape.kind)
    color, feminine = COLORS_IN[language][shape.color], shape.kind in FEMININE
    if feminine and color.endswith("o"):  # all others end alike for both
        color = color[:-1] + "a"
    article = {"it": ("un", "una"), "pt": ("um", "uma")}[language][feminine]
    return f"{article} {KINDS_IN[language][shape.kind]} {color}"


def ask_shapes(scene: Scene, task: str, language: str, rng: random.Random) -> Turn | None:
    """A question of one of `questions.TASKS`; None where the scene allows none."""
    if not scene.shapes:
        return None
    if language not in SHAPE_TEMPLATES:
        return ask(scene, task, language, rng)
    shape = rng.choice(scene.shapes)
    if (
        task == "position"
        and sum((other.color, other.kind) == (shape.color, shape.kind) for other in scene.shapes) > 1
    ):
        return None
    question = SHAPE_TEMPLATES[language][task].format(place=PLACES_IN[language][shape.place], a=a(language, shape))
    answer = {
        "kind": KINDS_IN[language][shape.kind],
        "color": COLORS_IN[language][shape.color],
        "position": PLACES_IN[language][shape.place],
        "count": str(len(scene.shapes)),
    }[task]
    return Turn(task, language, question, answer)


def ask_page(page: Page, task: str, language: str, rng: random.Random) -> Turn | None:
    """A question of one of `TASKS` about a page; None where the page allows none."""
    templates = TEMPLATES[language]
    if task == "shapes":
        turn = ask_shapes(page.scene, rng.choice(SHAPE_TASKS), language, rng)
        return turn and Turn("shapes", language, turn.question, turn.answer)
    if task == "charts":
        return _ask_chart(page, language, rng)
    texts = [
        text
        for text in page.texts
        if task in ("tables", "small print") or text.text.isdecimal() == (task == "numbers")
    ]
    if not texts:
        return None
    text = rng.choice(texts)
    question = templates[task].format(
        place=there(language, text.place) if text.place else "",
        cell=f"{COLUMNS[text.cell[0]]}{text.cell[1] + 1}" if text.cell else "",
    )
    return Turn(task, language, question, text.text)


def _ask_chart(page: Page, language: str, rng: random.Random) -> Turn:
    """How high a bar is, or, where one alone is so high, what color it has."""
    bar = rng.choice(page.bars)
    color = COLORS_IN[language][bar.color]
    alone = sum(other.height == bar.height for other in page.bars) == 1
    if alone and rng.random() < 0.5:
        return Turn("charts", language, TEMPLATES[language]["bar"].format(height=bar.height), color)
    return Turn("charts", language, TEMPLATES[language]["height"].format(color=color), str(bar.height))


def describe(page: Page, language: str) -> Turn:
    """All that is on a page: of a board in reading order ("top: 42; center: a red star"), of a table row by row ("A1:
    42; B1: 17"), of a chart from left to right ("red: 7; blue: 2")."""
    if page.bars:
        items = [(COLORS_IN[language][bar.color], str(bar.height)) for bar in page.bars]
    elif page.kind == "table":
        items = [(f"{COLUMNS[text.cell[0]]}{text.cell[1] + 1}", text.text) for text in page.texts]
    else:
        found = {shape.place: a(language, shape) for shape in page.scene.shapes} | {
            text.place: text.text for text in page.texts
        }
        items = [(PLACES_IN[language][place], found[place]) for place in PLACES if place in found]
    return Turn(
        "everything",
        language,
        TEMPLATES[language]["everything"],
        "; ".join(f"{key}: {value}" for key, value in items) + ".",
    )
