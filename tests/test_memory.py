"""What takes long: a checkpoint of the released size."""

import pytest

from benchmarks import loading_memory


@pytest.mark.slow
def test_loading_takes_at_most_a_tenth_more_than_the_weights(tmp_path):
    loading_memory.write_checkpoint(tmp_path)
    result = loading_memory.measure(tmp_path)
    assert result["weights"] > 4.8e9
    assert result["peak"] <= 1.1 * result["weights"]
