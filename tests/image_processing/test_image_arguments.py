"""Every argument of an image processor is honored, or refused by an error that names it: in a call, in the settings,
on loading."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import refused
from huggingface_hub.errors import StrictDataclassError
from jina_vlm import JinaVLMImageProcessor, JinaVLMProcessor
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, pipeline
from transformers.image_utils import ChannelDimension


# What a call may change, by a value that changes something
HONORED = {
    "do_resize": False,
    "max_tiles": 1,
    "max_crops": 1,
    "min_pixels": 1_000_000,
    "max_pixels": 50_000,
    "crop_to_patches": True,
    "input_data_format": "channels_first",
    "device": "meta",
    "return_tensors": "np",
}
# What is done in any case, by values that ask for something else
REFUSED = {
    "do_convert_rgb": [False],
    "do_rescale": [False],
    "rescale_factor": [1.0, 1 / 127.5],
    "do_normalize": [False],
    "image_mean": [0.0, [0.48145466, 0.4578275, 0.40821073]],
    "image_std": [1.0, (0.26862954, 0.26130258, 0.27577711)],
    "resample": [3, Image.Resampling.NEAREST],
    "size": [378, [378, 378], {"height": 378, "width": 378}, {"shortest_edge": 3136, "longest_edge": 1003520}],
    "default_to_square": [False],
    "do_center_crop": [True],
    "crop_size": [224, {"height": 224, "width": 224}],
    "do_pad": [True],
    "pad_size": [{"height": 512, "width": 512}],
    "data_format": ["channels_last", ChannelDimension.LAST],
    "image_seq_length": [576],
    "crop_to_patches": [False],
}
# The model's, to be set where the image processor is made
OF_THE_MODEL = {"tile_size": 224, "patch_size": 7, "overlap_margin": 2, "pooling_size": 1}
# By which the result does not change in any case
WITHOUT_EFFECT = {"disable_grouping": [True, False]}


@pytest.fixture
def tiler():
    """One that a test may change."""
    return JinaVLMImageProcessor()


@pytest.fixture(scope="module")
def image(make_image):
    return make_image(300, 500)


def cases(arguments: dict) -> list:
    return [pytest.param(name, value, id=f"{name}={value}") for name, values in arguments.items() for value in values]


def test_no_argument_of_the_library_is_forgotten():
    known = {*HONORED, *REFUSED, *OF_THE_MODEL, *WITHOUT_EFFECT}
    assert known == set(JinaVLMImageProcessor.valid_kwargs.__annotations__)


@pytest.mark.parametrize(("name", "value"), list(HONORED.items()))
def test_honored(tiler, image, name, value):
    defaults = {}
    if name == "input_data_format":  # of what can be read either way
        image, defaults = image[:3, :60], {name: "channels_last"}
    outputs = [tiler(image, **kwargs) for kwargs in (defaults, {name: value})]
    plain, changed = (output["pixel_values"] for output in outputs)
    if name == "crop_to_patches":
        assert outputs[1]["num_patches"].tolist() == [len(plain)] and "num_patches" not in outputs[0]
    elif name in ("device", "return_tensors"):
        assert getattr(changed, "device", None) != plain.device
    else:
        assert not torch.equal(changed, plain)


@pytest.mark.parametrize(("name", "value"), cases(REFUSED))
def test_refused(tiler, processor, image, bundle, name, value):
    for attempt in (
        lambda: tiler(image, **{name: value}),
        lambda: tiler.get_tiling(300, 500, **{name: value}),
        lambda: tiler.get_number_of_image_patches(300, 500, {name: value}),
        lambda: processor._get_num_multimodal_tokens([(300, 500)], **{name: value}),
        lambda: processor(images=image, text="<|image|>", **{name: value}),
        lambda: processor(images=image, text="<|image|>", images_kwargs={name: value}),
        lambda: JinaVLMImageProcessor(**{name: value}),
        lambda: JinaVLMImageProcessor.from_pretrained(bundle, **{name: value}),
        lambda: JinaVLMProcessor.from_pretrained(bundle, **{name: value}),
    ):
        with pytest.raises(ValueError, match=f"`{name}` is .* supports only "):
            attempt()
    if name != "size":
        setattr(tiler, name, value)
        with pytest.raises(ValueError, match=f"`{name}` is .* supports only "):
            tiler(image)


@pytest.mark.parametrize(("name", "value"), list(OF_THE_MODEL.items()))
def test_of_the_model(tiler, processor, image, name, value):
    for attempt in (
        lambda: tiler(image, **{name: value}),
        lambda: tiler.get_tiling(300, 500, **{name: value}),
        lambda: processor(images=image, text="<|image|>", **{name: value}),
    ):
        with pytest.raises(ValueError, match=f"`{name}` is {value} in a call, and .* belongs to the model"):
            attempt()
    made = JinaVLMImageProcessor(**{name: value})
    assert (made.get_tiling(900, 900), made.get_token_grid(2, 2)) != (
        tiler.get_tiling(900, 900),
        tiler.get_token_grid(2, 2),
    )
    assert torch.equal(made(image, **{name: value})["pixel_values"], made(image)["pixel_values"])


def test_what_is_done_in_any_case_may_be_said(tiler, processor, image):
    """As libraries do that pass on what they read from an image processor, or the usual defaults."""
    expected = tiler(image)["pixel_values"]
    own = {name: getattr(tiler, name, None) for name in tiler.valid_kwargs.__annotations__}
    assert torch.equal(tiler(image, **own)["pixel_values"], expected)
    usual = {
        "do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "do_center_crop": False,
        "do_pad": False, "rescale_factor": 0.00392156862745098, "image_mean": [0.5, 0.5, 0.5], "image_std": 0.5,
        "resample": 2, "data_format": ChannelDimension.FIRST, "size": dict(tiler.size), "crop_size": None,
        "disable_grouping": False,
    }  # fmt: skip
    assert torch.equal(tiler(image, **usual)["pixel_values"], expected)
    assert torch.equal(JinaVLMImageProcessor(**usual)(image)["pixel_values"], expected)
    assert torch.equal(
        processor(images=image, text="<|image|>", return_tensors="pt", **usual)["pixel_values"], expected
    )
    nothing = dict.fromkeys(tiler.valid_kwargs.__annotations__)
    assert torch.equal(tiler(image, **nothing)["pixel_values"], expected)
    assert torch.equal(JinaVLMImageProcessor(**nothing)(image)["pixel_values"], expected)


@pytest.mark.parametrize(("name", "value"), cases(WITHOUT_EFFECT))
def test_without_effect(tiler, image, name, value):
    assert torch.equal(tiler([image] * 2, **{name: value})["pixel_values"], tiler([image] * 2)["pixel_values"])


@pytest.mark.parametrize("name", ["max_tiles", "max_crops", "min_pixels", "max_pixels", *OF_THE_MODEL])
@pytest.mark.parametrize("value", ["4", 4.0, True, [4], "many"], ids=repr)
def test_integers(tiler, processor, image, bundle, tmp_path, name, value):
    shutil.copytree(bundle, tmp_path / "copy")
    settings = json.loads((tmp_path / "copy" / "processor_config.json").read_text())
    settings["image_processor"][name] = value
    if name == "max_crops":
        del settings["image_processor"]["max_tiles"]
    (tmp_path / "copy" / "processor_config.json").write_text(json.dumps(settings))
    attempts = [
        lambda: JinaVLMImageProcessor(**{name: value}),
        lambda: JinaVLMImageProcessor.from_pretrained(tmp_path / "copy"),
        lambda: AutoProcessor.from_pretrained(tmp_path / "copy"),
    ]
    if name not in OF_THE_MODEL:
        attempts += [
            lambda: tiler(image, **{name: value}),
            lambda: tiler.get_tiling(300, 500, **{name: value}),
        ]
    for attempt in attempts:
        own_name = "max_tiles" if name == "max_crops" else name
        with pytest.raises(TypeError, match=f"`{own_name}` must be an integer, got {re.escape(repr(value))}"):
            attempt()
    with pytest.raises((StrictDataclassError, TypeError), match=f"{name}.* expected int"):  # the library's words
        processor(images=image, text="<|image|>", **{name: value})


@pytest.mark.parametrize("value", ["no", 0, 1, [False]], ids=repr)
def test_do_resize_is_true_or_false(tiler, image, value):
    for attempt in (
        lambda: JinaVLMImageProcessor(do_resize=value),
        lambda: tiler(image, do_resize=value),
        lambda: tiler.get_tiling(9, 9, do_resize=value),
    ):
        with pytest.raises(TypeError, match=f"`do_resize` must be True or False, got {re.escape(repr(value))}"):
            attempt()


def test_integers_of_numpy(image, tmp_path):
    made = JinaVLMImageProcessor(max_tiles=np.int64(3))
    assert len(made(image)["pixel_values"]) == len(
        JinaVLMImageProcessor()(image, max_tiles=np.int32(3))["pixel_values"]
    )
    made.save_pretrained(tmp_path)
    assert JinaVLMImageProcessor.from_pretrained(tmp_path).max_tiles == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tile_size": 100}, r"`tile_size` \(100\) must be a multiple of `patch_size` \(14\)"),
        (
            {"overlap_margin": 14},
            "`overlap_margin` is 14; expected 0 or more, and less than half of a tile's 27 patches",
        ),
        ({"overlap_margin": 3}, r"`overlap_margin` \(3 patches\) must be a multiple of `pooling_size` \(2\)"),
        ({"overlap_margin": -2}, "`overlap_margin` must be at least 0, got -2"),
        ({"pooling_size": 0}, "`pooling_size` must be at least 1, got 0"),
        ({"patch_size": -14}, "`patch_size` must be at least 1, got -14"),
    ],
)
def test_geometry_that_does_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        JinaVLMImageProcessor(**settings)


@pytest.mark.parametrize("max_tiles", [0, -1])
def test_max_tiles(tiler, processor, make_image, max_tiles):
    for attempt in (
        lambda: JinaVLMImageProcessor(max_tiles=max_tiles),
        lambda: tiler(make_image(20, 20), max_tiles=max_tiles),
        lambda: tiler.get_tiling(20, 20, max_tiles=max_tiles),
        lambda: processor(images=make_image(20, 20), text="<|image|>", max_tiles=max_tiles),
        lambda: processor._get_num_multimodal_tokens([(20, 20)], max_tiles=max_tiles),
    ):
        with refused(f"`max_tiles` must be at least 1, got {max_tiles}"):
            attempt()


@pytest.mark.parametrize(
    "setting", [{"min_pixels": 0}, {"max_pixels": 100}, {"min_pixels": 500, "max_pixels": 400}], ids=str
)
def test_pixel_budget(tiler, make_image, setting):
    for attempt in (lambda: JinaVLMImageProcessor(**setting), lambda: tiler(make_image(20, 20), **setting)):
        with refused(f"`min_pixels` (<= `max_pixels`|must be at least 1).*{max(setting.values())}"):
            attempt()


def test_the_releases_name_of_max_tiles(tiler, processor, image, bundle, tmp_path):
    few = tiler(image, max_tiles=1)["pixel_values"]
    assert torch.equal(tiler(image, max_crops=1)["pixel_values"], few)
    assert torch.equal(
        processor(images=image, text="<|image|>", max_crops=1, return_tensors="pt")["pixel_values"], few
    )
    for made in (JinaVLMImageProcessor(max_crops=1), JinaVLMImageProcessor.from_pretrained(bundle, max_crops=1)):
        assert made.max_tiles == 1 and "max_crops" not in made.to_dict()
    assert tiler.max_tiles == 12, "a call changes nothing for later ones"
    assert torch.equal(tiler(image, max_crops=1, max_tiles=1)["pixel_values"], few)
    for attempt in (
        lambda: tiler(image, max_crops=1, max_tiles=2),
        lambda: JinaVLMImageProcessor(max_crops=1, max_tiles=2),
    ):
        with pytest.raises(ValueError, match="`max_tiles` 2 and `max_crops` 1, which are one setting"):
            attempt()
    tiler.max_crops = 24
    with pytest.raises(ValueError, match="which are one setting"):
        tiler(image)


# Unknown names


def test_unknown_names(tiler, image, bundle):
    for attempt in (
        lambda: tiler(image, foo=2),
        lambda: tiler.get_tiling(300, 500, foo=2),
        lambda: JinaVLMImageProcessor(foo=2),
        lambda: JinaVLMImageProcessor.from_pretrained(bundle, foo=2),
        lambda: AutoImageProcessor.from_pretrained(bundle, foo=2),
    ):
        with pytest.raises(
            TypeError, match="Unknown argument 'foo' of JinaVLMImageProcessor. Known are: crop_size, .*max_tiles"
        ):
            attempt()
    loaded, unused = JinaVLMImageProcessor.from_pretrained(bundle, foo=2, max_tiles=5, return_unused_kwargs=True)
    assert (loaded.max_tiles, unused) == (5, {"foo": 2})


def test_unknown_names_in_a_file(bundle, tmp_path):
    settings = json.loads((bundle / "processor_config.json").read_text())["image_processor"]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**settings, "max_tile": 3}))
    with pytest.raises(TypeError, match="Unknown argument 'max_tile'"):
        JinaVLMImageProcessor.from_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({**settings, "max_tiles": None, "processor_class": "JinaVLMProcessor"})
    )
    assert JinaVLMImageProcessor.from_pretrained(tmp_path).max_tiles == 12


# Who loads and calls it with more than settings


def test_loaders_get_through(bundle, released_folder):
    """What Auto classes, trainers and harnesses pass on beside the settings."""
    hub = {"revision": "main", "token": None, "local_files_only": True, "cache_dir": None, "force_download": False}
    code = {"trust_remote_code": False, "code_revision": None}
    for folder in (bundle, released_folder):
        for load in (JinaVLMImageProcessor.from_pretrained, AutoImageProcessor.from_pretrained):
            assert load(folder, max_tiles=5, backend="pil", **hub, **code).max_tiles == 5
        assert JinaVLMImageProcessor.from_pretrained(folder, max_tiles=5, use_fast=False).max_tiles == 5
        # lm-eval, TRL, sentence-transformers
        loaded = AutoProcessor.from_pretrained(
            folder, use_fast=True, padding_side="right", truncation_side="left", max_pixels=50_000, **hub, **code
        )
        assert (loaded.image_processor.max_pixels, loaded.tokenizer.truncation_side) == (50_000, "left")


def test_pipelines_get_through(bundle, image):
    """They hand the arguments of the model's loading to every part."""
    arguments = {"model": str(bundle), "dtype": "float32"}
    kwargs = {"attn_implementation": "eager"}
    pipe = pipeline("image-text-to-text", device="cpu", model_kwargs=dict(kwargs), **arguments)
    assert len(pipe.preprocess({"text": "<|image|>", "images": [Image.fromarray(image)]})["pixel_values"]) == 3
    features = pipeline(
        "image-feature-extraction", image_processor=str(bundle), model_kwargs=dict(kwargs), **arguments
    )
    assert features.image_processor.max_tiles == 12


