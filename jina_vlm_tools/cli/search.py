"""`search`: the pages of an index that fit a question. `ask --index` finds them by the same steps."""

import argparse
import json
import re
import time
from pathlib import Path

from jina_vlm_tools import sources
from jina_vlm_tools.engines import TORCH, check_engine
from jina_vlm_tools.extras import needing
from jina_vlm_tools.retrieval import CANDIDATES, KINDS

from . import options
from .progress import Progress


DESCRIPTION = """\
Find the pages of an index that fit a question, the best first. Searching by a
vector of each page (dense) is fast, by those of all its tokens (late) finds
more; two-stage does the first, and then the second for the best 100.
"""
EXAMPLES = """\
examples:
  jina-vlm search papers "Which pump was replaced in May?"
  jina-vlm search papers.index "Umsatz nach Ländern" --top 3 --heat-map maps
  jina-vlm search papers "a red valve" --json | jq -r '.results[].file'
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("index", type=Path, metavar="INDEX", help="an index, or a folder that was indexed")
    parser.add_argument("question", metavar="QUESTION", help="what to look for, quoted, in any language")
    parser.add_argument(
        "--top", type=options.positive, default=5, metavar="N", help="how many pages (default: %(default)s)"
    )
    add_way(parser)
    parser.add_argument(
        "--heat-map",
        type=Path,
        metavar="FOLDER",
        help="draw each page that was found into this folder, with color where the question's words match",
    )
    options.add_retrieval_model(parser)
    options.add_dtype(parser)
    options.add_device(parser)
    options.add_store(parser)
    options.add_json(parser, "one JSON object (question, way, results with file, page and score, seconds)")
    parser.set_defaults(run=run, check=check)


def add_way(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--way", choices=KINDS, help="how to search (default: the first that the index allows)")
    parser.add_argument(
        "--candidates",
        type=options.positive,
        metavar="N",
        help=f"how many pages two-stage compares by all their vectors (default: {CANDIDATES})",
    )


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if not args.question.strip():
        parser.error("the question is empty. Say what to look for")


class Searcher:
    """An index, the model that made it, and a store in the index's place where one is named."""

    def __init__(self, index: Path, args: argparse.Namespace, progress: Progress, verb: str):
        if not index.is_dir():
            raise NotADirectoryError(f"{index}: no such index. Make one with `jina-vlm index FOLDER`.")
        if args.model:
            sources.check_model(args.model)
            check_engine(args.model, TORCH)
        with needing("search", f"`jina-vlm {verb}`"), progress.step("import", "Importing torch and transformers"):
            from jina_vlm_tools.inference.loading import quiet_libraries
            from jina_vlm_tools.retrieval.identity import identify
            from jina_vlm_tools.retrieval.index import Index
            from jina_vlm_tools.retrieval.loading import load_embedder
            from jina_vlm_tools.retrieval.stores import open_store
        quiet_libraries()
        with progress.step("index", f"Opening {index}"):
            self.index = Index.open(index)
            self.way = args.way or self.index.ways[0]
            if args.candidates and self.way != "two-stage":
                raise ValueError(f"--candidates is for --way two-stage, and the way is {self.way}. Leave it out.")
            self.candidates = args.candidates or CANDIDATES
            self.index.check_way(self.way, args.top or 1, self.candidates)
            self.store = open_store(args.store, self.index) if args.store else self.index
        self.model = args.model or self.index.manifest["model"]
        with progress.step("model", f"Loading {self.model}"):
            self.embedder = load_embedder(self.model, args.device, args.dtype)
        self.index.check_embedder(identify(self.embedder, self.index.manifest["task"]), self.model)

    def search(self, question: str, top: int) -> list:
        queries = self.index.embed(self.embedder, [question], self.way)
        (found,) = self.store.search(queries, top, self.way, self.candidates) or [[]]
        return found

    def draw(self, page, max_pixels: int):
        """The image of a page, a PDF's with at most so many pixels.

        Raises:
            OSError, ValueError: it is gone, or has changed since.
        """
        from jina_vlm_tools.retrieval.documents import draw

        return draw(self.index.folder, page, max_pixels)


def run(args: argparse.Namespace) -> None:
    started, progress = time.perf_counter(), Progress()
    if args.heat_map and args.heat_map.exists() and not args.heat_map.is_dir():
        raise NotADirectoryError(f"--heat-map {args.heat_map} is a file. Name a folder.")
    searcher = Searcher(args.index, args, progress, "search")
    if args.heat_map and searcher.embedder.projector is None:
        raise ValueError("--heat-map needs a model with a projector, and this one makes dense vectors only.")
    with progress.step("search", f"Searching {len(searcher.index):,} pages"):
        found = searcher.search(args.question, args.top)
    maps = [None] * len(found)
    if args.heat_map:
        with progress.step("heat_map", "Drawing heat maps"):
            maps = draw_maps(searcher, args.question, found, args.heat_map)
    if args.json:
        results = [
            describe(searcher, rank, one) | {"heat_map": str(file) if file else None}
            for rank, (one, file) in enumerate(zip(found, maps, strict=True), 1)
        ]
        report = {
            "question": args.question,
            "index": str(searcher.index.path),
            "model": searcher.model,
            "way": searcher.way,
            "pages": len(searcher.index),
            "results": results,
            "seconds": {**progress.seconds, "total": round(time.perf_counter() - started, 3)},
        }
        print(json.dumps(report, ensure_ascii=False))
        return
    for rank, (one, file) in enumerate(zip(found, maps, strict=True), 1):
        print(f"{rank:>3}  {one.score:6.3f}  {one.page}" + (f"  ({file})" if file else ""))


def describe(searcher: Searcher, rank: int, found) -> dict:
    """A page that was found, for JSON."""
    page = found.page
    return {
        "rank": rank,
        "file": page.file,
        "page": page.page,
        "pages": page.pages,
        "score": round(found.score, 6),
        "path": str(searcher.index.folder / page.file),
    }


def draw_maps(searcher: Searcher, question: str, found: list, folder: Path) -> list[Path]:
    """A file for each page that was found."""
    from .tiles import save_whole

    folder.mkdir(parents=True, exist_ok=True)
    settings, files, most = searcher.index.settings, [], searcher.embedder.processor.image_processor.max_pixels
    for rank, one in enumerate(found, 1):
        name = re.sub(r"[^\w.-]+", "-", one.page.file)[-100:]
        file = folder / f"{rank:02d}-{name}-page-{one.page.page}.png"
        task = searcher.index.manifest["task"]
        heat = searcher.embedder.heat_map(
            question, searcher.draw(one.page, most), task=task, max_tiles=settings.max_tiles
        )
        save_whole(heat.draw(), file)
        files.append(file)
    return files
