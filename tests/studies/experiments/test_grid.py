"""The grids of short trainings: what is paired, what is left out, how variants differ, and what is made of answers."""

import csv
import dataclasses
import json
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import datasets
import pytest
import torch
import yaml
from conftest import ROOT
from PIL import Image
from torch.nn import functional as F

from experiments import ablations, grid, grid_data, grid_model, leave_one_out, small_model
from experiments.grid import Setting, Training
from jina_vlm_tools.synthetic.page_questions import COLORS_IN, PLACES_IN, TEMPLATES
from jina_vlm_tools.synthetic.shapes import COLORS
from jina_vlm_tools.training.settings import SettingsError
from jina_vlm_tools.training.stages import read_stage


RECIPES = ROOT / "experiments" / "recipes"


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """Little data, a start that knows nothing, and the recipes with two steps of four samples."""
    folder = tmp_path_factory.mktemp("grid")
    grid_data.write(folder / "data", samples=60, questions=4)
    (folder / "start").mkdir()
    torch.manual_seed(0)
    model = small_model.make_model(grid_model.make_config(grid_model.make_processor().tokenizer, [4]))
    for part in ("tower", "decoder"):
        grid_model.save_part(model, part, folder / "start")
    stages = []
    for stage in (1, 2):
        recipe = yaml.safe_load((RECIPES / f"grid_stage{stage}.yaml").read_text())
        recipe |= {"mixture": f"data/stage{stage}/mixture.yaml", "steps": 2, "global_batch_size": 4, "batch_size": 4}
        for part in ("encoder", "connector", "decoder"):
            recipe[part]["warmup_steps"] = 1
        stages.append(folder / f"stage{stage}.yaml")
        stages[-1].write_text(yaml.safe_dump(recipe))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
        yield Setting(tuple(stages), folder / "start", folder / "data" / "held_out", introduction=2)


def order(training: Training, setting: Setting, stage: int) -> grid.Order:
    return grid.make_order(training, *grid.open_stage(setting.stages[stage - 1], setting.start, training.pooling_size))


def drawn(training: Training, setting: Setting, stage: int, number: int = 300) -> list[tuple[str, int]]:
    """The first samples of a stage: the names of their sources, and their places there."""
    plan = order(training, setting, stage)
    return [(plan.sources[place.source].settings.name, place.index) for place in islice(plan.samples(), number)]


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


def test_every_category_of_the_grid_is_in_the_data(setting):
    """And what is left out in stage two is told apart from all else by its source alone."""
    mixtures = [read_stage(file)[1] for file in setting.stages]
    for category, value in leave_one_out.LEFT_OUT:
        assert any(grid.sources_left_out(mixture, (category, value)) for mixture in mixtures)
    for mixture in mixtures:
        languages = {source.name.endswith("not_English"): source.language for source in mixture.sources}
        assert languages == {True: "not English", False: "English"}
        assert sum(source.weight for source in mixture.sources) == pytest.approx(1)
        not_english = [source.weight for source in mixture.sources if source.language == "not English"]
        assert sum(not_english) == pytest.approx(grid_data.NOT_ENGLISH)


def test_samples_are_what_their_sources_say(setting):
    """Charts are about bars, tables about cells, in the languages that the source names."""
    folder = setting.questions.parent / "stage2"
    words = {"English": ("How", "What"), "not English": ("Wie", "Welche", "¿Qué", "¿De qué")}
    for group, starts in words.items():
        name = f"questions_charts_{group}".replace(" ", "_")
        rows = datasets.Dataset.from_parquet(str(folder / f"{name}.parquet"))
        for row in rows:
            asked = [turn["user"] for turn in row["texts"]]
            assert all(question.startswith(starts) for question in asked), asked
            assert row["images"][0].size == (grid_data.SIDE, grid_data.SIDE)


def test_questions_are_about_pages_that_training_does_not_draw(setting):
    """From other seeds; in all languages and of all kinds where these are mixed."""
    trained, asked = set(), []
    for file in (setting.questions.parent / "stage2").glob("*.parquet"):
        trained |= {row["images"][0].tobytes() for row in datasets.Dataset.from_parquet(str(file))}
    for column in grid_data.COLUMNS_ASKED:
        pages = [grid_data.held_out(column, index) for index in range(12)]
        if column == "text":
            assert all(page is None for page, _ in pages)
            continue
        asked += [grid_data.draw_page(page).tobytes() for page, _ in pages]
        if column == "not English":
            assert {(turn.language, page.kind) for page, turn in pages} == {
                (language, kind) for language in ("de", "es") for kind in ("shapes", "board", "table", "chart")
            }
        else:
            assert {turn.language for _, turn in pages} == {"en"}
    assert len(trained) > 40 and not trained & set(asked)


