"""Search fresh pages: how often what is found is relevant, with intervals and chance.

The pages are of every kind, with shapes and words that training never draws; queries are about them, in six languages.
Relevance is known of each pair (`searches`). nDCG@5 and recall@1, here whether the first page found is relevant, have
intervals of 95 % by resampling the queries (bootstrap). Chance is a random order.
"""

import random

import numpy as np
import torch

from jina_vlm_tools.retrieval.inputs import prepare
from jina_vlm_tools.retrieval.scores import cut, max_sim
from jina_vlm_tools.synthetic.page_questions import LANGUAGES, TASKS
from jina_vlm_tools.synthetic.pages import HELD_OUT_WORDS, Page, draw_page
from jina_vlm_tools.synthetic.pages_data import task_page
from jina_vlm_tools.synthetic.questions import EVALUATION_SEEDS
from jina_vlm_tools.synthetic.searches import Query, facts_of, query_about
from jina_vlm_tools.synthetic.shapes import HELD_OUT_PAIRS


def searches(pages: int, queries: int, tasks: tuple[str, ...] = TASKS) -> tuple[list[Page], list[Query], np.ndarray]:
    """Pages, queries, and which are relevant to which [queries, pages]."""
    rng = random.Random(f"search {EVALUATION_SEEDS}")
    languages = list(LANGUAGES)
    drawn = [
        task_page(tasks[index % len(tasks)], rng, HELD_OUT_PAIRS, HELD_OUT_WORDS[languages[index % len(languages)]])
        for index in range(pages)
    ]
    asked = [
        query_about(drawn[index % pages], languages[(index + index // pages) % len(languages)], rng)
        for index in range(queries)
    ]
    facts = [facts_of(page) for page in drawn]
    return drawn, asked, np.array([[query.finds(shown) for shown in facts] for query in asked])


def ndcg(scores: np.ndarray, relevant: np.ndarray, k: int = 5) -> np.ndarray:
    """Of each query: how much of the best possible order's gain its first `k` have, with gains of 1."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    discounts = 1 / np.log2(np.arange(2, k + 2))
    gained = (np.take_along_axis(relevant, order, axis=1) * discounts).sum(axis=1)
    best = np.array([discounts[: min(k, int(number))].sum() for number in relevant.sum(axis=1)])
    return gained / best


def first_is_relevant(scores: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    return relevant[np.arange(len(scores)), scores.argmax(axis=1)].astype(float)


def interval(values: np.ndarray, resamples: int = 2000) -> str:
    """ "85.1 (83.0 to 87.2)", in per cent."""
    means = np.random.default_rng(0).choice(values, (resamples, len(values))).mean(axis=1)
    low, high = np.percentile(100 * means, [2.5, 97.5])
    return f"{100 * values.mean():.1f} ({low:.1f} to {high:.1f})"


@torch.inference_mode()
def embed_all(embed, processor, contents: list, role: str, batch_size: int = 16) -> tuple[torch.Tensor, list]:
    """Dense [n, hidden], and multi-vectors of each."""
    dense, multi = [], []
    for start in range(0, len(contents), batch_size):
        inputs = dict(prepare(processor, contents[start : start + batch_size], role))
        pooled, tokens = embed(inputs)
        dense.append(pooled)
        multi += [one[mask.bool()] for one, mask in zip(tokens, inputs["attention_mask"], strict=True)]
    return torch.cat(dense), multi


def evaluate(embed, processor, pages: int, queries: int, dims: list[int], tasks: tuple[str, ...] = TASKS) -> dict:
    """By way of searching: recall@1 and nDCG@5 of each query."""
    drawn, asked, relevant = searches(pages, queries, tasks)
    documents = embed_all(embed, processor, [draw_page(page) for page in drawn], "document")
    sought = embed_all(embed, processor, [query.text for query in asked], "query")
    offsets = torch.tensor([0, *np.cumsum([len(one) for one in documents[1]])])
    flat = torch.cat(documents[1])
    ways = {f"dense {dim}": (cut(sought[0], dim) @ cut(documents[0], dim).T).numpy() for dim in dims}
    ways["late"] = torch.stack([max_sim(one, flat, offsets) for one in sought[1]]).numpy()
    ways["chance"] = np.random.default_rng(0).random(relevant.shape)
    return {
        name: {"recall@1": first_is_relevant(scores, relevant), "nDCG@5": ndcg(scores, relevant)}
        for name, scores in ways.items()
    }
