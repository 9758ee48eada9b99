"""A retrieval folder of `checkpoints/tiny`: the trained one, or, before there is one, a random one."""

from pathlib import Path

import pytest
import torch

from jina_vlm_tools.files import TINY, TINY_RETRIEVAL


WIDTH = 32


def find_retrieval_folder(home: Path) -> Path:
    """It is written to `home` where it was not trained yet."""
    if TINY_RETRIEVAL.is_dir():
        return TINY_RETRIEVAL
    pytest.importorskip("sentence_transformers", reason="checkpoints/tiny-retrieval has not been trained yet")
    from jina_vlm import JinaVLMForConditionalGeneration, JinaVLMProcessor

    from jina_vlm_tools.retrieval.folder import write_folder
    from jina_vlm_tools.training.lora import LoraSettings, add_adapters

    torch.manual_seed(0)
    model = JinaVLMForConditionalGeneration.from_pretrained(TINY)
    hidden = model.config.text_config.hidden_size
    model = add_adapters(model, LoraSettings(4, 8, parts=["decoder"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zeros, which change nothing
            torch.nn.init.normal_(parameter, std=0.03)
    projector = torch.nn.Linear(hidden, WIDTH, bias=False)
    processor = JinaVLMProcessor.from_pretrained(TINY)
    processor.image_processor.max_tiles = 4
    return write_folder(home / "tiny-random", model, projector, processor, base=str(TINY))
