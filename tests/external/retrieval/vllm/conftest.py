"""vLLM's vectors are compared with those that `reference.py` wrote in the other environment."""

import os
from pathlib import Path


# Before vLLM is imported; see tests/external/vllm.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["no_proxy"] = "127.0.0.1"

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from cases import VECTORS  # noqa: E402
from comparing import table  # noqa: E402


HOME = Path(os.environ.get("RETRIEVAL_REFERENCE", Path(__file__).parents[4] / "build" / "retrieval"))


@pytest.fixture(scope="session")
def home() -> Path:
    if not (HOME / VECTORS).is_file():
        pytest.fail(f"{HOME / VECTORS} is not there: `make test-retrieval` writes it, by reference.py")
    return HOME


@pytest.fixture(scope="session")
def vectors(home):
    """By "ADAPTER/CASE/KIND"."""
    return np.load(home / VECTORS)


def pytest_terminal_summary(terminalreporter):
    terminalreporter.section("largest differences from the reference, float32")
    for line in table():
        terminalreporter.write_line(line)
