"""An index on disk: killed, brought up to date, refused by name, repaired."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refused
from PIL import Image
from stub_embedder import HIDDEN, TOKENS, WIDTH, StubEmbedder

from jina_vlm_tools.retrieval import index as index_module
from jina_vlm_tools.retrieval import indexing
from jina_vlm_tools.retrieval.identity import identify
from jina_vlm_tools.retrieval.index import MANIFEST, Index, locked
from jina_vlm_tools.retrieval.indexing import Asked, share_of, update


COLORS = ("red", "lime", "blue", "yellow", "cyan", "magenta", "white")


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda _: None)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Seven pages: three images, a PDF of three, one more."""
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    for color in COLORS[:3]:
        save(folder / f"{color}.png", color)
    save(folder / "sub" / "three.pdf", *COLORS[3:6])
    save(folder / "white.png", "white")
    return folder


def save(path: Path, *colors: str) -> None:
    first, *others = [Image.new("RGB", (30, 40), color) for color in colors]
    first.save(path, **({"save_all": True, "append_images": others} if others else {}))


def run(folder: Path, embedder: StubEmbedder | None = None, **settings):
    """The summary of an update by this embedder; by none, if nothing is to be embedded."""

    def load(name):
        assert embedder, "the model was loaded"
        return embedder, "stub"

    path = settings.pop("path", folder.parent / "index")
    return update(folder, path, load, **{"batch_size": 2, **settings})


def rows(path: Path) -> list[tuple[str, int]]:
    return sorted((row["file"], row["page"]) for row in Index.open(path).table.to_pylist())


EXPECTED = sorted(
    [(f"{color}.png", 1) for color in ("red", "lime", "blue", "white")]
    + [("sub/three.pdf", page) for page in (1, 2, 3)]
)


def check_vectors(path: Path) -> None:
    """That each page has its own vectors: its color finds it."""
    index, embedder = Index.open(path), StubEmbedder()
    shown = {f"{color}.png": color for color in COLORS}
    for row in index.table.to_pylist():
        color = shown.get(row["file"]) or COLORS[2 + row["page"]]
        for way in index.ways:
            best = index.search(index.embed(embedder, [color], way), 1, way)[0][0]
            assert (best.page.file, best.page.page) == (row["file"], row["page"]), (color, way)
            assert best.score > 0.99


def test_made(folder):
    summary = run(folder, StubEmbedder())
    path = folder.parent / "index"
    assert (summary.pages, summary.new, summary.left, summary.errors) == (7, 7, 0, [])
    assert rows(path) == EXPECTED
    check_vectors(path)
    index = Index.open(path)
    assert len(index.parts) == 1 and index.tokens == 7 * TOKENS and index.folder == folder
    assert index.bytes == 2 * (7 * HIDDEN + 7 * TOKENS * WIDTH)
    files = sorted(file.name for file in path.iterdir() if not file.name.startswith("."))
    name = json.loads((path / MANIFEST).read_text())["parts"][0]["name"]
    assert files == [MANIFEST, f"{name}.dense.npy", f"{name}.multi.npy", f"{name}.pages.parquet"]


def test_nothing_new_loads_no_model(folder):
    run(folder, StubEmbedder())
    before = {file: file.stat().st_mtime_ns for file in (folder.parent / "index").glob("part-*")}
    summary = run(folder)
    assert (summary.new, summary.left) == (0, 0)
    assert before == {file: file.stat().st_mtime_ns for file in (folder.parent / "index").glob("part-*")}


def test_killed_and_resumed(folder, monkeypatch):
    """At its fifth page, within the PDF: four are there, and the next run embeds three."""
    path = folder.parent / "index"
    process = os.fork()
    if not process:
        torch.set_num_threads(1)
        indexing.PAGES_PER_PART = 2
        run(folder, StubEmbedder(dies_at=4, die=lambda: os.kill(os.getpid(), signal.SIGKILL)), batch_size=1)
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGKILL
    assert len(rows(path)) == 4 and set(rows(path)) < set(EXPECTED)
    embedder = StubEmbedder()
    summary = run(folder, embedder)
    assert (summary.new, summary.pages, embedder.embedded) == (3, 7, 3)
    assert rows(path) == EXPECTED
    check_vectors(path)


