"""Options of the library's Trainer, as it comes: each against our own forward pass over the same rows."""

import copy
import functools
import inspect

import datasets
import jina_vlm
import numpy as np
import pytest
import torch
from conftest import make_image
from miniature import save_miniature
from PIL import Image
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

from jina_vlm_tools.training import JinaVLMCollator


ANSWERS = ["a red star", "left", "a blue ring, a green one", "no", "above the ring", "two"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_miniature(tmp_path_factory.mktemp("miniature"), tile_size=140)


@pytest.fixture
def model(folder):
    return jina_vlm.JinaVLMForConditionalGeneration.from_pretrained(folder)


@pytest.fixture(scope="module")
def collator(folder):
    return JinaVLMCollator(jina_vlm.JinaVLMProcessor.from_pretrained(folder, max_tiles=2))


@pytest.fixture(scope="module")
def rows(collator) -> list[dict]:
    """In turn an image of one tile, one of two, and text alone, with the length that each becomes."""
    one, two = (Image.fromarray(make_image(*size)) for size in ((200, 200), (900, 200)))
    made = [
        {"images": ([one], [two], [])[index % 3], "texts": [{"user": f"which {index}?", "assistant": answer}]}
        for index, answer in enumerate(ANSWERS)
    ]
    return [{**row, "length": collator.measure(row)[0]} for row in made]


@pytest.fixture(scope="module")
def batch(collator, rows):
    return collator(rows)


@pytest.fixture
def make(model, collator, rows, tmp_path):
    """The function `make(..., **options)`: a Trainer of the rows in order, all six a step, that changes no weight
    unless it is given a learning rate."""

    parameters = inspect.signature(Trainer).parameters

    def make(**options) -> Trainer:
        of_trainer = {name: options.pop(name) for name in list(options) if name in parameters}
        arguments = {
            "output_dir": str(tmp_path),
            "per_device_train_batch_size": 6,
            "per_device_eval_batch_size": 6,
            "max_steps": 1,
            "learning_rate": 0.0,
            "lr_scheduler_type": "constant",
            "optim": "sgd",
            "max_grad_norm": 0.0,
            "train_sampling_strategy": "sequential",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "remove_unused_columns": False,
            "use_cpu": True,
            "disable_tqdm": True,
        }
        of_trainer = {
            "model": model,
            "data_collator": collator,
            "train_dataset": rows,
            "eval_dataset": rows,
            **of_trainer,
        }
        return Trainer(args=TrainingArguments(**{**arguments, **options}), **of_trainer)

    return make


def losses(trainer: Trainer, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@torch.no_grad()
def own_loss(model, batch, **kwargs) -> float:
    return model.eval()(**batch, **kwargs).loss.item()


def as_ids(collator, rows) -> dict:
    """A careless collator's batch: what is to be predicted is all that was read."""
    batch = collator(rows)
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


# ---------------------------------------------------------------------------------------------------------------------
# Losses and steps
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [6, 2, 1])
def test_accumulated_batches_are_one_large_batch(model, make, batch, size):
    """The loss, and every weight after a step of plain gradient descent; some of the batches are text alone."""
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    expected = model(**batch).loss
    expected.backward()
    expected_step = {name: -0.1 * value.grad for name, value in model.named_parameters()}
    model.zero_grad()
    trainer = make(per_device_train_batch_size=size, gradient_accumulation_steps=6 // size, learning_rate=0.1)
    trainer.train()
    assert losses(trainer) == pytest.approx([expected.item()], abs=1e-5)
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.detach() - before[name], expected_step[name], atol=1e-6, rtol=1e-3)


def test_labels_that_are_the_ids(model, make, collator, rows):
    """The Trainer counts labels at images, which the model drops: the loss is the mean over words nevertheless, in
    training and evaluation. Accumulated, each batch weighs as much as all that it has labels for."""
    expected = own_loss(model, as_ids(collator, rows))
    careless = functools.partial(as_ids, collator)
    trainer = make(data_collator=careless, eval_strategy="steps", eval_steps=1)
    trainer.train()
    assert losses(trainer) == losses(trainer, "eval_loss") == pytest.approx([expected], abs=1e-5)

    parts = [as_ids(collator, rows[start : start + 2]) for start in (0, 2, 4)]
    weights = np.array([(part["labels"][:, 1:] != -100).sum() for part in parts])
    expected = np.dot([own_loss(model, part) for part in parts], weights) / weights.sum()
    trainer = make(data_collator=careless, per_device_train_batch_size=2, gradient_accumulation_steps=3)
    trainer.train()
    assert losses(trainer) == pytest.approx([expected], abs=1e-5)


def test_label_smoothing(model, make, batch):
    """By the library's smoother as a loss of one's own, which is told to shift: `label_smoothing_factor` alone shifts
    for the classes of the library's own list of causal models."""
    with torch.no_grad():
        logits = model.eval()(**batch).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), label_smoothing=0.2)
    smoothed = functools.partial(LabelSmoother(0.2), shift_labels=True)
    for size in (6, 2):
        trainer = make(
            compute_loss_func=smoothed, per_device_train_batch_size=size, gradient_accumulation_steps=6 // size
        )
        trainer.train()
        assert losses(trainer) == pytest.approx([expected.item()], abs=1e-5)


