"""The generator of images, questions and answers that the small checkpoint is trained on, and its tokenizer."""

import dataclasses
import math
import random
import sys
from pathlib import Path

import datasets
import pytest
from huggingface_hub import EvalResult
from PIL import ImageChops


ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT))

from experiments.eval_pages import wilson  # noqa: E402
from experiments.eval_tiny import accuracy, card_results, chance, table  # noqa: E402
from experiments.seeing import TOKEN_CLASSES, PagesDataset, patch_labels, token_labels  # noqa: E402
from experiments.tokenizer import BASE_SIZE, END_OF_TEXT, STRUCTURAL_TOKENS, train_tokenizer  # noqa: E402
from jina_vlm_tools.synthetic import questions, shapes, shapes_data  # noqa: E402
from jina_vlm_tools.synthetic.page_questions import LANGUAGES as PAGE_LANGUAGES  # noqa: E402
from jina_vlm_tools.synthetic.page_questions import TASKS as PAGE_TASKS  # noqa: E402
from jina_vlm_tools.synthetic.page_questions import ask_shapes, describe  # noqa: E402
from jina_vlm_tools.synthetic.pages import (  # noqa: E402
    HELD_OUT_WORDS,
    TRAINING_WORDS,
    Page,
    Text,
    draw_page,
    make_board,
    make_chart,
    make_small_print,
    make_table,
)
from jina_vlm_tools.synthetic.pages_data import (  # noqa: E402
    held_out_sample,
    held_out_samples,
    stage1_turns,
    stage2_turns,
    task_page,
)
from jina_vlm_tools.synthetic.questions import LANGUAGES, TASKS, ask, evaluation_sample, normalize  # noqa: E402
from jina_vlm_tools.synthetic.shapes import (  # noqa: E402
    COLORS,
    HELD_OUT_PAIRS,
    KINDS,
    PLACES,
    TRAINING_PAIRS,
    Scene,
    Shape,
    draw_scene,
    make_scene,
)
from jina_vlm_tools.training.layouts import to_conversation  # noqa: E402


def pairs_of(sample):
    return {(shape.color, shape.kind) for shape in sample.scene.shapes}


def scene_of(*shapes_):
    """A white scene of (color, kind, place) triples."""
    return Scene(
        (300, 300),
        (255, 255, 255),
        tuple(Shape(kind, color, place, (0.5, 0.5), 0.4, 0.0, COLORS[color]) for color, kind, place in shapes_),
    )


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


def test_same_seed_same_sample():
    for seed in range(20):
        for task in PAGE_TASKS:
            (page, turns), again = stage2_turns(task, seed), stage2_turns(task, seed)
            assert (page, turns) == again and draw_page(page).tobytes() == draw_page(again[0]).tobytes()
    assert stage2_turns("numbers", 0) != stage2_turns("numbers", 1)
    assert evaluation_sample(0, "kind", "en") == evaluation_sample(0, "kind", "en")


def test_pairs_are_split():
    assert not set(HELD_OUT_PAIRS) & set(TRAINING_PAIRS)
    assert len(HELD_OUT_PAIRS) + len(TRAINING_PAIRS) == len(COLORS) * len(KINDS)
    for values in (COLORS, KINDS):
        for value in values:
            assert any(value in pair for pair in HELD_OUT_PAIRS)
            assert sum(value in pair for pair in TRAINING_PAIRS) >= 5


def test_held_out_pairs_and_words_are_drawn_in_evaluation_only():
    pages = [stage2_turns(task, seed)[0] for task in PAGE_TASKS for seed in range(150)] + [
        stage1_turns(seed)[0] for seed in range(300)
    ]
    scenes = PagesDataset(1000, first_seed=0)
    pages += [scenes[index] for index in range(400)]
    named = {(shape.color, shape.kind) for page in pages for shape in page.scene.shapes if shape.color}
    assert named == set(TRAINING_PAIRS)
    held_out = {word for words in HELD_OUT_WORDS.values() for word in words}
    assert not held_out & {text.text for page in pages for text in page.texts}
    assert not held_out & {word for words in TRAINING_WORDS.values() for word in words}
    seen, words = set(), set()
    for page, _ in held_out_samples(720):
        seen |= {(shape.color, shape.kind) for shape in page.scene.shapes}
        words |= {text.text for text in page.texts if not text.text.isdecimal()}
    assert seen == set(HELD_OUT_PAIRS) and words == held_out
    assert {pair for seed in range(500) for pair in pairs_of(evaluation_sample(seed, TASKS[seed % 4], "en"))} == set(
        HELD_OUT_PAIRS
    )


