"""Scoring of RealWorldQA. Rows: `question` (with options and instructions), `answer`, `image`."""

import re


# The first capital that stands alone: "B", "(B)", "B. The left one", "The answer is B."
LETTER = re.compile(r"(?<![A-Za-z])([A-Z])(?![A-Za-z'])")


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    """1 for the right option's letter or, where there are no options, for the same words."""
    given, expected = (text.strip().rstrip(".").strip() for text in (results[0], doc["answer"]))
    if LETTER.fullmatch(expected):
        letter = LETTER.search(given)
        return {"acc": float(letter is not None and letter[1] == expected)}
    return {"acc": float(given.lower() == expected.lower())}
