"""Adapters with PEFT, and TRL's trainers with our collator."""

import io

import datasets
import jina_vlm
import pytest
import torch
from conftest import make_image
from jina_vlm.compatibility_jina_vlm import CHECKPOINTING
from miniature import save_miniature
from PIL import Image

from jina_vlm_tools.training import JinaVLMCollator
from jina_vlm_tools.training.stages import LoraSettings, PartSettings
from jina_vlm_tools.training.trainer import freeze, part_of, see_blank_images


peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    return save_miniature(tmp_path_factory.mktemp("miniature"))


@pytest.fixture
def small(miniature):
    return jina_vlm.JinaVLMForConditionalGeneration.from_pretrained(miniature)


@pytest.fixture(scope="module")
def small_processor(miniature):
    processor = jina_vlm.JinaVLMProcessor.from_pretrained(miniature)
    processor.image_processor.max_tiles = 2
    return processor


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """An image of one tile, one of two, and text alone."""
    one, two = (Image.fromarray(make_image(*size)) for size in ((200, 200), (900, 200)))
    return [
        {
            "images": [one],
            "messages": [{"role": "user", "content": "which?"}, {"role": "assistant", "content": "a red star"}],
        },
        {
            "images": [two],
            "messages": [{"role": "user", "content": "where?"}, {"role": "assistant", "content": "left"}],
        },
        {
            "images": [],
            "messages": [
                {"role": "user", "content": "who?"},
                {"role": "assistant", "content": "a blue ring, a green one"},
            ],
        },
    ]


@pytest.fixture(scope="module")
def batch(small_processor, rows):
    return JinaVLMCollator(small_processor)(rows)


def adapted(model, **kwargs):
    from jina_vlm_tools.training.lora import add_adapters

    return add_adapters(model, LoraSettings(**{"rank": 4, "alpha": 8, **kwargs}))


def learn(model, batch, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    "parts", [["encoder"], ["connector"], ["decoder"], ["encoder", "connector", "decoder"]], ids="-".join
)
def test_adapters_stand_beside_every_linear_layer_of_the_parts(small, parts):
    """And nowhere else; not beside the head, which is as large as all of them."""
    linear = {
        name for name, module in small.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    model = adapted(small, parts=parts)
    found = {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.Linear)
    }
    assert found == {name for name in linear if part_of(name) in parts} and found
    assert {part_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad} == set(parts)


def test_adapters_merge_and_load(small, miniature, batch, tmp_path):
    """Trained; saved alone and loaded with `load_adapter`; merged: the same logits each time, and others than
    before."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        before = small(**inputs).logits
    model = adapted(small)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, before)
    learn(model, batch)
    with torch.no_grad():
        expected = model(**inputs).logits
    assert (expected - before).abs().max() > 0.1
    model.save_pretrained(tmp_path / "adapter")
    assert {file.name for file in (tmp_path / "adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }

    fresh = jina_vlm.JinaVLMForConditionalGeneration.from_pretrained(miniature)
    fresh.load_adapter(str(tmp_path / "adapter"))
    with torch.no_grad():
        torch.testing.assert_close(fresh(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = jina_vlm.JinaVLMForConditionalGeneration.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, expected, atol=1e-3, rtol=0)


def test_parts_without_a_learning_rate_have_no_trained_adapters(small):
    model = adapted(small)
    freeze(model, {"encoder": PartSettings(0), "connector": PartSettings(1e-3), "decoder": PartSettings(1e-4)})
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {part_of(name) for name in trained} == {"connector", "decoder"} and all("lora_" in name for name in trained)


def test_a_batch_without_images_reaches_every_adapter(small, small_processor, rows):
    see_blank_images(small)
    model = adapted(small).train()
    model(**JinaVLMCollator(small_processor)(rows[2:])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


# ---------------------------------------------------------------------------------------------------------------------
# TRL
# ---------------------------------------------------------------------------------------------------------------------


def as_dataset(rows) -> datasets.Dataset:
    def png(image):
        file = io.BytesIO()
        image.save(file, "PNG")
        return {"bytes": file.getvalue(), "path": None}

    features = datasets.Features(
        images=datasets.List(datasets.Image()),
        messages=datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")}),
    )
    return datasets.Dataset.from_list(
        [{**row, "images": [png(image) for image in row["images"]]} for row in rows], features=features
    )


def arguments(config_class, folder, **kwargs):
    return config_class(
        str(folder),
        per_device_train_batch_size=3,
        max_steps=3,
        learning_rate=1e-2,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        **{CHECKPOINTING: False},
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        train_sampling_strategy="sequential",
        **kwargs,
    )


def test_trl_sft(small, small_processor, rows, batch, tmp_path):
    """The first loss is the model's own on that batch; the last is lower."""
    trl = pytest.importorskip("trl")
    with torch.no_grad():
        expected = small(**batch).loss.item()
    trainer = trl.SFTTrainer(
        adapted(small),
        arguments(trl.SFTConfig, tmp_path),
        JinaVLMCollator(small_processor),
        as_dataset(rows),
        processing_class=small_processor,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(expected, abs=1e-4) and losses[-1] < losses[0]
