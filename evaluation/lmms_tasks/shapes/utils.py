"""Images and scoring of the questions about drawn shapes."""

import re


def words(text: str) -> list[str]:
    """Words in lower case, without punctuation."""
    return re.findall(r"\w+", text.lower())


def doc_to_visual(doc: dict) -> list:
    """The image, a PIL image; lmms-eval puts it before the text."""
    return [doc["image"]]


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    """1 where the answer's words are exactly the expected ones."""
    return {"exact_words": float(words(results[0]) == words(doc["answer"]))}
