"""Training with what the library offers: losses, gradients, checkpointing, freezing."""

import copy

import jina_vlm
import pytest
import torch
from jina_vlm.compatibility_jina_vlm import CHECKPOINTING
from torch.nn import functional as F
from transformers import BitsAndBytesConfig, QuantoConfig
from transformers.quantizers.quantizers_utils import should_convert_module


@pytest.fixture(scope="module")
def batch(chat):
    """A long conversation with two images, and a short one without: padding, images and rows."""
    turns = [
        [("user", (113, 500), " and ", (20, 20), "which?"), ("assistant", "the quick brown fox")],
        [("user", "the lazy dog"), ("assistant", "jumps")],
    ]
    return chat(turns, padding=True, padding_side="right")


def test_images_rows_and_padding_are_not_predicted(model, batch):
    """Labels that are the ids themselves, as a careless caller has them, give the loss over words alone."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        output = model(**batch, labels=ids)
    words = (mask == 1) & ~torch.isin(ids, torch.tensor(model.config.structural_token_ids))
    assert 0 < words[:, 1:].sum() < 60 < ids.numel()
    expected = F.cross_entropy(output.logits[:, :-1][words[:, 1:]], ids[:, 1:][words[:, 1:]])
    torch.testing.assert_close(output.loss, expected)


def test_shifted_labels_count_the_same(model, batch):
    """What sequence parallelism passes: the labels, and the labels shifted before they were cut into parts."""
    shifted = F.pad(batch["input_ids"], (0, 1), value=-100)[:, 1:]
    with torch.no_grad():
        expected = model(**batch, labels=batch["input_ids"]).loss
        found = model(**batch, labels=batch["input_ids"], shift_labels=shifted).loss
    torch.testing.assert_close(found, expected)


def test_labels_of_the_logits_that_are_kept(model, batch):
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :-20] = -100
    with torch.no_grad():
        expected = model(**batch, labels=labels).loss
        kept = model(**batch, labels=labels[:, -21:], logits_to_keep=21)
    assert kept.logits.shape[1] == 21
    torch.testing.assert_close(kept.loss, expected)


def test_loss_over_accumulated_batches(model, batch):
    """With `num_items_in_batch`, as the Trainer gives it, a loss is a sum over that number."""
    ids = batch["input_ids"]
    words = (batch["attention_mask"] == 1) & ~torch.isin(ids, torch.tensor(model.config.structural_token_ids))
    labels = ids.masked_fill(~words, -100)
    with torch.no_grad():
        mean = model(**batch, labels=labels).loss
        share = model(**batch, labels=labels, num_items_in_batch=torch.tensor(1000)).loss
    torch.testing.assert_close(share * 1000, mean * words[:, 1:].sum())


@pytest.mark.parametrize("shift", [False, True])
def test_a_number_of_labels_that_counts_images(model, batch, shift):
    """It is the Trainer's, where the labels are the ids: the loss is the mean over words all the same."""
    ids = batch["input_ids"]
    shifted = F.pad(ids, (0, 1), value=-100)[:, 1:]
    given = {"labels": ids, **({"shift_labels": shifted} if shift else {})}
    with torch.no_grad():
        expected = model(**batch, labels=ids).loss
        found = model(**batch, **given, num_items_in_batch=(shifted != -100).sum()).loss
        none = model(**batch, labels=torch.full_like(ids, -100), num_items_in_batch=torch.tensor(7)).loss
    torch.testing.assert_close(found, expected)
    assert none == 0


def test_hooks_on_the_embedding_see_sequences(new_model, batch):
    """As NEFTune's does. Images' places are a sequence too, and those of embeddings without ids are found."""
    seen = []
    embedding = new_model.get_input_embeddings()
    embedding.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    ids, width = batch["input_ids"], new_model.config.text_config.hidden_size
    with torch.no_grad():
        expected = new_model(**batch).logits
        inputs = {name: value for name, value in batch.items() if name != "input_ids"}
        found = new_model(inputs_embeds=embedding(ids), **inputs).logits
    places = int((ids == new_model.config.image_token_id).sum())
    of_text, of_images = (*ids.shape, width), (1, places, width)
    assert sorted(seen) == sorted([of_text, of_images, of_text, of_images, (1, 1, width)])
    assert torch.equal(found, expected)


