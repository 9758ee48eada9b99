"""Scoring of TextVQA. Rows: `question`, `answers` (of ten people), `image`."""

import re


NUMBERS = {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
ARTICLES = ("a", "an", "the")


def normalize(answer: str) -> str:
    """What VQA accuracy compares: words in lower case, numbers up to ten as digits, without articles and punctuation.

    Commas and points inside numbers: the former go, the latter stay. The benchmark's own code writes apostrophes into
    a list of contractions ("dont" becomes "don't"); leaving them all out makes the same ones equal.
    """
    text = answer.lower().replace("'", "").replace("\u2019", "")
    text = re.sub(r"(?<=\d),(?=\d)", "", text)
    text = re.sub(r"(?<!\d)\.|\.(?!\d)", " ", text)
    words = re.sub(r"[^\w.$%:&*#~^|\s]", " ", text).replace("_", " ").split()
    return " ".join(NUMBERS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(answer: str, answers: list[str]) -> float:
    """Accuracy against several people's answers (arXiv 1505.00468, section 4): an answer that three others gave is
    right. Of each group that leaves one person out, min(1, agreeing / 3), on average."""
    given = normalize(answer)
    agreeing = [given == normalize(other) for other in answers]
    return sum(min(1, (sum(agreeing) - agrees) / 3) for agrees in agreeing) / len(agreeing)


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    """The answer's accuracy."""
    return {"vqa_accuracy": vqa_accuracy(results[0], doc["answers"])}