def test_shapes_become_one_tile_and_small_print_several():
    def tiles(side):  # released-checkpoint.md, section 1, steps 2 and 3, for images within the budget
        return 1 if round(side / 14) * 14 - 112 <= 266 else 2

    sizes = set()
    for seed in range(300):
        scene = evaluation_sample(seed, "count", "en").scene
        assert [tiles(side) for side in scene.size] == [1, 1]
        sizes.add(scene.size)
        assert max(map(tiles, held_out_sample(seed, "small print", "en")[0].scene.size)) == 2
    assert draw_scene(scene).size == scene.size and draw_scene(scene).mode == "RGB"
    assert len(sizes) > 250


def test_shapes_are_drawn_in_their_place_and_color():
    for color in COLORS:
        for kind in KINDS:
            for index, place in enumerate(PLACES):
                image = draw_scene(scene_of((color, kind, place)))
                row, column = divmod(index, 3)
                cell = (100 * column, 100 * row, 100 * column + 100, 100 * row + 100)
                colors = dict((value, count) for count, value in image.crop(cell).getcolors(10_000))
                assert 500 < colors[COLORS[color]] < 8000
                image.paste((255, 255, 255), cell)
                assert image.getextrema() == ((255, 255),) * 3, "a shape leaves its cell"


def test_random_shapes_stay_in_their_cells():
    """Drawn one by one, no two shapes of a scene touch the same pixel."""
    for seed in range(40):
        scene = make_scene(random.Random(seed), TRAINING_PAIRS, number=5)
        covered = 0
        for shape in scene.shapes:
            alone = draw_scene(Scene(scene.size, scene.background, (shape,)))
            covered += sum(count for count, value in alone.getcolors(200_000) if value != scene.background)
        together = draw_scene(scene)
        assert covered == sum(count for count, value in together.getcolors(200_000) if value != scene.background)


def test_answers_are_true():
    """English questions, answered again from their words."""
    rng = random.Random(0)
    checked = dict.fromkeys(TASKS, 0)
    for seed in range(1500):
        task = TASKS[seed % 4]
        scene = make_scene(rng, shapes.ALL_PAIRS)
        turn = ask(scene, task, "en", rng)
        if turn is None:
            assert task == "position"
            continue
        words = normalize(turn.question).replace("crosses", "cross").split()
        words = [word.removesuffix("s") if word.removesuffix("s") in KINDS else word for word in words]
        asked = " ".join(words)
        places = [place for place in sorted(PLACES, key=len, reverse=True) if f" {place}" in asked]
        fitting = [
            shape
            for shape in scene.shapes
            if (not set(words) & set(COLORS) or shape.color in words)
            and (not set(words) & set(KINDS) or shape.kind in words)
            and (not places or shape.place == places[0])
        ]
        if task == "count":
            assert turn.answer == str(len(fitting)) and 1 <= len(fitting) <= 5
        else:
            (shape,) = fitting
            assert turn.answer == {"kind": shape.kind, "color": shape.color, "position": shape.place}[task]
        checked[task] += 1
    assert min(checked.values()) > 250


def labels_of(page):
    """Token labels by name, each [14, 14]."""
    return dict(zip(TOKEN_CLASSES, token_labels(page).unflatten(0, (14, 14)).unbind(dim=-1), strict=True))


def test_token_labels_of_shapes():
    scene = scene_of(("yellow", "ring", "top left"), ("black", "star", "bottom right"))
    labels = labels_of(Page("shapes", scene))
    colors, kinds, places = (labels[name] for name in ("color", "kind", "place"))
    assert places[0, 0] == 0 and places[0, -1] == 2 and places[7, 7] == 4 and places[-1, -1] == 8
    assert set(colors[places == 0].tolist()) == {0, 1 + list(COLORS).index("yellow")}
    assert set(kinds[places == 8].tolist()) == {0, 1 + KINDS.index("star")}
    assert not colors[(places != 0) & (places != 8)].any()
    assert (
        5 <= (colors[places == 0] > 0).sum() <= 16
    )  # a circle of radius 0.4 covers half of its cell of about 22 tokens
    assert not labels["character 0"].any() and (labels["character 1"] == -100).all()


def test_labels_of_texts():
    """The patches under a character's middle have its number; the tokens about a word all of its characters,
    from its middle."""
    page = Page("board", Scene((378, 378), (255, 255, 255), ()), (Text("A7", (189.0, 63.0), 28, place="top"),))
    patches = patch_labels(page).unflatten(0, (27, 27))
    assert patches[4, 12] == 11 and patches[4, 14] == 8 and set(patches[:3].flatten().tolist()) == {0}
    labels = labels_of(page)
    there = labels["character 0"] > 0
    assert 4 <= there.sum() <= 12 and there[2, 6]
    for index, number in enumerate((37, 37, 11, 8, 37, 37)):
        assert set(labels[f"character {index}"][there].tolist()) == {number}


