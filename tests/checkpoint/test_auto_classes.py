"""The library's Auto classes and pipelines, on a bundle folder with its own code and on the package's."""

import shutil
import warnings
from contextlib import ExitStack, contextmanager, nullcontext
from unittest import mock

import jina_vlm
import pytest
import torch
import transformers
from conftest import python
from hub_server import serve_hub
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    TextIteratorStreamer,
    pipeline,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING, AutoImageProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import is_torchvision_available


GENERATING = (AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModelForCausalLM)
MODELS = (AutoModel, *GENERATING)


@pytest.fixture(scope="module")
def package_unknown():
    """As in a process that never imported the package: where it is registered the library takes its classes, trusted
    or not."""
    mappings = [CONFIG_MAPPING, PROCESSOR_MAPPING, IMAGE_PROCESSOR_MAPPING]
    mappings += [auto._model_mapping for auto in MODELS]

    @contextmanager
    def forget():
        with ExitStack() as stack:
            for mapping in mappings:
                stack.enter_context(mock.patch.dict(mapping._extra_content, clear=True))
            yield

    return forget


@pytest.fixture(params=[True, False], ids=["the bundle's code", "the package's code"])
def trust(request, package_unknown):
    """`trust_remote_code`, with and without the package."""
    with package_unknown() if request.param else nullcontext():
        yield request.param


@pytest.fixture(scope="module")
def inputs(chat):
    return chat([("user", (113, 500), "What is shown?")], add_generation_prompt=True)


@pytest.fixture(scope="module")
def expected(model, inputs):
    with torch.no_grad():
        return model(**inputs, output_hidden_states=True)


# ---------------------------------------------------------------------------------------------------------------------
# Auto classes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("auto_class", "name"),
    [
        (AutoConfig, "JinaVLMConfig"),
        (AutoModel, "JinaVLMModel"),
        *((auto_class, "JinaVLMForConditionalGeneration") for auto_class in GENERATING),
        (AutoProcessor, "JinaVLMProcessor"),
        (AutoImageProcessor, "JinaVLMImageProcessor"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_auto_class(bundle, auto_class, name, trust):
    found = type(auto_class.from_pretrained(bundle, trust_remote_code=trust))
    assert found.__name__ == name
    assert found.__module__.split(".")[0] == ("transformers_modules" if trust else "jina_vlm")


@pytest.mark.parametrize("auto_class", MODELS)
def test_auto_models_compute_the_same(bundle, inputs, expected, auto_class, trust):
    model = auto_class.from_pretrained(bundle, trust_remote_code=trust, dtype=torch.float32)
    with torch.no_grad():
        output = model(**inputs)
    if auto_class is AutoModel:
        assert torch.equal(output.last_hidden_state, expected.hidden_states[-1])
    else:
        assert torch.equal(output.logits, expected.logits)


def test_auto_models_from_a_config(bundle, trust):
    config = AutoConfig.from_pretrained(bundle, trust_remote_code=trust)
    model = AutoModelForImageTextToText.from_config(config, trust_remote_code=trust)
    assert model.config.structural_token_ids == model.generation_config.suppress_tokens == list(range(512, 518))


def test_auto_tokenizer(bundle, processor):
    tokenizer = AutoTokenizer.from_pretrained(bundle)
    text = " User: the fox<|endoftext|> <im_patch>"
    assert tokenizer(text)["input_ids"] == processor.tokenizer(text)["input_ids"]
    assert tokenizer.padding_side == "left" and tokenizer.chat_template == processor.chat_template


# ---------------------------------------------------------------------------------------------------------------------
# Revisions, from a Hub: a server on this machine that answers as the Hub does
# ---------------------------------------------------------------------------------------------------------------------


def test_two_revisions_of_the_code_in_one_process(bundle, tmp_path):
    code = """
        from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

        def load(**revisions):
            return AutoModelForImageTextToText.from_pretrained("owner/model", trust_remote_code=True, **revisions)

        one, two, mixed = load(revision="one"), load(revision="two"), load(revision="one", code_revision="two")
        assert [model.revision for model in (one, two, mixed)] == ["one", "two", "two"]
        assert type(one) is not type(two) and type(load(revision="one")) is type(one)
        processor = AutoProcessor.from_pretrained("owner/model", revision="two", trust_remote_code=True)
        inputs = processor(text=" User: the fox Assistant:", return_tensors="pt")
        answers = [model.generate(**inputs, max_new_tokens=3, do_sample=False).tolist() for model in (one, two, mixed)]
        assert answers[0] == answers[1] == answers[2]
        """
    with serve_hub({}) as hub:
        for revision in ("one", "two"):
            folder = shutil.copytree(bundle, tmp_path / revision)
            with open(folder / "modeling_jina_vlm.py", "a") as file:
                file.write(f"\nJinaVLMForConditionalGeneration.revision = {revision!r}\n")
            hub.put("owner/model", folder, revision)
        environment = {
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "home"),
            "no_proxy": "*",
        }
        python(code, HF_ENDPOINT=hub.url, **environment)


# ---------------------------------------------------------------------------------------------------------------------
# Pipelines
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["image-text-to-text", "any-to-any"])
def pipe(request, bundle, package_unknown):
    if request.param == "any-to-any" and not is_torchvision_available():
        pytest.skip("any-to-any asks for torchvision")
    with package_unknown():
        return pipeline(request.param, model=str(bundle), trust_remote_code=True, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def images(make_image) -> list[Image.Image]:
    return [Image.fromarray(make_image(*size)) for size in ((300, 900), (200, 210))]


def about(image, text="What is this?") -> list[dict]:
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]


