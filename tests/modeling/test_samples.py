"""Images in rows by sample give the results of tiles one after the other, cut, shuffled and repeated."""

import pytest
import torch
from conftest import make_image, refused
from jina_vlm import JinaVLMProcessor
from torch.utils.data import default_collate


SMALL, WIDE, TALL = (300, 300), (113, 500), (500, 300)
# Images of each sample, and what it is asked
SAMPLES = [([SMALL], "What?"), ([WIDE, SMALL], "Which of the two?"), ([], "the quick brown fox"), ([TALL], "Why?")]


@pytest.fixture(scope="module")
def batch(processor):
    """[`SAMPLES`] as a processor gives them: (by sample, one after the other)."""
    images = [[make_image(*size, seed=index) for index, size in enumerate(sizes)] for sizes, _ in SAMPLES]
    texts = ["<|image|>" * len(sizes) + f" User: {text} Assistant:" for sizes, text in SAMPLES]
    return tuple(
        dict(processor(text=texts, images=images, return_tensors="pt", tiles_by_sample=by_sample))
        for by_sample in (True, False)
    )


def logits(model, inputs: dict) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def assert_same(found: torch.Tensor, expected: torch.Tensor, inputs: dict) -> None:
    real = inputs["attention_mask"].bool() & (inputs["input_ids"] < 512)
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=1e-4)


def rows(inputs: dict, index) -> dict:
    """The rows of every tensor, as trainers take them."""
    return {name: value[index] for name, value in inputs.items()}


def test_what_the_processor_gives(batch):
    by_sample, tiles = batch
    assert set(by_sample) == {"input_ids", "attention_mask", "pixel_values"}
    assert torch.equal(by_sample["input_ids"], tiles["input_ids"])
    assert by_sample["pixel_values"].shape == (4, 5, 3, 378, 378)
    is_tile = torch.arange(5) < torch.tensor([[2], [5], [0], [3]])
    assert torch.equal(by_sample["pixel_values"][is_tile], tiles["pixel_values"])
    assert not by_sample["pixel_values"][~is_tile].any()


def test_every_form_gives_the_same_logits(model, batch):
    by_sample, tiles = batch
    expected = logits(model, tiles)
    assert torch.equal(logits(model, by_sample), expected)
    assert torch.equal(logits(model, {**by_sample, "pixel_values": tiles["pixel_values"]}), expected)


@pytest.mark.parametrize(
    "index", [slice(1, 3), [2], [3, 0, 2, 1], [1, 1, 0, 1]], ids=["sliced", "text alone", "shuffled", "repeated"]
)
def test_rows_are_cut_shuffled_and_repeated(model, batch, index):
    by_sample, tiles = batch
    inputs = rows(by_sample, index)
    assert_same(logits(model, inputs), logits(model, tiles)[index], inputs)


@pytest.mark.parametrize("settings", [{}, {"num_return_sequences": 2, "num_beams": 2}], ids=str)
def test_answers(model, batch, settings):
    by_sample, tiles = batch
    settings = {"max_new_tokens": 4, "do_sample": False, **settings}
    expected = model.generate(**tiles, **settings)
    assert torch.equal(model.generate(**by_sample, **settings), expected)
    alone = model.generate(**rows(by_sample, [2]), **settings)
    assert torch.equal(alone[:, -4:], expected[2 * len(expected) // 4 :][: len(alone), -4:])


def test_padding_costs_nothing(model, batch):
    seen = []
    embeddings = model.model.vision_model.tower.embeddings
    handle = embeddings.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    try:
        logits(model, batch[1])
        expected, seen[:] = sum(seen), []
        logits(model, batch[0])
    finally:
        handle.remove()
    assert sum(seen) == expected <= 10


def test_one_row_through_the_default_collator(model, processor):
    """Which puts a dimension around each tensor."""
    one = processor(text="<|image|> What?", images=make_image(*WIDE), return_tensors="pt")
    by_sample = processor(text="<|image|> What?", images=make_image(*WIDE), return_tensors="pt", tiles_by_sample=True)
    collated = default_collate([{name: value[0] for name, value in by_sample.items()}])
    assert torch.equal(logits(model, collated), logits(model, one))


def test_a_setting(processor, tmp_path):
    """In a processor's settings and in a chat; a call says otherwise. It is a trainer's, and not saved."""
    chosen = JinaVLMProcessor(processor.image_processor, processor.tokenizer, tiles_by_sample=True)
    chosen.save_pretrained(tmp_path)
    assert not JinaVLMProcessor.from_pretrained(tmp_path).tiles_by_sample
    loaded = JinaVLMProcessor.from_pretrained(tmp_path, tiles_by_sample=True)
    assert loaded.tiles_by_sample is True and not processor.tiles_by_sample
    image = make_image(*SMALL)
    assert loaded(text="<|image|>", images=image)["pixel_values"].shape[:2] == (1, 2)
    assert loaded(text="<|image|>", images=image, tiles_by_sample=False)["pixel_values"].shape[:2] == (2, 3)
    assert loaded(images=image)["pixel_values"].shape[:2] == (2, 3), "without texts there are no samples"
    assert loaded(text="<|image|>", images=image, return_tensors="np")["pixel_values"].shape[:2] == (1, 2)
    messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]}]
    chat = processor.apply_chat_template(messages, tokenize=True, return_dict=True, tiles_by_sample=True)
    assert chat["pixel_values"].shape[:2] == (1, 2)


