"""An index on disk: pages of a folder, with the vectors of each.

    index.json                    what made it and how, its parts, and what could not be read
    part-000001.pages.parquet     file, page, pages, sha256, tokens: a row for each page
    part-000001.dense.npy         [pages, dims] float16
    part-000001.multi.npy         [tokens of all pages, width] float16

A part is there once `index.json` lists it, and no part is written twice: a run may be killed at any moment, and others
may search meanwhile. An index that several workers make has a folder for each one's share, `share-003-of-016`, with
all of this in it.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from jina_vlm_tools.files import INDEX_FOLDER, write_whole

from . import CANDIDATES, KINDS
from .documents import Page
from .embeddings import Embeddings
from .identity import differences
from .search import Found, Part, Way, rank


if TYPE_CHECKING:
    from .embedder import JinaVLMEmbedder


LAYOUT = "jina-vlm index 1"
MANIFEST = "index.json"
LOCK = ".lock"
PRECISION = "float16"
SCHEMA = pa.schema(
    {"file": pa.string(), "page": pa.int32(), "pages": pa.int32(), "sha256": pa.string(), "tokens": pa.int32()}
)
COLUMNS = ("file", "page", "pages", "sha256")
FULL = 1024  # pages of the largest part


@dataclass(frozen=True)
class Settings:
    """How pages are embedded.

    Args:
        kind (`str`): "both", dense and multi-vectors, or "dense".
        dims (`int`): Of dense vectors.
        max_tiles (`int`): Of a page.
        pool_factor (`int`): How many tokens become one multi-vector.
    """

    kind: str
    dims: int
    max_tiles: int
    pool_factor: int
    precision: str = PRECISION


class Index:
    """
    An index to search in. See [`Index.open`].

    Args:
        path (`Path`): Where it is.
        manifest (`dict`): What its `index.json` says; the first share's.
        parts (`list[Part]`): The vectors, memory-mapped.
        table (`pa.Table`): A row for each page, in the order of the parts.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], parts: list[Part], table: pa.Table):
        self.path, self.manifest, self.parts, self.table = path, manifest, parts, table
        self.settings = Settings(**manifest["settings"])

    @classmethod
    def open(cls, path: str | Path) -> Index:
        """
        Args:
            path: Of an index, or of a folder that was indexed with its index inside.

        Raises:
            FileNotFoundError: there is none.
            ValueError: a file of it is damaged or missing; the message says which, and what to do.
        """
        found = find_index(Path(path))
        shares = find_shares(found)
        manifests, parts, tables = [], [], []
        for share in shares:
            manifest, opened = _open_whole(share)
            manifests.append(manifest)
            for part, table in opened:
                parts.append(part)
                tables.append(table)
        for share, manifest in zip(shares, manifests, strict=True):
            if unlike := compare(manifests[0], manifest):
                raise ValueError(f"{share} was not made as {shares[0].name} was: {'; '.join(unlike)}. Make it anew.")
        if shares != [found]:
            numbers, (of, *others) = zip(*(manifest["share"] for manifest in manifests), strict=True)
            if {*others} - {of} or len({*numbers}) < len(numbers):
                raise ValueError(
                    f"{found} holds shares that make no whole: {', '.join(share.name for share in shares)}. Expected "
                    "shares of one count, each once. Delete the others."
                )
            if missing := sorted({*range(1, of + 1)} - {*numbers}):
                raise ValueError(
                    f"{found} lacks the shares {', '.join(map(str, missing))} of {of}: make them by "
                    f"`jina-vlm index FOLDER --share {missing[0]}/{of}`."
                )
        return cls(found, manifests[0], parts, pa.concat_tables(tables) if tables else SCHEMA.empty_table())

    def __len__(self) -> int:
        return len(self.table)

    @property
    def folder(self) -> Path:
        """Of the files that it is about."""
        return folder_of(find_shares(self.path)[0], self.manifest)

    @cached_property
    def tokens(self) -> int:
        """Multi-vectors in all."""
        return sum(int(part.offsets[-1]) for part in self.parts)

    @cached_property
    def bytes(self) -> int:
        """Of all vectors."""
        return sum(array.nbytes for part in self.parts for array in (part.dense, part.multi) if array is not None)

    @property
    def share(self) -> str:
        """Which of several workers' shares it is, such as "3/16"; "1/1" of a whole one."""
        return "{}/{}".format(*self.manifest["share"]) if len(find_shares(self.path)) == 1 else "1/1"

    def locate(self, row: int) -> tuple[Part, int]:
        """The part with a row, and its place there."""
        number = int(np.searchsorted(self._starts, row, "right")) - 1
        return self.parts[number], row - int(self._starts[number])

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.cumsum([0, *(len(part) for part in self.parts)])

    def page(self, row: int) -> Page:
        return Page(**{name: self.table[name][row].as_py() for name in COLUMNS})

    @property
    def ways(self) -> tuple[Way, ...]:
        """How it can be searched, the best first."""
        return tuple(KINDS) if self.settings.kind == "both" else ("dense",)

    def check_way(self, way: Way, top: int, candidates: int) -> None:
        """
        Raises:
            ValueError: it cannot be searched so.
        """
        if way not in KINDS:
            raise ValueError(f"`way` must be one of {', '.join(KINDS)}, got {way!r}.")
        if way not in self.ways:
            raise ValueError(
                f"{self.path} has dense vectors only, and cannot be searched by {way!r}: take 'dense', or make "
                "another index by a model with a projector."
            )
        if top < 1 or candidates < 1:
            raise ValueError(f"`top` and `candidates` must be at least 1, got {top} and {candidates}.")

    def search(
        self, queries: Embeddings, top: int = 5, way: Way | None = None, candidates: int = CANDIDATES
    ) -> list[list[Found]]:
        """
        Find the best pages for each query: exact, among all pages.

        Args:
            queries: float32, of the kind that the way needs: "dense"; "multi" for "late"; "both" for "two-stage".
            way: "dense" compares a vector of each page; "late" those of its tokens, which finds more and takes longer;
                "two-stage" those of the tokens of the best by the first. The best that the index has, if left out.
            candidates: How many pages "two-stage" compares by their tokens.

        Returns:
            For each query, [`Found`] pages, the best first.

        Raises:
            ValueError: the index, or the queries, have no vectors for this way.
        """
        way = way or self.ways[0]
        self.check_way(way, top, candidates)
        check_queries(queries, way, self.settings.dims, self.manifest["width"])
        return [
            [
                Found(self.page(row), score)
                for row, score in rank(self.parts, queries[number], min(top, len(self)), way, candidates)
            ]
            for number in range(len(queries) if len(self) else 0)
        ]

    def embed(self, embedder: JinaVLMEmbedder, questions: Sequence[str], way: Way | None = None) -> Embeddings:
        """Questions as queries, by the embedder that made the index, of the kind that the way needs."""
        return embedder.embed(
            list(questions),
            task=self.manifest["task"],
            role="query",
            kind=KINDS[way or self.ways[0]],
            dims=None if way == "late" else dims_for(embedder, self.settings.dims),
        )

    def check_embedder(self, identity: dict[str, Any], name: str) -> None:
        """
        Args:
            identity: See [`identify`].
            name: Of the model, for the message.

        Raises:
            ValueError: the index was made by another; the message names what differs.
        """
        refuse_another(self.path, self.manifest, identity, name)


