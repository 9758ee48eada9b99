"""Training by sentence-transformers: its losses that take a batch apart give the loss and the gradients of those that
do not, for pages of several tiles."""

import pytest
import torch
from cases import ALL, DIMS, shapes
from comparing import same
from datasets import Dataset
from sentence_transformers import (
    MultiVectorEncoder,
    MultiVectorEncoderTrainer,
    MultiVectorEncoderTrainingArguments,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.multi_vector_encoder import losses as late
from sentence_transformers.sentence_transformer import losses

from jina_vlm_tools.retrieval.inputs import PROMPTS


QUERIES = ["a red circle", "two green triangles beside a blue star", "nothing"]
PAGES = [shapes(1), shapes(2, 640, 480), shapes(3, 300, 500)]
GRADIENTS = 1e-4  # in parts of the largest: sums of many, in another order
CLASSES = {"dense": SentenceTransformer, "multi": MultiVectorEncoder}


def load(home, kind: str):
    # The last two are in the folder for multi-vectors, and lost where it is opened as one for dense vectors.
    model = CLASSES[kind](
        str(home / ALL), trust_remote_code=True, model_kwargs={"dtype": torch.float32}, device="cpu",
        prompts=PROMPTS, processor_kwargs={"tiles_by_sample": True},
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or ".linear." in name)  # loaded frozen
    return model.train()


@pytest.fixture(scope="module")
def models(home):
    return {kind: load(home, kind) for kind in CLASSES}


@pytest.fixture(scope="module")
def guide(home):
    return load(home, "dense").eval()


def features(model, pages=PAGES) -> list[dict]:
    return [
        model.preprocess(QUERIES, prompt=model.prompts["query"]),
        model.preprocess(pages, prompt=model.prompts["document"]),
    ]


def loss_and_gradients(model, loss, batch, labels=None) -> tuple[float, list[torch.Tensor]]:
    model.zero_grad()
    value = loss([dict(one) for one in batch], labels)
    value.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients and all(torch.isfinite(one).all() for one in gradients)
    return value.item(), gradients


PAIRS = {
    "MultipleNegativesRankingLoss": (
        "dense",
        lambda model, guide: losses.MultipleNegativesRankingLoss(model),
        lambda model, guide: losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2),
    ),
    "MatryoshkaLoss of it": (
        "dense",
        lambda model, guide: losses.MatryoshkaLoss(model, losses.MultipleNegativesRankingLoss(model), [128, DIMS]),
        lambda model, guide: losses.MatryoshkaLoss(
            model, losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2), [128, DIMS]
        ),
    ),
    "GISTEmbedLoss": (
        "dense",
        lambda model, guide: losses.GISTEmbedLoss(model, guide),
        lambda model, guide: losses.CachedGISTEmbedLoss(model, guide, mini_batch_size=2),
    ),
    "MultiVectorMultipleNegativesRankingLoss": (
        "multi",
        lambda model, guide: late.MultiVectorMultipleNegativesRankingLoss(model),
        lambda model, guide: late.CachedMultiVectorMultipleNegativesRankingLoss(model, mini_batch_size=2),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_cached_is_as_uncached(models, guide, name):
    kind, plain, cached = PAIRS[name]
    model = models[kind]
    batch = features(model)
    expected, gradients = loss_and_gradients(model, plain(model, guide), batch)
    found, cached_gradients = loss_and_gradients(model, cached(model, guide), batch)
    assert expected > 1e-3
    same(f"{name}, cached against uncached", found, expected)
    largest = max(one.abs().max() for one in gradients)
    for one, other in zip(gradients, cached_gradients, strict=True):
        same(f"{name}, gradients in parts of the largest", other / largest, one / largest, GRADIENTS)


def test_cosent(models):
    model = models["dense"]
    value, _ = loss_and_gradients(model, losses.CoSENTLoss(model), features(model), torch.tensor([0.9, 0.1, 0.5]))
    assert value > 0


def test_as_many_images_as_samples_but_not_one_each(models):
    """The library then takes rows of pixels for images, and no processor can tell it that they are samples. It is
    refused, not trained on."""
    model = models["dense"]
    contents = [[("image", PAGES[0]), ("image", PAGES[1])], [("text", "none")], [("image", PAGES[2])]]
    chats = [
        [{"role": "user", "content": [{"type": kind, kind: value} for kind, value in content]}] for content in contents
    ]
    batch = features(model, chats)
    plain, _ = loss_and_gradients(model, losses.MultipleNegativesRankingLoss(model), batch)
    assert plain > 0
    with pytest.raises(ValueError, match="image"):
        loss_and_gradients(model, losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=1), batch)


TRAINED = {
    "CachedMultipleNegativesRankingLoss": (
        "dense",
        lambda model, guide: PAIRS["MultipleNegativesRankingLoss"][2](model, guide),
    ),
    "CachedGISTEmbedLoss": ("dense", lambda model, guide: PAIRS["GISTEmbedLoss"][2](model, guide)),
    "CachedMultiVectorMultipleNegativesRankingLoss": (
        "multi",
        lambda model, guide: PAIRS["MultiVectorMultipleNegativesRankingLoss"][2](model, guide),
    ),
}


@pytest.mark.parametrize("name", TRAINED)
def test_trainer(home, guide, name, tmp_path):
    kind, make = TRAINED[name]
    model = load(home, kind)
    trainer_class, arguments = {
        "dense": (SentenceTransformerTrainer, SentenceTransformerTrainingArguments),
        "multi": (MultiVectorEncoderTrainer, MultiVectorEncoderTrainingArguments),
    }[kind]
    trainer = trainer_class(
        model=model,
        args=arguments(
            str(tmp_path), max_steps=3, per_device_train_batch_size=3, learning_rate=3e-3, logging_steps=1,
            use_cpu=True, report_to="none", save_strategy="no", prompts={"query": "Query:", "page": "Passage:"},
            lr_scheduler_type="constant", dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_dict({"query": QUERIES, "page": PAGES}),
        loss=make(model, guide),
    )  # fmt: skip
    trainer.train()
    values = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(values) == 3 and values[-1] < values[0], values


def test_its_own_sizes_of_tiles_are_kept(models):
    """The folder's processor cuts into four tiles at most, and gives each sample a row."""
    pixel_values = features(models["dense"])[1]["pixel_values"]
    assert pixel_values.shape[:2] == (3, 5) and "tile_positions" not in features(models["dense"])[1]