@pytest.mark.parametrize("step", range(12))
def test_stopped_at_any_write(folder, monkeypatch, step):
    """What is on disk is whole at any moment, also while parts are replaced."""
    monkeypatch.setattr(indexing, "PAGES_PER_PART", 2)
    path, written = folder.parent / "index", []
    write_whole = index_module.write_whole

    def stop(file, content):
        if len(written) == step:
            raise KeyboardInterrupt
        written.append(file)
        write_whole(file, content)

    with monkeypatch.context() as patch:
        patch.setattr(index_module, "write_whole", stop)
        with pytest.raises(KeyboardInterrupt):
            run(folder, StubEmbedder())
    if step:
        assert set(rows(path)) <= set(EXPECTED) and len(rows(path)) == len(set(rows(path)))
    run(folder, StubEmbedder())
    assert rows(path) == EXPECTED
    check_vectors(path)
    listed = {entry["name"] for entry in json.loads((path / MANIFEST).read_text())["parts"]}
    assert {file.name.split(".")[0] for file in path.glob("part-*")} == listed


def test_only_what_has_changed(folder):
    run(folder, StubEmbedder())
    save(folder / "red.png", "gray")
    (folder / "white.png").unlink()
    save(folder / "new.pdf", "navy", "olive")
    os.utime(folder / "blue.png")  # touched, and the same
    embedder = StubEmbedder()
    summary = run(folder, embedder)
    assert (summary.new, summary.left, summary.moved, embedder.embedded) == (3, 2, 0, 3)
    expected = sorted(set(EXPECTED) - {("white.png", 1)} | {("new.pdf", 1), ("new.pdf", 2)})
    assert rows(folder.parent / "index") == expected


def test_files_that_were_moved_take_their_pages_along(folder):
    run(folder, StubEmbedder())
    (folder / "sub" / "three.pdf").rename(folder / "moved.pdf")
    summary = run(folder)
    assert (summary.moved, summary.new, summary.left) == (3, 0, 0)
    assert ("moved.pdf", 2) in rows(folder.parent / "index")


def test_parts_are_put_together(folder, monkeypatch):
    monkeypatch.setattr(index_module, "FULL", 3)
    monkeypatch.setattr(indexing, "PAGES_PER_PART", 1)
    run(folder, StubEmbedder())
    path = folder.parent / "index"
    assert [entry["pages"] for entry in json.loads((path / MANIFEST).read_text())["parts"]] == [3, 3, 1]
    check_vectors(path)


def test_what_cannot_be_read_is_listed_and_tried_again(folder):
    (folder / "bad.pdf").write_bytes(b"%PDF-1.4")
    save(folder / "disliked.png", "#010203")
    summary = run(folder, StubEmbedder())
    assert [(one["file"], one["page"]) for one in summary.errors] == [("bad.pdf", 0), ("disliked.png", 1)]
    assert "an image that nobody likes" in summary.errors[1]["error"] and summary.pages == 7
    assert json.loads((folder.parent / "index" / MANIFEST).read_text())["errors"] == summary.errors
    save(folder / "bad.pdf", "olive", "navy")
    (folder / "disliked.png").unlink()
    summary = run(folder, StubEmbedder())
    assert (summary.new, summary.errors) == (2, [])


