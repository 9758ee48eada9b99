"""Make an index of a folder, or bring one up to date: only what is new or has changed is embedded."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from . import MAX_TILES
from .documents import WHOLE, Document, Page, Unreadable, digest, draw_all, find_files
from .embedder import JinaVLMEmbedder
from .embeddings import Embeddings, join
from .identity import identify
from .index import (
    MANIFEST,
    Settings,
    Writer,
    dims_for,
    find_shares,
    folder_of,
    locked,
    new_manifest,
    read_manifest,
    refuse_another,
)


PAGES_PER_PART = 64  # what a kill can cost
POOL_FACTOR = 1  # of a new index


@dataclass(frozen=True)
class Summary:
    """What a run did, in pages; `moved` and `left` count those whose files were renamed, and those that are gone or
    were changed. `errors` are of what could not be read: {"file", "page", "error"}."""

    path: Path
    pages: int
    new: int
    moved: int
    left: int
    errors: list[dict[str, Any]]
    repaired: list[str]
    seconds: float


@dataclass(frozen=True)
class Asked:
    """Of an index that is there, its own where they are left out; see [`Settings`]."""

    kind: str | None = None
    dims: int | None = None
    max_tiles: int | None = None
    pool_factor: int | None = None


def update(
    folder: Path,
    path: Path,
    load: Callable[[str | None], tuple[JinaVLMEmbedder, str]],
    *,
    model: str | None = None,
    asked: Asked | None = None,
    batch_size: int = 8,
    share: tuple[int, int] = (1, 1),
    show: bool = False,
) -> Summary:
    """
    Embed the pages of a folder that an index lacks, and take those out that are gone.

    A run that was stopped is taken up by the next one: at most the last 64 pages are embedded again.

    Args:
        folder: Of images and PDFs, looked through with its subfolders.
        path: Of the index.
        load: Gives an embedder and its name for the name of a model, or for None. It is called where there is
            something to embed, or `model` is another than the index's.
        model: The name of a model; the index's own, if left out.
        asked: Settings of a new index, which one that is there must have.
        share: (i, n): only the ith of n parts of the files, by their names: for several workers.
        show: A line of progress on stderr.

    Raises:
        OSError, ValueError: there is nothing to index, another run is at work, or the index was made in another way;
            the message says what differs.
    """
    started, asked = time.perf_counter(), asked or Asked()
    files = [file for file in find_files(folder) if share_of(file, share[1]) == share[0]]
    if not files and share == (1, 1):
        kept = f" {path} was left as it is." if (path / MANIFEST).is_file() else ""
        raise ValueError(f"{folder} holds no images and no PDFs.{kept}")
    _check_place(path, share)
    with locked(path):
        is_new = not (path / MANIFEST).is_file()  # another run may have made it a moment ago
        loaded: list[JinaVLMEmbedder] = []

        def get_embedder() -> JinaVLMEmbedder:
            """The index's, loaded where it is first needed."""
            if not loaded:
                embedder, name = load(model or manifest["model"])
                refuse_another(path, manifest, identify(embedder, manifest["task"]), name)
                loaded.append(embedder)
            return loaded[0]

        if is_new:
            embedder, name = load(model)
            manifest = _begin(folder, path, embedder, name, asked, share)
            loaded.append(embedder)
        else:
            manifest = read_manifest(path)
            _check(folder, path, manifest, asked, share)
            if model not in (None, manifest["model"]):
                get_embedder()
        writer = Writer(path, manifest)
        unreadable: list[Unreadable] = []
        hashes = dict(_hash(folder, files, unreadable))
        moved, left = _forget(writer, hashes)
        done: dict[str, set[int]] = {}
        for row in writer.rows():
            done.setdefault(row["file"], set()).add(row["page"])
        lengths = {row["file"]: row["pages"] for row in writer.rows()}
        max_pixels = manifest["identity"]["image settings"]["max_pixels"]
        for file in hashes.keys() - lengths.keys():
            try:
                with Document(folder / file, max_pixels) as document:
                    lengths[file] = document.pages
            except (OSError, ValueError) as error:
                unreadable.append(Unreadable(file, WHOLE, str(error)))
        pending = {
            file: sha for file, sha in hashes.items() if file in lengths and len(done.get(file, ())) < lengths[file]
        }
        drawn = draw_all(folder, pending, {(file, page) for file in done for page in done[file]}, max_pixels)
        total = sum(lengths.values())
        new = _embed_all(get_embedder, drawn, total, writer, unreadable, batch_size, show)
        unreadable.sort(key=lambda one: (one.file, one.page))
        errors = [vars(one) for one in unreadable]
        writer.settle(errors)
        total = sum(entry["pages"] for entry in writer.manifest["parts"])
    return Summary(path, total, new, moved, left, errors, writer.damaged, round(time.perf_counter() - started, 3))