def gradients(model, batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_gradients_reach_every_parameter(new_model, batch):
    found = gradients(new_model.train(), batch)
    assert found.keys() == dict(new_model.named_parameters()).keys()
    for name, gradient in found.items():
        assert gradient.isfinite().all()
        # A softmax does not see what is the same for all keys.
        assert gradient.any() or name.endswith("k_proj.bias"), name


def test_the_token_that_opens_texts_learns(new_model, batch):
    """It is the one that pads batches, whose embedding the library would leave as it is, of zeros."""
    config = copy.deepcopy(new_model.config)
    config.text_config.dtype = torch.bfloat16
    untrained = jina_vlm.JinaVLMModel(config).language_model
    rows = untrained.get_input_embeddings().weight.detach()
    assert rows.dtype == untrained.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert rows[config.text_config.pad_token_id].std() > rows.float().std() / 2
    new_model(**batch, labels=batch["input_ids"]).loss.backward()
    opening = new_model.config.text_config.pad_token_id
    assert opening in batch["input_ids"] and new_model.get_input_embeddings().weight.grad[opening].any()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(new_model, batch, reentrant):
    expected = gradients(new_model.train(), batch)
    getattr(new_model, f"{CHECKPOINTING}_enable")(**{f"{CHECKPOINTING}_kwargs": {"use_reentrant": reentrant}})
    if reentrant:  # it needs an input with a gradient: the Trainer calls this too
        new_model.enable_input_require_grads()
    recomputed = []
    for layer in (new_model.model.vision_model.tower.encoder.layers[0], new_model.model.language_model.layers[0]):
        layer.self_attn.register_forward_pre_hook(lambda *_: recomputed.append(True))
    found = gradients(new_model, batch)
    assert len(recomputed) == 4, "each layer once forwards, once again backwards"
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("part", ["vision_model", "connector", "language_model"])
def test_parts_are_frozen_by_name(new_model, batch, part):
    new_model.model.get_submodule(part).requires_grad_(False)
    found = gradients(new_model, batch)
    assert found and not [name for name in found if name.startswith(f"model.{part}.")]
    others = {"vision_model", "connector", "language_model"} - {part}
    assert others == {name.split(".")[1] for name in found if name.startswith("model.")}


@pytest.mark.slow
def test_one_batch_is_learned_by_heart(new_model, chat):
    turns = [
        [("user", (20, 20), "which?"), ("assistant", "the quick brown fox")],
        [("user", "the lazy dog"), ("assistant", "jumps")],
    ]
    batch = chat(turns, padding=True, padding_side="right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(new_model.parameters(), lr=5e-3)
    new_model.train()
    losses = []
    for _ in range(40):
        loss = new_model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(new_model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 2 and losses[-1] < 0.1, losses


QUANTIZATIONS = {
    "object": BitsAndBytesConfig(load_in_4bit=True),
    "object that skips more": QuantoConfig(modules_to_not_convert=["gate"]),
    "dict": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "dict without a method": {"load_in_4bit": True},
    "dict that skips more": {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_skip_modules": ["gate"]},
    "dict of quanto": {"quant_method": "quanto", "weights": "int8", "modules_to_not_convert": ["gate"]},
}


@pytest.mark.parametrize("config", QUANTIZATIONS.values(), ids=QUANTIZATIONS)
def test_quantization_keeps_connector_embeddings_and_head(model, released_folder, config, monkeypatch):
    """What is handed to the library names both, beside what the caller named; the caller's own config is left
    alone."""
    given = []

    def stop(cls, *args, quantization_config, **kwargs):
        given.append(quantization_config)
        raise InterruptedError

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", classmethod(stop))
    before = copy.deepcopy(config if isinstance(config, dict) else config.to_dict())
    with pytest.raises(InterruptedError):
        type(model).from_pretrained(released_folder, quantization_config=config)
    assert (config if isinstance(config, dict) else config.to_dict()) == before, "the caller's is left as it was"
    lists = [value for key, value in given[0].to_dict().items() if key.endswith(("skip_modules", "not_convert"))]
    names = {name for names in lists for name in names or []}
    skips_more = "gate" in str(before)
    for whole in (model, model.model):
        modules = {
            name: module
            for name, module in whole.named_modules()
            if isinstance(module, torch.nn.Linear | torch.nn.Embedding)
        }
        kept = {name for name in modules if not should_convert_module(name, list(names))}
        expected = {
            name for name in modules
            if "connector" in name or name.endswith(("lm_head", "embed_tokens"))
            or (skips_more and name.endswith("gate"))
        }  # fmt: skip
        assert kept == expected


def test_quantized_weights(model, bundle, batch):
    pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    quantized = type(model).from_pretrained(
        bundle, dtype=torch.float32, quantization_config=QuantoConfig(weights="int8")
    )
    kinds = {
        name: type(module).__name__ for name, module in quantized.named_modules() if "Linear" in type(module).__name__
    }
    whole = {name for name, kind in kinds.items() if kind == "Linear"}
    assert whole == {name for name in kinds if "connector" in name or name == "lm_head"} and len(kinds) > 2 * len(
        whole
    )
    with torch.no_grad():
        found, expected = (one(**batch, logits_to_keep=1).logits for one in (quantized, model))
    assert torch.nn.functional.cosine_similarity(found, expected, dim=-1).min() > 0.95
