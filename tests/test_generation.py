"""Everything that `generate` does, with pictures in the prompt: what each way to decode must have in common with greedy
decoding, which the golden data fix."""

import threading

import pytest
import torch
from jina_vlm.compatibility_jina_vlm import CACHE_NAME
from transformers import AutoModelForImageTextToText, StaticCache, TextIteratorStreamer, set_seed
from transformers.generation import utils as generation_utils


NEW_TOKENS = 6
SLICES_PICTURES = hasattr(generation_utils, "_slice_mm_encoder_output")  # prefill in chunks knows of pictures


def answer(model, inputs, **kwargs) -> torch.Tensor:
    kwargs = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **kwargs}
    ids = model.generate(**inputs, **kwargs)
    return ids[:, inputs["input_ids"].shape[1] :]


@pytest.fixture(scope="module")
def batch(chat):
    """Two pictures, none, one: on the left padding of three lengths."""
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


# ----------------------------------------------------------------------------------------------------------------------
# Ways to decode
# ----------------------------------------------------------------------------------------------------------------------


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
    assert sum(encoded) == len(batch["pixel_values"]), "pictures are encoded once"


def test_quantised_cache(model, one, greedy_one):
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


@pytest.mark.parametrize("kwargs", [{"num_beams": 3}, {"num_beams": 2, "do_sample": True, "temperature": 0.5}], ids=str)
def test_each_beam_keeps_its_pictures(model, chat, batch, encoded, kwargs):
    """Every sample's best beams, alone and in the batch; sampled ones in the same order of random numbers only alone."""
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


# ----------------------------------------------------------------------------------------------------------------------
# Output and stopping
# ----------------------------------------------------------------------------------------------------------------------


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
    hook = model.lm_head.register_forward_hook(lambda module, arguments, output: shapes.append(tuple(output.shape[:2])))
    answer(model, one, max_new_tokens=3)
    hook.remove()
    assert shapes == [(1, 1)] * 3


# ----------------------------------------------------------------------------------------------------------------------
# Prompts of other kinds
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_pictures", [False, True], ids=["pictures merged", "pictures beside them"])
def test_inputs_embeds(model, one, greedy_one, with_pictures):
    inputs = {name: one[name] for name in ("attention_mask", "pixel_values", "tile_positions")}
    embeds = model.get_input_embeddings()(one["input_ids"]).detach()
    if not with_pictures:
        features = model.get_image_features(inputs.pop("pixel_values"), inputs.pop("tile_positions")).pooler_output
        places = (one["input_ids"] == model.config.image_token_id).unsqueeze(-1)
        embeds = embeds.masked_scatter(places, torch.cat(features).detach())
    ids = model.generate(inputs_embeds=embeds, **inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert torch.equal(ids, greedy_one)


@pytest.mark.parametrize("size", [7, 64, 10_000])
def test_prefill_in_chunks(model, batch, greedy, encoded, size):
    """A chunk's border may lie within a picture."""
    if SLICES_PICTURES:
        assert torch.equal(answer(model, batch, prefill_chunk_size=size), greedy)
        assert sum(encoded) == len(batch["pixel_values"])
    else:
        with pytest.raises(ValueError, match="prefill_chunk_size"):
            answer(model, batch, prefill_chunk_size=size)


def test_text_in_chunks_on_every_version(model, chat):
    text = chat([("user", "the quick brown fox jumps over the lazy dog")], add_generation_prompt=True)
    assert torch.equal(answer(model, text, prefill_chunk_size=4), answer(model, text))


@pytest.mark.parametrize("given", ["all pictures", "new pictures"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_second_turn_from_the_first_turns_cache(model, chat, encoded, cache, given):
    """The second turn brings a new picture; the first one's is in the cache."""
    first = [("user", (113, 500), "What is shown?")]
    second = [*first, ("assistant", "the fox"), ("user", (40, 40), " and here?")]
    inputs, longer = chat(first), chat(second, add_generation_prompt=True)
    length = inputs["input_ids"].shape[1]
    assert torch.equal(longer["input_ids"][:, :length], inputs["input_ids"])
    expected = answer(model, longer)
    kwargs = {}
    if cache == "static":
        kwargs["cache"] = StaticCache(model.config.get_text_config(), max_cache_len=longer["input_ids"].shape[1] + NEW_TOKENS)
    with torch.no_grad():
        past = model(**inputs, use_cache=True, **kwargs)[CACHE_NAME]
    tiles = len(inputs["pixel_values"])
    del encoded[:]
    if given == "new pictures":
        longer = {**longer, **{name: longer[name][tiles:] for name in ("pixel_values", "tile_positions")}}
    assert torch.equal(answer(model, longer, **{CACHE_NAME: past}), expected)
    assert sum(encoded) == 2, "the first picture is not encoded again"


def test_a_batch_goes_on_from_its_cache(model, chat):
    """Rows of different lengths: each has its own new picture, one has none before."""
    first = [[("user", (113, 500), "What?")], [("user", "the quick brown fox")]]
    rest = [("assistant", "the fox"), ("user", (40, 40), " and here?")]
    longer = chat([[*turns, *rest] for turns in first], padding=True, add_generation_prompt=True)
    new = longer["input_ids"].shape[1] - chat(first[0])["input_ids"].shape[1]
    # What both rows have before the rest: the same number of columns, padding included
    before = {name: longer[name][:, :-new] for name in ("input_ids", "attention_mask")}
    pictures = {name: longer[name][:3] for name in ("pixel_values", "tile_positions")}
    past = model.generate(**before, **pictures, max_new_tokens=1, return_dict_in_generate=True)[CACHE_NAME]
    assert past.get_seq_length() == before["input_ids"].shape[1]
    assert torch.equal(answer(model, longer, **{CACHE_NAME: past}), answer(model, longer))


def test_continued_from_the_answers_own_cache(model, processor, chat, one):
    """What `generate` returns as the cache is what the next turn takes."""
    output = model.generate(**one, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True)
    follow_up = processor(text=" User: and then? Assistant:", return_tensors="pt")["input_ids"][:, 1:]
    ids = torch.cat([output.sequences, follow_up], dim=1)
    longer = {**one, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = answer(model, longer)
    assert torch.equal(answer(model, longer, **{CACHE_NAME: output[CACHE_NAME]}), expected)
    text_only = {name: longer[name] for name in ("input_ids", "attention_mask")}
    output = model.generate(**one, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(answer(model, text_only, **{CACHE_NAME: output[CACHE_NAME]}), expected)


def test_a_bundle_decodes_assisted_by_a_bundle(bundle, one, greedy_one):
    model, assistant = (AutoModelForImageTextToText.from_pretrained(bundle, trust_remote_code=True, dtype=torch.float32) for _ in range(2))
    assert torch.equal(answer(model, one, assistant_model=assistant, num_assistant_tokens=2), greedy_one)
