"""The snippets of the release's own card, with `import jina_vlm` before them: the answers are the released code's."""

import json
import shutil

import jina_vlm
import numpy as np
import pytest
import torch
from conftest import GOLDEN, make_image
from PIL import Image
from released import RELEASED_TEMPLATE
from transformers import AutoModelForCausalLM, AutoProcessor, GenerationConfig


GENERATION = GenerationConfig(max_new_tokens=12, do_sample=False)


@pytest.fixture(scope="module")
def checkpoint(released_folder, tmp_path_factory) -> str:
    """The released layout, with a chat template, as the Hub's page has one."""
    folder = tmp_path_factory.mktemp("snippets") / "jina-vlm"
    shutil.copytree(released_folder, folder)
    (folder / "chat_template.jinja").write_text(RELEASED_TEMPLATE)
    return str(folder)


@pytest.fixture(scope="module")
def processor(checkpoint):
    processor = AutoProcessor.from_pretrained(checkpoint, use_fast=False, trust_remote_code=True)
    assert type(processor) is jina_vlm.JinaVLMProcessor and RELEASED_TEMPLATE in processor.chat_template
    return processor


@pytest.fixture(scope="module")
def model(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True, dtype="auto").eval()
    assert type(model) is jina_vlm.JinaVLMForConditionalGeneration
    return model


def case_of(name: str, folder=GOLDEN / "cases") -> dict:
    return next(case for case in json.loads((folder / "index.json").read_text()) if case["name"] == name)


def images_of(case: dict) -> list:
    return [
        [open_image(image) for image in item] if isinstance(item, list) else open_image(item)
        for item in case["images"]
    ]


def open_image(image: dict) -> Image.Image:
    return Image.fromarray(make_image(*(image[key] for key in ("height", "width", "kind", "seed"))))


def chat(*parts: str | None) -> list[dict]:
    """One turn of texts and, by None, images, which a template needs no more of than their places."""
    content = [
        {"type": "image", "image": "https://none.example/image.png"}
        if part is None
        else {"type": "text", "text": part}
        for part in parts
    ]
    return [{"role": "user", "content": content}]


def render(processor, *parts: str | None) -> str:
    return processor.apply_chat_template(chat(*parts), tokenize=False, add_generation_prompt=True)


def answer(model, processor, prompts: list[str], images: list | None) -> torch.Tensor:
    inputs = processor(text=prompts, images=images, padding="longest", return_tensors="pt").to(model.device)
    output = model.generate(**inputs, generation_config=GENERATION, use_model_defaults=True)
    return output[:, inputs["input_ids"].shape[1] :]


def greedy(*names: str) -> list[list[int]]:
    return [np.load(GOLDEN / "cases" / f"{name}.npz")["greedy"].tolist() for name in names]


SHOWN = (None, "What is shown?")


def test_one_image(model, processor):
    prompt, case = render(processor, *SHOWN), case_of("one_image")
    assert prompt.removeprefix("<|endoftext|>") == case["text"]
    assert answer(model, processor, [prompt], images_of(case)).tolist() == greedy("one_image")


def test_several_images(model, processor):
    case = case_of("two_images")
    prompt = render(processor, None, " and", None, "which image?")
    assert prompt.removeprefix("<|endoftext|>") == case["text"]
    assert answer(model, processor, [prompt], images_of(case)).tolist() == greedy("two_images")


def test_text_alone(model, processor):
    prompt = render(processor, "the quick brown fox")
    assert answer(model, processor, [prompt], None).tolist() == greedy("text_only")
    assert not processor(text=[prompt], padding="longest").keys() & {"pixel_values", "tile_positions"}


def test_a_batch(model, processor):
    """Of prompts of different lengths, each with an image."""
    names = ("one_image", "portrait", "black_last_tile")
    prompts = [render(processor, None, words) for words in ("What is shown?", "describe the fox", "What is shown?")]
    images = [image for name in names for image in images_of(case_of(name))]
    assert answer(model, processor, prompts, images).tolist() == greedy(*names)


def test_a_mixed_batch(model, processor):
    """Images nested, `[]` for text alone."""
    case = case_of("mixed_batch", GOLDEN / "usage" / "cases")
    prompts = [
        render(processor, None, "What is shown in this image?"),
        render(processor, None, " and", None, "which image?"),
        render(processor, "the quick brown fox"),
    ]
    assert [prompt.removeprefix("<|endoftext|>") for prompt in prompts] == case["text"]
    images = images_of(case)
    assert images[-1] == [] and answer(model, processor, prompts, images).tolist() == case["greedy"]


def test_a_batch_of_text_alone(model, processor):
    """Lists of images that are all empty."""
    prompts = [render(processor, "the quick brown fox"), render(processor, "What is shown?")]
    answers = answer(model, processor, prompts, [[], []])
    assert answers[:1].tolist() == greedy("text_only")
    assert torch.equal(answers, answer(model, processor, prompts, None))


def test_generation_config_takes_the_models_defaults(model, processor):
    """Its own limits count, and the model's for the rest: what ends and pads an answer, and what is none."""
    prompt = render(processor, "the quick brown fox")
    inputs = processor(text=[prompt], padding="longest", return_tensors="pt")
    first = greedy("text_only")[0]
    model.generation_config.eos_token_id = [model.generation_config.eos_token_id, first[3]]
    try:
        output = model.generate(**inputs, generation_config=GENERATION, use_model_defaults=True)
    finally:
        model.generation_config.eos_token_id = model.generation_config.eos_token_id[0]
    assert output[0, inputs["input_ids"].shape[1] :].tolist() == first[: first.index(first[3]) + 1]
    assert GENERATION.eos_token_id is None, "the caller's is left as it was"
    with pytest.raises(ValueError, match="`use_model_defaults` is False, but transformers 5 always takes"):
        model.generate(**inputs, generation_config=GENERATION, use_model_defaults=False)
