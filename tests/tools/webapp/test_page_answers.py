"""The page's answers, without the page: streamed, stopped, timed, and each image encoded once."""

import threading
import time

import pytest
import torch

from jina_vlm_tools.files import TINY
from jina_vlm_tools.inference.conversation import Conversation
from jina_vlm_tools.inference.loading import load_on_device, load_processor_and_class
from jina_vlm_tools.webapp.answering import ImageChat
from jina_vlm_tools.webapp.examples import EXAMPLES


pytestmark = pytest.mark.skipif(not TINY.is_dir(), reason="checkpoints/tiny has not been trained yet")
CAPTION = EXAMPLES[0]
RIGHT = (
    "5 shapes: at the top left a pink star, at the top a red star, in the centre an orange triangle, at the bottom "
    "left a pink star, at the bottom right a purple cross."
)


@pytest.fixture(scope="module")
def loaded():
    processor, load_model = load_processor_and_class(str(TINY))
    return load_on_device(load_model, "cpu"), processor


@pytest.fixture
def chat(loaded):
    return ImageChat(*loaded, CAPTION.draw(), max_tiles=12)


@pytest.fixture
def calls(loaded):
    """Times at which the vision tower and the head began."""
    model, _ = loaded
    calls = {"tower": [], "head": []}
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: calls[name].append(time.monotonic()))
        for name, module in (("tower", model.model.vision_model), ("head", model.lm_head))
    ]
    yield calls
    for handle in handles:
        handle.remove()


def ask(chat, question, max_new_tokens=64, temperature=0.0):
    """The last of its turns, and the texts on the way."""
    assert chat.begin(question)
    texts = []
    for turn in chat.stream(max_new_tokens, temperature):
        texts.append(turn.text)
    return turn, texts


def test_an_answer_comes_piece_by_piece(chat):
    turn, texts = ask(chat, "Describe the picture.")
    assert turn.text == RIGHT
    assert len(set(texts)) > 20 and all(RIGHT.startswith(text) for text in (text.rstrip() for text in texts))
    assert not turn.is_stopped and not turn.is_cut_off


def test_tokens_and_times_are_those_of_the_answer(chat, loaded):
    start = time.perf_counter()
    turn, _ = ask(chat, "Describe the picture.")
    elapsed = time.perf_counter() - start
    reference = Conversation(*loaded, 64).answer("Describe the picture.", [CAPTION.draw()])
    counted = loaded[1]._get_num_multimodal_tokens([(320, 360)])["num_image_tokens"][0]
    assert (turn.prompt_tokens, turn.tokens) == (reference.prompt_tokens, reference.tokens)
    assert turn.image_tokens == counted and turn.text_tokens == turn.prompt_tokens - counted > 0
    parts = (turn.seconds_prepared, turn.seconds_encoded, turn.seconds_first_token, turn.seconds_decoded)
    assert all(seconds > 0 for seconds in parts)
    assert 0.9 * turn.seconds <= sum(parts) <= turn.seconds <= elapsed
    assert turn.tokens_per_second == pytest.approx((turn.tokens - 1) / turn.seconds_decoded)


@pytest.mark.parametrize(
    "slow, part",
    [("vision_model", "seconds_encoded"), ("connector", "seconds_encoded"), ("language_model", "seconds_first_token")],
)
def test_time_is_counted_where_it_was_spent(chat, loaded, slow, part):
    is_first = iter([True])
    module = getattr(loaded[0].model, slow)
    handle = module.register_forward_pre_hook(lambda *_: time.sleep(1.5 * next(is_first, False)))
    try:
        turn, _ = ask(chat, "Describe the picture.")
    finally:
        handle.remove()
    names = ("seconds_prepared", "seconds_encoded", "seconds_first_token", "seconds_decoded")
    assert max(names, key=lambda name: getattr(turn, name)) == part and getattr(turn, part) >= 1.5


def test_turns_are_those_of_a_conversation_and_the_image_is_encoded_once(chat, loaded, calls):
    questions = ("Describe the picture.", "How many shapes are there?", "What colour is the triangle?")
    turns = [ask(chat, question)[0] for question in questions]
    assert len(calls["tower"]) == 1
    assert [turn.seconds_encoded is None for turn in turns] == [False, True, True]
    reference = Conversation(*loaded, 64)
    for number, (question, turn) in enumerate(zip(questions, turns, strict=True)):
        expected = reference.answer(question, [] if number else [CAPTION.draw()])
        assert (turn.text, turn.prompt_tokens) == (expected.text, expected.prompt_tokens)


