"""Search fresh pages: `python -m experiments.eval_retrieval checkpoints/tiny-retrieval`.

The pages are of every kind, with shapes and words that training never draws; queries are about them, in six
languages. Which pages a query finds is known of each pair (`searches`). recall@1 is here whether the first page found
is relevant; nDCG@5 counts all relevant pages alike. Intervals are of 95 %, by resampling the queries (bootstrap);
chance is a random order.
"""

import argparse
import csv
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from jina_vlm_tools import markdown
from jina_vlm_tools.retrieval.embedder import JinaVLMEmbedder
from jina_vlm_tools.retrieval.embeddings import Embeddings
from jina_vlm_tools.retrieval.token_pooling import pool_tokens
from jina_vlm_tools.synthetic.page_questions import LANGUAGES, TASKS
from jina_vlm_tools.synthetic.pages import HELD_OUT_WORDS, Page, draw_page
from jina_vlm_tools.synthetic.pages_data import task_page
from jina_vlm_tools.synthetic.questions import EVALUATION_SEEDS
from jina_vlm_tools.synthetic.searches import Query, facts_of, query_about, relevance
from jina_vlm_tools.synthetic.shapes import HELD_OUT_PAIRS


CANDIDATES = 100  # of dense search, which late interaction orders anew
POOLED = (2, 3, 4, 8)


@dataclass(frozen=True)
class Held:
    """Pages, queries, and which are relevant to which [queries, pages]."""

    pages: list[Page]
    queries: list[Query]
    relevant: np.ndarray


