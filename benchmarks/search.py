"""Ten thousand pages, searched: `python -m benchmarks.search`.

An index of random unit vectors of the 2.4B model's sizes, as `jina-vlm index` writes it: 2,048 numbers of each page,
and for late interaction 272 vectors of 128 numbers, which is an A4 page of four tiles (814) pooled by three.
Memory-mapped, and read before: a search just after the machine was started also waits for the disk. A query has 20
tokens; embedding it is not in these times. **Opening** is what a command does once.
"""

import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from jina_vlm_tools import markdown
from jina_vlm_tools.retrieval.documents import Page
from jina_vlm_tools.retrieval.embeddings import Embeddings
from jina_vlm_tools.retrieval.index import FULL, Index, Settings, Writer, new_manifest

from .results import arguments, save


PAGES, DIMS, TOKENS, WIDTH, QUERY_TOKENS = 10_000, 2048, 272, 128, 20
LIMITS = {"dense": 0.2, "two-stage": 0.5}  # seconds that were set as a goal


def unit(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


def make(path: Path) -> None:
    """An index of random vectors."""
    torch.manual_seed(0)
    settings = Settings("both", DIMS, 4, 3)
    identity = {"base weights": "random", "image settings": {}}
    writer = Writer(path, new_manifest(path, path, "random", None, identity, settings, WIDTH, (1, 1)))
    for start in range(0, PAGES, FULL):
        number = min(FULL, PAGES - start)
        pages = [Page(f"{start + one:06d}.png", 1, 1, "0" * 64) for one in range(number)]
        writer.add(pages, Embeddings(unit(number, DIMS), list(unit(number, TOKENS, WIDTH))), [])


def measure(path: Path, rounds: int) -> list[dict]:
    started = time.perf_counter()
    index = Index.open(path)
    rows = [{"what": "opening", "seconds": time.perf_counter() - started, "bytes": index.bytes}]
    for part in index.parts:  # into memory
        part.multi.max(), part.dense.max()
    for way in ("dense", "two-stage", "late"):
        seconds = []
        for number in range(max(2, rounds // 5) if way == "late" else rounds + 1):
            torch.manual_seed(number)
            query = Embeddings(unit(1, DIMS), [unit(QUERY_TOKENS, WIDTH)])
            started = time.perf_counter()
            index.search(query, 5, way)
            seconds.append(time.perf_counter() - started)
        rows.append({"what": way, "seconds": statistics.median(seconds[1:]), "slowest": max(seconds[1:])})
    return rows


def table(rows: list[dict]) -> str:
    names = {
        "opening": "Opening",
        "dense": "Dense, all pages",
        "two-stage": "Dense, then late of the best 100",
        "late": "Late, all pages",
    }
    return markdown.table(
        ["10,000 pages", "Milliseconds, median", "Slowest", "Goal"],
        [
            [
                names[row["what"]],
                f"**{1000 * row['seconds']:,.0f}**",
                f"{1000 * row['slowest']:,.0f}" if "slowest" in row else "",
                f"{1000 * LIMITS[row['what']]:,.0f}" if row["what"] in LIMITS else "",
            ]
            for row in rows
        ],
    )


def main() -> None:
    parser = arguments(__doc__, rounds=20)
    args = parser.parse_args()
    if args.device != "cpu":
        parser.error("an index is searched on the CPU")
    folder = Path(tempfile.mkdtemp(prefix="jina-vlm-search-"))
    try:
        make(folder)
        rows = measure(folder, args.rounds)
    finally:
        shutil.rmtree(folder)
    print(table(rows))
    save("search", rows)


if __name__ == "__main__":
    main()
