"""LanceDB: a folder, without a server."""

from __future__ import annotations

from pathlib import Path

import lancedb
import numpy as np
import pyarrow as pa

from .. import CANDIDATES
from ..documents import Page
from ..embeddings import Embeddings
from ..index import COLUMNS, Index, check_queries
from ..search import Found, Way
from . import made_by, page_ids, refuse_another


TABLE = "pages"
BATCH = 256  # pages at a time


class LanceStore:
    """
    Args:
        place (`str`): A folder.
        exact (`bool`): Compare all pages, as our index does, or go by an index that was made with LanceDB, if there
            is one.
    """

    def __init__(self, place: str, exact: bool = True):
        self.place, self.exact = place, exact
        self.database = lancedb.connect(Path(place))
        self.table = self.database.open_table(TABLE) if TABLE in self.database.list_tables().tables else None

    def maker(self) -> str | None:
        """See [`Store.maker`]."""
        rows = self.table.search().select(["made_by"]).limit(1).to_list() if self.table else []
        return rows[0]["made_by"] if rows else None

    def put(self, index: Index) -> tuple[int, int]:
        """See [`Store.put`].

        Raises:
            ValueError: the table holds pages that were made in another way.
        """
        made, share, ids = made_by(index), index.share, page_ids(index)
        schema = _schema(index)
        refuse_another(f"lancedb:{self.place}", self.maker(), made)
        if self.table is None:
            self.table = self.database.create_table(TABLE, schema=schema)
        held = self.table.search().select(["id", "share"]).limit(self.table.count_rows() + 1).to_list()
        own = {row["id"] for row in held if row["share"] == share}
        gone = sorted(own - ids.keys())
        for start in range(0, len(gone), BATCH):
            self.table.delete(_is_one_of(gone[start : start + BATCH]))
        missing = [(name, row) for name, row in ids.items() if name not in own]
        for start in range(0, len(missing), BATCH):
            rows = [
                {"id": name, "made_by": made, "share": share} | vars(index.page(row)) | _vectors(index, row)
                for name, row in missing[start : start + BATCH]
            ]
            merged = self.table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
            merged.execute(pa.Table.from_pylist(rows, schema))  # what another share held is this one's now
        return len(missing), len(gone)

    def search(
        self, queries: Embeddings, top: int = 5, way: Way = "two-stage", candidates: int = CANDIDATES
    ) -> list[list[Found]]:
        """See [`Store.search`].

        Raises:
            ValueError: nothing was put there, or it has no vectors for this way.
        """
        if self.table is None:
            raise ValueError(f"lancedb:{self.place} holds no table {TABLE!r}: put an index there first.")
        schema = self.table.schema
        has_multi = "multi" in schema.names
        if way != "dense" and not has_multi:
            raise ValueError(f"lancedb:{self.place} has dense vectors only, and cannot be searched by {way!r}.")
        width = schema.field("multi").type.value_type.list_size if has_multi else None
        check_queries(queries, way, schema.field("dense").type.list_size, width)
        return [self._search(queries, number, top, way, candidates) for number in range(len(queries))]

    def _search(self, queries: Embeddings, number: int, top: int, way: Way, candidates: int) -> list[Found]:
        only = None
        if way != "late":
            query = queries.dense[number].numpy()
            limit = top if way == "dense" else max(top, candidates)
            rows = self._query(query, "dense", "dot", limit, only)
            if way == "dense" or not rows:
                return [_found(row, 1 - row["_distance"]) for row in rows]
            only = _is_one_of([row["id"] for row in rows])
        tokens = queries.multi[number].numpy()
        rows = self._query(tokens, "multi", "cosine", top, only)
        return [_found(row, 1 - row["_distance"] / len(tokens)) for row in rows]

    def _query(self, query: np.ndarray, column: str, metric: str, limit: int, only: str | None) -> list[dict]:
        search = self.table.search(query, vector_column_name=column).distance_type(metric)
        search = search.select(["id", *COLUMNS, "_distance"]).limit(limit)
        if self.exact:
            search = search.bypass_vector_index()
        return (search.where(only, prefilter=True) if only else search).to_list()


def _schema(index: Index) -> pa.Schema:
    fields = {name: pa.string() for name in ("id", "made_by", "share", "file", "sha256")}
    fields |= {"page": pa.int32(), "pages": pa.int32(), "dense": pa.list_(pa.float32(), index.settings.dims)}
    if index.settings.kind == "both":
        fields["multi"] = pa.list_(pa.list_(pa.float32(), index.manifest["width"]))
    return pa.schema(fields)


def _is_one_of(ids: list[str]) -> str:
    return f"id IN ({', '.join(repr(name) for name in ids)})"  # of digits and hyphens


def _found(row: dict, score: float) -> Found:
    return Found(Page(**{name: row[name] for name in COLUMNS}), score)


def _vectors(index: Index, row: int) -> dict[str, np.ndarray | list]:
    part, place = index.locate(row)
    vectors = {"dense": part.dense[place].astype(np.float32)}
    if part.multi is not None:
        vectors["multi"] = list(part.multi[part.offsets[place] : part.offsets[place + 1]].astype(np.float32))
    return vectors
