"""The released bits by torch's kernel where it has them, and step by step where it does not. `test_golden.py` holds
both to the released code's pixels."""

import pytest
import torch
from conftest import make_image
from jina_vlm import image_processing_jina_vlm as image_processing
from jina_vlm import resizing_jina_vlm as resizing
from torch.nn import functional as F


SIZES = [
    ((480, 640), (476, 644)),
    ((1080, 1920), (742, 1330)),
    ((60, 40), (378, 378)),
    ((1, 200), (14, 2800)),
    ((333, 7), (1706, 378)),
]


@pytest.mark.parametrize(("size", "resized"), SIZES, ids=str)
def test_step_by_step_equals_the_kernel_that_has_the_bits(size, resized):
    channel = torch.from_numpy(make_image(*size, seed=1))[..., 0].float()
    exactly = resizing.resize_exactly(channel, *resized)
    assert torch.equal(resizing.resize(channel, *resized), exactly)
    by_kernel = F.interpolate(channel[None, None], size=resized, mode="bilinear")[0, 0]
    torch.testing.assert_close(by_kernel, exactly, rtol=0, atol=0.02)
    assert torch.equal(by_kernel, exactly) or not resizing.kernel_rounds_as_released()


def test_rows_that_are_not_used_are_not_read():
    channel = torch.full((1000, 30), torch.nan)
    channel[49::100] = channel[50::100] = 7.0
    assert (resizing.resize_exactly(channel, 10, 30) == 7).all()


@pytest.mark.parametrize("settings", [{}, {"do_resize": False}], ids=["fitted", "native"])
def test_an_image_step_by_step(processor, monkeypatch, settings):
    """On a torch whose kernel rounds otherwise the image processor takes the other way, to the same pixels."""
    images = [make_image(700, 500), make_image(90, 1200)]
    ways = []
    for has_the_bits in (True, False):
        if has_the_bits and not resizing.kernel_rounds_as_released():
            continue
        monkeypatch.setattr(resizing, "kernel_rounds_as_released", lambda has_the_bits=has_the_bits: has_the_bits)
        ways.append(processor.image_processor(images, return_tensors="pt", **settings)["pixel_values"])
    assert torch.equal(ways[0], ways[-1])


@pytest.mark.parametrize("do_resize", [True, False])
@pytest.mark.parametrize("height", [370, 900])
def test_one_tile_is_its_own_thumbnail(tiler, monkeypatch, height, do_resize):
    """It is resized once."""
    sizes = []
    for module in (resizing, image_processing):
        original = module.resize
        monkeypatch.setattr(
            module, "resize", lambda *args, original=original: sizes.append(args[1:]) or original(*args)
        )
    pixels = tiler([make_image(height, 350)], do_resize=do_resize, return_tensors="pt")["pixel_values"]
    assert len(pixels) == 2 if height == 370 else len(pixels) > 2
    assert sizes.count((378, 378)) == 3, "channels"
