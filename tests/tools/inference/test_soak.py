"""Many requests from several threads: the same answers as one by one, and memory that stays flat. `python -m
benchmarks.soak` is the soak of 2,000."""

import sys

import pytest
from conftest import ROOT

from benchmarks import soak


if not (ROOT / "checkpoints" / "tiny").is_dir():
    pytest.skip("checkpoints/tiny has not been trained yet", allow_module_level=True)

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # Pillow's, of damaged images
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc"),
]


@pytest.mark.parametrize(("requests", "distinct"), [(30, 10), pytest.param(2000, 100, marks=pytest.mark.slow)])
def test_soak(requests, distinct):
    early, late, wrong, refused = soak.soak(*soak.load(), requests, 8, distinct)
    print(f"{requests} requests: {early / 2**20:.0f} MiB at a tenth, {late / 2**20:.0f} MiB at the end")
    assert wrong == 0
    assert 0 < refused < distinct / 2
    assert requests < 1000 or late - early < soak.GROWTH
