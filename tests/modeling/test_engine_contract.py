"""What engines take for granted, in ordinary tests: vLLM's Transformers back end cuts images by numbers that it asks
for, writes embeddings over placeholders, renders chats itself and puts a head of its own on the base model. `make
test-vllm` runs vLLM; these tests tell what broke without it."""

import inspect
import pickle
import re

import jinja2
import pytest
import torch
import transformers.utils.chat_template_utils as templates
from jina_vlm import (
    JinaVLMForConditionalGeneration,
    JinaVLMImageProcessor,
    JinaVLMModel,
    JinaVLMProcessor,
    JinaVLMVisionModel,
)
from safetensors import safe_open
from transformers import AutoTokenizer


SIZES = [(20, 20), (113, 500), (500, 600), (30, 90), (720, 1280), (1200, 260)]


@pytest.fixture(scope="module")
def images(make_image):
    return [make_image(*size, seed=index) for index, size in enumerate(SIZES)]


@pytest.fixture(scope="module")
def together(processor, images):
    """One prompt with all images, as vLLM calls the processor."""
    text = processor.image_token * len(images)
    return processor(
        text=text,
        images=images,
        return_tensors="pt",
        return_mm_token_type_ids=True,
        return_text_replacement_offsets=True,
    )


def by_image(processor, tensor) -> list[torch.Tensor]:
    counts = processor._get_num_multimodal_tokens(SIZES)["num_image_patches"]
    assert sum(counts) == len(tensor), "tiles are the first dimension"
    return list(tensor.split(counts))


def test_an_image_is_the_same_alone_and_among_others(processor, images, together):
    """Each of its tensors, cut along the first dimension by the number of tiles that sizes alone tell. A cache keeps
    them."""
    names = processor.image_processor.model_input_names
    tensors = {name: tensor for name, tensor in together.items() if name in names}
    assert set(tensors) == {"pixel_values", "tile_positions"}
    for name, tensor in tensors.items():
        for alone, cut in zip(images, by_image(processor, tensor), strict=True):
            assert torch.equal(processor(text=processor.image_token, images=alone, return_tensors="pt")[name], cut)


def test_token_counts_from_sizes(processor, together):
    counts = processor._get_num_multimodal_tokens(SIZES)["num_image_tokens"]
    assert sum(counts) == together["mm_token_type_ids"].sum() == together["input_ids"].shape[1] - 1  # `<|endoftext|>`
    fewer = processor._get_num_multimodal_tokens(SIZES, max_tiles=4)["num_image_tokens"]
    text = processor.image_token
    for size, number in zip(SIZES, fewer, strict=True):
        image = torch.zeros(3, *size, dtype=torch.uint8)
        assert processor(text=text, images=image, max_tiles=4, return_tensors="pt")["input_ids"].shape[1] - 1 == number


def test_replacements_make_the_prompt(processor, together):
    """`<|image|>` is one token; what stands for it, tokenized by itself, is what the prompt has there; and the token
    that occurs most in it is the one whose embeddings images replace."""
    tokenizer = processor.tokenizer
    (replacements,) = together["text_replacement_offsets"]
    assert tokenizer.encode(processor.image_token, add_special_tokens=False) == [processor.image_token_id]
    prompt = tokenizer.encode("<|endoftext|>", add_special_tokens=False)
    features = 0
    for item in replacements:
        assert item["type"] == "image"
        ids = tokenizer.encode(item["replacement"], add_special_tokens=False)
        assert int(torch.tensor(ids).mode().values) == processor.patch_token_id
        prompt, features = prompt + ids, features + ids.count(processor.patch_token_id)
    assert prompt == together["input_ids"][0].tolist()
    assert features == (together["input_ids"] == processor.patch_token_id).sum()


def test_embeddings_are_final(model, processor, together):
    """Written over the placeholders by somebody else they give what `forward` gives; and each image has the same
    alone."""
    images = {name: together[name] for name in processor.image_processor.model_input_names}
    ids = together["input_ids"]
    with torch.no_grad():
        expected = model(input_ids=ids, **images).logits
        features = model.get_image_features(**images, return_dict=True).pooler_output
        embeddings = model.get_input_embeddings()(ids)
        embeddings[ids == model.config.image_token_id] = torch.cat(features)
        found = model.lm_head(model.model.language_model(inputs_embeds=embeddings).last_hidden_state)
        pixels, positions = (by_image(processor, tensor) for tensor in images.values())
        for each, *inputs in zip(features, pixels, positions, strict=True):
            alone = model.get_image_features(*inputs, return_dict=True).pooler_output[0]
            torch.testing.assert_close(each, alone, rtol=0, atol=1e-4 * float(alone.abs().max()))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_what_images_became_is_an_output(model, processor, together):
    """Under the library's name, also as a tuple; and under the older one."""
    images = {name: together[name] for name in processor.image_processor.model_input_names}
    with torch.no_grad():
        features = model.get_image_features(**images)
        for part in (model, model.model):
            output = part(input_ids=together["input_ids"], **images)
            assert torch.equal(output.image_outputs.last_hidden_state, features.last_hidden_state)
            assert all(map(torch.equal, output.image_outputs.pooler_output, features.pooler_output))
            assert torch.equal(output.image_hidden_states, torch.cat(features.pooler_output))
            state, pooled = part(input_ids=together["input_ids"], **images, return_dict=False)[-1]
            assert torch.equal(state, features.last_hidden_state) and torch.equal(pooled[0], features.pooler_output[0])
            output = part(input_ids=together["input_ids"][:, :1])
            assert output.image_outputs is None and output.image_hidden_states is None


