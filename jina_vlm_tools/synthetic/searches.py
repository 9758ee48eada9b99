"""Queries that pages are searched by, in six languages: "a red star on the left and the number 47".

A page knows its facts, and a query names some of them; a page is relevant if it has all that a query names. So
relevance is exact and complete: of any two, page and query, it can be said.
"""

import dataclasses
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .page_questions import COLORS_IN, a, there
from .pages import COLUMNS, Page, random_number
from .shapes import PLACES, Shape


MOST_FACTS = 3
# How a fact is said: {text}, {cell}, {color}, {height}; and what joins two facts.
PHRASES = {
    "en": {"number": "the number {text}", "word": "the word {text}", "cell": "{text} in cell {cell}",
           "bar": "a bar in {color} of height {height}", "and": " and "},
    "de": {"number": "die Zahl {text}", "word": "das Wort {text}", "cell": "{text} in Zelle {cell}",
           "bar": "ein Balken in {color} der Höhe {height}", "and": " und "},
    "es": {"number": "el número {text}", "word": "la palabra {text}", "cell": "{text} en la celda {cell}",
           "bar": "una barra de color {color} de altura {height}", "and": " y "},
    "fr": {"number": "le nombre {text}", "word": "le mot {text}", "cell": "{text} dans la case {cell}",
           "bar": "une barre de couleur {color} de hauteur {height}", "and": " et "},
    "it": {"number": "il numero {text}", "word": "la parola {text}", "cell": "{text} nella cella {cell}",
           "bar": "una barra di colore {color} di altezza {height}", "and": " e "},
    "pt": {"number": "o número {text}", "word": "a palavra {text}", "cell": "{text} na célula {cell}",
           "bar": "uma barra de cor {color} de altura {height}", "and": " e "},
}  # fmt: skip


@dataclass(frozen=True)
class Fact:
    """Something that a page shows: a shape by `color` and `shape`, a text, a cell's text, or a bar by `color` and
    `height`. Without a `place` it is anywhere."""

    kind: str
    color: str = ""
    shape: str = ""
    text: str = ""
    cell: str = ""
    height: int = 0
    place: str = ""


@dataclass(frozen=True)
class Query:
    """What is looked for, and in which words."""

    facts: frozenset[Fact]
    language: str
    text: str

    def finds(self, facts: frozenset[Fact]) -> bool:
        """Whether a page with these facts is relevant."""
        return self.facts <= facts


def relevance(queries: Iterable[Query], facts: Sequence[frozenset[Fact]]) -> list[list[bool]]:
    """[queries, pages], of pages' facts."""
    return [[query.finds(each) for each in facts] for query in queries]


def facts_of(page: Page) -> frozenset[Fact]:
    """All that can be said of a page, with places and without."""
    placed = [Fact("shape", shape.color, shape.kind, place=shape.place) for shape in page.scene.shapes]
    for text in page.texts:
        kind = "number" if text.text.isdecimal() else "word"
        if text.cell is not None:
            placed.append(Fact("cell", text=text.text, cell=f"{COLUMNS[text.cell[0]]}{text.cell[1] + 1}"))
        placed.append(Fact(kind, text=text.text, place=text.place))
    placed += [Fact("bar", bar.color, height=bar.height) for bar in page.bars]
    return frozenset(placed) | {dataclasses.replace(fact, place="") for fact in placed}


def say(fact: Fact, language: str) -> str:
    """A fact in words."""
    if fact.kind == "shape":
        said = a(language, Shape(fact.shape, fact.color, "", (0, 0), 0, 0, (0, 0, 0)))
    else:
        said = PHRASES[language][fact.kind].format(
            text=fact.text, cell=fact.cell, color=COLORS_IN[language].get(fact.color), height=fact.height
        )
    return f"{said} {there(language, fact.place)}" if fact.place else said


def query_about(page: Page, language: str, rng: random.Random, most: int = MOST_FACTS) -> Query:
    """One to `most` facts of a page, each with its place or without."""
    facts = facts_of(page)
    named = sorted(facts - {fact for fact in facts if fact.place}, key=repr)
    named = [fact for fact in named if not (fact.kind == "number" and _is_in_a_cell(fact, facts))]
    chosen = []
    for fact in rng.sample(named, min(len(named), rng.randint(1, most))):
        placed = sorted(
            (other for other in facts if other.place and dataclasses.replace(other, place="") == fact), key=repr
        )
        chosen.append(rng.choice(placed) if placed and rng.random() < 0.5 else fact)
    said = PHRASES[language]["and"].join(say(fact, language) for fact in chosen)
    return Query(frozenset(chosen), language, said)


def _is_in_a_cell(number: Fact, facts: frozenset[Fact]) -> bool:
    return any(fact.kind == "cell" and fact.text == number.text for fact in facts)


def near_miss(page: Page, rng: random.Random) -> Page:
    """A page that shows nearly the same: shapes elsewhere, digits and letters in another order, bars of other heights.
    What is written in one place only once moves; a page without any of these is drawn with other numbers."""
    places = [place for place in PLACES if place not in {text.place for text in page.texts}]
    moved = rng.sample(places, len(page.scene.shapes))
    shapes = tuple(
        dataclasses.replace(shape, place=place)
        for shape, place in zip(page.scene.shapes, sorted(moved, key=PLACES.index), strict=True)
    )
    texts = tuple(dataclasses.replace(text, text=_permuted(text.text, rng)) for text in page.texts)
    colors = [bar.color for bar in page.bars]
    rng.shuffle(colors)
    bars = tuple(dataclasses.replace(bar, color=color) for bar, color in zip(page.bars, colors, strict=True))
    return dataclasses.replace(page, scene=dataclasses.replace(page.scene, shapes=shapes), texts=texts, bars=bars)


def _permuted(text: str, rng: random.Random) -> str:
    """The same characters in another order; another number where there is only one order."""
    orders = {"".join(rng.sample(text, len(text))) for _ in range(8)} - {text}
    orders = {order for order in orders if not (order.isdecimal() and order.startswith("0"))}
    if orders:
        return rng.choice(sorted(orders))
    return random_number(rng, len(text)) if text.isdecimal() else text
