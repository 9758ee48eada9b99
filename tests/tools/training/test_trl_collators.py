"""What TRL's own collators hand to the model: the tokens that our processor makes of the whole, opened once and ended
once.

They encode prompts and completions apart, and put the halves together.
"""

import copy

import datasets
import pytest
import torch
from conftest import make_image
from miniature import save_miniature
from PIL import Image
from released import RELEASED_TEMPLATE


trl = pytest.importorskip("trl")
from trl.trainer import dpo_trainer, kto_trainer, sft_trainer  # noqa: E402


BOS = "<|endoftext|>"
QUESTIONS, ANSWERS, OTHERS = ["what?", "two plus three?"], ["the fox", "five"], ["a dog", "no idea"]


def image(height: int, width: int) -> Image.Image:
    return Image.fromarray(make_image(height, width))


IMAGES = {
    "images": [[image(20, 20)], [image(30, 90), image(20, 20)]],
    "some": [[], [image(20, 20)]],
    "none": [[], []],
}


def turns(role: str, text: str) -> list[dict]:
    return [{"role": role, "content": text}]


def written(role: str, text: str, images: list) -> str:
    """A turn as the template writes it."""
    return f"{BOS} User: {'<|image|>' * len(images)}{text} Assistant:" if role == "user" else f" {text}{BOS}"


@pytest.fixture(params=["chats", "texts"])
def make(request):
    """The function `make(role, text, images)`: a prompt or completion of a row, as turns or as text."""
    return (lambda role, text, images: turns(role, text)) if request.param == "chats" else written


def rows(make, images: str, **columns) -> list[dict]:
    return [
        {
            "images": list(IMAGES[images][index]),
            "prompt": make("user", question, IMAGES[images][index]),
            **{name: make("assistant", texts[index], []) for name, texts in columns.items()},
        }
        for index, question in enumerate(QUESTIONS)
    ]


def whole(processor, index: int, answer: str, images: str, **kwargs) -> dict:
    """What the processor makes of the conversation in one piece."""
    content = [{"type": "image", "image": image} for image in IMAGES[images][index]]
    chat = [
        {"role": "user", "content": [*content, {"type": "text", "text": QUESTIONS[index]}]},
        *turns("assistant", answer),
    ]
    return processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt", **kwargs)


def assert_rows_are(
    processor, batch, answers: list[str], images: str, prefix: str = "", mask: str = "completion_mask"
):
    """The rows are these answers to the questions, in order, and the answers are what is marked."""
    bos = processor.tokenizer.convert_tokens_to_ids(BOS)
    ids, attended = batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"].bool()
    marked = batch["labels"] != -100 if mask == "labels" else batch[f"{prefix}{mask}"].bool()
    assert len(ids) == len(answers) and not (marked & ~attended).any()
    for row, answer in enumerate(answers):
        kept = ids[row][attended[row]]
        expected = whole(processor, row % len(QUESTIONS), answer, images)["input_ids"][0]
        assert kept.tolist() == expected.tolist()
        assert (kept == bos).nonzero().flatten().tolist() == [0, len(kept) - 1], "opened and ended, with none between"
        assert processor.decode(ids[row][marked[row]]) == f" {answer}{BOS}"
        if mask == "labels":
            assert torch.equal(batch["labels"][row][marked[row]], ids[row][marked[row]])


def assert_images_are(processor, batch, images: str, times: int = 1):
    expected = [
        processor.image_processor(one, return_tensors="pt")["pixel_values"] for some in IMAGES[images] for one in some
    ]
    if expected:
        assert torch.equal(batch["pixel_values"], torch.cat(expected * times))
    assert ("pixel_values" in batch) == bool(expected)


@pytest.mark.parametrize("images", IMAGES)
def test_sft(processor, make, images):
    collator = sft_trainer.DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    batch = collator(rows(make, images, completion=ANSWERS))
    assert_rows_are(processor, batch, ANSWERS, images, mask="labels")
    assert_images_are(processor, batch, images)


@pytest.mark.parametrize("images", IMAGES)
def test_sft_on_whole_conversations(processor, images):
    collator = sft_trainer.DataCollatorForVisionLanguageModeling(processor, assistant_only_loss=True)
    examples = [
        {"images": row["images"], "messages": row["prompt"] + row["completion"]}
        for row in rows(lambda role, text, images: turns(role, text), images, completion=ANSWERS)
    ]
    batch = collator(examples)
    assert_rows_are(processor, batch, ANSWERS, images, mask="labels")
    assert_images_are(processor, batch, images)


