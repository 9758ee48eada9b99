"""Rewards of answers that can be checked, for TRL's online trainers (GRPO, RLOO) and for recipes with `grpo`.

Each is called as TRL calls them, `reward(completions, answer, **columns)`: with what the model said, as texts or as
chats, and a right answer to each, or a list of them of which the best counts. It gives a number from 0 to 1 for each.

| What is asked | Reward |
| --- | --- |
| color, kind, yes or no | `exact` |
| how many | `number` |
| where, captions of few words | `words` |
| cells of tables, numbers and small print that are read | `letters` |
| the form of an answer | `Pattern` |
"""

import re
from collections import Counter
from collections.abc import Callable

from rapidfuzz.distance import Levenshtein

from jina_vlm_tools.synthetic.questions import normalize


Completion = str | list[dict]
NUMBER = re.compile(r"[-\u2212]?\d+(?:[.,]\d+)*")


def exact(completions: list[Completion], answer: list[str | list[str]], **columns) -> list[float]:
    """1 if the words are the answer's, whatever their case and punctuation."""
    return _best(completions, answer, lambda given, right: normalize(given) == normalize(right))


def number(completions: list[Completion], answer: list[str | list[str]], **columns) -> list[float]:
    """1 if the only number that is written in digits is the answer's. Naming several is no answer.

    Raises:
        ValueError: a right answer has no number, or several.
    """
    return _best(completions, answer, _same_number)


def words(completions: list[Completion], answer: list[str | list[str]], **columns) -> list[float]:
    """The F1 score of words in common: of "top left" for "top right" 0.5."""
    return _best(completions, answer, _shared_words)


def letters(completions: list[Completion], answer: list[str | list[str]], **columns) -> list[float]:
    """1 less the edits to the answer, as a share of the longer text; below a half, 0 (ANLS, arXiv 1907.00490). Of a
    number that is read with one digit wrong, the others count."""
    return _best(completions, answer, _similarity)


class Pattern:
    """A reward of 1 for answers that are this regular expression as a whole, apart from spaces around them.

    Args:
        pattern (`str`): As Python's `re` has it.
    """

    def __init__(self, pattern: str):
        self.pattern = re.compile(pattern)
        self.__name__ = "pattern"  # which TRL logs it by

    def __call__(self, completions: list[Completion], **columns) -> list[float]:
        return [float(self.pattern.fullmatch(text_of(completion).strip()) is not None) for completion in completions]


REWARDS = {reward.__name__: reward for reward in (exact, number, words, letters)}


def text_of(completion: Completion) -> str:
    """What was said: TRL gives chats where prompts are chats."""
    if isinstance(completion, str):
        return completion
    content = completion[-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def _best(
    completions: list[Completion], answers: list[str | list[str]], score: Callable[[str, str], float]
) -> list[float]:
    rewards = []
    for completion, right in zip(completions, answers, strict=True):
        given = text_of(completion)
        rewards.append(max(float(score(given, one)) for one in ([right] if isinstance(right, str) else right)))
    return rewards


def _same_number(given: str, right: str) -> bool:
    expected, found = _numbers(right), _numbers(given)
    if len(expected) != 1:
        raise ValueError(
            f"The right answer {right!r} has {len(expected)} numbers in digits, expected one. Use the reward `exact` "
            "or `letters` for it."
        )
    return found == expected


def _numbers(text: str) -> list[str]:
    """As they are written, but that 1,024 is 1024."""
    return [re.sub(r",(?=\d{3}(?:\D|$))", "", one).replace("\u2212", "-") for one in NUMBER.findall(text)]


def _shared_words(given: str, right: str) -> float:
    one, other = Counter(normalize(given).split()), Counter(normalize(right).split())
    common = (one & other).total()
    return 2 * common / (one.total() + other.total()) if common else 0.0


def _similarity(given: str, right: str) -> float:
    given, right = (" ".join(text.lower().split()) for text in (given, right))
    return Levenshtein.normalized_similarity(given, right, score_cutoff=0.5)