ARGUMENTS = {"max_new_tokens": 4, "return_full_text": False, "processor_kwargs": {"max_tiles": 2}}


def test_pipeline_of_the_package(bundle, pipe, images):
    own = pipeline(pipe.task, model=str(bundle), dtype=torch.float32)
    assert type(own.model) is jina_vlm.JinaVLMForConditionalGeneration is not type(pipe.model)
    assert own(text=about(images[0]), **ARGUMENTS) == pipe(text=about(images[0]), **ARGUMENTS)


def test_pipeline_answers_batches_of_chats_as_it_answers_each(pipe, images):
    chats = [about(images[0]), about(images[1], "And what is this?"), [{"role": "user", "content": "No image."}]]
    alone = [pipe(text=one, **ARGUMENTS)[0]["generated_text"] for one in chats]
    assert [answer[0]["generated_text"] for answer in pipe(text=chats, **ARGUMENTS)] == alone
    assert [answer[0]["generated_text"] for answer in pipe(text=chats[:2], batch_size=2, **ARGUMENTS)] == alone[:2]


def test_pipeline_with_images_and_text_apart(pipe, images, bundle):
    prompt = " User: <|image|>What is this? Assistant:"
    expected = pipe(text=about(images[0]), **ARGUMENTS)[0]["generated_text"]
    arguments = {**ARGUMENTS, **ARGUMENTS["processor_kwargs"]}
    del arguments["processor_kwargs"]
    assert pipe(images=images[0], text=prompt, **ARGUMENTS)[0]["generated_text"] == expected
    assert pipe(images=images[0], text=prompt, **arguments)[0]["generated_text"] == expected, "max_tiles by itself"
    both = pipe(images=images, text=[prompt, prompt], **ARGUMENTS)
    assert [answer["generated_text"] for answer in both][0] == expected


def test_pipeline_returns_what_is_asked_for(pipe, images):
    chat = about(images[1])
    new = pipe(text=chat, **ARGUMENTS)[0]["generated_text"]
    full = pipe(text=chat, **{**ARGUMENTS, "return_full_text": True})[0]["generated_text"]
    assert full[:-1] == chat and full[-1]["role"] == "assistant" and full[-1]["content"].strip() == new.strip()
    ids = pipe(text=chat, max_new_tokens=4, return_tensors=True, processor_kwargs={"max_tiles": 2})[0][
        "generated_token_ids"
    ]
    assert pipe.processor.decode(ids[-4:]) == new