def test_settings_of_the_release(released_folder, tmp_path, image):
    """Its file names a mean and a crop that its code does not use. What is given on loading is not taken for these."""
    expected = JinaVLMImageProcessor()(image)["pixel_values"]
    assert torch.equal(JinaVLMImageProcessor.from_pretrained(released_folder)(image)["pixel_values"], expected)
    assert JinaVLMImageProcessor.from_pretrained(released_folder, max_tiles=3).max_tiles == 3
    released = json.loads((released_folder / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**released, "do_resize": False, "max_crops": 24}))
    loaded = JinaVLMImageProcessor.from_pretrained(tmp_path)
    assert (loaded.do_resize, loaded.max_tiles) == (False, 24)
    assert (
        JinaVLMImageProcessor.from_pretrained(tmp_path, max_crops=3, do_resize=True).to_dict()
        == JinaVLMImageProcessor(max_tiles=3).to_dict()
    )
    assert torch.equal(JinaVLMImageProcessor(**released)(image)["pixel_values"], expected)
    for name, value in {"image_mean": [0.48, 0.46, 0.41], "do_rescale": False, "crop_size": 378}.items():
        with pytest.raises(ValueError, match=f"`{name}` is "):
            JinaVLMImageProcessor.from_pretrained(released_folder, **{name: value})
