"""Attention back ends: equal results, and the tower's may differ from the text model's."""

import pytest
import torch
from jina_vlm import JinaVLMForConditionalGeneration


@pytest.fixture(scope="module")
def batch(chat):
    turns = [[("user", (113, 500), "What is shown?")], [("user", "the quick brown fox")]]
    return chat(turns, padding=True, add_generation_prompt=True)


def load(folder, attention):
    return JinaVLMForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    ).eval()


def logits(model, batch) -> torch.Tensor:
    """Of words, where these random weights are not too ill-conditioned for float32 (see test_batches)."""
    words = (batch["attention_mask"] == 1) & (batch["input_ids"] < 512)
    with torch.no_grad():
        return model(**batch).logits[words]


@pytest.fixture(scope="module")
def expected(released_folder, batch):
    return logits(load(released_folder, "eager"), batch)


@pytest.mark.parametrize(
    ("attention", "tower", "text"),
    [
        ("eager", "eager", "eager"),
        ("sdpa", "sdpa", "sdpa"),
        ({"vision_config": "eager", "text_config": "sdpa"}, "eager", "sdpa"),
        ({"vision_config": "sdpa", "text_config": "eager"}, "sdpa", "eager"),
        pytest.param(
            {"vision_config": "sdpa", "text_config": "flex_attention"},
            "sdpa",
            "flex_attention",
            marks=pytest.mark.slow,  # each shape is compiled: minutes on a CPU
        ),
    ],
    ids=["eager", "sdpa", "eager and sdpa", "sdpa and eager", "sdpa and flex"],
)
def test_back_ends_agree(released_folder, batch, expected, attention, tower, text):
    model = load(released_folder, attention)
    assert model.model.vision_model.tower.config._attn_implementation == tower
    assert model.model.language_model.config._attn_implementation == text
    torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=1e-4)


def test_back_ends_are_changed_later(released_folder, batch, expected):
    model = load(released_folder, "sdpa")
    model.set_attn_implementation({"vision_config": "eager", "text_config": "sdpa"})
    layers = model.model.vision_model.tower.encoder.layers
    assert {layer.self_attn.config._attn_implementation for layer in layers} == {"eager"}
    assert model.model.language_model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=1e-4)
    model.set_attn_implementation("eager")
    assert model.model.language_model.layers[0].self_attn.config._attn_implementation == "eager"
    torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_flex_attention_everywhere(released_folder, batch, expected):
    torch.testing.assert_close(logits(load(released_folder, "flex_attention"), batch), expected, rtol=0, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flash attention runs on GPUs alone")
@pytest.mark.parametrize(
    "attention", ["flash_attention_2", {"vision_config": "flash_attention_2", "text_config": "sdpa"}], ids=str
)
def test_flash_attention(released_folder, batch, attention):
    pytest.importorskip("flash_attn")
    batch = batch.to("cuda")
    models = [
        JinaVLMForConditionalGeneration.from_pretrained(
            released_folder, dtype=torch.bfloat16, attn_implementation=name, device_map="cuda"
        )
        for name in (attention, "sdpa")
    ]
    found, expected = (logits(model, batch).float() for model in models)
    assert (found - expected).abs().mean() < 0.02 * expected.abs().mean()
