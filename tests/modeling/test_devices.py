"""Device maps: parts of the model on other devices, on disk, moved in by hooks when they are needed."""

import pytest
import torch
from accelerate import infer_auto_device_map
from jina_vlm import JinaVLMForConditionalGeneration


@pytest.fixture(scope="module")
def batch(chat):
    turns = [[("user", (113, 500), "What is shown?")], [("user", (20, 20), "the quick brown fox")]]
    return chat(turns, padding=True, add_generation_prompt=True)


@pytest.fixture(scope="module")
def expected(model, batch):
    return model.generate(**batch, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True)


def assert_same(model, batch, expected):
    found = model.generate(
        **batch, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        # As golden logits in float32: on a CPU the tower takes a few tiles at a time, from a disk all at once.
        torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-5)


def load(folder, device_map, tmp_path, **kwargs):
    return JinaVLMForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, device_map=device_map, offload_folder=tmp_path, **kwargs
    )


def on_disk(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.device.type == "meta"}


SPLITS = {
    "tower": {"model.vision_model": "disk", "model.connector": "cpu", "model.language_model": "cpu", "lm_head": "cpu"},
    "connector": {
        "model.vision_model": "cpu",
        "model.connector": "disk",
        "model.language_model": "cpu",
        "lm_head": "cpu",
    },
    "decoder": {
        "model.vision_model": "cpu",
        "model.connector": "cpu",
        "model.language_model": "disk",
        "lm_head": "cpu",
    },
    "half of the decoder": {
        "model.vision_model": "cpu",
        "model.connector": "cpu",
        "model.language_model.embed_tokens": "cpu",
        "model.language_model.layers.0": "cpu",
        "model.language_model.layers.1": "disk",
        "model.language_model.norm": "disk",
        "model.language_model.rotary_emb": "cpu",
        "lm_head": "disk",
    },
    "all": {"": "disk"},
}


@pytest.mark.parametrize(
    ("layout", "name"), [*(("native", name) for name in SPLITS), ("released", "tower"), ("released", "decoder")]
)
def test_parts_on_disk(released_folder, bundle, batch, expected, tmp_path, layout, name):
    model = load({"released": released_folder, "native": bundle}[layout], SPLITS[name], tmp_path)
    assert on_disk(model)
    assert_same(model, batch, expected)
    assert on_disk(model), "hooks put back what they brought"


def test_auto_device_map_splits_where_it_may(bundle, model, batch, expected, tmp_path):
    """`auto`, with less memory than the model needs: no module that must stay whole is split."""
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    offloaded = load(bundle, "auto", tmp_path, max_memory={"cpu": int(0.7 * size)})
    devices = offloaded.hf_device_map
    assert {"cpu", "disk"} <= set(devices.values())
    for name, module in offloaded.named_modules():
        if type(module).__name__ in model._no_split_modules:
            assert not [key for key in devices if key.startswith(f"{name}.")], f"{name} is split"
    assert_same(offloaded, batch, expected)


def test_every_split_falls_between_blocks(model):
    """For two GPUs of any size, by accelerate's own reckoning."""
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    no_split = list(model._no_split_modules)
    for share in (0.3, 0.5, 0.7, 0.9):
        devices = infer_auto_device_map(model, {0: int(share * size), 1: 2 * size}, no_split_module_classes=no_split)
        assert set(devices.values()) == {0, 1}
        for name, module in model.named_modules():
            if type(module).__name__ in no_split:
                assert not [key for key in devices if key.startswith(f"{name}.")], (share, name)


@pytest.mark.skipif(torch.accelerator.device_count() < 2, reason="needs two accelerators")
def test_split_over_two_accelerators(bundle, batch, expected, tmp_path):
    for device_map in (
        "balanced",
        {"model.vision_model": 1, "model.connector": 1, "model.language_model": 0, "lm_head": 0},
    ):
        model = load(bundle, device_map, tmp_path)
        assert len({parameter.device for parameter in model.parameters()}) == 2
        found = model.generate(**batch.to("cuda:0"), max_new_tokens=3, do_sample=False)
        assert torch.equal(found.cpu(), expected.sequences)
