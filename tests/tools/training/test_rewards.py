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
        ("number", "2.5", "2,5", 0),
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
        ("letters", "", "", 1),
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


def test_numbers_of_answers_without_one():
    with pytest.raises(
        ValueError, match="The right answer 'red' has 0 numbers in digits, expected one. Use the reward"
    ):
        REWARDS["number"](["3"], answer=["red"])