def dims_for(embedder: JinaVLMEmbedder, dims: int) -> int | None:
    """What to ask for, to get so many: nothing, if that is all there are."""
    return None if dims == embedder.model.config.get_text_config().hidden_size else dims


def check_queries(queries: Embeddings, way: Way, dims: int, width: int | None) -> None:
    """
    Raises:
        ValueError: queries lack what the way needs, or have vectors of another width than the index.
    """
    if way != "late":
        if queries.dense is None:
            raise ValueError(f"{way!r} needs dense vectors of a query: embed it with kind={KINDS[way]!r}.")
        if len(queries) and queries.dense.shape[1] != dims:
            raise ValueError(f"Queries have {queries.dense.shape[1]} numbers, pages {dims}: embed with dims={dims}.")
    if way != "dense":
        if queries.multi is None:
            raise ValueError(f"{way!r} needs multi-vectors of a query: embed it with kind={KINDS[way]!r}.")
        if len(queries) and queries.multi[0].shape[1] != width:
            raise ValueError(f"Multi-vectors of queries have {queries.multi[0].shape[1]} numbers, of pages {width}.")
    if queries.precision != "float32":
        raise ValueError(f"Queries are {queries.precision}: pass float32 ones (`restore`).")


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def find_index(path: Path) -> Path:
    """The index of a path: itself, or the one inside a folder that was indexed.

    Raises:
        FileNotFoundError: there is none.
    """
    for place in (path, path / INDEX_FOLDER):
        if (place / MANIFEST).is_file() or any(place.glob(f"share-*/{MANIFEST}")):
            return place
    raise FileNotFoundError(f"{path}: no index. Make one with `jina-vlm index FOLDER`, of images and PDFs.")