def test_neftune(model, make, batch):
    """Noise of its size on the embeddings of texts and of images' places while training, and none in evaluation."""
    alpha, seen = 5.0, []

    def see(module, args, kwargs):
        seen.append((module.training, kwargs["inputs_embeds"].detach()))

    model.model.language_model.register_forward_pre_hook(see, with_kwargs=True)
    expected = own_loss(model, batch)
    trainer = make(neftune_noise_alpha=alpha, eval_strategy="steps", eval_steps=1)
    trainer.train()
    (_, clean), (training, noisy), (evaluating, again) = seen
    assert training and not evaluating and torch.equal(again, clean)
    of_images = batch["input_ids"] == model.config.image_token_id
    width = clean.shape[-1]
    for places, length in ((~of_images, clean.shape[1]), (of_images, int(of_images.sum()))):
        largest = alpha / (length * width) ** 0.5
        assert 0.95 * largest < (noisy - clean)[places].abs().max() <= largest * 1.001
    assert losses(trainer, "eval_loss") == pytest.approx([expected], abs=1e-5)
    assert losses(trainer)[0] != pytest.approx(expected, abs=1e-5)


def test_batches_too_large_are_tried_again(model, make, batch, collator, rows):
    """`auto_find_batch_size`: six rows are too many here, five are not."""
    sizes = []

    def too_large(rows):
        sizes.append(len(rows))
        if len(rows) > 5:
            raise RuntimeError("CUDA out of memory.")
        return collator(rows)

    trainer = make(data_collator=too_large, auto_find_batch_size=True)
    trainer.train()
    assert sizes[:2] == [6, 5]
    assert losses(trainer) == pytest.approx([own_loss(model, collator(rows[:5]))], abs=1e-5)


def test_grouped_by_length(make, rows, batch):
    """By a column of the rows, which have no `input_ids` yet: `JinaVLMCollator.measure` counts."""
    assert [row["length"] for row in rows] == batch["attention_mask"].sum(dim=1).tolist()

    def padding(strategy: str) -> int:
        trainer = make(
            train_dataset=datasets.Dataset.from_list([{"length": row["length"]} for row in rows * 8]),
            data_collator=lambda rows: {"length": torch.tensor([row["length"] for row in rows])},
            train_sampling_strategy=strategy,
            length_column_name="length",
            per_device_train_batch_size=2,
        )
        lengths = [batch["length"] for batch in trainer.get_train_dataloader()]
        assert sorted(torch.cat(lengths).tolist()) == sorted([row["length"] for row in rows] * 8)
        return sum(int((length.max() - length).sum()) for length in lengths)

    assert padding("group_by_length") < 0.3 * padding("random")


@pytest.mark.slow
def test_compiled(model, make):
    """By inductor: three steps over batches of other shapes give the losses that they give without."""
    other = copy.deepcopy(model)  # what a Trainer has prepared, another does not compile
    options = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 0.1}
    trainer = make(**options)
    trainer.train()
    compiled = make(model=other, torch_compile=True, **options)
    compiled.train()
    assert isinstance(compiled.model_wrapped, torch._dynamo.OptimizedModule)
    assert losses(compiled) == pytest.approx(losses(trainer), abs=1e-4) and len(set(losses(trainer))) == 3


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------