def share_of(file: str, shares: int) -> int:
    """Whose a file is, from 1: by its name, so that it stays whoever's it was when others come."""
    return 1 + int.from_bytes(sha256(file.encode(errors="surrogateescape")).digest()[:8], "big") % shares


def _check_place(path: Path, share: tuple[int, int]) -> None:
    if path.is_file():
        raise NotADirectoryError(f"{path} is a file. Name a folder for the index.")
    if share != (1, 1) and (path.parent / MANIFEST).is_file():
        raise ValueError(
            f"{path.parent} is a whole index, in which no share would be read. Name another folder for the shares."
        )
    if shares := [share for share in find_shares(path) if share != path]:
        raise ValueError(
            f"{path} holds shares of an index, {', '.join(share.name for share in shares)}: bring each up to date by "
            "--share, or name another folder for a whole one."
        )
    if path.is_dir() and not (path / MANIFEST).is_file():
        others = sorted(each.name for each in path.iterdir() if not each.name.startswith((".", "part-", MANIFEST)))
        if others:
            raise ValueError(f"{path} holds {others[0]!r} but no {MANIFEST}: it is no index. Name a new folder.")


def _begin(
    folder: Path, path: Path, embedder: JinaVLMEmbedder, name: str, asked: Asked, share: tuple[int, int]
) -> dict[str, Any]:
    kind = asked.kind or ("dense" if embedder.projector is None else "both")
    factor = POOL_FACTOR if asked.pool_factor is None else asked.pool_factor
    # What fails for this one is no fault of any page.
    vectors = embedder.embed(
        [Image.new("RGB", (64, 64), "white")],
        kind=kind, dims=asked.dims, max_tiles=asked.max_tiles or MAX_TILES, pool_factor=factor,
    )  # fmt: skip
    settings = Settings(kind, vectors.dense.shape[1], asked.max_tiles or MAX_TILES, factor)
    width = None if vectors.multi is None else vectors.multi[0].shape[1]
    return new_manifest(folder, path, name, embedder.task, identify(embedder), settings, width, share)


def _check(folder: Path, path: Path, manifest: dict[str, Any], asked: Asked, share: tuple[int, int]) -> None:
    """
    Raises:
        ValueError: the index is of another folder, or of other settings.
    """
    before = folder_of(path, manifest)
    if before.exists() and before.resolve() != folder.resolve():
        raise ValueError(f"{path} is the index of {before}, not of {folder}. Name another folder by --output.")
    settings = manifest["settings"] | {"share": tuple(manifest["share"])}
    wanted = {name: value for name, value in vars(asked).items() if value is not None} | {"share": share}
    if changed := [
        f"{name} was {settings[name]}, is {value}" for name, value in wanted.items() if settings[name] != value
    ]:
        raise ValueError(
            f"{path} was made with other settings: {'; '.join(changed)}. Take those, or make a new index (--output)."
        )


