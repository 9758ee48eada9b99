"""The generator of pictures, questions and answers that the small checkpoint is trained on, and its tokenizer."""

import math
import random
import sys
from pathlib import Path

import datasets
import pytest
import torch
from huggingface_hub import EvalResult
from transformers import AutoModelForImageTextToText, AutoProcessor


ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from training import (  # noqa: E402
    questions,
    shapes,
    shapes_data,  # noqa: E402
)
from training.eval_tiny import accuracy, card_results, chance, table  # noqa: E402
from training.layouts import to_conversation  # noqa: E402
from training.questions import LANGUAGES, TASKS, ask, evaluation_sample, normalise, training_sample  # noqa: E402
from training.seeing import ScenesDataset, token_labels  # noqa: E402
from training.shapes import (  # noqa: E402
    COLOURS,
    HELD_OUT_PAIRS,
    KINDS,
    PLACES,
    TRAINING_PAIRS,
    Scene,
    Shape,
    draw_scene,
    make_scene,
)
from training.tokenizer import BASE_SIZE, END_OF_TEXT, STRUCTURAL_TOKENS, train_tokenizer  # noqa: E402


def pairs_of(sample):
    return {(shape.colour, shape.kind) for shape in sample.scene.shapes}


def scene_of(*shapes_):
    """A white scene of (colour, kind, place) triples."""
    return Scene(
        (300, 300),
        (255, 255, 255),
        tuple(Shape(kind, colour, place, (0.5, 0.5), 0.4, 0.0, COLOURS[colour]) for colour, kind, place in shapes_),
    )


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


def test_same_seed_same_sample():
    for seed in range(20):
        first, second = training_sample(seed), training_sample(seed)
        assert first == second
        assert draw_scene(first.scene).tobytes() == draw_scene(second.scene).tobytes()
    assert training_sample(0) != training_sample(1)
    assert evaluation_sample(0, "kind", "en") == evaluation_sample(0, "kind", "en")


def test_pairs_are_split():
    assert not set(HELD_OUT_PAIRS) & set(TRAINING_PAIRS)
    assert len(HELD_OUT_PAIRS) + len(TRAINING_PAIRS) == len(COLOURS) * len(KINDS)
    for values in (COLOURS, KINDS):
        for value in values:
            assert any(value in pair for pair in HELD_OUT_PAIRS)
            assert sum(value in pair for pair in TRAINING_PAIRS) >= 5


def test_held_out_pairs_are_drawn_in_evaluation_only():
    for seed in range(1000):
        for sample in (training_sample(seed), training_sample(seed, board=True)):
            assert pairs_of(sample) <= set(TRAINING_PAIRS)
    scenes = ScenesDataset(1000, first_seed=0)
    named = {(shape.colour, shape.kind) for i in range(400) for shape in scenes[i].shapes if shape.colour}
    assert named == set(TRAINING_PAIRS)
    seen = set()
    for seed in range(500):
        seen |= pairs_of(evaluation_sample(seed, TASKS[seed % 4], "en"))
    assert seen == set(HELD_OUT_PAIRS)


@pytest.mark.parametrize("seed", [-1, questions.EVALUATION_SEEDS])
def test_training_takes_no_seed_of_evaluation(seed):
    with pytest.raises(ValueError, match="Training seeds"):
        training_sample(seed)


def test_pictures_become_one_tile():
    def tiles(side):  # released-checkpoint.md, section 1, steps 2 and 3, for pictures within the budget
        return 1 if round(side / 14) * 14 - 112 <= 266 else 2

    sizes = set()
    for seed in range(300):
        scene = training_sample(seed).scene
        assert [tiles(side) for side in scene.size] == [1, 1]
        sizes.add(scene.size)
    assert draw_scene(scene).size == scene.size and draw_scene(scene).mode == "RGB"
    assert len(sizes) > 250


