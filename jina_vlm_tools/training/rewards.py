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
import unicodedata
from collections import Counter
from collections.abc import Callable
from decimal import Decimal

from rapidfuzz.distance import Levenshtein

from jina_vlm_tools.synthetic.questions import normalize, words_of


Completion = str | list[dict]
Answer = str | int | float | list[str | int | float]
MINUSES = "-\u2212\u2013"
NUMBER = re.compile(r"(?<!\w)-?\d+(?:[.,]\d+)*|\d+(?:[.,]\d+)*")


def exact(completions: list[Completion], answer: list[Answer], **columns) -> list[float]:
    """1 if the words are the answer's, whatever their case and punctuation. Signs, as of -5, C++ and 5 %, do count."""
    return _best(completions, answer, _same_words)


def number(completions: list[Completion], answer: list[Answer], **columns) -> list[float]:
    """1 if the only number that is written in digits is the answer's. Naming several is no answer.

    Raises:
        ValueError: no right answer is one number.
    """
    return _best(completions, answer, _same_number, _is_number)


def words(completions: list[Completion], answer: list[Answer], **columns) -> list[float]:
    """The F1 score of words in common: of "top left" for "top right" 0.5. For scripts with spaces between words."""
    return _best(completions, answer, _shared_words)


def letters(completions: list[Completion], answer: list[Answer], **columns) -> list[float]:
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
    """What was said: TRL gives chats where prompts are chats. A call of a tool says nothing."""
    if isinstance(completion, str):
        return completion
    content = (completion[-1].get("content") if completion else None) or ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or "" for part in content if part.get("type") == "text")


def _best(
    completions: list[Completion],
    answers: list[Answer],
    score: Callable[[str, str], float],
    can_be: Callable[[str], bool] = bool,
) -> list[float]:
    """The best score of each completion over its right answers, those that can be ones."""
    rewards = []
    for index, (completion, right) in enumerate(zip(completions, answers, strict=True)):
        given = [str(one) for one in (right if isinstance(right, list) else [right]) if one is not None]
        expected = [one for one in given if can_be(one)]
        if not expected:
            raise ValueError(
                f"The right answer {index} is {right!r}, which this reward cannot compare with: expected a text, and "
                "for `number` one number in digits. Take another reward, or leave the sample out."
            )
        rewards.append(max(float(score(text_of(completion), one)) for one in expected))
    return rewards


def _same_words(given: str, right: str) -> bool:
    one, other = (words_of(_with_signs(text), "LNMS") for text in (given, right))
    return one == other if one and other else given.strip() == right.strip()


def _with_signs(text: str) -> str:
    """With symbols for a minus before a number and for per cent, whose characters are punctuation in Unicode."""
    return re.sub(rf"(?<!\w)[{MINUSES}](?=\d)", "\u2212", text).replace("%", "\u2052")


def _numbers(text: str) -> list[Decimal]:
    """The numbers in digits of any script; commas before three digits, and spaces that do not break, group them."""
    plain = unicodedata.normalize("NFKC", re.sub(r"(?<=\d)[\u00a0\u202f](?=\d{3}(?!\d))", "", text))
    plain = "".join(str(unicodedata.digit(character, character)) for character in plain)
    plain = re.sub(rf"[{MINUSES}]", "-", plain)
    return [_decimal(one) for one in NUMBER.findall(plain)]


def _decimal(text: str) -> Decimal:
    """1,024 and 1.024.000 are whole numbers; of several marks the last one is the decimal's, if it is another."""
    *whole, last = re.split("[.,]", text)
    marks = re.findall("[.,]", text)
    groups = len({*marks}) == 1 and (len(marks) > 1 or (marks[0] == "," and len(last) == 3))
    return Decimal("".join(whole) + ("" if groups or not whole else ".") + last)


def _is_number(text: str) -> bool:
    return len(_numbers(text)) == 1


def _same_number(given: str, right: str) -> bool:
    return _numbers(given) == _numbers(right)


def _shared_words(given: str, right: str) -> float:
    one, other = Counter(normalize(given).split()), Counter(normalize(right).split())
    common = (one & other).total()
    return 2 * common / (one.total() + other.total()) if common else 0.0


def _similarity(given: str, right: str) -> float:
    given, right = (" ".join(unicodedata.normalize("NFC", text.lower()).split()) for text in (given, right))
    return Levenshtein.normalized_similarity(given, right, score_cutoff=0.5)
