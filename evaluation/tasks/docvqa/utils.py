"""Scoring of DocVQA. Rows: `question`, `answers` (a list of texts, all right), `image`."""

from nltk import edit_distance


THRESHOLD = 0.5  # below it a reading is a wrong one


def anls(answer: str, accepted: list[str]) -> float:
    """Average normalized Levenshtein similarity of one answer (arXiv 1907.00490, equation 1): 1 less the edits that
    part it from the nearest accepted answer, as a share of the longer one's characters; 0 where that is below a half.
    Case and runs of spaces do not count."""
    given = " ".join(answer.lower().split())
    similarities = []
    for text in accepted:
        expected = " ".join(text.lower().split())
        similarities.append(1 - edit_distance(given, expected) / max(len(given), len(expected), 1))
    return max((s for s in similarities if s >= THRESHOLD), default=0.0)


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    """The answer's similarity."""
    return {"anls": anls(results[0], doc["answers"])}
