"""Scoring of OCRBench. Rows: `dataset`, `question_type`, `question`, `answer` (texts, all right), `image`."""

FORMULAS = "HME100k"  # handwritten formulas


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    """1 where the answer holds an expected text; of formulas with their case, without their spaces."""

    def comparable(text: str) -> str:
        if doc["dataset"] == FORMULAS:
            return "".join(text.split())
        return text.strip().lower().replace("\n", " ")

    given = comparable(results[0])
    return {"acc": float(any(comparable(text) in given for text in doc["answer"]))}