def test_an_empty_folder_leaves_the_index_alone(folder):
    run(folder, StubEmbedder())
    aside = folder.rename(folder.parent / "aside")
    folder.mkdir()
    with refused("holds no images and no PDFs. .*index was left as it is"):
        run(folder)
    folder.rmdir()
    aside.rename(folder)
    assert run(folder).pages == 7


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        (lambda stub: None, None),
        (lambda stub: stub.model.to(dtype=torch.bfloat16), None),
        (lambda stub: stub.model["layer"].weight.data.add_(0.1), "base weights"),
        (lambda stub: stub.model["layer"].lora_A["retrieval"].weight.data.add_(0.1), "adapter"),
        (lambda stub: stub.projector.weight.data.add_(0.1), "projector"),
        (lambda stub: stub.settings.update(max_pixels=5), "image settings \\(max_pixels 90000, now 5\\)"),
        (
            lambda stub: setattr(stub.processor, "apply_chat_template", lambda *_, **__: {"input_ids": [[7]]}),
            "prompts",
        ),
    ],
)
def test_another_model_is_refused_by_what_differs(folder, change, differs):
    run(folder, StubEmbedder())
    index, other = Index.open(folder.parent / "index"), StubEmbedder()
    change(other)
    if differs is None:
        return index.check_embedder(identify(other), "stub")
    with refused(f"made by another model than other. What differs: {differs}[^;]*. Take --model stub"):
        index.check_embedder(identify(other), "other")
    with refused(f"What differs: {differs}"):  # where something is to be embedded, and where not
        run(folder, other, model="other")
    assert len(Index.open(folder.parent / "index")) == 7


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (Asked(max_tiles=2), "max_tiles was 4, is 2"),
        (Asked(pool_factor=3), "pool_factor was 1, is 3"),
        (Asked(dims=8), f"dims was {HIDDEN}, is 8"),
        (Asked(kind="dense"), "kind was both, is dense"),
    ],
)
def test_other_settings_are_refused_by_name(folder, asked, message):
    run(folder, StubEmbedder())
    with refused(message):
        run(folder, StubEmbedder(), asked=asked)


def test_settings_of_a_new_index(folder):
    run(folder, StubEmbedder(), asked=Asked(kind="dense", dims=8), path=folder / "dense")
    index = Index.open(folder / "dense")
    assert index.ways == ("dense",) and index.parts[0].multi is None and index.parts[0].dense.shape == (7, 8)
    with refused("dense vectors only, and cannot be searched by 'late'"):
        index.search(StubEmbedder().embed(["red"], role="query"), way="late")
    run(folder, StubEmbedder(), asked=Asked(pool_factor=2), path=folder.parent / "pooled")
    assert Index.open(folder.parent / "pooled").tokens == 7 * 3


def test_another_folder_is_refused(folder, tmp_path):
    run(folder, StubEmbedder())
    other = tmp_path / "other"
    other.mkdir()
    save(other / "red.png", "red")
    with refused("index is the index of .*folder, not of .*other"):
        run(other, StubEmbedder(), path=folder.parent / "index")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    with refused("full holds 'notes.txt' but no index.json"):
        run(folder, StubEmbedder(), path=tmp_path / "full")


def test_a_folder_moves_with_the_index_inside(folder):
    run(folder, StubEmbedder(), path=folder / ".jina-vlm-index")
    moved = folder.rename(folder.parent / "elsewhere")
    index = Index.open(moved)
    assert index.folder == moved and len(index) == 7
    assert run(moved, path=moved / ".jina-vlm-index").new == 0


def test_searching_while_parts_are_replaced(folder, monkeypatch):
    """The reader has seen what the index was made of, and then a run replaces it."""
    run(folder, StubEmbedder())
    (folder / "white.png").unlink()
    read, seen = index_module.read_manifest, []

    def read_and_wait(path):
        manifest = read(path)
        if not seen:
            seen.append(manifest)
            run(folder)
        return manifest

    monkeypatch.setattr(index_module, "read_manifest", read_and_wait)
    index = Index.open(folder.parent / "index")
    assert len(index) == 6 and seen[0]["parts"] != index.manifest["parts"]


def test_two_writers(folder):
    path = folder.parent / "index"
    with locked(path), refused("Another run is at work on .*index", BlockingIOError):
        run(folder, StubEmbedder())
    run(folder, StubEmbedder())


def test_a_writer_that_comes_as_the_first_one_ends(folder, monkeypatch):
    """It finds the index that was not there when it began."""
    path = folder.parent / "index"

    def wait_for_the_first(_):
        monkeypatch.setattr(indexing, "locked", locked)
        run(folder, StubEmbedder())
        return locked(path)

    monkeypatch.setattr(indexing, "locked", wait_for_the_first)
    assert run(folder, StubEmbedder()).new == 0 and rows(path) == EXPECTED


