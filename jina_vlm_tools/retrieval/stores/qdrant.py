"""Qdrant: a server by its URL, or a folder by the client's local mode, which is for some thousand pages."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from urllib.parse import urlsplit

import numpy as np
from qdrant_client import QdrantClient, models
from qdrant_client.http.exceptions import ApiException, UnexpectedResponse

from .. import CANDIDATES
from ..documents import Page
from ..embeddings import Embeddings
from ..index import COLUMNS, Index, check_queries
from ..search import Found, Way
from . import made_by, page_ids, refuse_another


COLLECTION = "pages"
BATCH = 16  # pages at a time: a page of 814 tokens is 1 MB of JSON, and servers take 32
API_KEY = "QDRANT_API_KEY"


def telling(method: Callable) -> Callable:
    """What the client raises becomes an OSError that says which server it is about, and what to do."""

    @wraps(method)
    def call(self: QdrantStore, *args, **kwargs):
        try:
            return method(self, *args, **kwargs)
        except UnexpectedResponse as error:
            advice = f" Put the server's key into {API_KEY}." if error.status_code in (401, 403) else ""
            said = " ".join(str(error).split())
            raise OSError(f"qdrant:{self.place}: the server refuses ({said}).{advice}") from error
        except ApiException as error:
            raise ConnectionError(f"qdrant:{self.place}: no server answers ({error}).") from error

    return call


class QdrantStore:
    """
    Args:
        place (`str`): A server's URL, with the name of a collection as its path where that is not "pages"; or a
            folder. The environment variable QDRANT_API_KEY is sent along.
        exact (`bool`): Compare all pages, as our index does, or go by Qdrant's index (HNSW), which misses some and is
            fast at any size.

    Raises:
        OSError: there is no server, it refuses, or the folder is in use.
    """

    @telling
    def __init__(self, place: str, exact: bool = True):
        self.place, self.exact = place, exact
        self.collection, self.is_server = COLLECTION, "://" in place
        if self.is_server:
            parts = urlsplit(place)
            self.collection = parts.path.strip("/") or COLLECTION
            url = f"{parts.scheme}://{parts.netloc}"
            self.client = QdrantClient(url=url, api_key=os.environ.get(API_KEY), timeout=60)
        else:
            try:
                self.client = QdrantClient(path=place)
            except RuntimeError as error:
                raise BlockingIOError(f"qdrant:{place} is in use: wait for its end, or run a server.") from error
        self.is_there = self.client.collection_exists(self.collection)

    @telling
    def maker(self) -> str | None:
        """See [`Store.maker`]."""
        if not self.is_there:
            return None
        one, _ = self.client.scroll(self.collection, limit=1, with_payload=["made_by"])
        return one[0].payload.get("made_by", "another program") if one else None

    @telling
    def put(self, index: Index) -> tuple[int, int]:
        """See [`Store.put`].

        Raises:
            ValueError: the collection holds pages that were made in another way.
        """
        made, share, ids = made_by(index), index.share, page_ids(index)
        refuse_another(f"qdrant:{self.place}", self.maker(), made)
        if not self.is_there:
            self._create(index)
        held, offset = set(), None
        own = models.Filter(must=[models.FieldCondition(key="share", match=models.MatchValue(value=share))])
        while True:
            points, offset = self.client.scroll(
                self.collection, own, limit=10_000, offset=offset, with_payload=False, with_vectors=False
            )
            held |= {str(point.id) for point in points}
            if offset is None:
                break
        if gone := sorted(held - ids.keys()):
            self.client.delete(self.collection, models.PointIdsList(points=gone))
        missing = [(name, row) for name, row in ids.items() if name not in held]
        for start in range(0, len(missing), BATCH):
            points = [
                models.PointStruct(
                    id=name,
                    vector=_vectors(index, row),
                    payload={"made_by": made, "share": share} | vars(index.page(row)),
                )
                for name, row in missing[start : start + BATCH]
            ]
            self.client.upsert(self.collection, points, wait=True)
        return len(missing), len(gone)

    def _create(self, index: Index) -> None:
        vectors = {
            "dense": models.VectorParams(
                size=index.settings.dims,
                distance=models.Distance.DOT,  # of length 1 already
                datatype=models.Datatype.FLOAT16,
            )
        }
        if index.settings.kind == "both":
            vectors["multi"] = models.VectorParams(
                size=index.manifest["width"],
                distance=models.Distance.DOT,
                datatype=models.Datatype.FLOAT16,
                on_disk=True,
                multivector_config=models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM),
                hnsw_config=models.HnswConfigDiff(m=0),  # compared for the best by dense vectors alone
            )
        self.client.create_collection(self.collection, vectors_config=vectors)
        if self.is_server:
            self.client.create_payload_index(self.collection, "share", models.PayloadSchemaType.KEYWORD)
        self.is_there = True

    @telling
    def search(
        self, queries: Embeddings, top: int = 5, way: Way = "two-stage", candidates: int = CANDIDATES
    ) -> list[list[Found]]:
        """See [`Store.search`].

        Raises:
            ValueError: nothing was put there, or it has no vectors for this way.
        """
        if not self.is_there:
            raise ValueError(f"qdrant:{self.place} holds no collection {self.collection!r}: put an index there first.")
        vectors = self.client.get_collection(self.collection).config.params.vectors
        if way != "dense" and "multi" not in vectors:
            raise ValueError(f"qdrant:{self.place} has dense vectors only, and cannot be searched by {way!r}.")
        check_queries(queries, way, vectors["dense"].size, vectors["multi"].size if "multi" in vectors else None)
        return [self._search(queries, number, top, way, candidates) for number in range(len(queries))]

    def _search(self, queries: Embeddings, number: int, top: int, way: Way, candidates: int) -> list[Found]:
        exact = models.SearchParams(exact=self.exact) if self.is_server else None  # local mode always is
        dense = None if way == "late" else queries.dense[number].tolist()
        tokens = None if way == "dense" else queries.multi[number].tolist()
        asked = {"query": dense, "using": "dense"} if way == "dense" else {"query": tokens, "using": "multi"}
        if way == "two-stage":
            limit = max(top, candidates)
            asked["prefetch"] = models.Prefetch(query=dense, using="dense", limit=limit, params=exact)
        found = self.client.query_points(
            self.collection, **asked, limit=top, search_params=exact, with_payload=list(COLUMNS)
        )
        share = 1 if way == "dense" else 1 / len(tokens)  # a sum over a query's tokens
        return [Found(Page(**point.payload), point.score * share) for point in found.points]


def _vectors(index: Index, row: int) -> dict[str, list]:
    part, place = index.locate(row)
    vectors = {"dense": part.dense[place].astype(np.float32).tolist()}
    if part.multi is not None:
        tokens = part.multi[part.offsets[place] : part.offsets[place + 1]]
        vectors["multi"] = tokens.astype(np.float32).tolist()
    return vectors
