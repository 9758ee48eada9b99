"""Images without pixels, or with others than an image has, are refused by an error that says what was given and what
was expected."""

import re

import numpy as np
import pytest
import torch
from conftest import refused
from PIL import Image


SMALL = (20, 20)


@pytest.mark.parametrize("empty", [[], (), [[]]])
def test_no_images(tiler, processor, empty):
    with refused("[Ee]mpty list of images"):
        tiler(empty)
    if empty != [[]]:
        with refused("empty list of images"):
            processor(images=empty, text="hi")


@pytest.mark.parametrize("shape", [(0, 0, 3), (0, 5, 3), (5, 0, 3), (0, 0), (3, 0, 0)], ids=str)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32], ids=["uint8", "float32"])
def test_no_pixels(tiler, shape, dtype):
    with refused(r"\b0\b"):
        tiler(np.zeros(shape, dtype))


def test_aspect_ratio(tiler):
    for size, shown in (((1, 201), "201 x 1"), ((402, 2), "2 x 402")):
        with refused(f"{shown} pixels; its longer side may be at most 200 times"):
            tiler(Image.new("L", size[::-1]))
    assert (
        len(tiler(Image.new("L", (200, 1)))["pixel_values"])
        == len(tiler(Image.new("L", (2, 400)))["pixel_values"])
        == 2
    )


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize(
    ("value", "shown"), [(np.nan, "nan"), (np.inf, "inf"), (-0.5, "-0.5"), (1.5, "1.5"), (255.0, "255.0")]
)
def test_floats(tiler, make_image, dtype, value, shown):
    array = (make_image(*SMALL) / 255).astype(dtype)
    array[3, 4, 1] = value
    for image in (array, torch.from_numpy(array)):
        with refused(rf"floats must lie in 0 \.\. 1 without NaN, got .*{shown}"):
            tiler(image)


@pytest.mark.parametrize("value", [-1, 256, 70000])
def test_integers(tiler, value):
    with refused(rf"int64 must lie in 0 \.\. 255, got .*{value}"):
        tiler(np.full((20, 20, 3), value))
    if not 0 <= value <= 65535:
        with refused(rf"0 \.\. 65535, got {value}"):
            tiler(Image.fromarray(np.full(SMALL, value, np.int32)))


def test_other_types(tiler):
    with refused("complex64"):
        tiler(np.ones((20, 20, 3), np.complex64))
    with refused("object"):
        tiler(np.full((20, 20, 3), "a", object))


@pytest.mark.parametrize("shape", [(20, 20, 2), (2, 20, 20), (20, 20, 5), (5, 20, 20)], ids=str)
def test_channels(tiler, shape):
    with refused(rf"1, 3 or 4 channels.*{re.escape(str(list(shape)))}"):
        tiler(np.zeros(shape, np.uint8))
    with refused("1, 3 or 4 channels"):
        tiler(torch.zeros(shape), input_data_format="channels_last" if shape[0] == 20 else "channels_first")


@pytest.mark.parametrize("shape", [(20,), (2, 2, 20, 20, 3)], ids=str)
def test_dimensions(tiler, shape):
    with refused(rf"{re.escape(str(list(shape)))}|{re.escape(str(shape))}", (ValueError, TypeError)):
        tiler(np.zeros(shape, np.uint8))
