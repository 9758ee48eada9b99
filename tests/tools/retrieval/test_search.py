"""Searching is exact, by all three ways, and by databases alike."""

import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import refused
from torch.nn import functional as F

from jina_vlm_tools.retrieval import scores
from jina_vlm_tools.retrieval.documents import Page
from jina_vlm_tools.retrieval.embeddings import Embeddings
from jina_vlm_tools.retrieval.index import Index, Settings, Writer, new_manifest
from jina_vlm_tools.retrieval.search import best
from jina_vlm_tools.retrieval.stores import open_store


PAGES, DIMS, WIDTH = 60, 24, 16


def unit(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


def make(path, documents: Embeddings, start: int = 0, part: int = 25) -> Index:
    path.mkdir()
    identity = {"base weights": "a", "image settings": {"max_pixels": 1}}
    settings = Settings("dense" if documents.multi is None else "both", DIMS, 4, 1)
    width = None if documents.multi is None else WIDTH
    writer = Writer(path, new_manifest(path, path, "m", "retrieval", identity, settings, width, (1, 1)))
    for first in range(0, len(documents), part):
        some = documents[first : first + part]
        pages = [Page(f"{start + first + number:03d}.png", 1, 1, "sha") for number in range(len(some))]
        writer.add(pages, some, [])
    return Index.open(path)


@pytest.fixture(scope="module")
def documents() -> Embeddings:
    """With lengths that differ, and two equal pages."""
    torch.manual_seed(1)
    dense, multi = unit(PAGES, DIMS), [unit(3 + number % 7, WIDTH) for number in range(PAGES)]
    dense[40], multi[40] = dense[7], multi[7]
    halves = Embeddings(dense.half().float(), [one.half().float() for one in multi])
    return halves


@pytest.fixture(scope="module")
def index(documents, tmp_path_factory) -> Index:
    return make(tmp_path_factory.mktemp("made") / "index", documents)


@pytest.fixture(scope="module")
def queries() -> Embeddings:
    torch.manual_seed(2)
    return Embeddings(unit(4, DIMS), [unit(2 + number, WIDTH) for number in range(4)])


def expected(queries: Embeddings, documents: Embeddings, way: str, candidates: int) -> np.ndarray:
    """[queries, pages], by the embedder's own comparison."""
    dense = Embeddings(queries.dense).score(Embeddings(documents.dense))
    late = queries.score(documents) / torch.tensor([len(one) for one in queries.multi])[:, None]
    if way == "two-stage":
        out = torch.ones_like(dense, dtype=torch.bool).scatter_(1, dense.topk(candidates).indices, False)
        return late.masked_fill(out, -torch.inf).numpy()
    return (dense if way == "dense" else late).numpy()


@pytest.mark.parametrize("chunk", [scores.CHUNK, 64])
@pytest.mark.parametrize("way", ["dense", "late", "two-stage"])
def test_exact(index, documents, queries, way, chunk, monkeypatch):
    monkeypatch.setattr(scores, "CHUNK", chunk)
    found = index.search(queries, 9, way, candidates=20)
    for pages, truth in zip(found, expected(queries, documents, way, 20), strict=True):
        order = np.argsort(-truth, kind="stable")[:9]
        assert [one.page.file for one in pages] == [f"{row:03d}.png" for row in order]
        assert np.allclose([one.score for one in pages], truth[order], atol=1e-5)


def test_equals_come_in_the_order_of_the_index(index, documents):
    query = documents[7]
    for way in index.ways:
        assert [one.page.file for one in index.search(query, 2, way)[0]] == ["007.png", "040.png"]
    assert best(np.array([1.0, 3, 3, 2, 3], np.float32), 2) == [(1, 3.0), (2, 3.0)]


def test_more_are_asked_for_than_there_are(index, queries):
    for way in index.ways:
        found = index.search(queries, 1000, way, candidates=3)[0]
        assert len(found) == PAGES and len({one.page.file for one in found}) == PAGES


def test_an_empty_index(tmp_path, queries):
    empty = make(tmp_path / "empty", Embeddings(torch.zeros(0, DIMS), []))
    assert empty.search(queries, 3, "dense") == []


def test_a_query_that_does_not_fit(index, queries):
    for query, way, message in (
        (Embeddings(None, queries.multi), "dense", "'dense' needs dense vectors of a query"),
        (Embeddings(queries.dense), "two-stage", "embed it with kind='both'"),
        (Embeddings(queries.dense[:, :8]), "dense", f"Queries have 8 numbers, pages {DIMS}"),
        (Embeddings(None, [one[:, :8] for one in queries.multi]), "late", f"have 8 numbers, of pages {WIDTH}"),
        (queries.quantize("int8"), "dense", "Queries are int8"),
    ):
        with refused(message):
            index.search(query, 3, way)
    with refused("`way` must be one of two-stage, late, dense, got 'fast'"):
        index.search(queries, 3, "fast")
    with refused("at least 1, got 0 and 100"):
        index.search(queries, 0)


@pytest.fixture(scope="module", params=["qdrant", "lancedb"])
def filled(request, index, tmp_path_factory):
    """A store with the index in it."""
    pytest.importorskip({"qdrant": "qdrant_client", "lancedb": "lancedb"}[request.param])
    store = open_store(f"{request.param}:{tmp_path_factory.mktemp('store') / 'database'}")
    assert store.put(index) == (PAGES, 0)
    return store


@pytest.mark.parametrize("way", ["dense", "late", "two-stage"])
def test_stores_find_the_same(filled, index, queries, way):
    """In one order, but where two pages are equal to a ten-thousandth: LanceDB knows cosines alone, and what float16
    leaves of a vector is not of length 1."""
    ours, theirs = (one.search(queries, 6, way, 20) for one in (index, filled))
    scored = index.search(queries, PAGES, "dense" if way == "dense" else "late")
    for some, others, every in zip(ours, theirs, scored, strict=True):
        known = {one.page: one.score for one in every}
        assert len({one.page for one in others}) == 6
        for one, other in zip(some, others, strict=True):
            assert abs(one.score - other.score) < 1e-4 and abs(one.score - known[other.page]) < 1e-4


def test_stores_are_brought_up_to_date(filled, documents, queries, index, tmp_path):
    """Last of those with this store: pages come and go, and nothing is put there twice."""
    assert filled.put(index) == (0, 0)
    later = make(tmp_path / "later", documents[10:], start=10)
    assert filled.put(later) == (0, 10)
    assert filled.put(index) == (10, 0)
    another = make(tmp_path / "another", documents)
    another.manifest["identity"]["base weights"] = "b"
    with refused("holds pages of an index that another model or other settings made"):
        filled.put(another)
    dense = make(tmp_path / "dense", Embeddings(documents.dense))
    with refused("another model or other settings"):
        filled.put(dense)


@pytest.fixture(params=["qdrant", "lancedb"])
def place(request, tmp_path) -> str:
    pytest.importorskip({"qdrant": "qdrant_client", "lancedb": "lancedb"}[request.param])
    return f"{request.param}:{tmp_path / 'database'}"


def test_pages_of_another_share_are_not_held_twice(place, index, queries, tmp_path):
    store = open_store(place)
    store.put(index)
    shutil.copytree(index.path, tmp_path / "share")
    share = Index.open(tmp_path / "share")
    share.manifest["share"] = [1, 2]
    assert store.put(share) == (PAGES, 0) == (len(store.search(queries, 2 * PAGES, "dense")[0]), 0)


def test_a_store_without_pages_finds_none(place, queries, tmp_path):
    store = open_store(place)
    empty = make(tmp_path / "empty", Embeddings(torch.zeros(0, DIMS), []))
    assert store.put(empty) == (0, 0)
    for way in ("two-stage", "late", "dense"):
        assert store.search(queries, 3, way) == [[]] * len(queries)


def test_a_store_is_searched_in_the_place_of_its_own_index_only(place, index, documents, queries, tmp_path):
    open_store(place).put(index)
    assert open_store(place, index).search(queries, 1, "late")
    another = make(tmp_path / "another", documents)
    another.manifest["identity"]["base weights"] = "b"
    with refused(f"{place} holds pages of an index that another model or other settings made"):
        open_store(place, another)
    mistyped = tmp_path / "databse"
    with refused("databse: no such folder. Put an index there: `jina-vlm index FOLDER --store", FileNotFoundError):
        open_store(f"{place.partition(':')[0]}:{mistyped}", index)
    assert not mistyped.exists()


def test_names_of_stores():
    for name in ("faiss:here", "qdrant", "qdrant:"):
        with refused("names no store. Expected qdrant:URL"):
            open_store(name)


def test_no_server_answers():
    pytest.importorskip("qdrant_client")
    with refused("qdrant:http://127.0.0.1:9: no server answers", OSError):
        open_store("qdrant:http://127.0.0.1:9")


def test_a_folder_in_use(tmp_path):
    pytest.importorskip("qdrant_client")
    place = f"qdrant:{tmp_path}"
    store = open_store(place)
    with refused(f"{place} is in use: wait for its end, or run a server", BlockingIOError):
        open_store(place)
    assert store


def test_a_server_that_refuses(index, queries):
    pytest.importorskip("qdrant_client")
    answers = []

    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self):
            status, content = answers[-1]
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET
        log_message = Mock()

    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = f"qdrant:http://127.0.0.1:{server.server_port}"
        for status in (401, 403):
            answers.append((status, b"no key"))
            with refused(
                f"{place}: the server refuses .*{status}.*no key.* Put the server's key into QDRANT", OSError
            ):
                open_store(place)
        answers.append((200, b'{"result": {"exists": true}, "status": "ok", "time": 0}'))
        store = open_store(place)
        answers.append((507, b"no space"))
        for attempt in (lambda: store.put(index), lambda: store.search(queries)):
            with refused(f"{place}: the server refuses .*507.*no space.*\\.$", OSError):
                attempt()
        server.shutdown()
    with refused("no server answers", ConnectionError):
        store.search(queries)