def find_shares(path: Path) -> list[Path]:
    """The folders that make an index: its own, or those of the workers' shares in it."""
    return [path] if (path / MANIFEST).is_file() else sorted(file.parent for file in path.glob(f"share-*/{MANIFEST}"))


def folder_of(path: Path, manifest: dict[str, Any]) -> Path:
    """Of the files that the index in `path` is about."""
    return Path(os.path.normpath(path / manifest["folder"]))


def compare(manifest: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """In words, in what two indexes' pages cannot be compared."""
    return differences(manifest["identity"] | manifest["settings"], other["identity"] | other["settings"])


def refuse_another(path: Path, manifest: dict[str, Any], identity: dict[str, Any], name: str) -> None:
    """
    Raises:
        ValueError: see [`Index.check_embedder`].
    """
    if unlike := differences(manifest["identity"], identity):
        raise ValueError(
            f"{path} was made by another model than {name}. What differs: {'; '.join(unlike)}. Take --model "
            f"{manifest['model']}, which made it, or make a new index (--output)."
        )


def read_manifest(path: Path) -> dict[str, Any]:
    """
    Raises:
        FileNotFoundError, ValueError: it is not there, or damaged, or of another layout.
    """
    file = path / MANIFEST
    advice = f"Delete the folder {path}, and run `jina-vlm index` again."
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: {path} is no index.")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        layout = manifest["layout"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error}). {advice}") from error
    if layout != LAYOUT:
        raise ValueError(f"{file} has the layout {layout!r}, this version reads {LAYOUT!r}. {advice}")
    needed = ("folder", "model", "task", "identity", "settings", "share", "width", "next_part", "parts", "errors")
    if lacking := [name for name in needed if name not in manifest]:
        raise ValueError(f"{file} is damaged: it lacks {', '.join(lacking)}. {advice}")
    return manifest


def _open_whole(path: Path) -> tuple[dict[str, Any], list[tuple[Part, pa.Table]]]:
    """Parts as one manifest lists them, though a run may replace them meanwhile."""
    manifest = read_manifest(path)
    while True:
        try:
            return manifest, [open_part(path, manifest, entry) for entry in manifest["parts"]]
        except ValueError:
            before, manifest = manifest, read_manifest(path)
            if before == manifest:
                raise


def part_files(path: Path, name: str, kind: str) -> dict[str, Path]:
    """The files of a part, by what is in them."""
    files = {"pages": path / f"{name}.pages.parquet", "dense": path / f"{name}.dense.npy"}
    return files | ({"multi": path / f"{name}.multi.npy"} if kind == "both" else {})