def test_stop_ends_the_model_and_the_chat_goes_on(chat, loaded, calls):
    """The model waits at its tenth token until it is stopped: a slow machine's reader sees no fewer."""
    stopped = threading.Event()

    def wait(*_) -> None:
        if len(calls["head"]) == 10:
            stopped.wait(60)

    handle = loaded[0].lm_head.register_forward_pre_hook(wait)
    try:
        assert chat.begin("Describe the picture.")
        for turn in chat.stream(64, 0.0):
            if turn.tokens >= 5 and not stopped.is_set():
                chat.stop()
                stopped.set()
    finally:
        handle.remove()
    assert turn.is_stopped and not turn.is_cut_off
    assert turn.tokens <= 11 and RIGHT.startswith(turn.text) and len(calls["head"]) == turn.tokens
    assert chat.messages[-1]["content"] == [{"type": "text", "text": turn.text}]
    turn, _ = ask(chat, "What colour is the triangle?")
    assert turn.text == "orange" and not turn.is_stopped


def test_stop_before_the_model_began(chat, calls):
    assert chat.begin("Describe the picture.")
    chat.stop()
    (*_, turn) = chat.stream(64, 0.0)
    assert turn.is_stopped and not turn.text and calls == {"tower": [], "head": []}
    assert ask(chat, "Describe the picture.")[0].text == RIGHT


def test_the_model_stops_when_nobody_reads(chat, loaded, calls):
    handle = loaded[0].lm_head.register_forward_pre_hook(lambda *_: time.sleep(0.05))
    try:
        assert chat.begin("Describe the picture.")
        answer = chat.stream(64, 0.0)
        while next(answer).tokens < 3:
            pass
        answer.close()
        begun = len(calls["head"])
        time.sleep(0.5)
    finally:
        handle.remove()
    assert len(calls["head"]) <= begun + 1 < 30  # a step may be under way


@pytest.mark.parametrize("failing", ["vision_model", "language_model"])
def test_a_failure_is_raised_and_the_chat_goes_on(chat, loaded, failing):
    if failing == "language_model":
        ask(chat, "How many shapes are there?")

    def fail(*_):
        raise RuntimeError("out of memory")

    handle = getattr(loaded[0].model, failing).register_forward_pre_hook(fail)
    try:
        assert chat.begin("Describe the picture.")
        with pytest.raises(RuntimeError, match="out of memory"):
            for _ in chat.stream(64, 0.0):
                pass
    finally:
        handle.remove()
    assert ask(chat, "Describe the picture.")[0].text == RIGHT


def test_one_answer_at_a_time(chat):
    assert chat.begin("Describe the picture.")
    assert not chat.begin("How many shapes are there?")
    answer = chat.stream(64, 0.0)
    next(answer)
    assert not chat.begin("How many shapes are there?") and not list(chat.stream(64, 0.0))
    assert [turn.text for turn in answer][-1] == RIGHT
    assert ask(chat, "How many shapes are there?")[0].text == "5"


def test_a_short_limit_cuts_the_answer_off(chat):
    turn, _ = ask(chat, "Describe the picture.", max_new_tokens=3)
    assert turn.is_cut_off and turn.tokens == 3 and RIGHT.startswith(turn.text)
    assert ask(chat, "How many shapes are there?")[0].text == "5"


@pytest.mark.parametrize("temperature", [2, 2.0])
def test_temperature_surprises(chat, temperature):
    torch.manual_seed(0)
    texts = {ask(chat, "Describe the picture.", temperature=temperature)[0].text for _ in range(3)}
    assert texts != {RIGHT}


def test_too_long_a_conversation_says_so(chat, loaded):
    assert chat.begin("Describe " * 4000)
    with pytest.raises(ValueError, match="the model takes 4096"):
        list(chat.stream(64, 0.0))
    assert ask(chat, "Describe the picture.")[0].text == RIGHT


def test_users_get_their_own_answers(loaded):
    """Each of several at once gets what it gets alone."""

    def answers(example):
        chat = ImageChat(*loaded, example.draw(), max_tiles=4)
        return [ask(chat, question)[0].text for question in (example.question, "Describe the picture.")]

    alone = [answers(example) for example in EXAMPLES]
    assert len({first for first, _ in alone}) == len(EXAMPLES)
    together = [None] * len(EXAMPLES)

    def run(index):
        together[index] = answers(EXAMPLES[index])

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(EXAMPLES))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone
