"""The best pages of an index for a query: exact, on memory-mapped parts, by vectors of pages (dense), of tokens (late
interaction), or by the first and then, of the best, by the second (two-stage)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from . import CANDIDATES
from .documents import Page
from .embeddings import Embeddings
from .scores import max_sim


Way = Literal["dense", "late", "two-stage"]
ROWS = 4096  # dense vectors that are compared at once: 32 MB of 2,048 numbers in float32


@dataclass(frozen=True)
class Found:
    """
    Args:
        score (`float`): From -1 to 1: the cosine of dense vectors, or the mean, over a query's tokens, of the best
            cosine with a page's.
    """

    page: Page
    score: float


@dataclass(frozen=True)
class Part:
    """Vectors of some pages, one after the other.

    Args:
        dense (`np.ndarray` [pages, dims] float16, *optional*).
        multi (`np.ndarray` [tokens, width] float16, *optional*): Those of page i are `offsets[i]` to `offsets[i + 1]`.
        offsets (`np.ndarray` [pages + 1] int64).
    """

    dense: np.ndarray | None
    multi: np.ndarray | None
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1


def rank(parts: Sequence[Part], query: Embeddings, top: int, way: Way, candidates: int = CANDIDATES) -> list[tuple]:
    """(row, score) of the best for one query, the best first; of equals, the first row.

    Args:
        query: Of one query, of the kind that the way needs.
        candidates: How many of the best by dense vectors are compared by those of their tokens.
    """
    if way == "late":
        return best(score_late(parts, query.multi[0]), top)
    scores = score_dense(parts, query.dense[0])
    if way == "dense":
        return best(scores, top)
    rows = sorted(row for row, _ in best(scores, max(top, candidates)))
    again = score_rows(parts, query.multi[0], rows)
    return [(rows[place], score) for place, score in best(again, top)]


def best(scores: np.ndarray, top: int) -> list[tuple[int, float]]:
    """(row, score) of the highest `top`, the highest first; of equals, the first row."""
    rows = np.arange(len(scores))
    if top < len(scores):
        least = np.partition(scores, len(scores) - top)[len(scores) - top]
        rows = np.flatnonzero(scores >= least)
    rows = rows[np.argsort(-scores[rows], kind="stable")][:top]
    return [(int(row), float(scores[row])) for row in rows]


@torch.inference_mode()
def score_dense(parts: Sequence[Part], query: torch.Tensor) -> np.ndarray:
    """[pages] float32, the products with a query [dims]."""
    scores = [
        torch.from_numpy(part.dense[start : start + ROWS]).float() @ query
        for part in parts
        for start in range(0, len(part), ROWS)
    ]
    return torch.cat(scores).numpy() if scores else np.zeros(0, np.float32)


@torch.inference_mode()
def score_late(parts: Sequence[Part], query: torch.Tensor) -> np.ndarray:
    """[pages] float32 of a query [tokens, width], in pieces that fit into memory."""
    scores = [max_sim(query, torch.from_numpy(part.multi), torch.from_numpy(part.offsets)) for part in parts]
    return torch.cat(scores).numpy() if scores else np.zeros(0, np.float32)


@torch.inference_mode()
def score_rows(parts: Sequence[Part], query: torch.Tensor, rows: Sequence[int]) -> np.ndarray:
    """As [`score_late`], for some pages."""
    starts = np.cumsum([0, *(len(part) for part in parts)])
    tokens = []
    for row in rows:
        number = int(np.searchsorted(starts, row, "right")) - 1
        part, place = parts[number], row - int(starts[number])
        tokens.append(torch.from_numpy(part.multi[part.offsets[place] : part.offsets[place + 1]]))
    if not tokens:
        return np.zeros(0, np.float32)
    offsets = torch.tensor([0, *(len(one) for one in tokens)]).cumsum(0)
    return max_sim(query, torch.cat(tokens), offsets).numpy()
