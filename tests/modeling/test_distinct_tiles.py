"""No tile is computed twice: what the tower sees, and that its results are the same."""

import numpy as np
import pytest
import torch
from jina_vlm import JinaVLMForConditionalGeneration
from jina_vlm.tiling_jina_vlm import find_distinct_tiles
from PIL import Image


def page(seed: int = 0) -> Image.Image:
    """White paper of six tiles, with noise for text in its upper third."""
    pixels = np.full((900, 600, 3), 255, dtype=np.uint8)
    pixels[20:200, 60:540] = np.random.default_rng(seed).integers(0, 256, (180, 480, 1), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def model(released_folder):
    """In float64: sums of float32 depend on how many tiles a pass has."""
    return JinaVLMForConditionalGeneration.from_pretrained(released_folder, dtype=torch.float64).eval()


@pytest.fixture
def seen(model):
    """How many tiles each pass of the tower's blocks has."""
    counts = []
    embeddings = model.model.vision_model.tower.embeddings
    handle = embeddings.register_forward_pre_hook(lambda _, inputs: counts.append(len(inputs[0])))
    yield counts
    handle.remove()


def features(model, inputs, with_gradients: bool = False) -> list[torch.Tensor]:
    with torch.set_grad_enabled(with_gradients):
        return model.get_image_features(inputs["pixel_values"], inputs["tile_positions"]).pooler_output


def distinct(pixel_values: torch.Tensor) -> int:
    return len({tile.numpy().tobytes() for tile in pixel_values})


def test_an_image_of_one_tile_is_its_own_thumbnail(model, processor, make_image, seen):
    inputs = processor(text="<|image|>", images=make_image(300, 300), return_tensors="pt")
    (found,) = features(model, inputs)
    assert sum(seen) == 1 and len(inputs["pixel_values"]) == 2
    (expected,) = features(model, inputs, with_gradients=True)
    assert sum(seen) == 3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


def test_blank_tiles_of_a_page(model, processor, seen):
    inputs = processor(text="<|image|>", images=page(), return_tensors="pt")
    (found,) = features(model, inputs)
    assert sum(seen) == distinct(inputs["pixel_values"]) <= len(inputs["pixel_values"]) - 3
    seen.clear()
    (expected,) = features(model, inputs, with_gradients=True)
    assert seen == [len(inputs["pixel_values"])]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


def test_across_the_images_of_a_batch(model, processor, make_image, seen):
    """A page and its copy cost what one costs; each image keeps its own mark of its last tile."""
    images = [page(), make_image(300, 300), page(), page(seed=1)]
    inputs = processor(text=["<|image|>"] * 4, images=images, return_tensors="pt")
    found = features(model, inputs)
    assert sum(seen) == distinct(inputs["pixel_values"]) < len(inputs["pixel_values"]) * 0.6
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[3])
    for index in (1, 3):
        alone = processor(text="<|image|>", images=images[index], return_tensors="pt")
        torch.testing.assert_close(found[index], features(model, alone)[0], rtol=0, atol=1e-7)


def test_answers_and_logits_are_the_same(model, processor):
    """All the way, with images and text; black tiles stay black."""
    images = [page(), Image.new("RGB", (300, 300)), Image.new("RGB", (300, 300), "white")]
    inputs = processor(text="<|image|><|image|><|image|> What?", images=images, return_tensors="pt")
    expected = model(**inputs).logits.detach()
    with torch.inference_mode():
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=1e-7)


def test_captured_outputs_are_those_of_all_tiles(model, processor, make_image):
    inputs = processor(text="<|image|>", images=make_image(300, 300), return_tensors="pt")
    with torch.no_grad():
        outputs = model.get_image_features(inputs["pixel_values"], inputs["tile_positions"], output_hidden_states=True)
    assert {len(states) for states in outputs.hidden_states} == {2}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("side", [14, 3], ids=["bytes in eights", "any number of bytes"])
def test_the_same_bits_and_no_others(dtype, side):
    """Not those whose pixels are the same in another order, nor 0 and -0, which other layers may tell apart."""
    tiles = torch.rand(7, 3, side, side, generator=torch.Generator().manual_seed(0)).to(dtype)
    tiles[3] = tiles[1]
    tiles[4] = tiles[1].flip(1)
    tiles[5], tiles[6] = 0.0, -0.0
    assert find_distinct_tiles(tiles) == ([0, 1, 2, 4, 5, 6], [0, 1, 2, 1, 3, 4, 5])
    assert find_distinct_tiles(tiles[1:]) == ([0, 1, 3, 4, 5], [0, 1, 0, 2, 3, 4])
    assert find_distinct_tiles(tiles.transpose(2, 3))[1] == [0, 1, 2, 1, 3, 4, 5]