def test_labels_of_tables_and_charts():
    table = make_table(random.Random(0))
    labels = labels_of(table)
    assert set(labels["column"].flatten().tolist()) == {0, *(1 + text.cell[0] for text in table.texts)}
    assert set(labels["row"].flatten().tolist()) == {0, *(1 + text.cell[1] for text in table.texts)}
    chart = make_chart(random.Random(0))
    labels = labels_of(chart)
    for bar in chart.bars:
        inside = labels["color"] == 1 + list(COLORS).index(bar.color)
        assert inside.any() and set(labels["height"][inside].tolist()) == {bar.height}


def test_pages_show_what_they_say():
    """Each text's and bar's ink lies within its box, and nothing is printed twice in a place."""
    for seed in range(60):
        rng = random.Random(seed)
        for page in (
            make_board(rng, TRAINING_PAIRS),
            make_table(rng),
            make_chart(rng),
            make_small_print(rng, TRAINING_PAIRS),
        ):
            width, height = page.scene.size
            empty = dataclasses.replace(page, texts=(), labels=(), bars=())
            ink = ImageChops.difference(draw_page(page), draw_page(empty))
            for box in [thing.box for thing in (*page.texts, *page.labels, *page.bars)]:
                assert 0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height + 1, (page.kind, seed)
                outer = tuple(round(side) + (-2, -2, 3, 7)[i] for i, side in enumerate(box))
                assert ink.crop(outer).getbbox(), "nothing is drawn there"
                ink.paste((0, 0, 0), outer)
            assert ink.getbbox() is None, (page.kind, seed)


def test_answers_about_pages_are_true():
    """English questions, answered again from their words."""
    checked = dict.fromkeys(PAGE_TASKS, 0)
    for seed in range(300):
        for task in ("numbers", "words", "tables", "charts", "small print"):
            page, turn = held_out_sample(seed, task, "en")
            asked = turn.question.removesuffix("?")
            if task == "tables":
                (answer,) = [
                    text.text for text in page.texts if asked.endswith(f"{'ABCD'[text.cell[0]]}{text.cell[1] + 1}")
                ]
            elif task == "charts":
                what = asked.split()[-1]
                answer = {bar.color: str(bar.height) for bar in page.bars}.get(what)
                if answer is None:
                    (answer,) = [bar.color for bar in page.bars if str(bar.height) == what]
            elif task == "small print":
                (answer,) = [text.text for text in page.texts]
            else:
                place = max((place for place in PLACES if asked.endswith(f" {place}")), key=len)
                (answer,) = [text.text for text in page.texts if text.place == place]
                assert answer.isdecimal() == (task == "numbers")
            assert turn.answer == answer
            checked[task] += 1
    with pytest.raises(ValueError, match="Expected one of shapes, numbers"):
        task_page("maps", random.Random(0), TRAINING_PAIRS)


@pytest.mark.parametrize("language", PAGE_LANGUAGES)
def test_every_task_is_asked_in_every_language(language):
    """With no part of a question left open, and each in words of its own."""
    asked = {task: held_out_sample(3, task, language)[1].question for task in PAGE_TASKS}
    assert len(set(asked.values())) == len(PAGE_TASKS) and not any("{" in question for question in asked.values())
    english = {held_out_sample(3, task, "en")[1].question for task in PAGE_TASKS}
    assert language == "en" or not english & set(asked.values())


@pytest.mark.parametrize(
    ("language", "expected"),
    [
        ("en", "top left: a red star; bottom: an orange cross; bottom right: HOUSE."),
        ("de", "oben links: ein roter Stern; unten: ein orange Kreuz; unten rechts: HOUSE."),
        ("it", "in alto a sinistra: una stella rossa; in basso: una croce arancione; in basso a destra: HOUSE."),
        ("pt", "em cima à esquerda: uma estrela vermelha; em baixo: uma cruz laranja; em baixo à direita: HOUSE."),
    ],
)
def test_descriptions(language, expected):
    scene = scene_of(("red", "star", "top left"), ("orange", "cross", "bottom"))
    page = Page("board", scene, (Text("HOUSE", (250.0, 250.0), 24, place="bottom right"),))
    assert describe(page, language).answer == expected


def test_wilson():
    low, high = wilson(9, 10)
    assert round(low, 3) == 0.596 and round(high, 3) == 0.982  # of published tables
    assert wilson(0, 10)[0] == 0 and wilson(10, 10)[1] == 1


