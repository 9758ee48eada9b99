"""Databases that an index can be put into, with the results that it gives itself. For those who run one, and for more
pages than one machine searches."""

from __future__ import annotations

import hashlib
import importlib
import json
import uuid
from pathlib import Path
from typing import Any, Protocol

from .. import CANDIDATES
from ..embeddings import Embeddings
from ..index import Index
from ..search import Found, Way


class Store(Protocol):
    """What a database does for us."""

    def maker(self) -> str | None:
        """[`made_by`] of the index whose pages it holds; None without any."""

    def put(self, index: Index) -> tuple[int, int]:
        """Make the database hold the pages of an index, and no others of its share; (added, removed)."""

    def search(
        self, queries: Embeddings, top: int = 5, way: Way = "two-stage", candidates: int = CANDIDATES
    ) -> list[list[Found]]:
        """As [`Index.search`]."""


# Module, class and what pip calls its client
STORES = {"qdrant": ("qdrant", "QdrantStore", "qdrant-client"), "lancedb": ("lancedb", "LanceStore", "lancedb")}


def open_store(place: str, index: Index | None = None) -> Store:
    """
    Args:
        place: KIND:PLACE, such as "qdrant:http://localhost:6333" or "lancedb:folder".
        index: In whose place it is to be searched; without one, a folder that is not there is made, to put pages into.

    Raises:
        OSError, ValueError: it is no such name, its client is not installed, no server answers, or the pages that are
            there were made in another way than the index's, or are none.
    """
    kind, separator, where = place.partition(":")
    if kind not in STORES or not separator or not where:
        raise ValueError(f"{place!r} names no store. Expected qdrant:URL, qdrant:FOLDER or lancedb:FOLDER.")
    module, name, package = STORES[kind]
    try:
        store = getattr(importlib.import_module(f".{module}", __name__), name)
    except ImportError as error:
        raise OSError(f"{place} needs `pip install {package}` ({error}).") from error
    if index is None:
        return store(where)
    if "://" not in where and not Path(where).is_dir():
        raise FileNotFoundError(
            f"{place}: no such folder. Put an index there: `jina-vlm index FOLDER --store {place}`."
        )
    opened = store(where)
    refuse_another(place, opened.maker(), made_by(index))
    return opened


def made_by(index: Index) -> str:
    """What pages of one store have in common: how they were made."""
    made = [index.manifest["identity"], index.manifest["settings"]]
    return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:16]


def page_ids(index: Index) -> dict[str, int]:
    """The row of each page, by an id that says which content it is."""
    columns = [index.table[name].to_pylist() for name in ("file", "page", "sha256")]
    return {
        str(uuid.uuid5(uuid.NAMESPACE_OID, json.dumps(row))): number
        for number, row in enumerate(zip(*columns, strict=True))
    }


def refuse_another(place: str, found: Any, expected: str) -> None:
    """
    Raises:
        ValueError: the store holds pages that were made in another way.
    """
    if found not in (None, expected):
        raise ValueError(
            f"{place} holds pages of an index that another model or other settings made ({found}, this one is "
            f"{expected}). Name another place."
        )