def test_shapes_are_drawn_in_their_place_and_colour():
    for colour in COLOURS:
        for kind in KINDS:
            for index, place in enumerate(PLACES):
                image = draw_scene(scene_of((colour, kind, place)))
                row, column = divmod(index, 3)
                cell = (100 * column, 100 * row, 100 * column + 100, 100 * row + 100)
                colours = dict((value, count) for count, value in image.crop(cell).getcolors(10_000))
                assert 500 < colours[COLOURS[colour]] < 8000
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
        words = normalise(turn.question).replace("crosses", "cross").split()
        words = [word.removesuffix("s") if word.removesuffix("s") in KINDS else word for word in words]
        asked = " ".join(words)
        places = [place for place in sorted(PLACES, key=len, reverse=True) if f" {place}" in asked]
        fitting = [
            shape
            for shape in scene.shapes
            if (not set(words) & set(COLOURS) or shape.colour in words)
            and (not set(words) & set(KINDS) or shape.kind in words)
            and (not places or shape.place == places[0])
        ]
        if task == "count":
            assert turn.answer == str(len(fitting)) and 1 <= len(fitting) <= 5
        else:
            (shape,) = fitting
            assert turn.answer == {"kind": shape.kind, "colour": shape.colour, "position": shape.place}[task]
        checked[task] += 1
    assert min(checked.values()) > 250


@pytest.mark.parametrize(
    ("language", "expected"),
    [
        ("en", "2 shapes: at the top left a red star, at the bottom an orange cross."),
        ("de", "2 Formen: oben links ein roter Stern, unten ein orange Kreuz."),
        ("es", "2 figuras: arriba a la izquierda una estrella roja, abajo una cruz naranja."),
        ("fr", "2 formes : en haut à gauche une étoile rouge, en bas une croix orange."),
    ],
)
def test_captions(language, expected):
    assert questions.caption(scene_of(("red", "star", "top left"), ("orange", "cross", "bottom")), language) == expected


def test_token_labels():
    scene = scene_of(("yellow", "ring", "top left"), ("black", "star", "bottom right"))
    colours, kinds, places = token_labels(scene).unflatten(0, (14, 14)).unbind(dim=-1)
    assert places[0, 0] == 0 and places[0, -1] == 2 and places[7, 7] == 4 and places[-1, -1] == 8
    assert set(colours[places == 0].tolist()) == {0, 1 + list(COLOURS).index("yellow")}
    assert set(kinds[places == 8].tolist()) == {0, 1 + KINDS.index("star")}
    assert not colours[(places != 0) & (places != 8)].any()
    assert 5 <= (colours[places == 0] > 0).sum() <= 16  # a circle of radius 0.4 covers half of its cell of about 22 tokens


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
    ("language", "colour", "kind", "expected"),
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
def test_agreement(language, colour, kind, expected):
    assert questions.a(language, colour, kind) == expected


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


def test_any_question_may_come_first():
    first = {(s.turns[0].task, s.turns[0].language) for s in map(training_sample, range(1000))}
    assert {(task, language) for task in TASKS for language in LANGUAGES} <= first


@pytest.mark.parametrize("apart", [False, True])
def test_conversations(apart):
    sample = next(s for s in map(training_sample, range(100)) if s.apart == apart and len(s.turns) > 2)
    conversations = sample.conversations()
    assert [message["role"] for messages in conversations for message in messages] == ["user", "assistant"] * len(sample.turns)
    assert len(conversations) == (len(sample.turns) if apart else 1)
    for messages in conversations:
        assert [part["type"] for part in messages[0]["content"]] == ["image", "text"]
        assert all(part["type"] == "text" for message in messages[1:] for part in message["content"])
    assert sample.conversations(answered=False) == [messages[:-1] for messages in conversations]


