"""Vectors against those of the reference. How far each engine is from it is told at the end of the run."""

import numpy as np
import torch
from cases import TOLERANCE, of_role


# Between weights that were merged and kept apart, and between kernels, single image tokens differ by this: the tower's
# rounding, whatever the adapter's size. Their scores are held to `TOLERANCE`.
ROUNDED = 1e-4


farthest: dict[str, float] = {}


def same(engine: str, found, expected, tolerance: float = TOLERANCE) -> None:
    """Equal within the tolerance, finite, and of one shape."""
    found, expected = (np.asarray(value.detach() if torch.is_tensor(value) else value) for value in (found, expected))
    assert found.shape == expected.shape, engine
    assert np.isfinite(found).all(), engine
    difference = float(np.abs(found - expected).max())
    farthest[engine] = max(farthest.get(engine, 0.0), difference)
    assert difference <= tolerance, f"{engine}: {difference:.1e}"


def same_multi_vectors(engine: str, found: dict, expected: dict) -> None:
    """Of all cases, by name: the numbers roughly, and MaxSim of each query with each document exactly."""
    for name, vectors in expected.items():
        same(engine, found[name], vectors, ROUNDED)
    queries, documents = of_role("query"), of_role("document")
    same(f"{engine}, scores", *(
        [[max_sim(one[query], one[document]) for document in documents] for query in queries]
        for one in (found, expected)
    ))  # fmt: skip


def max_sim(query, document) -> float:
    """Divided by the query's tokens."""
    return float((np.asarray(query) @ np.asarray(document).T).max(1).mean())


def table() -> list[str]:
    return [f"{difference:.1e}  {engine}" for engine, difference in farthest.items()]