def test_pipeline_hands_on_generation_arguments(pipe, images):
    chat = about(images[1])
    greedy = pipe(text=chat, **ARGUMENTS)[0]["generated_text"]
    sampled = {"do_sample": True, "temperature": 1e-6, "max_new_tokens": 4}
    assert pipe(text=chat, return_full_text=False, generate_kwargs=sampled)[0]["generated_text"] == greedy
    several = pipe(text=chat, return_full_text=False, generate_kwargs={**sampled, "num_return_sequences": 2})
    assert {answer["generated_text"] for answer in several} == {greedy}  # 5.16's pipeline keeps the first only


def test_pipeline_streams(pipe, images):
    streamer = TextIteratorStreamer(pipe.tokenizer or pipe.processor.tokenizer, skip_prompt=True)
    answer = pipe(
        text=about(images[1]), return_full_text=False, generate_kwargs={"streamer": streamer, "max_new_tokens": 4}
    )
    assert "".join(streamer) == answer[0]["generated_text"]


def test_pipeline_goes_on_with_what_the_assistant_began(pipe, images):
    """A chat that ends in an assistant's message is continued, not answered."""
    begun = [*about(images[1]), {"role": "assistant", "content": [{"type": "text", "text": "This is the"}]}]
    answer = pipe(text=begun, **ARGUMENTS)[0]["generated_text"]
    prompt = " User: <|image|>What is this? Assistant: This is the"
    assert answer == pipe(images=images[1], text=prompt, **ARGUMENTS)[0]["generated_text"]


def test_pipeline_says_where_arguments_of_generate_go(pipe, images):
    with pytest.raises(TypeError, match="'do_sample' of .*in a pipeline's call, as `generate_kwargs="):
        pipe(text=about(images[1]), do_sample=False)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, "auto"])
def test_pipeline_in_other_number_formats(bundle, images, dtype):
    pipe = pipeline("image-text-to-text", model=str(bundle), dtype=dtype)
    expected = {"bfloat16": torch.bfloat16, "auto": torch.float32}.get(dtype, dtype)
    assert pipe.model.dtype == expected and pipe.device.type == "cpu"
    assert pipe(text=about(images[1]), **ARGUMENTS)[0]["generated_text"]


@pytest.mark.parametrize("pipe", ["image-text-to-text"], indirect=True)  # the other's `preprocess` takes no chat
def test_pipeline_puts_transparency_onto_white_in_chats_only(pipe, tmp_path):
    path = str(tmp_path / "transparent.png")
    Image.new("RGBA", (60, 60), (200, 0, 0, 0)).save(path)
    Chat = transformers.utils.chat_template_utils.Chat
    assert (pipe.preprocess(Chat(about(path)))["pixel_values"] == 1).all()
    apart = pipe.preprocess({"images": path, "text": " User: <|image|> What is this? Assistant:"})
    assert (apart["pixel_values"][:, 1:] == -1).all()  # the library's own loading: the hidden red shows


def test_feature_extraction_pipeline(bundle, model, processor, trust):
    """Of text, which is all that the library's pipeline takes."""
    pipe = pipeline("feature-extraction", model=str(bundle), trust_remote_code=trust, dtype=torch.float32)
    assert type(pipe.model).__name__ == "JinaVLMModel"
    text = " User: the quick brown fox"
    with torch.no_grad():
        expected = model.model(**processor.tokenizer(text, return_tensors="pt")).last_hidden_state
    assert torch.equal(pipe(text, return_tensors=True), expected)


# ---------------------------------------------------------------------------------------------------------------------
# What is on its way out
# ---------------------------------------------------------------------------------------------------------------------


def test_nothing_deprecated_is_used(bundle, images, tmp_path, caplog, monkeypatch):
    """Neither by warnings nor in the library's log, from loading to saving."""
    monkeypatch.setattr(transformers.utils.logging.get_logger("transformers"), "propagate", True)
    with warnings.catch_warnings(record=True) as caught, caplog.at_level("INFO"):
        warnings.simplefilter("always")
        processor = AutoProcessor.from_pretrained(bundle)
        model = AutoModelForImageTextToText.from_pretrained(bundle, dtype=torch.float32)
        inputs = processor.apply_chat_template(
            about(images[1]), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        model.generate(**inputs, max_new_tokens=2)
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
    said = [str(warning.message) for warning in caught] + [record.getMessage() for record in caplog.records]
    assert not [text for text in said if "deprecat" in text.lower() or "will be removed" in text]