def test_lists_say_what_there_is_of_everything():
    scene = scene_of(("red", "star", "left"), ("red", "ring", "top right"))
    places, colours, kinds = (questions.listed(scene, task, "en", random.Random(0)) for task in questions.LISTS)
    assert places.startswith("top left: nothing; top: nothing; top right: a red ring; left: a red star; ")
    assert "red: 2, star left, ring top right" in colours and colours.count(": 0") == len(COLOURS) - 1
    assert "star: 1, red left" in kinds and "ring: 1, red top right" in kinds and kinds.count(": 0") == len(KINDS) - 2
    assert colours != questions.listed(scene, "colours", "en", random.Random(1)), "in any order"
    for language in LANGUAGES:
        for task in questions.LISTS:
            assert ask(scene, task, language, random.Random(0)).answer.count(";") == {"places": 8, "colours": 7, "kinds": 5}[task]


def test_nameless_shades_are_like_no_held_out_pair():
    rng = random.Random(0)
    scenes = [make_scene(rng, TRAINING_PAIRS, number=9, nameless=0.5) for _ in range(200)]
    nameless = [shape for scene in scenes for shape in scene.shapes if not shape.colour]
    assert 0.45 < len(nameless) / 1800 < 0.55 and {shape.kind for shape in nameless} == set(KINDS)
    for shape in nameless:
        distances = {colour: math.dist(shape.shade, COLOURS[colour]) for colour in COLOURS}
        nearest = min(distances, key=distances.get)
        assert distances[nearest] >= 60
        assert (nearest, shape.kind) not in HELD_OUT_PAIRS or max(shape.shade) - min(shape.shade) < 60
    labels = token_labels(Scene((300, 300), (255, 255, 255), (nameless[0],)))
    assert set(labels[:, 0].tolist()) == {0, -100} and set(labels[:, 1].tolist()) == {0, 1 + KINDS.index(nameless[0].kind)}


def test_twins_have_no_position_of_their_own():
    scene = scene_of(("red", "star", "left"), ("red", "star", "right"))
    assert ask(scene, "position", "en", random.Random(0)) is None


def test_normalise():
    assert normalise(" Oben links.") == "oben links" and normalise("3!") == "3"
    assert normalise("top") != normalise("top left")


def test_tokenizer_layout(tokenizer):
    ids = tokenizer.convert_tokens_to_ids(list(STRUCTURAL_TOKENS))
    assert ids == list(range(BASE_SIZE, BASE_SIZE + len(STRUCTURAL_TOKENS))) and len(tokenizer) == ids[-1] + 1
    assert BASE_SIZE % 128 == 0
    last = tokenizer.convert_ids_to_tokens(BASE_SIZE - 1)
    assert last.startswith("|<EXTRA_TOKENS_") and last in tokenizer.all_special_tokens + list(tokenizer.get_added_vocab())
    assert tokenizer.bos_token == tokenizer.eos_token == tokenizer.pad_token == END_OF_TEXT
    assert tokenizer.padding_side == "left"


@pytest.mark.parametrize("text", ["", " a  b\n\tc ", "¿Qué? Größe, œuvre", "日本語 🙂‍↔️ \u0000\uffff", "\x80\xff", " User: 3\r\n"])
def test_tokenizer_encodes_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_words_of_the_generator_are_single_tokens(tokenizer):
    for language in LANGUAGES:
        for word in [*questions.COLOUR_NAMES[language].values(), *(noun for _, noun, _ in questions.NOUNS[language].values())]:
            assert len(tokenizer(" " + word, add_special_tokens=False)["input_ids"]) == 1