def test_tiles_without_positions(processor, model, batch, tmp_path):
    """The model reads them off the tokens. In a call or as a setting, which is not saved: engines need them."""
    chosen = JinaVLMProcessor(processor.image_processor, processor.tokenizer, return_tile_positions=False)
    chosen.save_pretrained(tmp_path)
    assert JinaVLMProcessor.from_pretrained(tmp_path).return_tile_positions
    images = [[make_image(*size, seed=index) for index, size in enumerate(sizes)] for sizes, _ in SAMPLES]
    texts = ["<|image|>" * len(sizes) + f" User: {text} Assistant:" for sizes, text in SAMPLES]
    for one, kwargs in ((processor, {"return_tile_positions": False}), (chosen, {"return_tile_positions": None})):
        inputs = one(text=texts, images=images, return_tensors="pt", **kwargs)
        assert set(inputs) == {"input_ids", "attention_mask", "pixel_values"}
        assert torch.equal(inputs["pixel_values"], batch[1]["pixel_values"])
    assert torch.equal(logits(model, inputs), logits(model, batch[1]))
    assert set(processor(images=images, return_tile_positions=False)) == {"pixel_values"}


def test_tiles_are_counted_as_trainers_ask(processor):
    """By lists of images, with None for a sample that has none."""
    images = [[make_image(*SMALL)], None, [make_image(*WIDE), make_image(*SMALL)], []]
    counted = processor.image_processor(images, crop_to_patches=True, return_tensors="pt")["num_patches"]
    assert counted.tolist() == [2, 3, 2]
    texts = ["<|image|>", "none", "<|image|><|image|>", "none"]
    inputs = processor(text=texts, images=images, crop_to_patches=True, tiles_by_sample=True, return_tensors="pt")
    assert inputs["num_patches"].tolist() == [2, 3, 2] and "tile_positions" not in inputs
    with refused("Expected an image .*, got NoneType", TypeError):
        processor.image_processor([make_image(*SMALL), None])


def test_prompts_without_their_images_are_not_answered(model, batch):
    tiles = batch[1]
    ids = {name: tiles[name] for name in ("input_ids", "attention_mask")}
    places = int((ids["input_ids"] == model.config.image_token_id).sum())
    with refused(f"The prompts have {places} places for image features, but no images are given. Pass"):
        model.generate(**ids, max_new_tokens=2)
    for nothing in ({"tile_positions": tiles["tile_positions"]}, {"mm_encoder_outputs": {}}):
        with refused("but no images are given"):
            model.generate(**ids, **nothing, max_new_tokens=2)
    assert model.generate(**rows(ids, [2]), max_new_tokens=2).shape[1] == ids["input_ids"].shape[1] + 2


def test_none_for_no_images(processor):
    """As data sets have it where some samples have images and others none."""
    image = make_image(*SMALL)
    found = processor(text=["<|image|> What?", "Why?"], images=[[image], None], return_tensors="pt")
    expected = processor(text=["<|image|> What?", "Why?"], images=[[image], []], return_tensors="pt")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_contradictions_are_told(model, batch):
    """Totals may agree while an image would stand at another's question."""
    by_sample, tiles = batch
    pixels = by_sample["pixel_values"]
    cases = {
        r"show images of \[2, 5, 0, 3\] tiles, but `pixel_values` has \[3, 5, 0, 2\]": pixels[[3, 1, 2, 0]],
        r"show images of \[2, 5, 0, 3\] tiles, but `pixel_values` has \[2, 2, 0, 2\]": pixels[:, :2],
        r"show images of \[2, 5, 0, 3\] tiles, but `pixel_values` has \[2, 5, 0\]": pixels[:3],
        "show images of 10 tiles, but `pixel_values` has 9": tiles["pixel_values"][:9],
    }
    for message, given in cases.items():
        with refused(message):
            logits(model, {**by_sample, "pixel_values": given})
    with refused(r"has \[3, 5, 0, 2\]. Pass text and images of the same samples"):
        model.generate(**{**by_sample, "pixel_values": pixels[[3, 1, 2, 0]]}, max_new_tokens=1)
    ids = by_sample["input_ids"].clone()
    ids[ids == model.config.structural_token_ids[3]] = 7
    with refused("grids of sample 0's images cannot be read off its tokens: their blocks are"):
        logits(model, {**by_sample, "input_ids": ids})
