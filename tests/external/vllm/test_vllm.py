"""vLLM's offline engine, through its Transformers back end, on the bundle as it is: `LLM.chat` gives `generate`'s
tokens."""

import contextlib
import gc

import pytest
from conftest import CHATS, CHECKPOINT, MAX_TOKENS, shapes, user
from vllm import LLM, SamplingParams


GREEDY = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)


@contextlib.contextmanager
def engine(**kwargs):
    """Both caches are on, as they are by default. A step takes fewer tokens than an image has, so that prompts are cut
    in the midst of images."""
    kwargs = {"max_num_batched_tokens": 256, "enable_prefix_caching": True, "disable_log_stats": False, **kwargs}
    llm = LLM(
        str(CHECKPOINT),
        trust_remote_code=True,
        dtype="float32",
        max_model_len=4096,
        limit_mm_per_prompt={"image": 3},
        enforce_eager=True,
        **kwargs,
    )
    yield llm
    del llm
    gc.collect()


@pytest.fixture(scope="module")
def llm():
    with engine() as llm:
        yield llm


def metric(llm, name: str) -> float:
    return sum(item.value for item in llm.get_metrics() if item.name == name)


def assert_same(reference, outputs, chats, **kwargs):
    for output, chat in zip(outputs, chats, strict=True):
        prompt, answer = reference(chat, **kwargs)
        assert output.prompt_token_ids == prompt
        assert reference.without_end(output.outputs[0].token_ids) == answer
        assert answer, "an empty answer shows nothing"


@pytest.mark.parametrize("name", CHATS)
def test_chat(llm, reference, name):
    assert_same(reference, llm.chat(CHATS[name], GREEDY, use_tqdm=False), [CHATS[name]])


def test_all_at_once(llm, reference):
    """Different numbers of tiles in one batch, and text alone among them; what the first pass left in the caches is
    used."""
    hits = metric(llm, "vllm:mm_cache_hits"), metric(llm, "vllm:prefix_cache_hits")
    assert_same(reference, llm.chat(list(CHATS.values()), GREEDY, use_tqdm=False), CHATS.values())
    assert metric(llm, "vllm:mm_cache_hits") > hits[0]
    assert metric(llm, "vllm:prefix_cache_hits") > hits[1]


def test_one_image_is_not_another(llm, reference):
    """Prompts that differ in nothing but the image: neither cache may take one for the other."""
    chats = [[user(shapes(seed), "Describe the picture.")] for seed in (20, 21, 22)]
    answers = [reference(chat)[1] for chat in chats]
    assert len(set(map(tuple, answers))) == len(answers)
    for chat in chats:
        assert_same(reference, llm.chat(chat, GREEDY, use_tqdm=False), [chat])


def test_processor_arguments_of_the_engine(reference):
    chat = [user(shapes(3, 1280, 720), "Describe the picture.")]
    with engine(mm_processor_kwargs={"max_tiles": 4}) as llm:
        outputs = llm.chat(chat, GREEDY, use_tqdm=False)
    assert_same(reference, outputs, [chat], max_tiles=4)
    assert len(outputs[0].prompt_token_ids) < 900 < len(reference(chat)[0])


def test_processor_arguments_of_one_request(llm, reference):
    """vLLM counts tiles by the engine's own arguments. A request that asks for others is refused, and no other is
    harmed."""
    chat = CHATS["13 tiles"]
    with pytest.raises(ValueError, match="cannot be split"):
        llm.chat(chat, GREEDY, use_tqdm=False, mm_processor_kwargs={"max_tiles": 4})
    assert_same(reference, llm.chat(chat, GREEDY, use_tqdm=False), [chat])


def test_no_structural_token_is_sampled(llm, reference):
    """vLLM does not know `suppress_tokens`; the head's rows themselves must be low."""
    params = SamplingParams(temperature=2.0, max_tokens=200, seed=0, ignore_eos=True, n=4)
    outputs = llm.chat(CHATS["2 tiles"], params, use_tqdm=False)[0].outputs
    sampled = {token for output in outputs for token in output.token_ids}
    assert len(sampled) > 100
    assert not sampled & set(reference.model.config.structural_token_ids)


PROMPTS = {
    "text": (" User: What colour is the star? Assistant:", []),
    "an image": (" User: <|image|>Describe the picture. Assistant:", [1]),
    "two": (" User: <|image|> and <|image|>Describe the picture. Assistant:", [5, 6]),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_raw_prompts(llm, reference, name):
    """Nobody wrote `<|endoftext|>` in front of these: the tokenizer adds what the processor adds."""
    text, seeds = PROMPTS[name]
    images = [shapes(seed) for seed in seeds]
    inputs = reference.processor(text=text, images=images or None, return_tensors="pt")
    answer = reference.model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)[
        0, inputs["input_ids"].shape[1] :
    ]
    output = llm.generate(
        {"prompt": text, **({"multi_modal_data": {"image": images}} if images else {})}, GREEDY, use_tqdm=False
    )[0]
    assert output.prompt_token_ids == inputs["input_ids"][0].tolist()
    assert reference.without_end(output.outputs[0].token_ids) == reference.without_end(answer.tolist())


def test_rendered_chats(llm, reference):
    """They have theirs, and are encoded as chats are."""
    chat = CHATS["2 tiles"]
    text = reference.processor.apply_chat_template(chat, add_generation_prompt=True)
    prompt = {"prompt": text, "multi_modal_data": {"image": shapes(1)}}
    output = llm.generate(prompt, GREEDY, use_tqdm=False, tokenization_kwargs={"add_special_tokens": False})[0]
    assert output.prompt_token_ids == reference(chat)[0]


@pytest.mark.parametrize("begun", ["The <|image|>x", "The <im_patch> |<EXTRA_TOKENS_0>|", "The <", "There is"])
def test_continued_messages(llm, reference, begun):
    """With special tokens typed in what is to be continued, which the template breaks up by a space."""
    chat = [user(shapes(1), "Describe the picture."), {"role": "assistant", "content": begun}]
    output = llm.chat(chat, GREEDY, use_tqdm=False, add_generation_prompt=False, continue_final_message=True)[0]
    broken = begun.replace("<|", "< |").replace("<im_", "< im_").replace("|<EXTRA_", "| <EXTRA_")
    harmless = [chat[0], {"role": "assistant", "content": broken}]
    expected = reference.processor.apply_chat_template(harmless, continue_final_message=True, tokenize=True)
    assert output.prompt_token_ids == expected[0]


TYPED = ("<|image|>", "<im_patch>", "<|endoftext|>")


@pytest.mark.parametrize("typed", TYPED)
def test_typed_structural_tokens(llm, reference, typed):
    """vLLM renders a chat to a string and tokenizes that, so that the template itself must break up what users typed:
    by one space more than they wrote, and no token."""
    chat = [user(f"Look {typed} here", shapes(1), "Describe the picture.")]
    prompt = llm.chat(chat, GREEDY, use_tqdm=False)[0].prompt_token_ids
    harmless = [user(f"Look {typed[0]} {typed[1:]} here", shapes(1), "Describe the picture.")]
    assert prompt == reference(harmless)[0]


def test_two_processes(reference):
    """Tensor parallelism: half of the heads each."""
    with engine(tensor_parallel_size=2) as llm:
        assert_same(reference, llm.chat(list(CHATS.values()), GREEDY, use_tqdm=False), CHATS.values())
