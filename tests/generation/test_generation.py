"""Everything that `generate` does, with images in the prompt: what each way to decode must have in common with greedy
decoding, which the golden data fix."""

import threading

import pytest
import torch
from jina_vlm.compatibility_jina_vlm import CACHE_NAME, CHUNKS_CAN_HAVE_IMAGES
from transformers import (
    AutoModelForImageTextToText,
    ContinuousBatchingConfig,
    GenerationConfig,
    StaticCache,
    TextIteratorStreamer,
    set_seed,
)


NEW_TOKENS = 6


def answer(model, inputs, **kwargs) -> torch.Tensor:
    kwargs = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **kwargs}
    ids = model.generate(**inputs, **kwargs)
    return ids[:, inputs["input_ids"].shape[1] :]


@pytest.fixture(scope="module")
def batch(chat):
    """Two images, none, one: on the left padding of three lengths."""
    turns = [
        [("user", (113, 500), " and ", (20, 20), "which image?")],
        [("user", "the quick brown fox")],
        [("user", (30, 90), "What is shown?")],
    ]
    return chat(turns, padding=True, add_generation_prompt=True)


@pytest.fixture(scope="module")
def one(chat):
    return chat([("user", (113, 500), "What is shown?")], add_generation_prompt=True)


@pytest.fixture(scope="module")
def greedy(model, batch):
    return answer(model, batch)


@pytest.fixture(scope="module")
def greedy_one(model, one):
    return answer(model, one)


@pytest.fixture
def encoded(model, monkeypatch):
    """Numbers of tiles that the tower was given, call by call."""
    calls = []
    forward = model.model.vision_model.forward

    def counted(pixel_values, **kwargs):
        calls.append(len(pixel_values))
        return forward(pixel_values, **kwargs)

    monkeypatch.setattr(model.model.vision_model, "forward", counted)
    return calls


# ---------------------------------------------------------------------------------------------------------------------
# Ways to decode
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs",
    [
        {"do_sample": True, "top_k": 1},
        {"do_sample": True, "temperature": 1e-6, "num_return_sequences": 2},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "offloaded"},
        {"cache_implementation": "offloaded_static"},
    ],
    ids=lambda kwargs: " ".join(f"{name}={value}" for name, value in kwargs.items()),
)
def test_batches(model, batch, greedy, encoded, kwargs):
    if "offloaded" in str(kwargs.get("cache_implementation")) and not torch.accelerator.is_available():
        pytest.skip("the library moves such a cache to and from an accelerator")
    several = kwargs.get("num_return_sequences", 1)
    assert torch.equal(answer(model, batch, **kwargs), greedy.repeat_interleave(several, dim=0))
    assert sum(encoded) == len(batch["pixel_values"]), "images are encoded once"


def test_quantized_cache(model, one, greedy_one):
    """In four bits, beyond the last tokens: these answers do not depend on the rest."""
    pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    config = {"backend": "quanto", "nbits": 4, "q_group_size": 32}
    assert torch.equal(answer(model, one, cache_implementation="quantized", cache_config=config), greedy_one)


def test_sampling_follows_the_seed(model, batch):
    answers = []
    for seed in (0, 0, 1):
        set_seed(seed)
        answers.append(answer(model, batch, do_sample=True, num_return_sequences=2, temperature=2.0))
    assert torch.equal(answers[0], answers[1]) and not torch.equal(answers[0], answers[2])
    assert len(answers[0]) == 6 and not torch.equal(answers[0][0], answers[0][1])


@pytest.mark.parametrize(
    "kwargs", [{"num_beams": 3}, {"num_beams": 2, "do_sample": True, "temperature": 0.5}], ids=str
)
def test_each_beam_keeps_its_images(model, chat, batch, encoded, kwargs):
    """Every sample's best beams, alone and in the batch; sampled ones in the same order of random numbers only
    alone."""
    set_seed(0)
    together = answer(model, batch, num_return_sequences=2, **kwargs)
    assert len(together) == 6 and sum(encoded) == len(batch["pixel_values"])
    if kwargs.get("do_sample"):
        return
    turns = [("user", (30, 90), "What is shown?")]
    alone = answer(model, chat(turns, add_generation_prompt=True), num_return_sequences=2, **kwargs)
    assert torch.equal(together[4:, : alone.shape[1]], alone)