def right_tokens(logits, labels) -> list[bool]:
    """Of each label that is to be predicted, whether the logits before it say so."""
    counted = labels[:, 1:] != -100
    return (logits[:, :-1].argmax(-1) == labels[:, 1:])[counted].tolist()


@pytest.mark.parametrize("every", [None, 1])
def test_predictions_are_logits_by_sample(model, make, collator, rows, every):
    """What `compute_metrics` is given, over batches of other lengths and numbers of tiles: each row's own logits, and
    nothing of the images."""
    given = []

    def compute_metrics(prediction):
        given.append(prediction)
        return {"right": sum(right_tokens(prediction.predictions, prediction.label_ids))}

    trainer = make(compute_metrics=compute_metrics, per_device_eval_batch_size=2, eval_accumulation_steps=every)
    metrics = trainer.evaluate()
    (prediction,) = given
    assert isinstance(prediction.predictions, np.ndarray) and len(prediction.predictions) == len(rows)
    right = 0
    for row, logits, labels in zip(rows, prediction.predictions, prediction.label_ids, strict=True):
        alone = collator([row])
        length = alone["input_ids"].shape[1]
        with torch.no_grad():
            expected = model.eval()(**alone).logits
        np.testing.assert_allclose(logits[:length], expected[0], atol=1e-4)
        assert labels[:length].tolist() == alone["labels"][0].tolist() and (labels[length:] == -100).all()
        right += sum(right_tokens(expected, alone["labels"]))
    assert metrics["eval_right"] == right
    pairs = [collator(rows[start : start + 2]) for start in (0, 2, 4)]
    assert metrics["eval_loss"] == pytest.approx(np.mean([own_loss(model, pair) for pair in pairs]), abs=1e-5)


def test_preprocessed_logits(model, make, batch):
    """Predicted ids instead of logits, which are a vocabulary's size smaller."""
    given = []

    def compute_metrics(prediction):
        given.append(prediction.predictions)
        return {}

    def most_likely(logits, labels):
        assert isinstance(logits, torch.Tensor) and logits.shape[:2] == labels.shape
        return logits.argmax(-1)

    make(
        compute_metrics=compute_metrics, preprocess_logits_for_metrics=most_likely, per_device_eval_batch_size=3
    ).evaluate()
    with torch.no_grad():
        expected = model.eval()(**batch).logits.argmax(-1)
    attended = batch["attention_mask"].bool().numpy()
    assert given[0].shape == expected.shape and (given[0] == expected.numpy())[attended].mean() > 0.999


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------


class Stop(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        control.should_training_stop = True


def test_resumed(make, folder, tmp_path):
    """Stopped after two of four steps, in the middle of the rows, and gone on with: the losses of a run that was not
    stopped."""

    def start(output: str, **options) -> Trainer:
        model = jina_vlm.JinaVLMForConditionalGeneration.from_pretrained(folder)
        return make(model=model, output_dir=str(tmp_path / output), **options)

    options = {
        "per_device_train_batch_size": 2, "max_steps": 4, "learning_rate": 1e-2, "optim": "adamw_torch",
        "save_strategy": "steps", "save_steps": 2, "train_sampling_strategy": "random",
    }  # fmt: skip
    whole = start("whole", **options)
    whole.train()
    stopped = start("stopped", callbacks=[Stop()], **options)
    stopped.train()
    assert stopped.state.global_step == 2
    resumed = start("stopped", **options)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole) and len(set(losses(whole))) == 4


def test_the_best_is_loaded_at_the_end(model, make, batch, tmp_path):
    """A step that is too long makes the model worse: the one before it is what is left."""
    trainer = make(
        max_steps=2, learning_rate=0.3, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, save_total_limit=2, lr_scheduler_type="constant", optim="adamw_torch",
    )  # fmt: skip
    trainer.train()
    found = losses(trainer, "eval_loss")
    assert len(found) == 2 and found[0] != pytest.approx(found[1], abs=1e-2)
    assert own_loss(model, batch) == pytest.approx(min(found), abs=1e-5)
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{1 + found.index(min(found))}")
