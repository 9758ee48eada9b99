"""`index`, `search` and `ask --index`: with the small checkpoint, an adapter and a projector that learned nothing."""

import json
import re
import sys
from pathlib import Path

import jina_vlm
import peft
import pytest
import torch
from conftest import refused
from PIL import Image
from safetensors.torch import save_file

from jina_vlm_tools.cli import index, options, search
from jina_vlm_tools.cli.main import main, parse_args
from jina_vlm_tools.files import TINY
from jina_vlm_tools.retrieval import documents, loading
from jina_vlm_tools.retrieval.embedder import JinaVLMEmbedder
from jina_vlm_tools.retrieval.index import MANIFEST, Index
from jina_vlm_tools.synthetic.questions import evaluation_sample
from jina_vlm_tools.synthetic.shapes import draw_scene


QUESTION = "How many shapes are there?"
CANDIDATES = ("--candidates", 5)


def make_retrieval_folder(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    model = jina_vlm.JinaVLMForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32)
    config = peft.LoraConfig(r=2, target_modules=r".*language_model.*q_proj", init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(folder)
    processor = jina_vlm.JinaVLMProcessor.from_pretrained(TINY)
    processor.image_processor.max_tiles = 1  # to embed with, not to answer
    processor.save_pretrained(folder)
    (folder / "1_Dense").mkdir()
    save_file({"linear.weight": torch.randn(128, 128) / 11}, folder / "1_Dense" / "model.safetensors")
    settings = {"bias": False, "activation_function": "torch.nn.Identity"}
    (folder / "1_Dense" / "config.json").write_text(json.dumps(settings))
    (folder / "modules.json").write_text(json.dumps([{"path": "1_Dense", "type": "some.Dense"}]))
    return folder


@pytest.fixture(scope="module")
def retrieval(tmp_path_factory) -> Path:
    return make_retrieval_folder(tmp_path_factory.mktemp("model") / "retrieval", 0)


@pytest.fixture(scope="module")
def papers(tmp_path_factory, retrieval) -> Path:
    """An image, a PDF of two pages and a broken one, with the index inside."""
    folder = tmp_path_factory.mktemp("home") / "papers"
    folder.mkdir()
    scenes = [draw_scene(evaluation_sample(seed, "count", "en").scene).resize((150, 300)) for seed in range(3)]
    scenes[0].save(folder / "one.png")
    scenes[1].save(folder / "two.pdf", save_all=True, append_images=[scenes[2]])
    (folder / "broken.pdf").write_bytes(b"%PDF-1.4")
    main(["index", str(folder), "--model", str(retrieval), "--max-tiles", "1"])
    return folder


@pytest.fixture(scope="module", autouse=True)
def loaded_once():
    """Models are not changed by the verbs."""
    kept, load = {}, loading.load_embedder

    def load_once(name, device=None, dtype=None):
        key = (name, device, dtype)
        if key not in kept:
            kept[key] = load(name, device, dtype)
        return kept[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "load_embedder", load_once)
        yield


@pytest.fixture
def said(capsys):
    """The function `said(*arguments)`: what the command prints, on stdout and stderr."""

    def run(*arguments) -> tuple[str, str]:
        capsys.readouterr()
        main([str(argument) for argument in arguments])
        return tuple(capsys.readouterr())

    return run


def stopped(*arguments) -> str:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return str(stop.value.code)


def expected(retrieval: Path, papers: Path, way: str) -> list[tuple[str, int, float]]:
    """(file, page, score), by the embedder alone."""
    embedder = JinaVLMEmbedder.from_pretrained(retrieval, dtype=torch.float32)
    pages = [documents.Page("one.png", 1, 1, ""), *(documents.Page("two.pdf", page, 2, "") for page in (1, 2))]
    images = []
    for page in pages:
        with documents.Document(papers / page.file, embedder.processor.image_processor.max_pixels) as document:
            images.append(document.draw(page.page))
    kind = "dense" if way == "dense" else "multi"
    query = embedder.embed([QUESTION], role="query", kind=kind)
    scores = embedder.score(query, embedder.embed(images, kind=kind, max_tiles=1))[0]
    scores = scores if way == "dense" else scores / len(query.multi[0])
    found = sorted(zip(scores.tolist(), pages, strict=True), key=lambda pair: -pair[0])
    return [(page.file, page.page, score) for score, page in found]


@pytest.mark.parametrize("way", ["two-stage", "late", "dense"])
def test_search_finds_what_the_embedder_finds(said, papers, retrieval, way):
    report = json.loads(said("search", papers, QUESTION, "--way", way, "--json")[0])
    truth = expected(retrieval, papers, way)
    found = [(one["file"], one["page"], one["score"]) for one in report["results"]]
    assert [one[:2] for one in found] == [one[:2] for one in truth]
    assert all(abs(one[2] - other[2]) < 2e-3 for one, other in zip(found, truth, strict=True))  # float16
    assert (report["way"], report["pages"], report["model"]) == (way, 3, str(retrieval))
    assert report["results"][0]["path"] == str(papers / found[0][0]) and report["seconds"]["total"] > 0


def test_search_for_people(said, papers):
    lines = said("search", papers, QUESTION, "--top", 2)[0].splitlines()
    report = json.loads(said("search", papers, QUESTION, "--top", 2, "--json")[0])
    assert len(lines) == 2
    for rank, (line, one) in enumerate(zip(lines, report["results"], strict=True), 1):
        place = f"two.pdf, page {one['page']} of 2" if one["pages"] > 1 else "one.png"
        assert line.split("  ")[-1] == place and line.split()[:2] == [str(rank), f"{one['score']:.3f}"]


def test_heat_maps(said, papers, tmp_path):
    target = tmp_path / "new" / "maps"
    report = json.loads(said("search", papers, QUESTION, "--heat-map", target, "--json", "--top", 2)[0])
    assert len(report["results"]) == len(list(target.iterdir())) == 2
    for rank, one in enumerate(report["results"], 1):
        file = Path(one["heat_map"])
        assert file.parent == target and file.name == f"{rank:02d}-{one['file']}-page-{one['page']}.png"
        with Image.open(file) as image:
            assert image.size == documents_size(papers / one["file"], one["page"])
    (line,) = said("search", papers, QUESTION, "--heat-map", target, "--top", 1)[0].splitlines()
    assert line.endswith(f"  ({report['results'][0]['heat_map']})")
    assert "is a file. Name a folder" in stopped("search", papers, QUESTION, "--heat-map", papers / "one.png")


def documents_size(path: Path, page: int) -> tuple[int, int]:
    with documents.Document(path, 1_003_520) as document:
        return document.draw(page).size


def test_index_says_what_it_did(said, papers, capsys):
    out, err = said("index", papers, "--json")
    report = json.loads(out)
    assert (report["pages"], report["new"], report["index"]) == (3, 0, str(papers / ".jina-vlm-index"))
    assert [one["file"] for one in report["errors"]] == ["broken.pdf"]
    assert "warning: not indexed: broken.pdf: " in err
    assert said("index", papers)[0].startswith("3 pages, nothing new; 1 could not be read: ")


def test_ask_names_the_page_and_answers_from_it(said, papers, retrieval):
    """With the adapter off: as the small checkpoint answers about that page."""
    report = json.loads(said("ask", "--index", papers, QUESTION, "--json", "--max-tokens", 4)[0])
    (page,) = report["images"]
    found = json.loads(said("search", papers, QUESTION, "--top", 1, "--json")[0])["results"][0]
    assert {name: page[name] for name in found if name != "heat_map"} == {
        name: value for name, value in found.items() if name != "heat_map"
    }
    drawn = papers.parent / "page.png"
    with documents.Document(papers / page["file"], 10**7) as document:
        document.draw(page["page"]).save(drawn)
    assert page["tiles"] > 2
    plain = json.loads(said("ask", drawn, QUESTION, "--json", "--max-tokens", 4, "--model", TINY)[0])
    assert report["answer"] == plain["answer"] and report["tokens"] == plain["tokens"]
    lines = said("ask", "--index", papers, QUESTION, "--max-tokens", 4)[0].splitlines()
    assert lines == [page["name"], report["answer"]]


@pytest.mark.parametrize("verb", [["search"], ["ask", "--index"]])
def test_candidates_are_of_two_stages(papers, verb):
    assert "--candidates is for --way two-stage" in stopped(*verb, papers, QUESTION, "--way", "late", *CANDIDATES)


def test_pages_are_asked_about_as_fine_as_they_are_drawn(said, retrieval, tmp_path):
    """And are fitted to what --max-pixels says, not to what pages are embedded at."""
    pages = tmp_path / "pages"
    pages.mkdir()
    Image.new("RGB", (620, 877), "white").save(pages / "a4.pdf", resolution=75)
    said("index", pages, "--model", retrieval, "--max-tiles", 1)
    for tiles, size in (([], [1191, 1684]), (["--max-tiles", 1], [636, 900])):
        report = json.loads(said("ask", "--index", pages, QUESTION, "--json", "--max-tokens", 1, *tiles)[0])
        assert [report["images"][0][side] for side in ("width", "height")] == size


def test_ask_about_several_pages_and_questions(said, papers):
    out = said("ask", "--index", papers, "--top", 2, "-p", QUESTION, "-p", "Why?", "--max-tokens", 1, "--max-tiles", 1)
    headings = [line for line in out[0].splitlines() if ".p" in line]
    assert len(headings) == 2 and all(heading.count("; ") == 1 for heading in headings)
    assert headings[0].endswith(f": {QUESTION}") and headings[1].endswith(": Why?")
    report = json.loads(said("ask", "--index", papers, "--top", 3, QUESTION, "--json", "--max-tokens", 1)[0])
    assert [image["rank"] for image in report["images"]] == [1, 2, 3]


def test_more_pages_than_the_model_takes_are_refused_by_its_options(said, retrieval, tmp_path):
    pages = tmp_path / "pages"
    pages.mkdir()
    for number in range(3):
        Image.new("RGB", (620, 877), (0, 0, 80 * number)).save(pages / f"{number}.pdf", resolution=75)
    said("index", pages, "--model", retrieval, "--max-tiles", 1)
    message = stopped("ask", "--index", pages, QUESTION, "--top", 3)
    assert re.search(r"3 pages have 5,\d+ tokens, the model takes 4,096\. Ask about fewer \(--top N\) or", message)
    said("ask", "--index", pages, QUESTION, "--top", 2, "--max-tokens", 1)


def test_a_store_in_the_place_of_the_index(said, papers, tmp_path):
    pytest.importorskip("qdrant_client")
    place = f"qdrant:{tmp_path / 'database'}"
    assert f"3 put into {place}, 0 taken out" in said("index", papers, "--store", place)[0]
    assert said("search", papers, QUESTION, "--store", place) == said("search", papers, QUESTION)
    other, place = make_retrieval_folder(tmp_path / "other", 1), f"qdrant:{tmp_path / 'of another'}"
    said("index", papers, "--model", other, "--output", tmp_path / "index", "--max-tiles", 1, "--store", place)
    assert "another model or other settings made" in stopped("search", papers, QUESTION, "--store", place)


def test_no_share_is_put_into_a_whole_index(papers):
    assert "is a whole index, in which no share would be read" in stopped("index", papers, "--share", "1/2")


def test_another_model_is_refused(papers, tmp_path):
    other = make_retrieval_folder(tmp_path / "other", 1)
    for command in (["search", papers, QUESTION], ["ask", "--index", papers, QUESTION]):
        message = stopped(*command, "--model", other)
        assert "What differs: adapter" in message and "; projector" in message and f"--model {papers}" not in message
    message = stopped("search", papers, QUESTION, "--model", TINY)
    assert "adapter (" in message and "now none" in message and "base weights" not in message
    assert "max_tiles was 1, is 4" in stopped("index", papers, "--max-tiles", "4")


def test_a_checkpoint_as_it_is_makes_dense_vectors(said, papers, tmp_path):
    index = tmp_path / "dense"
    said("index", papers, "--model", TINY, "--output", index, "--max-tiles", 1)
    assert Index.open(index).ways == ("dense",)
    assert len(json.loads(said("search", index, QUESTION, "--json")[0])["results"]) == 3
    assert "dense vectors only" in stopped("search", index, QUESTION, "--way", "late")
    assert "--candidates is for --way two-stage, and the way is dense" in stopped("search", index, "?", *CANDIDATES)
    assert "--heat-map needs a model with a projector" in stopped("search", index, "?", "--heat-map", tmp_path / "m")


def test_a_damaged_index(papers, tmp_path, said):
    index = tmp_path / "index"
    said("index", papers, "--output", index, "--model", json.loads(read(papers))["model"], "--max-tiles", 1)
    file = next(index.glob("*.multi.npy"))
    file.write_bytes(file.read_bytes()[:1000])
    for command in (["search", index, QUESTION], ["ask", "--index", index, QUESTION]):
        assert f"error: {file} is damaged" in stopped(*command)
    out, err = said("index", papers, "--output", index)
    assert "3 pages, 3 new" in out and f"warning: embedded anew: {file}" in err
    said("search", index, QUESTION)


def read(papers: Path) -> str:
    return (papers / ".jina-vlm-index" / MANIFEST).read_text()


def test_what_is_wrong_is_said_before_anything_is_imported(papers, monkeypatch, tmp_path):
    for module in (index, search):
        monkeypatch.setattr(module, "needing", lambda *_: pytest.fail("imported"))
    assert "none: no such folder" in stopped("index", tmp_path / "none")
    assert "none: no such index" in stopped("search", tmp_path / "none", "a question")
    assert "neither a folder nor the name" in stopped("index", papers, "--model", "./none")
    monkeypatch.delenv(options.RETRIEVAL_VARIABLE, raising=False)
    monkeypatch.setattr(options, "TINY_RETRIEVAL", tmp_path / "none")
    assert "There is no model for retrieval here. Give --model" in stopped("index", tmp_path)


def test_which_model_makes_a_new_index(monkeypatch, tmp_path):
    monkeypatch.delenv(options.RETRIEVAL_VARIABLE, raising=False)
    monkeypatch.setattr(options, "TINY_RETRIEVAL", tmp_path)
    assert options.default_retrieval_model() == str(tmp_path)
    monkeypatch.setenv(options.RETRIEVAL_VARIABLE, "me/mine")
    assert options.default_retrieval_model() == "me/mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search", "papers"], "QUESTION"),
        (["search", "papers", " "], "the question is empty"),
        (["index", "papers", "--share", "4/3"], "expected I/N with I from 1 to N"),
        (["index", "papers", "--share", "third"], "such as 3/16, got 'third'"),
        (["index", "papers", "--max-tiles", "0"], "at least 1"),
        (["ask", "--index", "papers", "a.png", "Why?"], "--index finds what to ask about, and a.png names it"),
        (["ask", "--index", "papers", "Why?", "--map"], "--map asks about each image"),
        (["ask", "--index", "papers", "Why?", "--engine", "llama.cpp"], "answers by torch: leave --engine llama.cpp"),
        (["ask", "Why?", "--top", "3"], "--top is about an index"),
        (["ask", "a.png", "Why?", "--way", "late"], "--way is about an index"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_file_that_changed_is_not_shown_as_what_was_found(papers, tmp_path, said):
    folder = tmp_path / "folder"
    folder.mkdir()
    Image.new("RGB", (60, 60), "red").save(folder / "a.png")
    said("index", folder, "--model", json.loads(read(papers))["model"], "--max-tiles", 1)
    Image.new("RGB", (60, 60), "blue").save(folder / "a.png")
    assert "a.png has changed since it was indexed" in stopped("ask", "--index", folder, QUESTION)
    with refused("has changed", ValueError):
        page = Index.open(folder).page(0)
        documents.draw(folder, page, 10_000)
    assert sys.modules["jina_vlm_tools.retrieval.index"]
