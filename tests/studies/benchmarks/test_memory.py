"""What takes long: a checkpoint of the released size."""

import pytest

from benchmarks import loading
from benchmarks.side_by_side import in_fresh_process


@pytest.mark.slow
def test_loading_takes_at_most_a_tenth_more_than_the_weights(tmp_path):
    loading.write_released(tmp_path)
    result = in_fresh_process(loading.load, str(tmp_path), False)
    assert result["weights"] > 4.8e9
    assert result["peak"] <= 1.1 * result["weights"]