def test_prompt_lookup(model, one, greedy_one):
    assert torch.equal(answer(model, one, prompt_lookup_num_tokens=3), greedy_one)


def test_assisted_decoding(model, released_folder, one, greedy_one, encoded):
    assistant = type(model).from_pretrained(released_folder, dtype=torch.float32).eval()
    assert torch.equal(answer(model, one, assistant_model=assistant), greedy_one)
    assert len(encoded) == 1


def test_custom_decoding(model, one, greedy_one):
    """A loop of the caller's own, as `custom_generate`."""

    def last_of_two(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        unfinished = True
        while unfinished:
            inputs = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **model_kwargs)
            scores = logits_processor(input_ids, model(**inputs).logits[:, -1])
            input_ids = torch.cat([input_ids, scores.argmax(-1, keepdim=True)], dim=-1)
            model_kwargs |= {"attention_mask": torch.ones_like(input_ids), "position_ids": None}
            unfinished = not stopping_criteria(input_ids, scores).all()
        return input_ids

    assert torch.equal(answer(model, one, custom_generate=last_of_two, use_cache=False), greedy_one)


# ---------------------------------------------------------------------------------------------------------------------
# Output and stopping
# ---------------------------------------------------------------------------------------------------------------------


def test_streaming(model, processor, one, greedy_one):
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True)
    thread = threading.Thread(target=answer, args=(model, one), kwargs={"streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == processor.decode(greedy_one[0])


def test_stop_strings(model, processor, one, greedy_one):
    text = processor.decode(greedy_one[0])
    stop = text[len(text) // 3 : 2 * len(text) // 3]
    stopped = processor.decode(answer(model, one, stop_strings=[stop], tokenizer=processor.tokenizer)[0])
    assert stop and text.startswith(stopped) and stop in stopped and len(stopped) < len(text)


def test_everything_on_request(model, one, greedy_one):
    output = model.generate(
        **one, max_new_tokens=2, do_sample=False, return_dict_in_generate=True,
        output_logits=True, output_scores=True, output_hidden_states=True,
    )  # fmt: skip
    length = one["input_ids"].shape[1]
    assert torch.equal(output.sequences[:, length:], greedy_one[:, :2])
    assert output.hidden_states[0][-1].shape[1] == length and output.hidden_states[1][-1].shape[1] == 1
    assert output[CACHE_NAME].get_seq_length() == length + 1
    assert torch.isinf(output.scores[0][0, model.config.structural_token_ids]).all()
    assert output.logits[0].isfinite().all()


def test_prefill_computes_one_positions_logits(model, one):
    shapes = []
    hook = model.lm_head.register_forward_hook(
        lambda module, arguments, output: shapes.append(tuple(output.shape[:2]))
    )
    answer(model, one, max_new_tokens=3)
    hook.remove()
    assert shapes == [(1, 1)] * 3


# ---------------------------------------------------------------------------------------------------------------------
# Prompts of other kinds
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_images", [False, True], ids=["images merged", "images beside them"])
def test_inputs_embeds(model, one, greedy_one, with_images):
    inputs = {name: one[name] for name in ("attention_mask", "pixel_values", "tile_positions")}
    embeds = model.get_input_embeddings()(one["input_ids"]).detach()
    if not with_images:
        features = model.get_image_features(inputs.pop("pixel_values"), inputs.pop("tile_positions")).pooler_output
        places = (one["input_ids"] == model.config.image_token_id).unsqueeze(-1)
        embeds = embeds.masked_scatter(places, torch.cat(features).detach())
    ids = model.generate(inputs_embeds=embeds, **inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert torch.equal(ids, greedy_one)


@pytest.mark.parametrize("size", [7, 64, 10_000])
def test_prefill_in_chunks(model, batch, greedy, encoded, size):
    """A chunk's border may lie within an image."""
    if CHUNKS_CAN_HAVE_IMAGES:
        assert torch.equal(answer(model, batch, prefill_chunk_size=size), greedy)
        assert sum(encoded) == len(batch["pixel_values"])
    else:
        with pytest.raises(ValueError, match="prefill_chunk_size"):
            answer(model, batch, prefill_chunk_size=size)


def test_text_in_chunks_on_every_version(model, chat):
    text = chat([("user", "the quick brown fox jumps over the lazy dog")], add_generation_prompt=True)
    assert torch.equal(answer(model, text, prefill_chunk_size=4), answer(model, text))


@pytest.mark.parametrize("given", ["all images", "new images"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_second_turn_from_the_first_turns_cache(model, chat, encoded, cache, given):
    """The second turn brings a new image; the first one's is in the cache."""
    first = [("user", (113, 500), "What is shown?")]
    second = [*first, ("assistant", "the fox"), ("user", (40, 40), " and here?")]
    inputs, longer = chat(first), chat(second, add_generation_prompt=True)
    length = inputs["input_ids"].shape[1]
    assert torch.equal(longer["input_ids"][:, :length], inputs["input_ids"])
    expected = answer(model, longer)
    kwargs = {}
    if cache == "static":
        kwargs["cache"] = StaticCache(
            model.config.get_text_config(), max_cache_len=longer["input_ids"].shape[1] + NEW_TOKENS
        )
    with torch.no_grad():
        past = model(**inputs, use_cache=True, **kwargs)[CACHE_NAME]
    tiles = len(inputs["pixel_values"])
    del encoded[:]
    if given == "new images":
        longer = {**longer, **{name: longer[name][tiles:] for name in ("pixel_values", "tile_positions")}}
    assert torch.equal(answer(model, longer, cache=past), expected)
    assert sum(encoded) == 2, "the first image is not encoded again"


def test_a_batch_goes_on_from_its_cache(model, chat):
    """Rows of different lengths: each has its own new image, one has none before."""
    first = [[("user", (113, 500), "What?")], [("user", "the quick brown fox")]]
    rest = [("assistant", "the fox"), ("user", (40, 40), " and here?")]
    longer = chat([[*turns, *rest] for turns in first], padding=True, add_generation_prompt=True)
    new = longer["input_ids"].shape[1] - chat(first[0])["input_ids"].shape[1]
    # What both rows have before the rest: the same number of columns, padding included
    before = {name: longer[name][:, :-new] for name in ("input_ids", "attention_mask")}
    images = {name: longer[name][:3] for name in ("pixel_values", "tile_positions")}
    past = model.generate(**before, **images, max_new_tokens=1, return_dict_in_generate=True)[CACHE_NAME]
    assert past.get_seq_length() == before["input_ids"].shape[1]
    assert torch.equal(answer(model, longer, cache=past), answer(model, longer))


def test_continued_from_the_answers_own_cache(model, processor, chat, one):
    """What `generate` returns as the cache is what the next turn takes."""
    output = model.generate(**one, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True)
    follow_up = processor(text=" User: and then? Assistant:", return_tensors="pt")["input_ids"][:, 1:]
    ids = torch.cat([output.sequences, follow_up], dim=1)
    longer = {**one, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = answer(model, longer)
    assert torch.equal(answer(model, longer, cache=output[CACHE_NAME]), expected)
    text_only = {name: longer[name] for name in ("input_ids", "attention_mask")}
    output = model.generate(**one, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(answer(model, text_only, cache=output[CACHE_NAME]), expected)


@pytest.fixture(scope="module")
def going_on(model, chat):
    """Two chats of the same length with an image of its own in each turn: all of their inputs, the new images alone,
    and the cache of their first turns, made anew at each call."""
    rest = [("assistant", "the fox"), ("user", (40, 40), " and here?")]
    firsts = [[("user", (height, width), "What?")] for height, width in ((113, 90), (120, 80))]
    longer = chat([[*first, *rest] for first in firsts], add_generation_prompt=True)
    before = chat(firsts, padding=True)
    assert longer["attention_mask"].all() and before["attention_mask"].all()
    new = torch.tensor([tile for image in (1, 3) for tile in (2 * image, 2 * image + 1)])
    assert len(longer["pixel_values"]) == 8, "two tiles an image"
    new_images = {name: longer[name][new] for name in ("pixel_values", "tile_positions")}

    def cache():
        with torch.no_grad():
            return model(**before, use_cache=True)[CACHE_NAME]

    return longer, new_images, cache


@pytest.mark.parametrize("given", ["all images", "new images", "features of all", "features of the new"])
@pytest.mark.parametrize(
    "kwargs",
    [{"do_sample": True, "top_k": 1, "num_return_sequences": 2}, {"num_beams": 2, "num_return_sequences": 2}],
    ids=["returns", "beams"],
)
def test_each_sample_keeps_its_images_from_a_repeated_cache(model, going_on, kwargs, given):
    longer, new_images, cache = going_on
    expected = answer(model, longer, **kwargs)
    text = {name: longer[name] for name in ("input_ids", "attention_mask")}
    images = longer if "all" in given else new_images
    images = {name: images[name] for name in ("pixel_values", "tile_positions")}
    if "features" in given:
        features = model.get_image_features(**images)
        before = list(features.pooler_output)
        images = {"mm_encoder_outputs": {"image": features}}
    past = cache()
    past.batch_repeat_interleave(2)
    assert torch.equal(answer(model, {**text, **images}, cache=past, **kwargs), expected)
    if "features" in given:
        pairs = zip(features.pooler_output, before, strict=True)
        assert all(one is other for one, other in pairs), "the caller's features are left as they were"


def test_one_chat_with_two_returns_from_its_cache(model, chat):
    first = [("user", (113, 500), "What is shown?")]
    longer = chat([*first, ("assistant", "the fox"), ("user", (40, 40), " and here?")], add_generation_prompt=True)
    with torch.no_grad():
        past = model(**chat(first), use_cache=True)[CACHE_NAME]
    past.batch_repeat_interleave(2)
    kwargs = {"do_sample": True, "top_k": 1, "num_return_sequences": 2}
    assert torch.equal(answer(model, longer, cache=past, **kwargs), answer(model, longer, **kwargs))


@pytest.mark.parametrize(
    "kwargs", [{"num_beams": 2}, {"do_sample": True, "top_k": 1, "num_return_sequences": 3}], ids=["beams", "returns"]
)
def test_given_features_are_left_as_they_were(model, batch, kwargs):
    images = {name: batch[name] for name in ("pixel_values", "tile_positions")}
    features = {"image": model.get_image_features(**images)}
    before = list(features["image"].pooler_output)
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    answers = [answer(model, {**text, "mm_encoder_outputs": features}, **kwargs) for _ in range(2)]
    after = features["image"].pooler_output
    assert len(after) == len(before) and all(one is other for one, other in zip(after, before, strict=True))
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answer(model, batch, **kwargs))


@pytest.mark.parametrize("how", ["prompt lookup", "prompt lookup in a config", "assistant"])
def test_assisted_decoding_from_a_cache_is_refused(model, one, how):
    output = model.generate(**one, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    longer = {**one, "input_ids": output.sequences, "attention_mask": torch.ones_like(output.sequences)}
    kwargs = {
        "prompt lookup": {"prompt_lookup_num_tokens": 2},
        "prompt lookup in a config": {"generation_config": GenerationConfig(prompt_lookup_num_tokens=2)},
        "assistant": {"assistant_model": model},
    }[how]
    with pytest.raises(ValueError, match="`cache` of .* Leave out the cache"):
        model.generate(**longer, cache=output[CACHE_NAME], **kwargs)


# ---------------------------------------------------------------------------------------------------------------------
# Structural tokens
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def eager_for_structure(new_model):
    """A model whose likeliest next tokens are structural ones."""
    structural = new_model.config.structural_token_ids
    new_model.lm_head.register_forward_hook(
        lambda head, inputs, logits: logits.index_fill(-1, torch.tensor(structural), 1e4)
    )
    return new_model


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"suppress_tokens": [7]},
        {"generation_config": GenerationConfig(max_new_tokens=12, do_sample=True)},
        {"generation_config": GenerationConfig(max_new_tokens=12, do_sample=True, suppress_tokens=[7])},
    ],
    ids=["own", "argument", "config", "config with others"],
)
def test_structural_tokens_are_never_generated(eager_for_structure, one, kwargs):
    model = eager_for_structure
    model.generation_config = GenerationConfig(
        eos_token_id=model.config.text_config.eos_token_id
    )  # a caller's own, without ours
    set_seed(0)
    kwargs = {"max_new_tokens": 12, "do_sample": True} | kwargs if "generation_config" not in kwargs else kwargs
    ids = model.generate(**one, **kwargs)[:, one["input_ids"].shape[1] :]
    assert not torch.isin(
        ids, torch.tensor([*model.config.structural_token_ids, *([7] if "7" in str(kwargs) else [])])
    ).any()


def test_nor_in_continuous_batches(eager_for_structure, processor):
    model = eager_for_structure
    prompts = [processor.tokenizer(text)["input_ids"] for text in ("the quick brown", "fox jumps over the")]
    config = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    before = config.to_dict()
    # else the cache takes nearly all memory there is
    few = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=64)
    results = model.generate_batch(prompts, generation_config=config, continuous_batching_config=few)
    generated = [token for result in results.values() for token in result.generated_tokens]
    assert len(generated) == 12 and not {*generated} & {*model.config.structural_token_ids}
    assert config.to_dict() == before, "the caller's config is left as it was"


@pytest.mark.parametrize("how", ["generate_batch", "paged"])
def test_continuous_batches_lose_no_image(model, one, how):
    with pytest.raises(ValueError, match="shows an image, which continuous batching would lose"):
        if how == "paged":
            model.generate(**one, cache_implementation="paged", max_new_tokens=2)
        else:
            model.generate_batch(one["input_ids"].tolist(), max_new_tokens=2)


def test_a_bundle_decodes_assisted_by_a_bundle(bundle, one, greedy_one):
    model, assistant = (
        AutoModelForImageTextToText.from_pretrained(bundle, trust_remote_code=True, dtype=torch.float32)
        for _ in range(2)
    )
    assert torch.equal(answer(model, one, assistant_model=assistant, num_assistant_tokens=2), greedy_one)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")
def test_the_caches_older_name(model, one):
    """Callers of before 5.24 and libraries that follow slowly, such as PEFT, know the cache by it."""
    ids, mask = one["input_ids"], one["attention_mask"]
    with torch.no_grad():
        expected = model(**one, logits_to_keep=1).logits
        steps = []
        for name in ("cache", "past_key_values"):
            before = model(**{**one, "input_ids": ids[:, :-1], "attention_mask": mask[:, :-1]}, use_cache=True)
            last = {"input_ids": ids[:, -1:], "attention_mask": mask, name: before[CACHE_NAME]}
            steps.append(model(**last).logits)
        with pytest.raises(ValueError, match="(?i)both `?cache`?|both `past_key_values` and `cache`"):
            model(input_ids=ids[:, -1:], cache=before[CACHE_NAME], past_key_values=before[CACHE_NAME])
    for logits in steps:
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