def test_tokenizer_saves_and_loads(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = " User: ¿Dónde está la estrella roja?<|endoftext|><im_patch>"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (loaded.bos_token, loaded.padding_side) == (END_OF_TEXT, "left")


def test_packed_conversations_are_what_they_are_alone():
    """Every answer's logits and labels in the collator's rows, which hold many conversations about a picture, are those of the
    conversation processed by itself; so nothing of one conversation reaches another."""
    from training.train_tiny import ConversationCollator

    checkpoint = str(ROOT / "checkpoints" / "tiny")
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, trust_remote_code=True, dtype=torch.float32).eval()
    samples = [next(s for s in map(training_sample, range(seed, 100)) if s.apart == apart) for seed, apart in ((0, True), (9, False))]
    batch = ConversationCollator(processor)(samples)
    labels = batch.pop("labels")
    assert torch.equal(batch["pixel_values"][::2], batch["pixel_values"][1::2]), "a picture is its own thumbnail"
    with torch.inference_mode():
        logits = model(**batch).logits
    assert logits.shape[:2] == labels.shape
    for sample, row_logits, row_labels in zip(samples, logits, labels, strict=True):
        is_answer = row_labels != -100
        predictions, answers = [], []
        for messages in sample.conversations():
            alone = processor.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
            )
            marked = alone.pop("assistant_masks")[0].bool()
            with torch.inference_mode():
                predictions.append(model(**alone).logits[0, :-1][marked[1:]])
            answers.append(alone["input_ids"][0, marked])
        assert torch.equal(row_labels[is_answer], torch.cat(answers))
        torch.testing.assert_close(row_logits[:-1][is_answer[1:]], torch.cat(predictions), atol=1e-4, rtol=1e-4)


def test_table_of_results():
    results = [
        {"task": task, "language": language, "expected": str(i), "right": i == 0}
        for task in TASKS
        for language in LANGUAGES
        for i in range(4)
    ]
    assert accuracy(results) == (0.25, 64) and accuracy(results, task="kind", language="de") == (0.25, 4)
    assert chance(results, "count") == 0.25
    assert table(results).splitlines()[-1] == "| all | 25.0 (16) | 25.0 (16) | 25.0 (16) | 25.0 (16) | 25.0 (64) | 25.0 |"


def test_results_for_the_model_card():
    """Each is the arguments of an `EvalResult`, as the library takes them."""
    results = [{"task": task, "language": "en", "expected": "x", "right": task == "kind"} for task in TASKS]
    found = card_results(results)
    assert found["command"] == "make eval-tiny"
    evaluations = [EvalResult(**one) for one in found["results"]]
    assert [one.metric_value for one in evaluations] == [25.0, *(100.0 if task == "kind" else 0.0 for task in TASKS)]
    assert {one.metric_type for one in evaluations} == {"accuracy"} and len({one.dataset_name for one in evaluations}) == 5


def test_italian_is_true_and_held_out_pairs_are_held_out():
    scene = scene_of(("red", "star", "top left"), ("blue", "ring", "bottom"))
    found = {shapes_data.ask_in_italian(scene, task, random.Random(seed)) for task in TASKS for seed in range(20)}
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
    assert shapes_data.ask_in_italian(twins, "position", random.Random(0)) is None
    for seed in range(200):
        scene, turns = shapes_data.training_turns(seed)
        assert {(shape.colour, shape.kind) for shape in scene.shapes} <= set(TRAINING_PAIRS) and turns
        scene, turn = shapes_data.held_out_turn(seed)
        assert {(shape.colour, shape.kind) for shape in scene.shapes} <= set(HELD_OUT_PAIRS)
        assert (turn.task, turn.language) == (TASKS[seed % 4], "it")


def test_drawn_data_are_in_the_sources_layouts(tmp_path):
    """Each of the three files in another one, and the same again."""
    for folder in ("a", "b"):
        shapes_data.write(tmp_path / folder, pictures=3, texts=2, held_out=4)
    names = ["held_out.parquet", "text.jsonl", "train.parquet"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == names
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)
    rows = {}
    for name in names:
        kind = "json" if name.endswith("jsonl") else "parquet"
        loaded = datasets.load_dataset(kind, data_files=str(tmp_path / "a" / name), split="train", cache_dir=str(tmp_path / "cache"))
        rows[name] = [to_conversation(row) for row in loaded]
    assert [len(rows[name]) for name in names] == [4, 2, 3]
    (question, answer) = rows["held_out.parquet"][0]
    assert [part["type"] for part in question["content"]] == ["image", "text"] and answer["role"] == "assistant"
    assert len(rows["train.parquet"][0]) >= 2 and rows["text.jsonl"][0][0]["content"][0]["type"] == "text"
