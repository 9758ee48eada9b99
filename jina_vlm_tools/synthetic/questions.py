"""Questions about a scene and their answers, in English, German, Spanish and French.

There are four tasks: the `kind` of a shape, its `color`, its `position`, and a `count` from 1 to 5. A question always
has one right answer, short enough to be compared as a string.
"""

import random
import re
import unicodedata
from dataclasses import dataclass

from PIL import Image

from .shapes import COLORS, HELD_OUT_PAIRS, KINDS, PLACES, Scene, Shape, draw_scene, make_scene


TASKS = ("kind", "color", "count", "position")
LANGUAGES = ("en", "de", "es", "fr")
EVALUATION_SEEDS = 1_000_000_000  # training takes seeds from 0, evaluation from here on


# ---------------------------------------------------------------------------------------------------------------------
# Words
# ---------------------------------------------------------------------------------------------------------------------

# Of each kind: gender, singular, plural.
NOUNS = {
    "en": {kind: ("", kind, {"cross": "crosses"}.get(kind, kind + "s")) for kind in KINDS},
    "de": {
        "circle": ("m", "Kreis", "Kreise"),
        "square": ("n", "Quadrat", "Quadrate"),
        "triangle": ("n", "Dreieck", "Dreiecke"),
        "star": ("m", "Stern", "Sterne"),
        "cross": ("n", "Kreuz", "Kreuze"),
        "ring": ("m", "Ring", "Ringe"),
    },
    "es": {
        "circle": ("m", "círculo", "círculos"),
        "square": ("m", "cuadrado", "cuadrados"),
        "triangle": ("m", "triángulo", "triángulos"),
        "star": ("f", "estrella", "estrellas"),
        "cross": ("f", "cruz", "cruces"),
        "ring": ("m", "anillo", "anillos"),
    },
    "fr": {
        "circle": ("m", "cercle", "cercles"),
        "square": ("m", "carré", "carrés"),
        "triangle": ("m", "triangle", "triangles"),
        "star": ("f", "étoile", "étoiles"),
        "cross": ("f", "croix", "croix"),
        "ring": ("m", "anneau", "anneaux"),
    },
}

# The word that stands for any kind: gender, singular, plural.
SHAPE = {
    "en": ("", "shape", "shapes"),
    "de": ("f", "Form", "Formen"),
    "es": ("f", "figura", "figuras"),
    "fr": ("f", "forme", "formes"),
}

# Colors as answers; Spanish and French also as feminine, masculine plural and feminine plural adjectives.
COLOR_NAMES = {
    "en": {color: color for color in COLORS},
    "de": dict(zip(COLORS, "rot orange gelb grün blau lila rosa schwarz".split(), strict=True)),
    "es": dict(zip(COLORS, "rojo naranja amarillo verde azul morado rosa negro".split(), strict=True)),
    "fr": dict(zip(COLORS, "rouge orange jaune vert bleu violet rose noir".split(), strict=True)),
}
_UNCHANGING = {"de": ("orange", "lila", "rosa"), "es": ("naranja", "rosa"), "fr": ("orange",)}

# Where a shape is, as an answer; as said of a shape ("the shape ..."); as the scene of a sentence ("What is ...?").
PLACE_NAMES = {
    "en": dict(zip(PLACES, PLACES, strict=True)),
    "de": dict(
        zip(
            PLACES,
            "oben links,oben,oben rechts,links,in der Mitte,rechts,unten links,unten,unten rechts".split(","),
            strict=True,
        )
    ),
    "es": dict(
        zip(
            PLACES,
            "arriba a la izquierda,arriba,arriba a la derecha,a la izquierda,en el centro,a la derecha,"
            "abajo a la izquierda,abajo,abajo a la derecha".split(","),
            strict=True,
        )
    ),
    "fr": dict(
        zip(
            PLACES,
            (
                "en haut à gauche,en haut,en haut à droite,à gauche,au centre,à droite,"
                "en bas à gauche,en bas,en bas à droite"
            ).split(","),
            strict=True,
        )
    ),
}
_ENGLISH_PREPOSITIONS = {"left": "on the", "right": "on the", "centre": "in the"}


def adjective(language: str, color: str, gender: str, plural: bool = False) -> str:
    """The color beside a noun without article ("rote Formen") or with an indefinite one ("ein rotes Kreuz")."""
    name = COLOR_NAMES[language][color]
    if language == "en" or name in _UNCHANGING[language]:
        return name
    if language == "de":
        return name + ("e" if plural else {"m": "er", "f": "e", "n": "es"}[gender])
    if gender == "f":
        if language == "es":
            name = re.sub("o$", "a", name)
        else:
            name = {"vert": "verte", "bleu": "bleue", "violet": "violette", "noir": "noire"}.get(name, name)
    if plural:
        name += "es" if name == "azul" else "s"
    return name


def where(language: str, place: str) -> str:
    """The place in a sentence: "What is <on the left>?"."""
    if language == "en":
        return f"{_ENGLISH_PREPOSITIONS.get(place, 'at the')} {place}"
    return PLACE_NAMES[language][place]


