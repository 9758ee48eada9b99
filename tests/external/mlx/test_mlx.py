"""MLX itself, and mlx-vlm, which wrote `jinaai/jina-vlm-mlx`: what they quantize and save is what conversion reads.

Both run on the CPU here. What mlx-vlm's own answers differ in is `test_port.py`'s.
"""

import json
import shutil
from collections import Counter
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from mlx_copy import fuse_biases, mlx_name
from mlx_vlm.models.jina_vlm import Model, ModelConfig
from mlx_vlm.quant_utils import quantize_model
from mlx_vlm.utils import save_config, save_weights
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from jina_vlm_tools.hub.assemble import assemble
from jina_vlm_tools.hub.mlx import dequantize, list_names


DTYPES = {torch.float32: mx.float32, torch.float16: mx.float16, torch.bfloat16: mx.bfloat16}
RELEASED = Path(__file__).parents[2] / "golden" / "released-tiny"


def to_mlx(tensor: torch.Tensor) -> mx.array:
    return mx.array(tensor.float().numpy()).astype(DTYPES[tensor.dtype])


def to_torch(array: mx.array) -> torch.Tensor:
    if array.dtype == mx.uint32:
        return torch.from_numpy(np.array(array))
    dtype = next(ours for ours, theirs in DTYPES.items() if theirs == array.dtype)
    return torch.from_numpy(np.array(array.astype(mx.float32))).to(dtype)


def may_be_quantized(group_size: int):
    """The matrices that `jinaai/jina-vlm-mlx` holds in groups."""

    def decide(name: str, module: nn.Module) -> bool:
        is_first = name.startswith("language_model.layers.0.")
        return hasattr(module, "to_quantized") and not is_first and module.weight.shape[1] % group_size == 0

    return decide


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_dequantized_to_the_same_bits(dtype, bits, group_size):
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(bits)).mul(0.05).to(dtype)
    parts = mx.quantize(to_mlx(weight), group_size=group_size, bits=bits)
    expected = to_torch(mx.dequantize(*parts, group_size=group_size, bits=bits))
    ours = dequantize(*map(to_torch, parts), bits=bits)
    assert ours.dtype == dtype and torch.equal(ours, expected) and not torch.equal(ours, weight)


def test_names_and_number_of_tensors_are_the_releases():
    """956, as was counted in it; nothing is computed here."""
    model = Model(ModelConfig())
    nn.quantize(model, 64, 4, class_predicate=may_be_quantized(64))
    names = {name for name, _ in tree_flatten(model.parameters()) if not name.endswith("_inv_freq")}
    parts = Counter(name.partition(".")[0] for name in names)
    assert parts == {"vision_model": 491, "vl_connector": 19, "language_model": 446}
    whole = {name for name in names if not name.endswith((".scales", ".biases"))}
    assert whole == list_names({"vision_config": {"n_layers": 27}, "text_config": {"n_layers": 28}}).keys()


@pytest.fixture(scope="module", params=[4, 8])
def made(request, tmp_path_factory):
    """A small model of mlx-vlm, quantized and saved by it, and what we convert that to."""
    folder = tmp_path_factory.mktemp("mlx")
    (folder / "copy").mkdir()
    (folder / "converted").mkdir()
    config = json.loads((RELEASED / "config.json").read_text())
    tensors = {mlx_name(name): tensor for name, tensor in load_file(RELEASED / "model.safetensors").items()}
    fuse_biases(tensors)
    model = Model(ModelConfig.from_dict(config))
    model.load_weights([(name, to_mlx(tensor)) for name, tensor in tensors.items()])
    model, config = quantize_model(model, config, 32, request.param, quant_predicate=may_be_quantized(32))
    save_weights(folder / "copy", model)
    for name in ("preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(RELEASED / name, folder / "copy" / name)
    save_config(config, folder / "copy" / "config.json")
    assemble(str(folder / "copy"), folder / "converted")
    model = Model(ModelConfig.from_dict(config))
    nn.quantize(model, 32, request.param, class_predicate=may_be_quantized(32))
    model.load_weights(str(folder / "copy" / "model.safetensors"))
    return model, folder / "converted"


def test_text_gives_the_logits_that_mlx_vlm_gives(made):
    mlx_model, folder = made
    ids = torch.randint(0, 320, (2, 40), generator=torch.Generator().manual_seed(0))
    expected = to_torch(mlx_model.language_model(mx.array(ids.numpy())).logits)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="float32").eval()
    with torch.no_grad():
        logits = model(input_ids=ids).logits[..., : expected.shape[-1]]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_images_give_the_features_that_mlx_vlm_gives(made):
    mlx_model, folder = made
    processor = AutoProcessor.from_pretrained(folder)
    image = np.random.default_rng(0).integers(0, 256, (378, 378, 3), dtype=np.uint8)
    images = processor.image_processor(image, return_tensors="pt")
    tiles = images["pixel_values"]
    assert len(tiles) == 2, "a thumbnail and one tile, all of whose tokens are kept in this order"
    rows = tiles.unflatten(2, (27, 14)).unflatten(4, (27, 14)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    masks = torch.ones(1, 2, 27 * 27)
    masks[:, -1] = 0.5  # the last tile is marked as partly padded
    features = to_torch(mlx_model.get_image_features(to_mlx(rows[None]), to_mlx(masks))).flatten(0, 2)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="float32").eval()
    with torch.no_grad():
        ours = model.get_image_features(tiles, images["tile_positions"]).pooler_output[0]
        ours = ours - model.get_input_embeddings()(torch.tensor([model.config.image_token_id]))
    assert (ours - features).abs().max() < 1e-4 * features.abs().max()
