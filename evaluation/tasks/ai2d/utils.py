"""Prompts of AI2D. Rows: `question`, `options` (texts), `answer` (index of the right option, as a text), `image`."""

LETTERS = "ABCD"


def doc_to_text(doc: dict) -> str:
    """The question, its lettered options, and what to answer with."""
    options = (f"{letter}. {option}" for letter, option in zip(LETTERS, doc["options"], strict=True))
    lines = [doc["question"], *options, "Answer with the option's letter from the given choices directly."]
    return "<image>" + "\n".join(lines)


def doc_to_target(doc: dict) -> str:
    """The right option's letter."""
    return LETTERS[int(doc["answer"])]
