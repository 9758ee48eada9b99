"""mlx-vlm's port of jina-vlm, held to what the released code computes: as it is, and mended as docs/mlx.md proposes.

Where it differs as it is, the test says in what: a version that mends this fails here, and the page is to be changed.
"""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from golden_images import make_image
from mlx_vlm import generate
from mlx_vlm.models.jina_vlm import Model
from mlx_vlm.models.jina_vlm.image_processor import ImageProcessor, smart_resize
from mlx_vlm.utils import load
from PIL import Image
from port import MendedProcessor, mend, sanitize

from jina_vlm_tools.files import TINY


GOLDEN = Path(__file__).parents[2] / "golden"
RELEASED = GOLDEN / "released-tiny"
CASES = {case["name"]: case for case in json.loads((GOLDEN / "cases" / "index.json").read_text())}
WITH_IMAGES = [name for name, case in CASES.items() if case["images"]]
ONE_IMAGE = [name for name in WITH_IMAGES if len(CASES[name]["images"]) == 1]
STRUCTURAL = {"<im_start>": 151936, "<im_end>": 151937, "<im_patch>": 151938, "<im_col>": 151939}
THEIRS = {"start": 151666, "end": 151667, "patch": 151665, "column": 151668}


def expected(name: str) -> dict:
    return np.load(GOLDEN / "cases" / f"{name}.npz")


def images_of(name: str) -> list[Image.Image]:
    keys = ("height", "width", "kind", "seed")
    return [Image.fromarray(make_image(*(image[key] for key in keys))) for image in CASES[name]["images"]]


@pytest.fixture(scope="module")
def loaded():
    """The released layout by their `load`, mended: model and their own processor."""
    with pytest.MonkeyPatch.context() as patch:
        mend(patch)
        return load(str(RELEASED))


@pytest.fixture(scope="module")
def model(loaded):
    return loaded[0]


@pytest.fixture
def mended_model(model, monkeypatch):
    mend(monkeypatch)
    return model


@pytest.fixture(scope="module")
def as_it_is(loaded):
    return loaded[1]


@pytest.fixture(scope="module")
def mended(loaded):
    processor = MendedProcessor(loaded[1].tokenizer)
    processor.detokenizer = loaded[1].detokenizer
    return processor


# As it is ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", [RELEASED, TINY], ids=["released layout", "ours"])
def test_checkpoints_do_not_load(folder):
    with pytest.raises(ValueError, match=r"parameters not in model"):
        load(str(folder))


def test_sizes_of_nested_settings_are_lost(monkeypatch):
    """With the names right, `load` takes the 2.4B model's heads for any model's. This small one has 2 of 16."""
    monkeypatch.setattr(Model, "sanitize", lambda self, weights: sanitize(weights))
    with pytest.raises(ValueError, match=r"Expected shape \(3456, 32\) but received shape \(96, 32\)"):
        load(str(RELEASED))


def test_special_ids_are_other_tokens():
    processor = ImageProcessor()
    assert {name: getattr(processor, f"{name}_token_id") for name in THEIRS} == THEIRS
    config = json.loads((Path(__file__).parents[3] / "config.json").read_text())
    assert config["structural_token_ids"][:4] == list(STRUCTURAL.values())


def test_fit_and_grid_are_the_releases():
    """But for images of more than 200 to 1, which the release refuses."""
    processor, refused = ImageProcessor(), []
    for case in json.loads((GOLDEN / "geometry.json").read_text()):
        size = smart_resize(case["height"], case["width"], factor=14)
        if "error" in case:
            refused.append((case["height"], case["width"]))
            continue
        assert list(size) == case["resized"]
        grid = processor.select_tiling(size[0] - 112, size[1] - 112, 266, 12)
        assert [int(number) for number in grid] == case["tiling"]
    assert refused == [(1, 201), (201, 1)]


# Of what each image's prompt has: ids that differ (all of the image's, and the missing <|endoftext|>); of the sampled
# pixels, the share that differs, and the largest difference (values are -1 to 1).
DIFFERENCES = {
    "one_image": (814, 0.973, 0.349),
    "portrait": (1064, 0.375, 0.010),
    "wide_12_tiles": (1744, 0.999, 0.797),
    "half_black": (1744, 0.489, 0.308),
    "black_last_tile": (1054, 0.0, 0.0),
    "one_row": (844, 0.996, 0.658),
    "one_column": (1024, 0.429, 0.008),
    "upscaled": (424, 0.074, 0.156),
}


