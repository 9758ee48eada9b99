"""The small checkpoint, by torch in float32."""

import pytest
import torch
from jina_vlm import JinaVLMForConditionalGeneration, JinaVLMProcessor

from jina_vlm_tools.files import TINY


@pytest.fixture(scope="session")
def processor():
    return JinaVLMProcessor.from_pretrained(TINY)


@pytest.fixture(scope="session")
def by_torch():
    return JinaVLMForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32).eval()