def open_part(path: Path, manifest: dict[str, Any], entry: dict[str, Any]) -> tuple[Part, pa.Table]:
    """
    Raises:
        ValueError: a file is missing, cut off, or does not fit the others; the message names it.
    """
    settings = manifest["settings"]
    files = part_files(path, entry["name"], settings["kind"])
    pages, tokens = entry["pages"], entry["tokens"]
    shapes = {"dense": (pages, settings["dims"]), "multi": (tokens, manifest["width"])}
    arrays: dict[str, Any] = {}
    for what, file in files.items():
        try:
            if what == "pages":
                table = pq.read_table(file, schema=SCHEMA, page_checksum_verification=True)
                lengths = np.asarray(table["tokens"], np.int64)
                if (len(table), int(lengths.sum())) != (pages, tokens):
                    raise ValueError(f"{len(table)} pages of {lengths.sum()} vectors, expected {pages} of {tokens}")
            else:
                # Only what is written is copied, and nothing is: torch asks for arrays that could be.
                arrays[what] = np.load(file, mmap_mode="c", allow_pickle=False)
                if arrays[what].shape != shapes[what] or arrays[what].dtype != np.float16:
                    found = arrays[what]
                    raise ValueError(f"{found.dtype} {list(found.shape)}, expected float16 {list(shapes[what])}")
        except (OSError, ValueError, EOFError, pa.ArrowException) as error:
            reason = "it is missing" if not file.is_file() else str(error).splitlines()[0]
            raise ValueError(
                f"{file} is damaged ({reason}). Run `jina-vlm index {folder_of(path, manifest)} --output {path}` "
                "again: it embeds anew what was lost."
            ) from error
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Part(arrays["dense"], arrays.get("multi"), offsets), table


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Be alone with an index, as long as the process lasts, however that ends.

    Raises:
        BlockingIOError: another run writes to it.
    """
    path.mkdir(parents=True, exist_ok=True)
    with open(path / LOCK, "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"Another run is at work on {path}. Wait for its end, or end its process.") from None
        yield


class Writer:
    """
    Changes an index, so that at any moment the one on disk is whole. Only with [`locked`].

    Args:
        path (`Path`): Its folder.
        manifest (`dict`): Of the index that is there, or of a new one.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]):
        self.path, self.manifest = path, manifest
        self.kind = manifest["settings"]["kind"]
        self.damaged: list[str] = []
        kept, self.tables = [], []
        for entry in manifest["parts"]:
            try:
                self.tables.append(open_part(path, manifest, entry)[1])
                kept.append(entry)
            except ValueError as error:
                self.damaged.append(str(error))
        self.manifest["parts"] = kept
        self._commit(kept)

    def rows(self) -> list[dict[str, Any]]:
        """A row of each page."""
        return [row for table in self.tables for row in table.to_pylist()]

    def add(self, pages: Sequence[Page], vectors: Embeddings, errors: Sequence[dict]) -> None:
        """Append a part. `errors`: all that are known by now."""
        self.manifest["errors"] = list(errors)
        lengths = [len(one) for one in vectors.multi] if vectors.multi is not None else [0] * len(pages)
        rows = [asdict(page) | {"tokens": length} for page, length in zip(pages, lengths, strict=True)]
        arrays = {"dense": vectors.dense.to(torch.float16).numpy()}
        if vectors.multi is not None:
            arrays["multi"] = torch.cat(vectors.multi).to(torch.float16).numpy()
        entry, table = self._write(pa.Table.from_pylist(rows, SCHEMA), arrays)
        self.tables.append(table)
        self._commit([*self.manifest["parts"], entry])

    def settle(self, errors: Sequence[dict]) -> None:
        """Write down what could not be read, and put small parts together."""
        self.manifest["errors"] = list(errors)
        self._commit(self.manifest["parts"])
        groups: list[list[dict]] = [[]]
        for entry in self.manifest["parts"]:
            if sum(each["pages"] for each in groups[-1]) + entry["pages"] > FULL:
                groups.append([])
            groups[-1].append(entry)
        for group in groups:
            if len(group) > 1:
                self._rewrite({entry["name"] for entry in group}, lambda row: row)

    def change(self, change: Callable[[dict], dict | None]) -> None:
        """Let `change` say of each row what becomes of it: a row, or None if its page is to leave."""
        touched = {
            entry["name"]
            for entry, table in zip(self.manifest["parts"], self.tables, strict=True)
            if any(change(row) != row for row in table.to_pylist())
        }
        if touched:
            self._rewrite(touched, change)

    def _rewrite(self, names: set[str], change: Callable[[dict], dict | None]) -> None:
        """Put the rows of these parts, as they become, into new ones."""
        entries, tables = [], []
        waiting: list[tuple[dict, dict[str, np.ndarray]]] = []

        def write() -> None:
            rows, kept = [row for row, _ in waiting], [arrays for _, arrays in waiting]
            arrays = {name: np.concatenate([one[name] for one in kept]) for name in kept[0]}
            entry, table = self._write(pa.Table.from_pylist(rows, SCHEMA), arrays)
            entries.append(entry)
            tables.append(table)
            waiting.clear()

        for entry, table in zip(self.manifest["parts"], self.tables, strict=True):
            if entry["name"] not in names:
                entries.append(entry)
                tables.append(table)
                continue
            part, _ = open_part(self.path, self.manifest, entry)
            for number, row in enumerate(table.to_pylist()):
                if (changed := change(row)) is None:
                    continue
                arrays = {"dense": part.dense[number : number + 1]}
                if part.multi is not None:
                    arrays["multi"] = part.multi[part.offsets[number] : part.offsets[number + 1]]
                waiting.append((changed, arrays))
                if len(waiting) == FULL:
                    write()
        if waiting:
            write()
        self.tables = tables
        self._commit(entries)

    def _write(self, table: pa.Table, arrays: dict[str, np.ndarray]) -> tuple[dict[str, Any], pa.Table]:
        name = f"part-{self.manifest['next_part']:06d}"
        self.manifest["next_part"] += 1
        files = part_files(self.path, name, self.kind)
        for what, array in arrays.items():
            buffer = BytesIO()
            np.save(buffer, np.ascontiguousarray(array))
            write_whole(files[what], buffer.getbuffer())
        buffer = BytesIO()
        pq.write_table(table, buffer, write_page_checksum=True)
        write_whole(files["pages"], buffer.getvalue())
        tokens = int(np.asarray(table["tokens"], np.int64).sum())
        return {"name": name, "pages": len(table), "tokens": tokens}, table

    def _commit(self, parts: list[dict[str, Any]]) -> None:
        """Make these the index's parts, and delete what is none of it."""
        self.manifest["parts"] = parts
        write_whole(self.path / MANIFEST, json.dumps(self.manifest, indent=1, ensure_ascii=False).encode())
        own = {file for entry in parts for file in part_files(self.path, entry["name"], self.kind).values()}
        for file in self.path.glob("part-*"):
            if file not in own:
                file.unlink()


def new_manifest(
    folder: Path, path: Path, model: str, task: str | None, identity: dict, settings: Settings, width, share
) -> dict[str, Any]:
    """Of an index without pages. `width`: of multi-vectors, or None."""
    return {
        "layout": LAYOUT,
        "folder": relative(folder, path),
        "model": model,
        "task": task,
        "identity": identity,
        "settings": asdict(settings),
        "width": width,
        "share": list(share),
        "next_part": 1,
        "parts": [],
        "errors": [],
    }


def relative(folder: Path, path: Path) -> str:
    """How an index names its folder: from where it lies, if that is inside, so that the two can be moved together."""
    folder, path = folder.resolve(), path.resolve()
    return os.path.relpath(folder, path) if path.is_relative_to(folder) else str(folder)