@pytest.mark.parametrize("name", ONE_IMAGE)
def test_order_is_right_and_ids_pixels_and_marks_are_not(as_it_is, name):
    case, inputs = expected(name), as_it_is.process_one(CASES[name]["text"], images_of(name))
    ids, places = np.array(inputs["input_ids"])[0], np.array(inputs["image_input_idx"]).reshape(-1, 196)
    assert len(ids) == len(case["input_ids"]) - 1, "the opening <|endoftext|> is missing"
    wanted = case["image_input_idx"]
    assert np.array_equal(np.where(places < 0, -1, places + 1), np.where(wanted < 0, -1, wanted)), "overlaps are right"
    difference = np.abs(np.array(inputs["pixel_values"])[0][tuple(case["pixel_index"].T)] - case["pixel_value"])
    found = int((ids != case["input_ids"][1:]).sum()), (difference > 1e-6).mean(), difference.max()
    assert found == pytest.approx(DIFFERENCES[name], abs=1e-3)
    masks = np.array(inputs["image_masks"])[0]
    assert (masks == 1).all() and (case["image_masks_first"][-1] == -1), "the last tile is not marked"


def test_two_images_of_unlike_grids_are_refused(as_it_is):
    with pytest.raises(ValueError, match="same shape"):
        as_it_is.process_one(CASES["two_images"]["text"], images_of("two_images"))


def test_two_images_of_like_grids_do_not_fit_their_places(as_it_is, model):
    text = CASES["two_images"]["text"]
    inputs = as_it_is.process_one(text, images_of("one_image") * text.count("<|image|>"))
    inputs["input_ids"] = mx.minimum(inputs["input_ids"], 600)  # their ids are beyond this small vocabulary
    with pytest.raises(ValueError):
        model(**inputs)


def test_chat_template_that_the_release_has_not_is_another(as_it_is):
    chat = [{"role": "user", "content": "<|image|>What?"}]
    text = as_it_is.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|user|>\n<|image|>What?\n<|assistant|>\n"


# Mended --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_mended_inputs_are_the_released_codes(mended, name):
    case, inputs = expected(name), mended.process_one(CASES[name]["text"], images_of(name))
    assert np.array_equal(np.array(inputs["input_ids"])[0], case["input_ids"])
    if not CASES[name]["images"]:
        return
    places, wanted = np.array(inputs["image_input_idx"]).reshape(-1, 196), case["image_input_idx"]
    assert np.array_equal(np.where(places < 0, -1, places), np.where(wanted < 0, -1, wanted))
    pixels = np.array(inputs["pixel_values"])[0]
    np.testing.assert_allclose(pixels[tuple(case["pixel_index"].T)], case["pixel_value"], rtol=0, atol=1e-6)
    marked = np.where((np.array(inputs["image_masks"])[0] < 1).all(axis=1), -1, 1)
    assert np.array_equal(marked, case["image_masks_first"])


@pytest.mark.parametrize("name", ["one_image", "two_images", "black_last_tile", "upscaled", "text_only"])
def test_mended_logits_and_answers_are_the_released_codes(mended, mended_model, name):
    case, inputs = expected(name), mended.process_one(CASES[name]["text"], images_of(name))
    if CASES[name]["images"]:
        features = np.array(mended_model.get_image_features(inputs["pixel_values"], inputs["image_masks"]))[0]
        sample = case["feature_sample"]
        assert np.abs(features[:, ::37] - sample).max() < 1e-4 * np.abs(sample).max()
    logits = np.array(mended_model(**inputs).logits)[0]
    np.testing.assert_allclose(logits[-8:], case["logits_last8"], rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", ["upscaled", "two_images"])
def test_mended_answer_by_their_generate(mended, mended_model, name, tmp_path):
    paths = []
    for index, image in enumerate(images_of(name)):
        image.save(path := tmp_path / f"{index}.png")
        paths.append(str(path))
    answer = generate(mended_model, mended, CASES[name]["text"], image=paths, max_tokens=12, temperature=0.0)
    expected = mended.decode(CASES[name]["greedy"])
    assert answer.text == expected.replace("\ufffd", ""), "their detokenizer drops what is no character yet"