def damage(path: Path, how: str) -> str:
    """The name of the file that is damaged now."""
    what = {"cut": "*.multi.npy", "missing": "*.dense.npy", "table": "*.parquet", "other": "*.dense.npy"}
    file = next(path.glob(what.get(how, MANIFEST)))
    if how == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "missing":
        file.unlink()
    elif how == "table":
        content = bytearray(file.read_bytes())
        content[40] ^= 0xFF
        file.write_bytes(content)
    elif how == "other":
        np.save(file, np.zeros((3, HIDDEN), np.float16))
    elif how == "json":
        file.write_text(file.read_text()[:-50])
    elif how == "layout":
        file.write_text(file.read_text().replace("jina-vlm index 1", "jina-vlm index 9"))
    elif how == "keys":
        file.write_text('{"layout": "jina-vlm index 1"}')
    return file.name


@pytest.mark.parametrize("how", ["cut", "missing", "table", "other"])
def test_a_damaged_part_is_refused_and_embedded_anew(folder, how):
    run(folder, StubEmbedder())
    path = folder.parent / "index"
    name = damage(path, how)
    with refused(f"{name} is damaged .*Run `jina-vlm index {folder} --output {path}` again"):
        Index.open(path)
    summary = run(folder, StubEmbedder())
    assert summary.new == 7 and len(summary.repaired) == 1 and name in summary.repaired[0]
    check_vectors(path)


@pytest.mark.parametrize(
    ("how", "message"),
    [("json", "is damaged"), ("layout", "has the layout 'jina-vlm index 9'"), ("keys", "it lacks folder, model")],
)
def test_a_damaged_manifest_is_refused(folder, how, message):
    run(folder, StubEmbedder())
    path = folder.parent / "index"
    damage(path, how)
    for attempt in (lambda: Index.open(path), lambda: run(folder, StubEmbedder())):
        with refused(f"index.json.* {message}.*Delete the folder {path}, and run `jina-vlm index` again"):
            attempt()


def test_no_index(tmp_path):
    with refused("no index. Make one with `jina-vlm index FOLDER`", FileNotFoundError):
        Index.open(tmp_path)


def test_shares_that_make_no_whole(folder):
    path = folder.parent / "index"
    for number, of in ((1, 2), (2, 2), (1, 3)):
        run(folder, StubEmbedder(), path=path / f"share-{number:03d}-of-{of:03d}", share=(number, of))
    with refused("index holds shares that make no whole: share-001-of-002, share-001-of-003, share-002-of-002"):
        Index.open(path)
    (path / "share-001-of-003").rename(path.parent / "aside")
    assert rows(path) == EXPECTED
    with refused("holds shares of an index, share-001-of-002, share-002-of-002: bring each up to date by --share"):
        run(folder, StubEmbedder(), path=path)
    shutil.copytree(path / "share-001-of-002", path / "share-001-of-002.old")
    with refused("make no whole: share-001-of-002, share-001-of-002.old, share-002-of-002"):
        Index.open(path)


def test_no_share_is_put_into_a_whole_index(folder):
    run(folder, StubEmbedder())
    path = folder.parent / "index"
    with refused("index is a whole index, in which no share would be read. Name another folder"):
        run(folder, path=path / "share-002-of-004", share=(2, 4))
    assert not list(path.glob("share-*"))


def test_shares_make_one_index(folder):
    """Of three workers. Which share a file is in depends on its name alone."""
    path, pages = folder.parent / "index", 0
    for number in (1, 2, 3):
        pages += run(folder, StubEmbedder(), path=path / f"share-{number:03d}-of-003", share=(number, 3)).pages
        if number == 2:
            with refused("lacks the shares 3 of 3: make them by `jina-vlm index FOLDER --share 3/3`"):
                Index.open(path)
    assert pages == 7 and rows(path) == EXPECTED
    assert len({share_of(file, 3) for file, _ in EXPECTED}) > 1
    check_vectors(path)
    with refused("share was \\(2, 3\\), is \\(1, 3\\)"):
        run(folder, StubEmbedder(), path=path / "share-002-of-003", share=(1, 3))
    other = StubEmbedder(seed=5)
    alone = path / "share-003-of-003"
    for file in alone.iterdir():
        file.unlink()
    run(folder, other, path=alone, share=(3, 3))
    with refused("share-003-of-003 was not made as share-001-of-003 was: adapter"):
        Index.open(path)
