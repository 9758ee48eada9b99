"""A mixture from YAML: what is refused, what is drawn, in what batches, and the same again."""

import io
import itertools
import json
import logging
import random
from collections import Counter

import datasets
import pytest
import torch
import yaml
from PIL import Image

from jina_vlm_tools.training import JinaVLMCollator
from jina_vlm_tools.training.mixture import (
    MixtureDataset,
    Plan,
    Source,
    SourceSettings,
    TooManyBadSamples,
    padding_share,
    read_mixture,
    shares,
)
from jina_vlm_tools.training.settings import SettingsError


@pytest.fixture(scope="module", autouse=True)
def caches(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("datasets"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        yield


@pytest.fixture(scope="module")
def collator(processor):
    return JinaVLMCollator(processor)


def png(height: int, width: int, value: int) -> dict:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (value % 256, value // 7 % 256, 90)).save(file, "PNG", compress_level=1)
    return {"bytes": file.getvalue(), "path": None}


def words(rng: random.Random, longest: int) -> str:
    return " ".join(rng.choices("the quick brown fox jumps over a lazy dog".split(), k=rng.randint(1, longest)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three sources: images of all shapes and sizes as FineVision has them, photos as LLaVA has them, and text."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    turn = {"user": datasets.Value("string"), "assistant": datasets.Value("string")}
    rows = [
        {
            "images": [png(rng.randint(60, 1300), rng.randint(60, 1300), i)],
            "texts": [{"user": words(rng, 30), "assistant": words(rng, 60)}],
        }
        for i in range(120)
    ]
    rows[7]["images"] = [{"bytes": rows[7]["images"][0]["bytes"][:100], "path": None}]
    rows[9]["texts"] = []
    datasets.Dataset.from_list(
        rows, features=datasets.Features(images=datasets.List(datasets.Image()), texts=datasets.List(turn))
    ).to_parquet(folder / "many.parquet")
    (folder / "photos").mkdir()
    with open(folder / "photos" / "photos.jsonl", "w") as file:
        for i in range(30):
            (folder / "photos" / f"{i}.png").write_bytes(png(300 + i, 300, i)["bytes"])
            turns = [{"from": "human", "value": f"<image>\nwhat is {i}?"}, {"from": "gpt", "value": words(rng, 5)}]
            file.write(json.dumps({"image": f"{i}.png", "conversations": turns}) + "\n")
    with open(folder / "text.jsonl", "w") as file:
        for i in range(60):
            chat = [
                {"role": "user", "content": f"{i} {words(rng, 300)}"},
                {"role": "assistant", "content": words(rng, 300)},
            ]
            file.write(json.dumps({"messages": chat}) + "\n")
    return folder


def source(name: str, weight: float, path: str, modality: str = "image-text", **more) -> dict:
    return {
        "name": name,
        "weight": weight,
        "path": path,
        "task": "vqa",
        "domain": "photos",
        "modality": modality,
        "language": "en",
        **more,
    }


MIXTURE = {
    "text_share": 0.15,
    "max_bad_share": 0.05,
    "sources": [
        source("many", 0.55, "many.parquet", domain="documents"),
        source("photos", 0.3, "photos/*.jsonl"),
        source("text", 0.15, "text.jsonl", "text", task="chat"),
    ],
}


@pytest.fixture
def write(folder):
    def write(changes: dict | None = None, **first_source):
        mixture = yaml.safe_load(yaml.safe_dump({**MIXTURE, **(changes or {})}))
        mixture["sources"][0] |= first_source
        file = folder / "mixture.yaml"
        file.write_text(yaml.safe_dump(mixture))
        return file

    return write


def open_all(file, collator) -> tuple[list[Source], list[float]]:
    mixture = read_mixture(file)
    sources = [
        Source(one, number, file, collator, mixture.max_bad_share) for number, one in enumerate(mixture.sources)
    ]
    return sources, [one.weight for one in mixture.sources]


@pytest.fixture(scope="module")
def opened(folder, collator):
    file = folder / "opened.yaml"
    file.write_text(yaml.safe_dump(MIXTURE))
    return open_all(file, collator)


def plan(opened, steps=40, global_batch_size=16, batch_size=4, seed=0, **kwargs) -> Plan:
    return Plan(*opened, steps, global_batch_size, batch_size, seed, **kwargs)


def where(batches) -> list[list[tuple[int, int]]]:
    return [[(place.source, place.index) for place in batch] for batch in batches]


# ---------------------------------------------------------------------------------------------------------------------
# What is drawn
# ---------------------------------------------------------------------------------------------------------------------


def test_sources_have_their_shares(opened):
    drawn = Counter(place.source for batch in plan(opened, steps=200) for place in batch)
    for number, weight in enumerate((0.55, 0.3, 0.15)):
        assert abs(drawn[number] / drawn.total() - weight) < 0.02
    assert drawn.total() == 200 * 16


def test_every_sample_comes_once_before_one_comes_again(opened):
    drawn = [place.index for place in itertools.islice(opened[0][0].places(0), 3 * 118)]
    rounds = [drawn[start : start + 118] for start in (0, 118, 236)]
    assert all(sorted(one) == sorted({*range(120)} - {7, 9}) for one in rounds), "all but the bad ones"
    assert rounds[0] != rounds[1] and rounds[0] != sorted(rounds[0])


def test_batches_have_their_size(opened):
    batches = list(plan(opened))
    assert len(batches) == len(plan(opened)) == 40 * 16 // 4 and {len(batch) for batch in batches} == {4}


def test_padding_is_under_a_tenth(opened):
    grouped = padding_share(iter(plan(opened, steps=64)))
    places = [place for batch in plan(opened, steps=64) for place in batch]
    random.Random(0).shuffle(places)
    shuffled = padding_share(places[start : start + 4] for start in range(0, len(places), 4))
    print(f"padding: {grouped:.1%} of tokens in groups, {shuffled:.1%} without")
    assert grouped < 0.1 < 0.3 < shuffled


def test_batches_are_of_equal_tiles(opened):
    """All but those at the borders of groups."""
    batches = list(plan(opened, steps=64))
    equal = sum(len({place.tiles for place in batch}) == 1 for batch in batches)
    assert equal > 0.75 * len(batches) and len({batch[0].tiles for batch in batches}) > 5


def test_processes_side_by_side_get_batches_alike(opened):
    """The batches of a step come by size: of two dealt together, one does not wait long for the other."""
    batches = [sum(place.tokens for place in batch) for batch in plan(opened, steps=64)]
    together = sum(abs(a - b) for a, b in zip(batches[::2], batches[1::2], strict=True))
    random.Random(0).shuffle(batches)
    anyhow = sum(abs(a - b) for a, b in zip(batches[::2], batches[1::2], strict=True))
    assert together < 0.6 * anyhow


def test_first_single_sources_then_mixed(opened):
    batches = where(plan(opened, single_source_share=0.5))
    steps = [
        {source for batch in batches[start : start + 4] for source, _ in batch} for start in range(0, len(batches), 4)
    ]
    assert all(len(step) == 1 for step in steps[:20]) and {source for step in steps[:20] for source in step} == {
        0,
        1,
        2,
    }
    assert sum(len(step) > 1 for step in steps[20:]) > 15


def test_a_seed_is_an_order(opened, write, collator):
    first = where(plan(opened))
    assert first == where(plan(opened)) == where(plan(open_all(write(), collator)))
    assert first != where(plan(opened, seed=1))


def test_streams_give_the_same_samples(opened, write, collator):
    """Of the same weights, in batches as large, without a bad one; and the same again."""
    file = write(streaming=True)
    streamed = open_all(file, collator)
    batches = list(plan(streamed, steps=10))
    assert where(batches) == where(plan(open_all(file, collator), steps=10))
    places = [place for batch in batches for place in batch if place.source == 0]
    by_index = {index: (tokens, tiles) for index, tokens, tiles in opened[0][0].measures}
    assert len(places) > 50 and all((place.tokens, place.tiles) == by_index[place.index] for place in places)
    assert streamed[0][0].bad.total() == 2
    batch = collator([streamed[0][0].sample(place) for place in places[:2]])
    assert len(batch["pixel_values"]) == sum(place.tiles for place in places[:2])


def test_a_shorter_plan_is_the_beginning_of_a_longer_one(opened):
    """Which is what makes going on in the middle the same as never having stopped."""
    assert where(plan(opened, steps=10)) == where(itertools.islice(plan(opened, steps=40), 40))


def test_samples_are_what_the_plan_says(opened, collator):
    batches = list(plan(opened, steps=2))
    dataset = MixtureDataset(opened[0], 32)
    for places in batches:
        batch = collator([dataset[place] for place in places])
        assert batch["attention_mask"].sum(dim=1).tolist() == [place.tokens for place in places]
        assert len(batch.get("pixel_values", [])) == sum(place.tiles for place in places)


def test_workers_load_the_same(opened, collator):
    def load(workers):
        loader = torch.utils.data.DataLoader(
            MixtureDataset(opened[0], 32),
            batch_sampler=plan(opened, steps=1),
            collate_fn=collator,
            num_workers=workers,
        )
        return [batch["input_ids"] for batch in loader]

    assert all(torch.equal(a, b) for a, b in zip(load(0), load(2), strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# What is bad
# ---------------------------------------------------------------------------------------------------------------------


def test_bad_samples_are_counted_logged_and_skipped(write, collator, caplog):
    with caplog.at_level(logging.WARNING, logger="training"):
        sources, _ = open_all(write(), collator)
    assert sources[0].bad.total() == 2 and sources[0].seen == 120 and len(sources[0]) == 118
    assert (
        "many: sample 7 is skipped: An image cannot be" in caplog.text
        and "many: sample 9 is skipped: `texts` is []" in caplog.text
    )
    assert "2 of 120 samples are bad" in sources[0].report() and "1 x `texts` is []" in sources[0].report()
    assert "0 of 60" in sources[2].report()


@pytest.mark.parametrize("streaming", [False, True])
def test_too_many_bad_samples_stop_the_run(write, collator, streaming):
    file = write({"max_bad_share": 0.01}, streaming=streaming)
    with pytest.raises(
        TooManyBadSamples, match=r"(?s)More than 1.0%.*many: 2 of 1\d\d samples are bad.*1 x `texts` is \[\]"
    ):
        for _ in plan(open_all(file, collator)):
            pass


def chat_row(image: str, answer: str) -> str:
    """A chat whose contents are a list and a text, as chats are written; `datasets` keeps such a column as JSON."""
    question = [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns}) + "\n"


def open_rows(path: str, folder, collator, max_bad_share: float = 1.0) -> Source:
    settings = SourceSettings("rows", 1.0, "", "", "image-text", "", path=path)
    return Source(settings, 0, folder / "mixture.yaml", collator, max_bad_share=max_bad_share)


@pytest.mark.parametrize("streaming", [False, True])
def test_chats_of_texts_and_parts(tmp_path, collator, streaming):
    (tmp_path / "a.png").write_bytes(png(20, 30, 0)["bytes"])
    (tmp_path / "chats.jsonl").write_text(chat_row("a.png", "A star.") + chat_row("none.png", "A fox."))
    settings = SourceSettings(
        "rows", 1.0, "", "", "image-text", "", path=str(tmp_path / "chats.jsonl"), streaming=streaming
    )
    rows = Source(settings, 0, tmp_path / "mixture.yaml", collator, max_bad_share=1.0)
    place = next(rows.places(seed=0))
    user, assistant = rows.sample(place)["messages"]
    assert [part["type"] for part in user["content"]] == ["image", "text"] and user["content"][1]["text"] == "What?"
    assert user["content"][0]["image"].size == (30, 20) and place.tiles == 2
    assert assistant["content"] == [{"type": "text", "text": "A star."}]
    if not streaming:
        assert len(rows) == 1 and "none.png" in rows.report()


def test_images_of_several_folders(tmp_path, collator):
    """A path that would lead to another folder's image is no path."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(png(20, 30, 0)["bytes"])
        (tmp_path / name / "train.jsonl").write_text(chat_row("1.png", name))
    with pytest.raises(TooManyBadSamples, match="files lie in several folders. Make each folder a source"):
        open_rows("*/train.jsonl", tmp_path, collator)
    assert len(open_rows("a/train.jsonl", tmp_path, collator)) == 1
    for name in ("a", "b"):
        (tmp_path / name / "train.jsonl").write_text(chat_row(str(tmp_path / name / "1.png"), name))
    assert len(open_rows("*/train.jsonl", tmp_path, collator)) == 2


def test_an_image_that_has_come_since(tmp_path, collator):
    """What was measured is kept, but not that an image was missing."""
    (tmp_path / "a.png").write_bytes(png(20, 30, 0)["bytes"])
    (tmp_path / "chats.jsonl").write_text(chat_row("a.png", "A star.") + chat_row("b.png", "A fox."))
    assert len(open_rows("chats.jsonl", tmp_path, collator)) == 1
    (tmp_path / "b.png").write_bytes(png(20, 30, 0)["bytes"])
    assert len(open_rows("chats.jsonl", tmp_path, collator)) == 2


def test_images_in_a_source_of_text(write, collator):
    with pytest.raises(TooManyBadSamples, match="It has images, but its source is of modality text"):
        open_all(write({"text_share": None}, modality="text"), collator)


def test_shares_by_category(write):
    found = shares(read_mixture(write()))
    assert found["modality"] == {"image-text": 0.85, "text": 0.15} and found["domain"] == {
        "documents": 0.55,
        "photos": 0.45,
    }
    assert found["task"] == {"vqa": 0.85, "chat": 0.15} and found["language"] == {"en": 1.0}


@pytest.mark.parametrize(
    ("changes", "first_source", "message"),
    [
        ({}, {"weight": 0.5}, r"`sources\[\].weight` is 0.95: the weights must add up to 1"),
        ({}, {"weight": -1}, r"`sources\[0\].weight` is -1.0: expected a share"),
        ({}, {"weight": "a lot"}, r"`sources\[0\].weight` is 'a lot': expected a number"),
        ({}, {"weight": True}, r"`sources\[0\].weight` is True: expected a number"),
        ({"text_share": 0.2}, {}, r"`text_share` is 0.2: the weights of the sources of modality text add up to 0.15"),
        ({"single_source_share": 2}, {}, r"`single_source_share` is 2.0: expected a share"),
        ({"max_bad": 0.1}, {}, "`max_bad` is 0.1: this key is unknown. Known are: sources, text_share"),
        ({"sources": []}, {}, r"`sources` is \[\]: expected at least one"),
        ({"sources": "many"}, {}, "`sources` is 'many': expected a list"),
        ({}, {"name": "text"}, r"`sources\[0\].name` is 'text': two sources have this name"),
        ({}, {"modality": "video"}, r"`sources\[0\].modality` is 'video': expected one of image-text, text"),
        ({}, {"path": "nothing/*.parquet"}, r"`sources\[0\].path` is 'nothing/\*.parquet': no file has this name"),
        (
            {},
            {"path": "photos/0.png"},
            r"`sources\[0\].path` is 'photos/0.png': expected files of one kind, of .parquet",
        ),
        ({}, {"hub": "owner/name"}, r"`sources\[0\]` is 'many': expected either `path` or `hub`"),
        ({}, {"path": None}, r"`sources\[0\]` is 'many': expected either `path` or `hub`"),
        ({}, {"streaming": "yes please"}, r"`sources\[0\].streaming` is 'yes please': expected true or false"),
    ],
)
def test_mixtures_that_cannot_be(write, changes, first_source, message):
    if changes.get("sources") is not None:
        file = write()
        file.write_text(yaml.safe_dump({**MIXTURE, **changes}))
    else:
        file = write(changes, **first_source)
    with pytest.raises(SettingsError, match=f"mixture.yaml: {message}"):
        read_mixture(file)


def test_a_missing_key(write, folder):
    mixture = yaml.safe_load(write().read_text())
    del mixture["sources"][1]["language"]
    (folder / "mixture.yaml").write_text(yaml.safe_dump(mixture))
    with pytest.raises(SettingsError, match=r"mixture.yaml: `sources\[1\].language` is None: this key is missing"):
        read_mixture(folder / "mixture.yaml")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_missing_column(write, folder, collator, streaming):
    (folder / "captions.jsonl").write_text('{"image": "a.png", "shows": "a fox"}\n')
    file = write(path="captions.jsonl", streaming=streaming)
    with pytest.raises(
        SettingsError,
        match=r"mixture.yaml: `sources\[0\].path` is 'captions.jsonl': it has the columns image, shows, "
        "but none of texts",
    ):
        open_all(file, collator)


def test_a_file_that_is_not_what_it_says(write, folder, collator):
    (folder / "broken.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(SettingsError, match=r"`sources\[0\].path` is 'broken.parquet': it cannot be opened"):
        open_all(write(path="broken.parquet"), collator)


def test_a_data_set_that_the_hub_does_not_have(write, collator, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(SettingsError, match=r"`sources\[0\].hub` is 'nobody/nothing': it cannot be opened"):
        open_all(write(path=None, hub="nobody/nothing"), collator)