def at(language: str, place: str) -> str:
    """The place beside a noun: "the shape <on the left>"."""
    if language == "es":
        return "del centro" if place == "centre" else "de " + re.sub("^a la", "la", PLACE_NAMES["es"][place])
    return where(language, place)


def a(language: str, color: str, kind: str) -> str:
    """ "a red star" """
    gender, noun, _ = NOUNS[language][kind]
    colored = adjective(language, color, gender)
    if language == "en":
        return f"{'an' if colored[0] in 'aeiou' else 'a'} {colored} {noun}"
    if language == "de":
        return f"ein {colored} {noun}"
    article = {"es": {"m": "un", "f": "una"}, "fr": {"m": "un", "f": "une"}}[language][gender]
    return f"{article} {noun} {colored}"


def the(language: str, color: str | None, kind: str | None) -> str:
    """ "the red star", "the star", "the red shape" or "the shape" """
    gender, noun, _ = NOUNS[language][kind] if kind else SHAPE[language]
    if language == "en":
        return " ".join(filter(None, ("the", color, noun)))
    if language == "de":
        article = {"m": "der", "f": "die", "n": "das"}[gender]
        colored = color and adjective("de", color, "f")  # "der rote", "die rote", "das rote"
        return " ".join(filter(None, (article, colored, noun)))
    colored = color and " " + adjective(language, color, gender)
    if language == "fr" and noun[0] in "aé":
        return f"l'{noun}{colored or ''}"
    article = {"es": {"m": "el", "f": "la"}, "fr": {"m": "le", "f": "la"}}[language][gender]
    return f"{article} {noun}{colored or ''}"


def of(phrase: str) -> str:
    """French "de" before a phrase or plural: "du cercle", "d'étoiles"."""
    if phrase.startswith("le "):
        return "du " + phrase[3:]
    return f"d'{phrase}" if phrase[0] in "aé" else f"de {phrase}"


# ---------------------------------------------------------------------------------------------------------------------
# Questions
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """A question and its answer. `task` is one of `TASKS` or `LISTS`, or "caption"."""

    task: str
    language: str
    question: str
    answer: str


# How a question points at a shape: not at all where it is the only one, by its place, or by its color, its kind or
# both where these tell it from all others.
POINTERS = {
    "kind": ("only", "place", "color"),
    "color": ("only", "place", "kind"),
    "position": ("only", "color", "kind", "both"),
}

# {the}: the shape, with what is known of it; {of}: the same after French "de"; {color}: agreeing with the word for
# shape; {name}: the bare color; {where}, {at}: its place; {plural}: what is counted.
TEMPLATES = {
    "en": {
        ("kind", "only"): ["What shape is this?", "Which shape is in the picture?", "What shape is it?"],
        ("kind", "place"): ["What shape is {where}?", "Which shape is {where}?", "What shape do you see {where}?"],
        ("kind", "color"): ["What shape is the {name} one?", "Which shape is {name}?"],
        ("color", "only"): ["What colour is it?", "What colour is {the}?"],
        ("color", "place"): ["What colour is {the} {at}?", "Which colour does {the} {at} have?"],
        ("color", "kind"): ["What colour is {the}?", "Which colour does {the} have?"],
        "position": ["Where is {the}?", "In which part of the picture is {the}?"],
        "count": ["How many {plural} are there?", "How many {plural} do you see?", "Count the {plural}."],
    },
    "de": {
        ("kind", "only"): ["Welche Form ist das?", "Welche Form ist im Bild?"],
        ("kind", "place"): ["Welche Form ist {where}?", "Welche Form siehst du {where}?"],
        ("kind", "color"): ["Welche Form ist {name}?", "Was für eine Form ist {name}?"],
        ("color", "only"): ["Welche Farbe hat {the}?", "Welche Farbe siehst du?"],
        ("color", "place"): ["Welche Farbe hat {the} {at}?", "Welche Farbe siehst du {where}?"],
        ("color", "kind"): ["Welche Farbe hat {the}?", "Was für eine Farbe hat {the}?"],
        "position": ["Wo ist {the}?", "Wo befindet sich {the}?"],
        "count": ["Wie viele {plural} gibt es?", "Wie viele {plural} sind da?", "Wie viele {plural} siehst du?"],
    },
    "es": {
        ("kind", "only"): ["¿Qué figura es?", "¿Qué figura hay en la imagen?"],
        ("kind", "place"): ["¿Qué figura hay {where}?", "¿Qué figura ves {where}?"],
        ("kind", "color"): ["¿Qué figura es {color}?", "¿Cuál es la figura {color}?"],
        ("color", "only"): ["¿De qué color es?", "¿Qué color tiene {the}?"],
        ("color", "place"): ["¿Qué color tiene {the} {at}?", "¿Qué color ves {where}?"],
        ("color", "kind"): ["¿Qué color tiene {the}?", "¿Cuál es el color de {the}?"],
        "position": ["¿Dónde está {the}?", "¿En qué parte de la imagen está {the}?"],
        "count": ["¿{how_many} {plural} hay?", "¿{how_many} {plural} ves?"],
    },
    "fr": {
        ("kind", "only"): ["Quelle forme est-ce ?", "Quelle forme y a-t-il dans l'image ?"],
        ("kind", "place"): ["Quelle forme y a-t-il {where} ?", "Quelle forme vois-tu {where} ?"],
        ("kind", "color"): ["Quelle forme est {color} ?", "Quelle est la forme {color} ?"],
        ("color", "only"): ["De quelle couleur est-ce ?", "Quelle est la couleur {of} ?"],
        ("color", "place"): ["Quelle est la couleur {of} {at} ?", "Quelle couleur vois-tu {where} ?"],
        ("color", "kind"): ["Quelle est la couleur {of} ?"],
        "position": ["Où est {the} ?", "Où se trouve {the} ?"],
        "count": ["Combien {of} y a-t-il ?", "Combien {of} vois-tu ?"],
    },
}