@pytest.mark.parametrize("images", IMAGES)
def test_dpo(processor, make, images):
    collator = dpo_trainer.DataCollatorForVisionPreference(processor)
    batch = collator(rows(make, images, chosen=ANSWERS, rejected=OTHERS))
    assert_rows_are(processor, batch, ANSWERS + OTHERS, images)
    assert_images_are(processor, batch, images, times=2)


@pytest.mark.parametrize("images", IMAGES)
def test_kto(processor, make, images):
    collator = kto_trainer.DataCollatorForVisionUnpairedPreference(processor)
    examples = [{**row, "label": index == 0} for index, row in enumerate(rows(make, images, completion=ANSWERS))]
    batch = collator(copy.deepcopy(examples))
    assert_rows_are(processor, batch, ANSWERS, images)
    assert_rows_are(processor, batch, ANSWERS[::-1], images, prefix="KL_")
    assert_images_are(processor, batch, images)


def test_a_releases_template(new_processor):
    """Its processor, not its template, opens chats; TRL asks the processor not to."""
    new_processor.chat_template = RELEASED_TEMPLATE
    collator = sft_trainer.DataCollatorForVisionLanguageModeling(new_processor)
    batch = collator([{"images": IMAGES["images"][0], "messages": turns("user", "what?")}])
    assert (
        batch["input_ids"].tolist()
        == new_processor(text=" User: <|image|>what? ", images=IMAGES["images"][0])["input_ids"]
    )


@pytest.mark.parametrize("token", ["<box>", "<|box|>"])
def test_tokens_of_ones_own(new_processor, token):
    """They are learned as tokens, in all that TRL renders by itself too."""
    new_processor.tokenizer.add_tokens([token], special_tokens=True)
    (token_id,) = new_processor.tokenizer.convert_tokens_to_ids([token])
    prompt, answer = turns("user", f"where? {token}"), turns("assistant", f"{token}1, 2{token}")
    sft = sft_trainer.DataCollatorForVisionLanguageModeling(new_processor)
    dpo = dpo_trainer.DataCollatorForVisionPreference(new_processor)
    for batch in (
        sft([{"images": [], "messages": prompt + answer}]),
        sft([{"images": [], "prompt": prompt, "completion": answer}]),
        dpo([{"images": [], "prompt": prompt, "chosen": answer, "rejected": answer}]),
    ):
        assert (batch["input_ids"][0] == token_id).sum() == 3


# ---------------------------------------------------------------------------------------------------------------------
# Texts alone: the trainers encode whole conversations beforehand
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    return save_miniature(tmp_path_factory.mktemp("miniature"))


TRAINERS = {
    "SFT": {"completion": ANSWERS},
    "DPO": {"chosen": ANSWERS, "rejected": OTHERS},
    "KTO": {"completion": ANSWERS},
}


@pytest.mark.parametrize("name", TRAINERS)
def test_texts_alone(miniature, tmp_path, monkeypatch, make, name):
    import jina_vlm

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    processor = jina_vlm.JinaVLMProcessor.from_pretrained(miniature)
    examples = [
        {key: value for key, value in row.items() if key != "images"}
        | ({"label": index == 0} if name == "KTO" else {})
        for index, row in enumerate(rows(make, "none", **TRAINERS[name]))
    ]
    trainer = getattr(trl, f"{name}Trainer")(
        jina_vlm.JinaVLMForConditionalGeneration.from_pretrained(miniature),
        args=getattr(trl, f"{name}Config")(
            str(tmp_path),
            per_device_train_batch_size=2,
            use_cpu=True,
            bf16=False,
            report_to="none",
            train_sampling_strategy="sequential",
        ),
        train_dataset=datasets.Dataset.from_list(examples),
        processing_class=processor,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    answers = ANSWERS + OTHERS if name == "DPO" else ANSWERS
    assert_rows_are(processor, batch, answers, "none", mask="labels" if name == "SFT" else "completion_mask")
    if name == "KTO":
        assert_rows_are(processor, batch, ANSWERS[::-1], "none", prefix="KL_")