def test_answers_in_other_languages():
    """A scene of one shape has one answer for each task, whatever the phrasing."""
    scene = scene_of(("green", "star", "top right"))
    expected = {
        "de": ("Stern", "grün", "1", "oben rechts"),
        "es": ("estrella", "verde", "1", "arriba a la derecha"),
        "fr": ("étoile", "vert", "1", "en haut à droite"),
    }
    rng = random.Random(0)
    for language, answers in expected.items():
        for task, answer in zip(TASKS, answers, strict=True):
            turns = [ask(scene, task, language, rng) for _ in range(50)]
            assert {turn.answer for turn in turns} == {answer} and len({turn.question for turn in turns}) > 3


@pytest.mark.parametrize(
    ("language", "color", "kind", "expected"),
    [
        ("en", "orange", "ring", "an orange ring"),
        ("de", "green", "square", "ein grünes Quadrat"),
        ("de", "purple", "star", "ein lila Stern"),
        ("es", "black", "cross", "una cruz negra"),
        ("es", "orange", "star", "una estrella naranja"),
        ("fr", "purple", "star", "une étoile violette"),
        ("fr", "green", "cross", "une croix verte"),
        ("fr", "blue", "ring", "un anneau bleu"),
    ],
)
def test_agreement(language, color, kind, expected):
    assert questions.a(language, color, kind) == expected


@pytest.mark.parametrize(
    ("language", "arguments", "expected"),
    [
        ("de", ("red", "square"), "das rote Quadrat"),
        ("de", ("pink", None), "die rosa Form"),
        ("es", (None, "ring"), "el anillo"),
        ("es", ("red", None), "la figura roja"),
        ("fr", (None, "star"), "l'étoile"),
        ("fr", ("black", "cross"), "la croix noire"),
    ],
)
def test_definite_article(language, arguments, expected):
    assert questions.the(language, *arguments) == expected


def test_elision_and_contraction():
    assert [questions.of(phrase) for phrase in ("le cercle", "l'étoile", "anneaux", "formes rouges")] == [
        "du cercle",
        "de l'étoile",
        "d'anneaux",
        "de formes rouges",
    ]
    assert questions.at("es", "centre") == "del centro" and questions.at("es", "left") == "de la izquierda"


def test_questions_show_the_image():
    sample = evaluation_sample(0, "kind", "en")
    ((message),) = sample.question()
    assert [part["type"] for part in message["content"]] == ["image", "text"] and message["role"] == "user"
    assert message["content"][1]["text"] == sample.turn.question
    assert message["content"][0]["image"].tobytes() == draw_scene(sample.scene).tobytes()


def test_nameless_shades_are_like_no_held_out_pair():
    rng = random.Random(0)
    scenes = [make_scene(rng, TRAINING_PAIRS, number=9, nameless=0.5) for _ in range(200)]
    nameless = [shape for scene in scenes for shape in scene.shapes if not shape.color]
    assert 0.45 < len(nameless) / 1800 < 0.55 and {shape.kind for shape in nameless} == set(KINDS)
    for shape in nameless:
        distances = {color: math.dist(shape.shade, COLORS[color]) for color in COLORS}
        nearest = min(distances, key=distances.get)
        assert distances[nearest] >= 60
        assert (nearest, shape.kind) not in HELD_OUT_PAIRS or max(shape.shade) - min(shape.shade) < 60
    labels = token_labels(Page("shapes", Scene((300, 300), (255, 255, 255), (nameless[0],))))
    assert set(labels[:, 0].tolist()) == {0, -100} and set(labels[:, 1].tolist()) == {
        0,
        1 + KINDS.index(nameless[0].kind),
    }


def test_twins_have_no_position_of_their_own():
    scene = scene_of(("red", "star", "left"), ("red", "star", "right"))
    assert ask(scene, "position", "en", random.Random(0)) is None


def test_normalize():
    assert normalize(" Oben links.") == "oben links" and normalize("3!") == "3"
    assert normalize("top") != normalize("top left")


def test_tokenizer_layout(tokenizer):
    ids = tokenizer.convert_tokens_to_ids(list(STRUCTURAL_TOKENS))
    assert ids == list(range(BASE_SIZE, BASE_SIZE + len(STRUCTURAL_TOKENS))) and len(tokenizer) == ids[-1] + 1
    assert BASE_SIZE % 128 == 0
    last = tokenizer.convert_ids_to_tokens(BASE_SIZE - 1)
    assert last.startswith("|<EXTRA_TOKENS_") and last in tokenizer.all_special_tokens + list(
        tokenizer.get_added_vocab()
    )
    assert tokenizer.bos_token == tokenizer.eos_token == tokenizer.pad_token == END_OF_TEXT
    assert tokenizer.padding_side == "left"


