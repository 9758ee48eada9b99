"""Attention of a tower's patches to those of their strip alone, for the first part of a training.

Letters are learned from what lies beside them, and attention to all of a tile is half of the time. A strip is a third
of a tile, from side to side, as lines of text are. Every second block cuts elsewhere, so that no line is cut in all.
"""

import torch
from torch import nn
from transformers import AttentionInterface

from .seeing import SIDE


ROWS = 9  # of patches, of a strip
SHIFT = 4  # rows, of every second block


def attention_in_strips(module, query, key, value, attention_mask, scaling: float, **_) -> tuple[torch.Tensor, None]:
    """[tiles, patches, heads, width], of [tiles, heads, patches, width] each; the last strip may go on at the top."""
    shift = module.shift * SIDE
    query, key, value = (
        each.roll(-shift, 2).unflatten(2, (SIDE // ROWS, ROWS * SIDE)) for each in (query, key, value)
    )
    weights = torch.softmax(query @ key.mT * scaling, dim=-1, dtype=torch.float32).to(value.dtype)
    return (weights @ value).flatten(2, 3).roll(shift, 2).transpose(1, 2).contiguous(), None


def cut_into_strips(vision_model: nn.Module) -> None:
    """Until another implementation of attention is set."""
    AttentionInterface.register("strips", attention_in_strips)
    for index, layer in enumerate(vision_model.tower.encoder.layers):
        layer.self_attn.shift = SHIFT * (index % 2)
    vision_model.set_attn_implementation("strips")
