"""A forward pass with images as one graph: `torch.export`, and `torch.compile(fullgraph=True)`."""

import copy

import pytest
import torch
from torch.export import Dim, export


NAMES = ("input_ids", "attention_mask", "pixel_values", "tile_positions")


class Prefill(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, pixel_values, tile_positions):
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        images = {"pixel_values": pixel_values, "tile_positions": tile_positions}
        return self.model(**inputs, **images, use_cache=False).logits


@pytest.fixture(scope="module")
def small(model):
    """A tower of two blocks and a decoder of one: what is traced is the same for each."""
    config = copy.deepcopy(model.config)
    config.vision_config.num_hidden_layers, config.vision_feature_layers = 2, [1, 0]
    config.text_config.num_hidden_layers, config.text_config.layer_types = 1, ["full_attention"]
    torch.manual_seed(0)
    return type(model)(config).double().eval()


@pytest.fixture(scope="module")
def inputs(chat):
    """Images of 2, 3 and 5 tiles, and two in one prompt, with texts of several lengths."""

    def make(*sizes, text):
        inputs = chat([("user", *sizes, text)], add_generation_prompt=True)
        return tuple(inputs[name].double() if name == "pixel_values" else inputs[name] for name in NAMES)

    return [
        make((113, 500), text="which?"),
        make((20, 20), text="which fox?"),
        make((500, 600), text="what is shown in this one?"),
        make((30, 90), (113, 500), text="which of the two?"),
    ]


@torch.no_grad()
def test_export_of_a_fixed_grid(small, inputs):
    prefill = Prefill(small)
    program = export(prefill, inputs[0])
    # Other pixels of the same grid
    other = (*inputs[0][:2], -inputs[0][2], inputs[0][3])
    for given in (inputs[0], other):
        torch.testing.assert_close(program.module()(*given), prefill(*given), rtol=0, atol=1e-12)


@torch.no_grad()
def test_export_of_any_number_of_tiles(small, inputs):
    prefill = Prefill(small)
    length, tiles = Dim("length", min=4, max=8192), Dim("tiles", min=2, max=512)
    program = export(prefill, inputs[0], dynamic_shapes=({1: length}, {1: length}, {0: tiles}, {0: tiles}))
    for given in inputs:
        torch.testing.assert_close(program.module()(*given), prefill(*given), rtol=0, atol=1e-12)


@torch.no_grad()
def test_one_graph_with_images(small, inputs):
    """fullgraph, for any number of tiles."""
    prefill = Prefill(small)
    torch.compiler.reset()
    compiled = torch.compile(prefill, fullgraph=True, dynamic=True, backend="eager")
    for given in inputs:
        torch.testing.assert_close(compiled(*given), prefill(*given), rtol=0, atol=1e-12)
    torch.compiler.reset()
