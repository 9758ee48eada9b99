"""Scoring of POPE. Rows: `question`, `answer` ("yes" or "no"), `image`."""

import re


def says_yes(answer: str) -> bool:
    """Whether an answer agrees: it does unless "no" or "not" is among the words of its first sentence, as the
    benchmark has it."""
    return not {"no", "not"} & set(re.findall(r"\w+", answer.lower().split(".")[0]))


def process_results(doc: dict, results: list[str]) -> dict:
    """Right or not; and, for F1, whether it should and does say yes."""
    expected, given = doc["answer"].strip().lower() == "yes", says_yes(results[0])
    return {"acc": float(given == expected), "f1": (int(expected), int(given))}