@pytest.mark.parametrize(
    "text", ["", " a  b\n\tc ", "¿Qué? Größe, œuvre", "日本語 🙂‍↔️ \u0000\uffff", "\x80\xff", " User: 3\r\n"]
)
def test_tokenizer_encodes_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_words_of_the_generator_are_single_tokens(tokenizer):
    for language in LANGUAGES:
        for word in [
            *questions.COLOR_NAMES[language].values(),
            *(noun for _, noun, _ in questions.NOUNS[language].values()),
        ]:
            assert len(tokenizer(" " + word, add_special_tokens=False)["input_ids"]) == 1


def test_tokenizer_saves_and_loads(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = " User: ¿Dónde está la estrella roja?<|endoftext|><im_patch>"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (loaded.bos_token, loaded.padding_side) == (END_OF_TEXT, "left")


def test_table_of_results():
    results = [
        {"task": task, "language": language, "expected": str(i), "right": i == 0}
        for task in TASKS
        for language in LANGUAGES
        for i in range(4)
    ]
    assert accuracy(results) == (0.25, 64) and accuracy(results, task="kind", language="de") == (0.25, 4)
    assert chance(results, "count") == 0.25
    assert (
        table(results).splitlines()[-1] == "| all | 25.0 (16) | 25.0 (16) | 25.0 (16) | 25.0 (16) | 25.0 (64) | 25.0 |"
    )


def test_results_for_the_model_card():
    """Each is the arguments of an `EvalResult`, as the library takes them."""
    results = [{"task": task, "language": "en", "expected": "x", "right": task == "kind"} for task in TASKS]
    found = card_results(results)
    assert found["command"] == "make eval-tiny"
    evaluations = [EvalResult(**one) for one in found["results"]]
    assert [one.metric_value for one in evaluations] == [25.0, *(100.0 if task == "kind" else 0.0 for task in TASKS)]
    assert {one.metric_type for one in evaluations} == {"accuracy"} and len(
        {one.dataset_name for one in evaluations}
    ) == 5


def test_italian_is_true_and_held_out_pairs_are_held_out():
    scene = scene_of(("red", "star", "top left"), ("blue", "ring", "bottom"))
    found = {ask_shapes(scene, task, "it", random.Random(seed)) for task in TASKS for seed in range(20)}
    assert {(turn.question, turn.answer) for turn in found} == {
        ("Che forma c'è in alto a sinistra?", "stella"),
        ("Che forma c'è in basso?", "anello"),
        ("Di che colore è la forma in alto a sinistra?", "rosso"),
        ("Di che colore è la forma in basso?", "blu"),
        ("Dove vedi una stella rossa?", "in alto a sinistra"),
        ("Dove vedi un anello blu?", "in basso"),
        ("Quante forme ci sono?", "2"),
    }
    twins = scene_of(("red", "star", "left"), ("red", "star", "right"))
    assert ask_shapes(twins, "position", "it", random.Random(0)) is None
    for seed in range(200):
        scene, turns = shapes_data.training_turns(seed)
        assert {(shape.color, shape.kind) for shape in scene.shapes} <= set(TRAINING_PAIRS) and turns
        scene, turn = shapes_data.held_out_turn(seed)
        assert {(shape.color, shape.kind) for shape in scene.shapes} <= set(HELD_OUT_PAIRS)
        assert (turn.task, turn.language) == (TASKS[seed % 4], "it")


def test_drawn_data_are_in_the_sources_layouts(tmp_path):
    """The files in three of them, and the same again."""
    for folder in ("a", "b"):
        shapes_data.write(tmp_path / folder, images=3, texts=2, held_out=4, counting=5)
    names = ["counting.parquet", "held_out.parquet", "held_out_counting.parquet", "text.jsonl", "train.parquet"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == names
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)
    rows = {}
    for name in names:
        kind = "json" if name.endswith("jsonl") else "parquet"
        loaded = datasets.load_dataset(
            kind, data_files=str(tmp_path / "a" / name), split="train", cache_dir=str(tmp_path / "cache")
        )
        rows[name] = [to_conversation(row) for row in loaded]
    assert [len(rows[name]) for name in names] == [5, 4, 1, 2, 3]
    (question, answer) = rows["held_out.parquet"][0]
    assert [part["type"] for part in question["content"]] == ["image", "text"] and answer["role"] == "assistant"
    assert len(rows["train.parquet"][0]) >= 2 and rows["text.jsonl"][0][0]["content"][0]["type"] == "text"
