"""`index`: a folder becomes something to search in."""

import argparse
import sys
from pathlib import Path

from jina_vlm_tools import sources
from jina_vlm_tools.engines import TORCH, check_engine
from jina_vlm_tools.extras import needing
from jina_vlm_tools.files import INDEX_FOLDER
from jina_vlm_tools.retrieval import MAX_TILES

from . import options
from .progress import Progress


DESCRIPTION = """\
Make an index of the pages of a folder, of images and PDFs, to find them by
questions (`jina-vlm search`) and to answer from them (`jina-vlm ask --index`).
Run again, it embeds what is new or has changed, and takes out what is gone;
also after it was stopped, by whatever: each page is in the index once.
"""
EXAMPLES = """\
examples:
  jina-vlm index papers
  jina-vlm index papers --output papers.index --pool-factor 3
  jina-vlm index papers --share 3/16 --output /shared/papers.index   # the third of 16 workers
  jina-vlm index papers --store qdrant:http://localhost:6333
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="of images and PDFs; looked through with its subfolders"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="INDEX",
        help=f"a new folder, or an index to bring up to date (default: {INDEX_FOLDER} in FOLDER)",
    )
    options.add_retrieval_model(parser)
    parser.add_argument(
        "--max-tiles",
        type=options.positive,
        metavar="N",
        help="at most so many tiles of a page beside the thumbnail: more find smaller print, and make larger vectors "
        f"(default: the index's; {MAX_TILES} for a new one, which is 814 vectors of an A4 page)",
    )
    parser.add_argument(
        "--pool-factor",
        type=options.positive,
        metavar="N",
        help="put so many vectors of a page that are most alike together into one (default: the index's; 1)",
    )
    parser.add_argument(
        "--dims",
        type=options.positive,
        metavar="N",
        help="numbers of a page's dense vector (default: the index's; all)",
    )
    parser.add_argument(
        "--kind",
        choices=("both", "dense"),
        help="dense vectors alone take a fiftieth of the room, and find less (default: the index's; both, if the "
        "model has a projector)",
    )
    parser.add_argument(
        "--share",
        type=share,
        default=(1, 1),
        metavar="I/N",
        help="only the Ith of N shares of the files, for one of N workers; each may run, stop and go on by itself",
    )
    parser.add_argument(
        "--batch-size", type=options.positive, default=8, help="pages at a time (default: %(default)s)"
    )
    options.add_dtype(parser)
    options.add_device(parser)
    options.add_store(parser)
    options.add_json(parser, "one JSON object (index, pages, new, moved, left, errors, seconds)")
    parser.set_defaults(run=run, interrupted="The same command goes on from here.")


def share(text: str) -> tuple[int, int]:
    try:
        number, of = map(int, text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected I/N, such as 3/16, got {text!r}") from None
    if not 1 <= number <= of:
        raise argparse.ArgumentTypeError(f"expected I/N with I from 1 to N, got {text!r}")
    return number, of


def run(args: argparse.Namespace) -> None:
    if not args.folder.is_dir():
        raise NotADirectoryError(f"{args.folder}: no such folder. Expected one with images or PDFs.")
    if args.model:
        sources.check_model(args.model)
        check_engine(args.model, TORCH)
    output = args.output or args.folder / INDEX_FOLDER
    number, of = args.share
    path = output if of == 1 else output / f"share-{number:03d}-of-{of:03d}"
    if not (path / "index.json").is_file() and not args.model:
        args.model = options.default_retrieval_model()  # a missing one is said before anything is imported
    progress = Progress()
    with needing("search", "`jina-vlm index`"), progress.step("import", "Importing torch and transformers"):
        from jina_vlm_tools.inference.loading import quiet_libraries
        from jina_vlm_tools.retrieval.index import Index
        from jina_vlm_tools.retrieval.indexing import Asked, update
        from jina_vlm_tools.retrieval.loading import full_name, load_embedder
        from jina_vlm_tools.retrieval.stores import open_store

    quiet_libraries()
    store = open_store(args.store) if args.store else None

    def load(name: str) -> tuple:
        with progress.step("model", f"Loading {name}"):
            return load_embedder(name, args.device, args.dtype), name

    summary = update(
        args.folder,
        path,
        load,
        model=full_name(args.model) if args.model else None,
        asked=Asked(args.kind, args.dims, args.max_tiles, args.pool_factor),
        batch_size=args.batch_size,
        share=args.share,
        show=sys.stderr.isatty(),
    )
    added = removed = None
    if store:
        with progress.step("store", f"Putting them into {args.store}"):
            added, removed = store.put(Index.open(path))
    for reason in summary.repaired:
        print(f"warning: embedded anew: {reason}", file=sys.stderr)
    for one in summary.errors:
        page = f", page {one['page']}" if one["page"] else ""
        print(f"warning: not indexed: {one['file']}{page}: {one['error']}", file=sys.stderr)
    if args.json:
        import json

        report = vars(summary) | {"path": str(path)}
        report["index"] = report.pop("path")
        report["store"] = {"place": args.store, "added": added, "removed": removed} if store else None
        print(json.dumps(report, ensure_ascii=False))
        return
    told = {"new": summary.new, "moved": summary.moved, "gone or changed": summary.left}
    said = ", ".join(f"{number:,} {what}" for what, number in told.items() if number) or "nothing new"
    print(f"{summary.pages:,} pages, {said}; {len(summary.errors):,} could not be read: {path}")
    if store:
        print(f"{added:,} put into {args.store}, {removed:,} taken out.")
