"""The release as people use it (tests/golden/usage/README.md): without the fit to a budget, with another budget, with
more tiles."""

import json

import numpy as np
import pytest
import torch
from conftest import GOLDEN, make_image
from jina_vlm import JinaVLMImageProcessor
from jina_vlm.tiling_jina_vlm import count_tokens


USAGE = GOLDEN / "usage"
CASES = json.loads((USAGE / "cases" / "index.json").read_text())
GEOMETRY = json.loads((USAGE / "geometry.json").read_text())
OF_THE_IMAGE_PROCESSOR = ("do_resize", "max_crops", "max_pixels")
by_name = pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
by_name_alone = pytest.mark.parametrize(
    "case", [case for case in CASES if case["name"] != "mixed_batch"], ids=lambda case: case["name"]
)


def expected(case: dict) -> dict[str, np.ndarray]:
    return np.load(USAGE / "cases" / f"{case['name']}.npz")


def images_of(case: dict) -> list[np.ndarray]:
    flat = [image for item in case["images"] for image in (item if isinstance(item, list) else [item])]
    return [make_image(*(image[key] for key in ("height", "width", "kind", "seed"))) for image in flat]


def arguments_of(case: dict) -> dict:
    return {name: case["call"][name] for name in OF_THE_IMAGE_PROCESSOR if case["call"].get(name) is not None}


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@by_name
def test_pixels_are_bit_equal(case, processor):
    golden = expected(case)
    made = processor.image_processor(images_of(case), return_tensors="pt", **arguments_of(case))
    assert len(made["pixel_values"]) == np.sum(golden["n_tiles"])
    grids = [[rows, columns] for row, _, rows, columns in made["tile_positions"].tolist() if row < 0]
    assert grids == (sum(case["grid"], []) if case["name"] == "mixed_batch" else case["grid"])
    # as the release lays them out: [tile, patch, (row, column, channel) in the patch]
    patches = made["pixel_values"].unflatten(2, (27, 14)).unflatten(4, (27, 14))
    patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    *tile, patch, value = golden["pixel_index"].T
    if len(tile) == 2:  # of a batch: the number of the sample, and of the tile in it
        tile = [np.cumsum([0, *golden["n_tiles"]])[tile[0]] + tile[1]]
    np.testing.assert_array_equal(patches.numpy()[tile[0], patch, value], golden["pixel_value"])
    flat = patches.flatten(1).double().numpy()
    np.testing.assert_allclose(flat.mean(axis=1), golden["pixel_tile_mean"], atol=1e-6)
    np.testing.assert_allclose(flat.std(axis=1), golden["pixel_tile_std"], atol=1e-6)


@by_name_alone
def test_ids_and_greedy(case, processor, model):
    golden = expected(case)
    inputs = processor(text=case["text"], images=images_of(case), return_tensors="pt", **arguments_of(case))
    assert inputs["input_ids"][0].tolist() == golden["input_ids"].tolist()
    made = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert made[0, inputs["input_ids"].shape[1] :].tolist() == golden["greedy"].tolist() == case["greedy"]


def test_a_mixed_batch(processor, model):
    """Images nested, one text without any: rows are those of the release, which pads them with -1."""
    case = next(case for case in CASES if case["name"] == "mixed_batch")
    golden, images = expected(case), iter(images_of(case))
    nested = [[next(images) for _ in sample] for sample in case["images"]]
    inputs = processor(text=case["text"], images=nested, return_tensors="pt", **case["call"])
    rows = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -1)
    assert rows.tolist() == golden["input_ids"].tolist()
    made = model.generate(**inputs, max_new_tokens=12, do_sample=False)[:, rows.shape[1] :]
    assert made.tolist() == golden["greedy"].tolist() == case["greedy"]


@pytest.mark.parametrize("route", ["fit", "native"])
@pytest.mark.parametrize("max_crops", [12, 16, 24])
def test_geometry(processor, route, max_crops):
    tiler, arguments = processor.image_processor, {"do_resize": route == "fit", "max_crops": max_crops}
    set_once = JinaVLMImageProcessor(**arguments)
    for size in GEOMETRY["sizes"]:
        height, width = size["height"], size["width"]
        if size[route] == "ValueError":
            with pytest.raises(ValueError, match=f"{width} x {height} pixels.* 200 times"):
                tiler.get_tiling(height, width, **arguments)
            continue
        told = size[route][str(max_crops)]
        fitted, grid = tiler.get_tiling(height, width, **arguments)
        assert (list(grid), list(fitted)) == (told["grid"], size["fitted"] if route == "fit" else [height, width])
        assert set_once.get_tiling(height, width) == (fitted, grid)
        assert tiler.get_number_of_image_patches(height, width, arguments) == told["n_tiles"]
        counted = processor._get_num_multimodal_tokens([(height, width)], **arguments)
        assert (counted.num_image_tokens, counted.num_image_patches) == ([told["n_tokens"]], [told["n_tiles"]])


def test_tokens_of_each_grid(processor):
    for name, told in GEOMETRY["grids"].items():
        rows, columns = map(int, name.split("x"))
        assert count_tokens(rows, columns, 14, 2) == told["n_tokens"]
        grids = [processor.image_processor.get_token_grid(*grid) for grid in ((1, 1), (rows, columns))]
        assert sum(height * width for height, width in grids) == told["n_patch_tokens"]
