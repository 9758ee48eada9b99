"""Rewards: what each gives for a right, a half right and a wrong answer, as TRL calls them."""

import pytest

from jina_vlm_tools.training.rewards import REWARDS, Pattern


@pytest.mark.parametrize(
    ("name", "given", "right", "expected"),
    [
        ("exact", " Red.", "red", 1),
        ("exact", "en haut à gauche", "En haut, à gauche", 1),
        ("exact", "a red star", "red", 0),
        ("exact", "green", ["grün", "green"], 1),
        ("number", "There are 3 of them.", "3", 1),
        ("number", "3 or 4", "3", 0),
        ("number", "three", "3", 0),
        ("number", "1,024", "1024", 1),
        ("number", "−7 °C", "-7", 1),
        ("number", "2.5", "2,5", 1),
        ("number", "1.024,50", "1,024.5", 1),
        ("number", "3.0", "3", 1),
        ("number", "\u0663", "3", 1),
        ("number", "5-3", "-3", 0),
        ("number", "\u20133", "-3", 1),
        ("number", "3", ["three", "3"], 1),
        ("number", "3", 3, 1),
        ("exact", "\u0926\u094b", "\u0926\u0940", 0),  # Hindi: two, gave
        ("exact", "cafe\u0301", "caf\u00e9", 1),
        ("exact", "-5", "5", 0),
        ("exact", "5 %", "5", 0),
        ("exact", "C++", "C", 0),
        ("exact", "...", "!", 0),
        ("words", "\u0926\u094b", "\u0926\u0940", 0),
        ("number", "1,2", "12", 0),
        ("words", "top right", "top left", 0.5),
        ("words", "left, at the top", "top left", 2 * 2 / (4 + 2)),
        ("words", "", "top left", 0),
        ("words", "red red", "red", 2 * 1 / (2 + 1)),
        ("letters", "1 234", "1234", 0.8),
        ("letters", "7979", "9797", 0.5),
        ("letters", "79", "9797", 0.5),
        ("letters", "7", "9797", 0),
        ("letters", "REGEN ", "regen", 1),
    ],
)
def test_rewards(name, given, right, expected):
    """Of texts, and of chats as TRL's trainers have them."""
    chats = (
        [{"role": "assistant", "content": given}],
        [{"role": "assistant", "content": [{"type": "text", "text": given}]}],
    )
    for completion in (given, *chats):
        assert REWARDS[name]([completion], answer=[right], prompts=["?"]) == [pytest.approx(expected)]


def test_each_completion_has_its_own_answer():
    assert REWARDS["exact"](["a", "b", "a"], answer=["a", "a", ["b", "a"]]) == [1, 0, 1]


def test_form():
    reward = Pattern(r"\d+|none")
    assert reward(["12", " none\n", "12 stars", "", "nonesuch"], answer=["1"] * 5) == [1, 1, 0, 0, 0]
    assert reward.__name__ == "pattern"


@pytest.mark.parametrize(
    ("name", "right"), [("number", "red"), ("number", "3 or 4"), ("exact", None), ("exact", []), ("letters", "")]
)
def test_answers_that_cannot_be_compared_with(name, right):
    with pytest.raises(ValueError, match=r"The right answer 0 is .*, which this reward cannot compare with"):
        REWARDS[name](["3"], answer=[right])


@pytest.mark.parametrize(
    "completion", [[], [{"role": "assistant", "tool_calls": []}], [{"content": None}], [{"content": [{"text": None}]}]]
)
def test_completions_that_say_nothing(completion):
    assert REWARDS["exact"]([completion], answer=["red"]) == [0]
