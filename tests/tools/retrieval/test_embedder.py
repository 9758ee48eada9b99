"""`JinaVLMEmbedder` on the small retriever: vectors, errors, the adapter's switch, and jina-embeddings-v4's calls."""

from pathlib import Path

import numpy as np
import pytest
import torch
from jina_vlm import JinaVLMForConditionalGeneration, JinaVLMProcessor
from PIL import Image
from torch import nn

from jina_vlm_tools.files import ROOT, TINY
from jina_vlm_tools.retrieval import folder
from jina_vlm_tools.retrieval.embedder import JinaVLMEmbedder
from jina_vlm_tools.retrieval.heat_maps import HeatMap, compare
from jina_vlm_tools.retrieval.inputs import to_chat
from jina_vlm_tools.retrieval.loading import load_embedder


FOLDER = ROOT / "checkpoints" / "tiny-retrieval"
SHAPES = ROOT / "docs" / "shapes.png"


@pytest.fixture(scope="module")
def embedder() -> JinaVLMEmbedder:
    return JinaVLMEmbedder.from_pretrained(FOLDER, dtype=torch.float32)


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return Image.open(SHAPES).convert("RGB")


def greedy(embedder: JinaVLMEmbedder, image: Image.Image) -> str:
    return embedder.answer("Describe the picture.", image, max_new_tokens=8)


def test_alone_equals_in_a_batch(embedder, image):
    wide = image.resize((700, 300))
    inputs = ["a red star", image, {"image": wide, "text": "wide"}, {"image": [image, wide]}, Path(SHAPES), "47 " * 30]
    together = embedder.embed(inputs, kind="both", batch_size=4)
    assert len(together) == 6
    for index, content in enumerate(inputs):
        alone = embedder.embed([content], kind="both")
        assert torch.allclose(alone.dense[0], together.dense[index], atol=1e-5)
        assert alone.multi[0].shape == together.multi[index].shape
        assert torch.allclose(alone.multi[0], together.multi[index], atol=1e-5)
    assert torch.allclose(together.dense[1], together.dense[4], atol=1e-5)  # the same image, by its path
    assert together.dense.dtype == torch.float32
    assert torch.allclose(together.dense.norm(dim=-1), torch.ones(6))


def test_vectors_are_means_and_projections_of_the_last_states(embedder, image):
    chat = [
        {"role": "system", "content": [{"type": "text", "text": "Passage:"}]},
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "a page"}]},
    ]
    inputs = embedder.processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
    with torch.inference_mode(), embedder.using("retrieval"):
        states = embedder.model.model(**inputs).last_hidden_state[0]
    made = embedder.embed([{"image": image, "text": "a page"}], kind="both")
    normalize = nn.functional.normalize
    assert torch.allclose(made.dense[0], normalize(states.mean(0), dim=-1), atol=1e-5)
    assert torch.allclose(made.multi[0], normalize(embedder.projector(states), dim=-1), atol=1e-5)


def test_the_order_is_given_back_and_progress_told(embedder):
    texts = ["word " * count for count in (9, 1, 5, 3, 7)]
    seen = []
    made = embedder.embed(texts, kind="multi", batch_size=2, progress=lambda done, of: seen.append((done, of)))
    lengths = [len(one) for one in made.multi]
    assert sorted(range(5), key=lengths.__getitem__) == sorted(range(5), key=lambda index: len(texts[index]))
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_roles_kinds_widths_and_pooling(embedder):
    query, page = (embedder.embed(["a red star"], role=role) for role in ("query", "document"))
    assert not torch.allclose(query.dense, page.dense, atol=1e-3)
    assert embedder.embed(["x"], kind="multi").dense is None and embedder.embed(["x"]).multi is None
    both = embedder.embed(["a red star"], kind="both", dims=32)
    assert torch.allclose(both.dense, page.truncate(32).dense, atol=1e-6)
    pooled = embedder.embed(["a red star on the left"], kind="multi", pool_factor=4)
    whole = embedder.embed(["a red star on the left"], kind="multi")
    assert len(pooled.multi[0]) == -(-len(whole.multi[0]) // 4)
    assert len(embedder.embed([], kind="both").multi) == 0


def test_generation_is_as_before_whatever_happened(embedder, image):
    plain = JinaVLMEmbedder(
        JinaVLMForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32),
        JinaVLMProcessor.from_pretrained(TINY),
    )
    expected = greedy(plain, image)
    assert greedy(embedder, image) == expected
    adapted = embedder.embed(["a red star"]).dense
    with pytest.raises(RuntimeError, match="in between"), embedder.using():
        raise RuntimeError("in between")
    with pytest.raises(FileNotFoundError, match="Input 1"):
        embedder.embed(["fine", {"image": "nowhere.png"}])
    assert greedy(embedder, image) == expected
    assert torch.equal(adapted, embedder.embed(["a red star"]).dense)
    assert not torch.allclose(adapted, plain.embed(["a red star"]).dense, atol=1e-2)


def test_an_answer_is_from_as_many_tiles_as_the_base_takes(embedder):
    assert embedder.processor.image_processor.max_tiles == 4
    seen = []
    hook = embedder.model.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs), with_kwargs=True)
    page = Image.new("RGB", (1600, 1200), "white")
    embedder.answer("How many stars are there?", page, max_new_tokens=1)
    hook.remove()
    chat = [
        {
            "role": "user",
            "content": [{"type": "image", "image": page}, {"type": "text", "text": "How many stars are there?"}],
        }
    ]
    expected = JinaVLMProcessor.from_pretrained(TINY).apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert torch.equal(seen[0]["input_ids"], expected["input_ids"])


def test_adapters_are_on_to_the_end_of_a_block_in_which_something_is_embedded(embedder):
    """Or asked, for which they are off."""
    ids = torch.arange(100, 120)[None]

    @torch.inference_mode()
    def states() -> torch.Tensor:
        return embedder.model.model(input_ids=ids).last_hidden_state

    plain, answer = states(), embedder.answer("How many stars are there?", SHAPES)
    with embedder.using("retrieval"):
        adapted = states()
        embedder.embed(["a red star"])
        assert torch.equal(states(), adapted)
        assert embedder.answer("How many stars are there?", SHAPES) == answer
        assert torch.equal(states(), adapted)
    assert torch.equal(states(), plain) and not torch.allclose(adapted, plain, atol=1e-3)


def test_a_folder_of_the_hub_is_looked_up_once(monkeypatch):
    asked = []
    monkeypatch.setattr(folder, "snapshot_download", lambda name, **_: asked.append(name) or FOLDER)
    monkeypatch.setattr(folder, "cached_file", lambda *_, **__: "adapter_config.json")
    assert load_embedder("me/retrieval", "cpu").tasks == ["retrieval"] and asked == ["me/retrieval"]


@pytest.mark.parametrize(
    ("inputs", "asked", "error", "said"),
    [
        ("a text", {}, TypeError, "Put a single one into a list"),
        (["fine", 7], {}, TypeError, "Input 1 is a int"),
        (["fine", " "], {}, ValueError, "Input 1 is empty"),
        ([{"text": "x", "video": "y"}], {}, ValueError, "Input 0 has video"),
        (["fine", {"image": "nowhere.png"}], {}, FileNotFoundError, "Input 1: No such image"),
        (["x"], {"task": "code"}, ValueError, "loaded for retrieval"),
        (["x"], {"role": "passage"}, ValueError, "query, document"),
        (["x"], {"kind": "late"}, ValueError, "dense, multi, both"),
        (["x"], {"dims": 31}, ValueError, "16, 32, 64, 128"),
        (["x"], {"dims": 32, "kind": "multi"}, ValueError, "for dense vectors"),
        (["x"], {"batch_size": 0}, ValueError, "`batch_size` must be at least 1"),
        (["x"], {"pool_factor": 2}, ValueError, "for multi-vectors"),
        (["x"], {"max_length": 0}, ValueError, "`max_length` must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_embedded_is_named(embedder, inputs, asked, error, said):
    with pytest.raises(error, match=said):
        embedder.embed(inputs, **asked)


def test_long_texts_are_cut_with_a_warning_unless_that_was_asked_for(embedder, recwarn):
    text = "red star " * 3000
    with pytest.warns(UserWarning, match="Inputs 1 are as long as the model takes, 4096 tokens"):
        whole = embedder.embed(["short", text], kind="multi")
    assert len(whole.multi[1]) == 4096
    with pytest.warns(UserWarning, match="Inputs 0 are .* Pass `max_length=4096`"):
        assert len(embedder.encode_text([text], return_multivector=True)[0]) == 4096
    recwarn.clear()
    assert len(embedder.embed([text], kind="multi", max_length=4096).multi[0]) == 4096
    assert len(embedder.embed([text], kind="multi", max_length=64).multi[0]) == 64
    assert not recwarn.list
    with pytest.raises(ValueError, match="would cut an image"):
        embedder.embed([{"image": SHAPES}], max_length=64)


def test_calls_of_jina_embeddings_v4(embedder, image):
    query = embedder.encode_text(texts="a red star", task="retrieval", prompt_name="query")
    assert torch.equal(query, embedder.embed(["a red star"], role="query").dense[0])
    passages = embedder.encode_text(["a red star", "47"], task="retrieval", prompt_name="passage", truncate_dim=32)
    assert torch.equal(torch.stack(passages), embedder.embed(["a red star", "47"], dims=32).dense)
    assert torch.equal(embedder.encode_text("x"), embedder.encode_text("x", prompt_name="query"))
    images = embedder.encode_image(images=[str(SHAPES), image], task="retrieval", return_numpy=True)
    assert isinstance(images, np.ndarray) and images.shape == (2, 128)
    multi = embedder.encode_image([image], return_multivector=True, max_pixels=50_000)
    assert multi[0].shape[1] == embedder.projector.out_features
    texts = embedder.encode_text(["a", "a longer one"], return_multivector=True, return_numpy=True, max_length=64)
    assert isinstance(texts, list) and len({len(one) for one in texts}) == 2
    with pytest.raises(ValueError, match='"query" or "passage"'):
        embedder.encode_text("x", prompt_name="document")
    with pytest.raises(ValueError, match="`truncate_dim` is for dense"):
        embedder.encode_text("x", return_multivector=True, truncate_dim=32)


def test_a_checkpoint_without_projector_embeds_dense_alone():
    plain = JinaVLMEmbedder.from_pretrained(TINY, dtype=torch.float32)
    assert plain.tasks == [] and plain.embed(["x"]).dense.shape == (1, 128)
    with pytest.raises(ValueError, match="need a projector"):
        plain.embed(["x"], kind="multi")
    with pytest.raises(ValueError, match="No adapter is loaded"):
        plain.embed(["x"], task="retrieval")
    with pytest.raises(ValueError, match="takes vectors of 64 numbers, but the model makes 128"):
        JinaVLMEmbedder(plain.model, plain.processor, nn.Linear(64, 16, bias=False))


def test_heat_maps_have_a_word_for_each_of_the_query(embedder, image):
    heat = embedder.heat_map("a red star, on the left", image)
    assert heat.words == ["a", "red", "star,", "on", "the", "left"]
    rows, columns = embedder.processor.image_processor.get_token_grid(
        *embedder.processor.image_processor.get_tiling(image.height, image.width)[1]
    )
    assert heat.rise.shape == (6, rows, columns)
    assert heat.draw().size == image.size and heat.draw([1, 2]) != heat.draw([3])
    with pytest.raises(ValueError, match="from 0 to 5"):
        heat.draw([6])


def test_a_word_whose_best_match_lies_outside_the_image_has_no_color(embedder, image):
    length = len(embedder.embed(["a"], role="query", kind="multi").multi[0])
    ids = embedder.processor.apply_chat_template(
        [to_chat(image, "document")], tokenize=True, return_dict=True, return_tensors="pt"
    )["input_ids"][0]
    is_image = ids == embedder.model.config.image_token_id
    around, corner, empty = torch.eye(3)
    shown = torch.where(is_image[:, None], empty, around)
    shown[is_image.nonzero()[-1]] = corner  # the last of the tiles'
    outside, inside = (
        compare(embedder, "a", image, word.expand(length, 3), shown)
        for word in (0.8 * around + 0.6 * corner, 0.6 * around + 0.8 * corner)
    )
    assert not outside.rise.any() and outside.draw() == image
    assert torch.isclose(inside.rise[0, -1, -1], torch.tensor(0.2)) and inside.rise.sum() == inside.rise[0, -1, -1]
    assert inside.draw() != image


def test_what_follows_a_query_belongs_to_its_last_word(embedder, image):
    """A decoder has read all of a query only there, and can say only there what its last words ask for."""
    asked = torch.zeros(len(embedder.embed(["a star"], role="query", kind="multi").multi[0]), 2)
    shown = torch.zeros(len(embedder.embed([image], kind="multi").multi[0]), 2)
    ids = embedder.processor.apply_chat_template(
        [to_chat(image, "document")], tokenize=True, return_dict=True, return_tensors="pt"
    )["input_ids"][0]
    last_of_tiles = (ids == embedder.model.config.image_token_id).nonzero()[-1]
    asked[-1, 0] = shown[last_of_tiles, 0] = 1
    rise = compare(embedder, "a star", image, asked, shown).rise
    assert rise.sum() == rise[1, -1, -1] == 1


def test_a_word_that_matches_the_image_little_better_than_the_prompt_has_little_color(image):
    """As words have that say nothing: they match where nothing is, which is much of an image."""
    rise = torch.zeros(2, 4, 4)
    rise[0, :, ::2] = 0.02
    rise[1, 1, 2] = 0.7
    heat = HeatMap(image, ["the", "star"], rise)
    drawn = [np.asarray(each, dtype=float) for each in (heat.draw(), heat.draw([1]), heat.draw([0]), image)]
    assert np.abs(drawn[0] - drawn[1]).max() < 10 < np.abs(drawn[1] - drawn[3]).max()
    assert np.abs(drawn[2] - drawn[3]).max() < 10
    assert heat.draw([0]) != image
