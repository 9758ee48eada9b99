"""Vectors against those of the reference. How far each engine is from it is told at the end of the run."""

import numpy as np
import torch
from cases import TOLERANCE


farthest: dict[str, float] = {}


def same(engine: str, found, expected) -> None:
    """Equal within the tolerance, finite, and of one shape."""
    found, expected = (np.asarray(value.detach() if torch.is_tensor(value) else value) for value in (found, expected))
    assert found.shape == expected.shape, engine
    assert np.isfinite(found).all(), engine
    difference = float(np.abs(found - expected).max())
    farthest[engine] = max(farthest.get(engine, 0.0), difference)
    assert difference <= TOLERANCE, f"{engine}: {difference:.1e}"


def table() -> list[str]:
    return [f"{difference:.1e}  {engine}" for engine, difference in farthest.items()]