def _hash(folder: Path, files: list[str], unreadable: list[Unreadable]) -> Iterator[tuple[str, str]]:
    for file in files:
        try:
            file.encode()
            yield file, digest(folder / file)
        except UnicodeEncodeError:
            shown = file.encode(errors="backslashreplace").decode()
            unreadable.append(Unreadable(shown, WHOLE, "Its name is not UTF-8: rename it."))
        except OSError as error:
            unreadable.append(Unreadable(file, WHOLE, str(error)))


def _forget(writer: Writer, hashes: dict[str, str]) -> tuple[int, int]:
    """Let the pages of files leave that are gone or have changed, and those of moved files go with them."""
    rows = writer.rows()
    known = {row["file"] for row in rows}
    arrived = {sha: file for file, sha in hashes.items() if file not in known}
    renamed: dict[str, str] = {}
    for row in rows:
        file, sha = row["file"], row["sha256"]
        if file not in hashes and file not in renamed and sha in arrived:
            renamed[file] = arrived.pop(sha)

    def change(row: dict[str, Any]) -> dict[str, Any] | None:
        file = renamed.get(row["file"], row["file"])
        return row | {"file": file} if hashes.get(file) == row["sha256"] else None

    changed = [change(row) for row in rows]
    writer.change(change)
    moved = sum(after is not None and after != row for row, after in zip(rows, changed, strict=True))
    return moved, sum(after is None for after in changed)


def _embed_all(
    get_embedder: Callable[[], JinaVLMEmbedder],
    drawn: Iterator,
    total: int,
    writer: Writer,
    unreadable: list[Unreadable],
    batch_size: int,
    show: bool,
) -> int:
    """Embed and write pages, part by part; how many. `total`: with those that are there."""
    settings = Settings(**writer.manifest["settings"])
    options = {
        "kind": settings.kind, "max_tiles": settings.max_tiles, "pool_factor": settings.pool_factor,
        "task": writer.manifest["task"], "batch_size": batch_size,
    }  # fmt: skip
    before = sum(entry["pages"] for entry in writer.manifest["parts"])
    waiting: list[tuple[Page, Embeddings]] = []
    count = 0

    def write() -> None:
        errors = [vars(one) for one in unreadable]
        writer.add([page for page, _ in waiting], join([vectors for _, vectors in waiting]), errors)
        waiting.clear()

    with tqdm(total=total, initial=before, unit="page", disable=not show, dynamic_ncols=True) as bar:
        for batch in _ahead(drawn, batch_size):
            unreadable += [each for each in batch if isinstance(each, Unreadable)]
            images = [each for each in batch if not isinstance(each, Unreadable)]
            for page, vectors in _embed(get_embedder(), images, settings.dims, options) if images else ():
                if isinstance(vectors, str):
                    unreadable.append(Unreadable(page.file, page.page, vectors))
                    continue
                waiting.append((page, vectors))
                count += 1
                if len(waiting) == PAGES_PER_PART:
                    write()
            bar.update(len(batch))
        if waiting:
            write()
    return count


def _embed(
    embedder: JinaVLMEmbedder, images: list[tuple[Page, Image.Image]], dims: int, options: dict[str, Any]
) -> Iterator[tuple[Page, Embeddings | str]]:
    """Each page with its vectors, or with what is wrong with it."""
    try:
        vectors = embedder.embed([image for _, image in images], dims=dims_for(embedder, dims), **options)
    except (OSError, ValueError) as error:
        if len(images) == 1:
            yield images[0][0], str(error)
        else:
            for image in images:
                yield from _embed(embedder, [image], dims, options)
        return
    for number, (page, _) in enumerate(images):
        yield page, vectors[number]


def _ahead(items: Iterator, batch_size: int) -> Iterator[list]:
    """Batches, each drawn while the one before is embedded. In one thread: PDFium takes no more."""
    with ThreadPoolExecutor(1) as executor:
        following = executor.submit(lambda: list(islice(items, batch_size)))
        while batch := following.result():
            following = executor.submit(lambda: list(islice(items, batch_size)))
            yield batch