def ask(scene: Scene, task: str, language: str, rng: random.Random) -> Turn | None:
    """A random question of a task about a scene, with its only right answer. None where the scene allows none: twins
    cannot be told apart by how they look."""
    if task == "count":
        return _ask_count(scene, language, rng)
    pointers = [
        (pointer, shape) for pointer in POINTERS[task] for shape in scene.shapes if _is_clear(scene, pointer, shape)
    ]
    if not pointers:
        return None
    chosen = rng.choice(sorted({pointer for pointer, _ in pointers}))
    shape = rng.choice([shape for pointer, shape in pointers if pointer == chosen])
    phrase = the(
        language,
        shape.color if chosen in ("color", "both") else None,
        shape.kind if chosen in ("kind", "both") else None,
    )
    templates = TEMPLATES[language]
    question = (
        rng.choice(templates[task] if task == "position" else templates[task, chosen])
        .format(
            the=phrase,
            of=of(phrase),
            color=adjective(language, shape.color, "f"),
            name=COLOR_NAMES[language][shape.color],
            where=where(language, shape.place),
            at=at(language, shape.place),
        )
        .replace("de el ", "del ")
    )
    answer = {
        "kind": NOUNS[language][shape.kind][1],
        "color": COLOR_NAMES[language][shape.color],
        "position": PLACE_NAMES[language][shape.place],
    }[task]
    return Turn(task, language, question, answer)


def _is_clear(scene: Scene, pointer: str, shape: Shape) -> bool:
    """Whether the pointer leaves no doubt which shape of the scene is meant."""
    look = {
        "only": lambda shape: None,
        "place": lambda shape: shape.place,
        "color": lambda shape: shape.color,
        "kind": lambda shape: shape.kind,
        "both": lambda shape: (shape.color, shape.kind),
    }[pointer]
    return sum(look(other) == look(shape) for other in scene.shapes) == 1


def _ask_count(scene: Scene, language: str, rng: random.Random) -> Turn:
    """How many shapes, or shapes of one color, or of one kind, that the scene holds."""
    shape = rng.choice(scene.shapes)
    color = kind = None
    match rng.choice(("all", "all", "color", "kind")):
        case "color":
            color = shape.color
        case "kind":
            kind = shape.kind
    gender, _, plural = NOUNS[language][kind] if kind else SHAPE[language]
    if color:
        colored = adjective(language, color, gender, plural=True)
        plural = f"{colored} {plural}" if language in ("en", "de") else f"{plural} {colored}"
    question = rng.choice(TEMPLATES[language]["count"]).format(
        plural=plural, of=of(plural), how_many="Cuántas" if gender == "f" else "Cuántos"
    )
    number = sum(color in (None, shape.color) and kind in (None, shape.kind) for shape in scene.shapes)
    return Turn("count", language, question, str(number))


def normalize(answer: str) -> str:
    """What is compared of an answer: its words in lower case, without punctuation and symbols."""
    return " ".join(words_of(answer, "LNM"))


def words_of(text: str, categories: str) -> list[str]:
    """Words of characters of these Unicode categories, in lower case. Vowel signs are marks (M), not letters."""
    composed = unicodedata.normalize("NFC", text.lower())
    return "".join(
        character if character == "_" or unicodedata.category(character)[0] in categories else " "
        for character in composed
    ).split()


# ---------------------------------------------------------------------------------------------------------------------
# Samples
# ---------------------------------------------------------------------------------------------------------------------


def show(image: Image.Image, turn: Turn) -> list[dict]:
    """The conversation for a chat template that shows an image and asks a question."""
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": turn.question}]}]


@dataclass(frozen=True)
class Sample:
    """A scene and a question about it."""

    scene: Scene
    turn: Turn

    def question(self) -> list[dict]:
        """The conversation for a chat template, up to the question."""
        return show(draw_scene(self.scene), self.turn)


def evaluation_sample(seed: int, task: str, language: str) -> Sample:
    """An image of held-out pairs and one question about it. Seeds count from 0 here too, and are moved out of
    training's reach."""
    rng = random.Random(EVALUATION_SEEDS + seed)
    turn = None
    while turn is None:
        scene = make_scene(rng, HELD_OUT_PAIRS)
        turn = ask(scene, task, language, rng)
    return Sample(scene, turn)
