"""A model smaller than the tests' other ones, for many steps in little time."""

from pathlib import Path

import jina_vlm
import torch
from conftest import ROOT


def save_miniature(folder: Path, tile_size: int = 378) -> Path:
    """Random weights, with the tokenizer and the settings of `checkpoints/tiny`, and tiles of this side in pixels."""
    tiny = ROOT / "checkpoints" / "tiny"
    config = jina_vlm.JinaVLMConfig.from_pretrained(tiny)
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 1}
    vision["image_size"] = tile_size
    text = {
        "layer_types": None,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 32,
    }
    config = jina_vlm.JinaVLMConfig(
        vision_config={**config.vision_config.to_dict(), **vision},
        text_config={**config.text_config.to_dict(), **text},
        vision_feature_layers=[1, 0],
        connector_num_attention_heads=1,
        connector_head_dim=32,
        connector_intermediate_size=32,
        image_token_id=config.image_token_id,
        structural_token_ids=config.structural_token_ids,
    )
    torch.manual_seed(0)
    jina_vlm.JinaVLMForConditionalGeneration(config).save_pretrained(folder)
    processor = jina_vlm.JinaVLMProcessor.from_pretrained(tiny)
    processor.image_processor.tile_size = tile_size
    processor.save_pretrained(folder)
    return folder