def test_patches_are_labelled_with_what_lies_on_them():
    """A chart's bar from its foot to its height, and nothing beside it."""
    bar = grid_data.Bar((42, 42, 84, 126), "red", 6)
    page = grid_data.Page("chart", grid_data.Scene((126, 126), (240, 240, 240), ()), bars=(bar,))
    labels = grid_model.token_labels(page, grid_model.middles()).unflatten(0, (9, 9))
    heights = labels[..., list(grid_model.TOKEN_CLASSES).index("height")]
    expected = torch.zeros(9, 9, dtype=torch.long)
    expected[3:, 3:6] = 6
    assert torch.equal(heights, expected)


def test_mosaics_are_what_is_said_of_them():
    """Each cell that a description names has its color, in the chat's language."""
    described = set()
    for index in range(20):
        messages = grid_model.mosaic(random.Random(index))["messages"]
        image, question = messages[0]["content"]
        for language, templates in TEMPLATES.items():
            if question["text"] != templates["everything"] or language not in grid_model.ABOUT_MOSAICS:
                continue
            described.add(language)
            places, names = list(PLACES_IN[language].values()), list(COLORS_IN[language].values())
            for said in messages[1]["content"][0]["text"].rstrip(".").split("; "):
                place, color = said.split(": ")
                row, column = divmod(places.index(place), 3)
                pixel = image["image"].getpixel((42 * column + 21, 42 * row + 21))
                named = list(COLORS.values())[names.index(color)]
                assert max(abs(a - b) for a, b in zip(pixel, named, strict=True)) <= 10
    assert described == {"en", "de", "es"}


# ---------------------------------------------------------------------------------------------------------------------
# Order
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", leave_one_out.LEFT_OUT, ids="=".join)
@pytest.mark.parametrize("stage", [1, 2])
def test_what_remains_comes_in_the_same_order(setting, kind, stage):
    """The base's samples less those that are left out, and as many steps."""
    _, mixture, sources = grid.open_stage(setting.stages[stage - 1], setting.start, 2)
    gone = {mixture.sources[number].name for number in grid.sources_left_out(mixture, kind)}
    with_all, without = (drawn(Training(3, one), setting, stage) for one in (None, kind))
    remains = [sample for sample in with_all if sample[0] not in gone]
    assert without[: len(remains)] == remains and len(remains) > 100
    assert not {name for name, _ in without} & gone
    assert (remains == with_all) == (not gone)
    base, other = order(Training(3), setting, stage), order(Training(3, kind), setting, stage)
    assert len(list(base)) == len(list(other)) == base.steps == other.steps == 2
    assert all(len(batch) == 4 for batch in other)


def test_seeds_have_orders_of_their_own(setting):
    assert drawn(Training(0), setting, 2) == drawn(Training(0), setting, 2) != drawn(Training(1), setting, 2)


def test_images_keep_their_order_whatever_the_share_of_texts(setting):
    """0, 15 and 30 % of texts; what is a text at 15 % is one at 30 %."""
    samples = {share: drawn(Training(0, text_share=share), setting, 2, 4000) for share in (0.0, 0.15, 0.3)}
    images = {share: [s for s in some if not s[0].startswith("text")] for share, some in samples.items()}
    for share, some in samples.items():
        assert 1 - len(images[share]) / len(some) == pytest.approx(share, abs=0.02)
        assert images[share] == images[0.0][: len(images[share])]
    assert samples[0.15] == drawn(Training(0), setting, 2, 4000)
    assert samples[0.0] == drawn(Training(0, ("modality", "text")), setting, 2, 4000)


def test_nothing_may_be_left_of_no_stage(setting):
    mixture = read_stage(setting.stages[0])[1]
    image_sources = [source for source in mixture.sources if source.modality != "text"]
    with pytest.raises(ValueError, match="Without modality 'image-text' nothing of a stage remains"):
        grid.sources_left_out(dataclasses.replace(mixture, sources=image_sources), ("modality", "image-text"))