def test_one_vocabulary(model):
    size = model.config.get_text_config().vocab_size
    assert model.get_input_embeddings().weight.shape[0] == model.get_output_embeddings().weight.shape[0] == size
    assert max(model.config.structural_token_ids) < size


def test_head_survives_the_base_model(bundle):
    """vLLM makes the base model, leaves out the tensors that it ignores on loading, and puts its own head on the
    rest."""
    base = JinaVLMModel.from_pretrained(bundle)
    with safe_open(bundle / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "lm_head.weight" in names
    assert not [
        name for name in names for pattern in base._keys_to_ignore_on_load_unexpected if re.search(pattern, name)
    ]


def test_parts_are_found(model):
    assert isinstance(model.model.get_encoder(modality="image"), JinaVLMVisionModel)
    assert model.model.get_decoder() is model.model.language_model
    assert "pixel_values" in inspect.signature(JinaVLMForConditionalGeneration.get_image_features).parameters


def test_template_takes_parts(chat_template):
    """Engines look for a loop over a message's content, by name or through a filter; where they find none, they hand
    the template strings, and images are lost."""
    tree = templates._compile_jinja_template(chat_template).environment.parse(chat_template)
    loops = []
    for loop in tree.find_all(jinja2.nodes.For):
        source = loop.iter.node if isinstance(loop.iter, jinja2.nodes.Filter) else loop.iter
        if isinstance(source, jinja2.nodes.Getitem) and source.arg.value == "content":
            loops.append(source.node.name)
    assert loops == ["message"]


def test_template_needs_no_variables(chat_template, processor, conversation, chat):
    """Rendered by the tokenizer alone, with no variable of ours, and tokenized, it gives the processor's prompt."""
    turns = [("user", (20, 20), "What is shown?"), ("assistant", "A field."), ("user", "Where?", (30, 90))]
    text = processor.tokenizer.apply_chat_template(
        conversation(turns), chat_template=chat_template, tokenize=False, add_generation_prompt=True
    )
    images = [
        part["image"]
        for turn in conversation(turns)
        for part in turn["content"]
        if isinstance(part, dict) and "image" in part
    ]
    ids = processor(text=text, images=images, return_tensors="pt")["input_ids"]
    assert torch.equal(ids, chat(turns, add_generation_prompt=True)["input_ids"])


@pytest.mark.parametrize("space", [True, False])
def test_a_releases_template_is_saved_with_what_it_expects(new_processor, conversation, tmp_path, space):
    """Two variables, and a processor that opens chats: engines have neither. They are written into it."""
    loaded = JinaVLMProcessor(
        new_processor.image_processor,
        new_processor.tokenizer,
        chat_template="{% if always_start_with_space %} {% endif %}{% for message in messages %}"
        "{% for part in message['content'] %}{{ image_prompt_token if part['type'] == 'image' else part['text'] }}"
        "{% endfor %}{% endfor %}",
        always_start_with_space=space,
    )
    loaded.save_pretrained(tmp_path)
    messages = conversation([("user", (20, 20), "hi")])
    expected = "<|endoftext|>" + " " * space + "<|image|>hi"
    assert AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(messages, tokenize=False) == expected
    again = JinaVLMProcessor.from_pretrained(tmp_path)
    assert again.apply_chat_template(messages) == expected and again.chat_template == loaded.chat_template
    assert again.apply_chat_template(messages, image_prompt_token="<picture>") == expected.replace(
        "<|image|>", "<picture>"
    )


@pytest.mark.parametrize("max_tiles", [1, 2, 4, 7, 12])
def test_largest_image(released_folder, max_tiles):
    """`size` names an image that takes as much as any: engines try it to see how much memory they need, and refuse
    what turns out to be larger."""
    processor = JinaVLMProcessor.from_pretrained(released_folder, max_tiles=max_tiles)
    assert processor.image_processor.max_tiles == max_tiles

    def counts(*size):
        found = processor._get_num_multimodal_tokens([size])
        return found["num_image_tokens"][0], found["num_image_patches"][0]

    size = processor.image_processor.size
    largest = counts(size["height"], size["width"])
    sides = [14, 100, 250, 303, 378, 500, 700, 1000, 1300, 2000, 3000, 3300, 5000]
    others = [
        counts(height, width) for height in sides for width in sides if max(height, width) <= 200 * min(height, width)
    ]
    assert largest[0] >= max(tokens for tokens, _ in others)
    assert largest[1] == 1 + max_tiles == max(tiles for _, tiles in others)


def test_processor_holds_no_state(new_processor, images, conversation):
    """Engines share one among threads and copy it to other processes."""
    before = pickle.dumps(
        (vars(new_processor.image_processor), new_processor.tokenizer.init_kwargs, new_processor.chat_template)
    )
    new_processor(text=new_processor.image_token, images=images[0], max_tiles=2, return_tensors="pt")
    new_processor.apply_chat_template(
        conversation([("user", (20, 20), "x")]), tokenize=True, return_dict=True, max_tiles=3
    )
    assert before == pickle.dumps(
        (vars(new_processor.image_processor), new_processor.tokenizer.init_kwargs, new_processor.chat_template)
    )
    copied = pickle.loads(pickle.dumps(new_processor))
    for name, value in copied(text=copied.image_token, images=images[1], return_tensors="pt").items():
        assert torch.equal(
            value, new_processor(text=new_processor.image_token, images=images[1], return_tensors="pt")[name]
        )


def test_size_is_not_saved():
    assert "size" not in JinaVLMImageProcessor(max_tiles=3).to_dict()