def held_out(pages: int, queries: int, tasks: Iterable[str] = TASKS) -> Held:
    """Pages of each task in turn, and queries about each page in turn, each task's in each language in turn."""
    rng, tasks, languages = random.Random(f"search {EVALUATION_SEEDS}"), list(tasks), list(LANGUAGES)
    drawn = [
        task_page(
            tasks[index % len(tasks)],
            rng,
            HELD_OUT_PAIRS,
            HELD_OUT_WORDS[languages[index // len(tasks) % len(languages)]],
        )
        for index in range(pages)
    ]
    asked = [
        query_about(drawn[index % pages], languages[(index % len(tasks) + index // len(tasks)) % len(languages)], rng)
        for index in range(queries)
    ]
    facts = [facts_of(page) for page in drawn]
    return Held(drawn, asked, np.array(relevance(asked, facts)))


def ndcg(scores: np.ndarray, relevant: np.ndarray, k: int = 5) -> np.ndarray:
    """Of each query: how much of the best possible order's gain its first `k` have, with gains of 1."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    discounts = 1 / np.log2(np.arange(2, k + 2))
    gained = (np.take_along_axis(relevant, order, axis=1) * discounts).sum(axis=1)
    best = np.array([discounts[: min(k, int(number))].sum() for number in relevant.sum(axis=1)])
    return gained / best


def first_is_relevant(scores: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    return relevant[np.arange(len(scores)), scores.argmax(axis=1)].astype(float)


MEASURES: dict[str, Callable] = {"recall@1": first_is_relevant, "nDCG@5": ndcg}


def interval(values: np.ndarray, resamples: int = 2000) -> str:
    """ "85.1 (83.0 to 87.2)", in per cent."""
    means = np.random.default_rng(0).choice(values, (resamples, len(values))).mean(axis=1)
    low, high = np.percentile(100 * means, [2.5, 97.5])
    return f"{100 * values.mean():.1f} ({low:.1f} to {high:.1f})"


def rank_again(dense: np.ndarray, late: np.ndarray, candidates: int) -> np.ndarray:
    """Late scores of the best of a dense search; the others come behind them."""
    best = np.argsort(-dense, axis=1, kind="stable")[:, :candidates]
    scores = dense - 1e6
    np.put_along_axis(scores, best, np.take_along_axis(late, best, axis=1), axis=1)
    return scores


def ways(queries: Embeddings, documents: Embeddings, dims: Iterable[int]) -> dict[str, np.ndarray]:
    """Scores [queries, documents] by each way of searching."""

    def alone(embeddings: Embeddings, kind: str) -> Embeddings:
        return Embeddings(**{kind: getattr(embeddings, kind)})

    sought, held = ({kind: alone(one, kind) for kind in ("dense", "multi")} for one in (queries, documents))
    late = sought["multi"].score(held["multi"])
    found = {"late": late}
    whole = sought["dense"].score(held["dense"])
    found |= {f"dense {dim}": sought["dense"].truncate(dim).score(held["dense"].truncate(dim)) for dim in dims}
    found[f"late, of dense's best {CANDIDATES}"] = torch.from_numpy(
        rank_again(whole.numpy(), late.numpy(), CANDIDATES)
    )
    for factor in POOLED:
        pooled = Embeddings(multi=[pool_tokens(one, factor) for one in documents.multi])
        found[f"late, pages pooled by {factor}"] = sought["multi"].score(pooled)
    for precision in ("int8", "binary"):
        found[f"late, pages {precision}"] = sought["multi"].score(held["multi"].quantize(precision))
        found[f"dense, pages {precision}"] = sought["dense"].score(held["dense"].quantize(precision))
    scores = {name: one.numpy() for name, one in found.items()}
    return scores | {"chance": np.random.default_rng(0).random(late.shape)}


def embed(embedder: JinaVLMEmbedder, held: Held, max_tiles: int | None) -> tuple[Embeddings, Embeddings]:
    """Queries' and pages'."""
    queries = embedder.embed([query.text for query in held.queries], role="query", kind="both", batch_size=32)
    pages = [draw_page(page) for page in held.pages]
    return queries, embedder.embed(pages, kind="both", batch_size=16, max_tiles=max_tiles)


def evaluate(
    embedder: JinaVLMEmbedder, held: Held, max_tiles: int | None = None
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """Each query's measures by each way of searching, and the ways' scores."""
    config = embedder.model.config
    scores = ways(*embed(embedder, held, max_tiles), config.matryoshka_dimensions)
    measured = {
        name: {measure: compute(one, held.relevant) for measure, compute in MEASURES.items()}
        for name, one in scores.items()
    }
    return measured, scores


def table(measured: dict[str, dict[str, np.ndarray]]) -> str:
    rows = [[name, *(interval(values) for values in one.values())] for name, one in measured.items()]
    return markdown.table(["Search", *MEASURES], rows)


def by_kind(measured: dict[str, dict[str, np.ndarray]], held: Held, tasks: list[str]) -> str:
    """Late search, by what kind of page a query is about, and by its language."""
    late, pages = measured["late"], len(held.pages)
    of_task = np.array([tasks[index % pages % len(tasks)] for index in range(len(held.queries))])
    of_language = np.array([query.language for query in held.queries])
    rows = [
        [name, *(interval(values[where]) for values in late.values()), str(where.sum())]
        for name, where in [(task, of_task == task) for task in tasks]
        + [(f"in {name}", of_language == language) for language, name in LANGUAGES.items()]
        if where.any()
    ]
    return markdown.table(["Late", *MEASURES, "queries"], rows)


def write(file: Path, measured: dict[str, dict[str, np.ndarray]]) -> None:
    with open(file, "w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened, lineterminator="\n")
        writer.writerow(["search", *MEASURES])
        writer.writerows(
            [name, *(f"{100 * values.mean():.2f}" for values in one.values())] for name, one in measured.items()
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a retrieval folder")
    parser.add_argument("--pages", type=int, default=500)
    parser.add_argument("--queries", type=int, default=1_000)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="kinds of pages")
    parser.add_argument("--max-tiles", type=int, help="of a page (default: the checkpoint's)")
    parser.add_argument("--csv", type=Path, help="write the means here")
    args = parser.parse_args()
    started = time.perf_counter()
    held = held_out(args.pages, args.queries, args.tasks)
    embedder = JinaVLMEmbedder.from_pretrained(args.model, dtype=torch.float32)
    measured, _ = evaluate(embedder, held, args.max_tiles)
    print(f"{table(measured)}\n\n{by_kind(measured, held, args.tasks)}\n")
    print(
        f"{args.queries:,} queries, {args.pages:,} pages, {held.relevant.sum(1).mean():.1f} of them relevant to a "
        f"query in the mean, in {time.perf_counter() - started:.0f} s."
    )
    if args.csv:
        write(args.csv, measured)


if __name__ == "__main__":
    main()