# ---------------------------------------------------------------------------------------------------------------------
# Variants
# ---------------------------------------------------------------------------------------------------------------------


PAGES = 8


@pytest.mark.parametrize(
    ("variant", "blocks", "tokens"),
    [(("pooling", name), 4, tokens) for name, tokens in (("attention, 2 x 2", 25), ("mean, 2 x 2", 25), ("none", 81))]
    + [(("feature layers", f"block {number} of 5"), number, 25) for number in (2, 4, 5)],
    ids=str,
)
def test_variants_have_their_tokens_and_blocks(setting, variant, blocks, tokens):
    """A tile's tokens from the model, an image's from the processor; tower and decoder start alike."""
    training = ablations.VARIANTS[variant]
    model = grid.make_start(training, setting.start)
    base = grid.make_start(Training(0), setting.start)
    assert len(model.model.vision_model.tower.encoder.layers) == blocks
    pixels = grid_model.mosaics_to_see()[:PAGES].repeat_interleave(2, dim=0)
    with torch.no_grad():
        images = model.get_image_features(pixels, torch.tensor([[-1, -1, 1, 1], [0, 0, 1, 1]] * PAGES)).pooler_output
    assert [len(features) for features in images] == [2 * tokens] * PAGES
    features = torch.cat(images)
    processor = grid_model.make_processor(training.pooling_size)
    inputs = processor(text="<|image|> What?", images=Image.new("RGB", (126, 126)), return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 2 * tokens
    assert len(inputs["pixel_values"]) == 2
    for name, weight in base.named_parameters():
        same = "tower.encoder.layers" not in name and "connector" not in name
        if same or (name in dict(model.named_parameters()) and "tower" in name):
            assert torch.equal(weight, model.get_parameter(name)), name
    # Image tokens are as large as words.
    ratio = features.pow(2).mean().sqrt() / model.get_input_embeddings().weight.pow(2).mean().sqrt()
    assert 0.75 < ratio < 1.3


def test_mean_pooling_is_the_mean_of_values(setting):
    """By hand, over windows that are padded with zeros as the model's are; what both connectors have starts alike."""
    mean = grid.make_start(ablations.VARIANTS["pooling", "mean, 2 x 2"], setting.start).model.connector
    attention = grid.make_start(Training(0), setting.start).model.connector
    for name in ("v_proj", "out_proj", "gate_proj", "up_proj"):
        assert torch.equal(getattr(mean, name).weight, getattr(attention, name).weight)
    features = torch.randn(3, 81, 256, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = mean(features, torch.tensor([False, False, True]))
        features[2] += mean.pad_embed[1]
        grid_of = F.pad(features.unflatten(1, (9, 9)), (0, 0, 0, 1, 0, 1)).permute(0, 3, 1, 2)
        pooled = F.avg_pool2d(grid_of, 2).flatten(2).transpose(1, 2)
        hidden = mean.out_proj(mean.v_proj(pooled))
        expected = mean.down_proj(F.silu(mean.gate_proj(hidden)) * mean.up_proj(hidden))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, attention(features, torch.tensor([False, False, False])), atol=1e-3)


def test_names_tell_trainings_apart():
    trainings = {
        dataclasses.replace(training, seed=seed)
        for seed in (0, 1)
        for training in (*ablations.VARIANTS.values(), *(Training(0, kind) for kind in leave_one_out.LEFT_OUT))
    }
    names = {training.name for training in trainings}
    assert len(names) == len(trainings) == 2 * (7 + len(leave_one_out.LEFT_OUT))
    assert "base__seed_0" in names and "without_domain_charts__seed_1" in names


# ---------------------------------------------------------------------------------------------------------------------
# Running
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_training_for_real(setting, tmp_path):
    """Both stages, then all questions; connector and decoder learn; the same training again has the same losses."""
    training = Training(1, ("domain", "tables"))
    grid.train_and_ask(training, setting, tmp_path)
    file = grid.answers_file(training, tmp_path)
    result = json.loads(file.read_text())
    assert list(result["right"]) == list(grid_data.COLUMNS_ASKED)
    assert all(len(right) == 4 for right in result["right"].values())
    assert result["image_tokens"] == 50 and len(result["losses"]) == 2
    before, model = (grid.introduced(training, setting, tmp_path) for _ in range(2))
    assert grid.train(model, training, setting, tmp_path) == pytest.approx(result["losses"])
    for part in ("connector", "language_model.layers.0"):
        old, new = (dict(one.model.get_submodule(part).named_parameters()) for one in (before, model))
        assert all(not torch.equal(old[name], new[name]) for name in old if name.endswith("proj.weight")), part


@pytest.mark.parametrize("layers", [(3, 1), (4,)])
def test_what_was_seen_once_is_what_the_tower_sees(setting, layers):
    """Image tokens from the stored outputs of the blocks and from pixels, within bfloat16's steps."""
    model = grid.make_start(Training(0, feature_layers=layers), setting.start)
    pixels = grid_model.mosaics_to_see()[:3].repeat_interleave(2, dim=0)
    positions = torch.tensor([[-1, -1, 1, 1], [0, 0, 1, 1]] * 3)
    seen = grid.see({"pixel_values": pixels}, setting.start)["pixel_values"]
    assert seen.shape == (3, grid_model.DEPTH, 81, 128) and seen.dtype == torch.bfloat16
    with torch.no_grad():
        expected = torch.cat(model.get_image_features(pixels, positions).pooler_output)
        model.model.vision_model = grid.Seen(layers)
        found = torch.cat(model.get_image_features(grid.twice(seen), positions).pooler_output)
    assert (found - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_a_stage_that_trains_the_tower_is_refused(setting, tmp_path):
    recipe = yaml.safe_load(setting.stages[0].read_text())
    recipe["encoder"]["learning_rate"] = 1e-3
    recipe["mixture"] = str(setting.questions.parent / "stage1" / "mixture.yaml")
    (tmp_path / "stage.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(SettingsError, match="`encoder.learning_rate` is 0.001: expected 0"):
        grid.open_stage(tmp_path / "stage.yaml", setting.start, 2)


def fake_answers(training: Training) -> dict:
    """All right, but that numbers need their boards, and charts, for two seeds of three, texts."""
    right = {column: [True] * 4 for column in grid_data.COLUMNS_ASKED}
    if training.left_out == ("domain", "boards"):
        right["numbers"] = [False] * 4
    if training.left_out == ("modality", "text") and training.seed:
        right["charts"] = [False] * 4
    tokens = 50 if training.pooling_size == 2 else 162
    return {"right": right, "losses": [1.0, 0.5], "image_tokens": tokens, "cpu_seconds": 60.0 + training.seed}


@pytest.fixture
def faked(monkeypatch):
    """Trainings that answer at once; the list has what ran, and stops at as many as `limit` says."""
    ran, limit = [], [10**6]

    def train_and_ask(training, setting, output):
        if len(ran) >= limit[0]:
            raise RuntimeError("stopped")
        ran.append(training)
        grid.answers_file(training, output).write_text(json.dumps(fake_answers(training)))

    monkeypatch.setattr(grid, "train_and_ask", train_and_ask)
    monkeypatch.setattr(grid, "ProcessPoolExecutor", lambda workers, mp_context: ThreadPoolExecutor(1))
    return ran, limit


def call(module, setting, tmp_path, monkeypatch, *arguments: str) -> None:
    command = ["grid", "--stages", *map(str, setting.stages), "--start", str(setting.start)]
    command += ["--questions", str(setting.questions), "--output", str(tmp_path / "answers")]
    monkeypatch.setattr(sys, "argv", [*command, "--results", str(tmp_path / "results"), *arguments])
    module.main()


def test_a_stopped_grid_goes_on(setting, faked, tmp_path, monkeypatch):
    """What is done is not done again, seeds come one after the other, and the base is shared by both grids."""
    ran, limit = faked
    limit[0] = 13
    with pytest.raises(RuntimeError, match="stopped"):
        call(leave_one_out, setting, tmp_path, monkeypatch)
    limit[0] = 10**6
    call(leave_one_out, setting, tmp_path, monkeypatch)
    assert len(ran) == len(set(ran)) == 30 and [training.seed for training in ran[:13]] == [0] * 10 + [1] * 3
    call(ablations, setting, tmp_path, monkeypatch)
    assert len(ran) == len(set(ran)) == 30 + 3 * 6


def test_what_leaving_out_changes(setting, faked, tmp_path, monkeypatch):
    call(leave_one_out, setting, tmp_path, monkeypatch)
    rows = list(csv.DictReader((tmp_path / "results" / "leave_one_out.csv").read_text().splitlines()))
    assert len(rows) == 9 * (len(grid_data.COLUMNS_ASKED) + 1)
    found = {(row["left_out"], row["column"]): row for row in rows}
    numbers = found["boards", "numbers"]
    assert [numbers[key] for key in ("category", "base", "accuracy", "change", "low", "high", "per_seed")] == [
        "domain",
        *("100.0", "0.0", "-100.0", "-100.0", "-100.0"),
        "-100.0 -100.0 -100.0",
    ]
    # Two of three seeds fall from right to wrong: -66.7, and t(2) = 4.303 standard errors of 33.3 to either side.
    charts = found["text", "charts"]
    assert [charts[key] for key in ("change", "low", "high")] == ["-66.7", "-210.1", "76.8"]
    assert found["boards", "all"]["change"] == "-12.5" and found["charts", "shapes"]["change"] == "0.0"
    with Image.open(tmp_path / "results" / "leave_one_out.png") as image:
        assert image.width > 1000 and image.height > 600


def test_what_variants_cost(setting, faked, tmp_path, monkeypatch, capsys):
    call(ablations, setting, tmp_path, monkeypatch, "--seeds", "0", "1")
    rows = list(csv.DictReader((tmp_path / "results" / "ablations.csv").read_text().splitlines()))
    assert len(rows) == len(ablations.VARIANTS) * (len(grid_data.COLUMNS_ASKED) + 1)
    (none,) = [row for row in rows if row["variant"] == "none" and row["column"] == "all"]
    assert (none["image_tokens"], none["cpu_seconds"], none["change"]) == ("162", "60", "0.0")
    # One of two seeds: -6.25 of 12.5, and t(1) = 12.706 standard errors of 6.25.
    assert "| text | 0 % | 50 | 60 | 93.8 | -6.2 (-85.7 to +73.2) |" in capsys.readouterr().out


def test_the_papers_table_beside_it():
    """The changes that the paper prints, in per cent of the base."""
    rows = leave_one_out.read_paper()
    assert len(rows) == 9 * 15
    relative = {(row["left_out"], row["column"]): 100 * row["change"] / row["base"] for row in rows}
    assert relative["charts", "ChartQA"] == pytest.approx(-39.4, abs=0.05)
    assert relative["non-English", "MTVQA"] == pytest.approx(-16.1, abs=0.3)  # of rounded figures
    assert relative["code", "HellaSwag"] == pytest.approx(-10.6, abs=0.3)
    assert relative["real world", "HellaSwag"] == pytest.approx(9.1, abs=0.3)
    assert relative["documents", "MMMU"] == pytest.approx(7.3, abs=0.05)


def test_chance_is_the_most_frequent_answer(setting):
    """Of four questions of each column."""
    chances = grid.chance(setting)
    for column in grid_data.COLUMNS_ASKED:
        answers = [grid_data.held_out(column, index)[1].answer for index in range(4)]
        assert chances[column] == 25 * max(map(answers.count, answers)), column


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "1"], "--seeds: expected 2 to 10 different numbers"),
        (["--seeds", "1", "1"], "--seeds: expected 2 to 10 different numbers"),
        (["--workers", "0"], "--workers: expected at least 1, got 0"),
        (["--start", "nowhere"], "--start nowhere: it has no tower. Run `python -m experiments.grid_model` first."),
        (["--leave-out", "domain=maps"], "No source of either stage has domain 'maps'"),
    ],
)
def test_wrong_arguments_are_said_before_anything_is_trained(
    setting, faked, tmp_path, monkeypatch, arguments, message
):
    with pytest.raises((SystemExit, ValueError), match=message):
        call(leave_one_out, setting, tmp_path, monkeypatch, *arguments)
    assert not faked[0]


def test_a_kind_needs_a_category(setting, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        call(leave_one_out, setting, tmp_path, monkeypatch, "--leave-out", "charts")
    assert "expected task=... or domain=... or modality=... or language=..., got 'charts'" in capsys.readouterr().err
