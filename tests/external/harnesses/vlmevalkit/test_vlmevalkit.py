"""VLMEvalKit as it is installed, with the small checkpoint in it: the drawn shapes, and a few rows of the schemas of
the paper's benchmarks. Each answer is that of our own way of asking, and each score is found by `evaluation.table`.

The rows ask about drawn shapes, with the wrapper's prompts. What needs a judge cannot be run here.
"""

import base64
import io
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import pytest
import torch
from answers import answer_greedily, prepare
from PIL import Image


os.environ["HF_HUB_OFFLINE"] = "1"

from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: E402
from vlmeval import dataset as kit  # noqa: E402

from evaluation import shapes, table  # noqa: E402
from evaluation.vlmevalkit.__main__ import main  # noqa: E402
from evaluation.vlmevalkit.drawn_shapes import DrawnShapes  # noqa: E402
from evaluation.vlmevalkit.model import LETTER, SHORT, JinaVLM  # noqa: E402
from experiments.eval_tiny import evaluate  # noqa: E402


CHECKPOINT = Path(__file__).parents[4] / "checkpoints" / "tiny"
SAMPLES = 48  # of the shapes
ROWS = shapes.rows(4)
LANGUAGES = ("ar", "cn", "en", "pt", "ru", "tr")


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(CHECKPOINT, trust_remote_code=True)


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(CHECKPOINT, trust_remote_code=True, dtype=torch.float32).eval()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """VLMEvalKit's predictions of a benchmark by row, and the table's scores by benchmark. Its data lie under
    `tmp_path`, where they would be downloaded to."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LMUData", str(tmp_path))
    monkeypatch.setattr(kit, "DATASET_CLASSES", list(kit.DATASET_CLASSES))
    for cls in kit.DATASET_CLASSES:
        if hasattr(cls, "DATASET_MD5"):
            monkeypatch.setattr(cls, "DATASET_MD5", {})

    def run(name: str, *arguments: str) -> tuple[list[str], dict[str, float]]:
        command = ["--checkpoint", str(CHECKPOINT), "--dtype", "float32", "--data", name, "--work-dir", "results"]
        monkeypatch.setattr(sys, "argv", ["vlmevalkit", *command, "--judge", "exact_matching", *arguments])
        main()
        predictions = pd.read_excel(f"results/tiny/tiny_{name}.xlsx")["prediction"].astype(str).tolist()
        benchmarks = table.yaml.safe_load(table.BENCHMARKS.read_text(encoding="utf-8"))
        scores = table.collect(tmp_path / "results", benchmarks)["tiny"]
        return predictions, {name: score.value for (name, _), score in scores.items()}

    return run


def test_shapes(run, model, processor):
    own = evaluate(model, processor, SAMPLES, batch_size=16)
    share = sum(result["right"] for result in own) / SAMPLES
    assert 0.8 < share < 1, "a score that nothing could change shows nothing"
    shapes.write(shapes.PATH, SAMPLES)
    predictions, scores = run("shapes")
    assert predictions == [result["given"] for result in own]
    assert scores == {"shapes": pytest.approx(100 * share)}


def png(image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


@torch.inference_mode()
def own_answer(model, processor, content: list) -> str:
    """Of a message of images and texts."""
    return answer_greedily(model, processor, prepare(processor, content), 1024).strip()


IMAGES, QUESTIONS = [row["image"] for row in ROWS], [row["question"] for row in ROWS]
OPTIONS = {"A": "zebra", "B": "rot"}
CHOICES = "\nA. zebra\nB. rot\n" + LETTER


@dataclass
class Case:
    """A benchmark's row in the table, its columns beside index, image, question and answer, and what is asked."""

    row: str
    columns: dict = field(default_factory=dict)
    content: list = field(default_factory=lambda: [[i, q + CHOICES] for i, q in zip(IMAGES, QUESTIONS, strict=True)])
    questions: list = field(default_factory=lambda: QUESTIONS)
    images: list = field(default_factory=lambda: [png(image) for image in IMAGES])
    # What a column `answer` holds where the answer that was given is right; None where it never is
    answer: str | None = "{}"
    full: float = 100.0


SHORTLY = [[image, f"{question}\n{SHORT}"] for image, question in zip(IMAGES, QUESTIONS, strict=True)]
PAIRS = [str([png(IMAGES[i]), png(IMAGES[i - 1])]) for i in range(4)]
CASES = {
    "TextVQA_VAL": Case("TextVQA", content=SHORTLY, answer="['{0}', '{0}', '{0}', '{0}']"),
    "DocVQA_VAL": Case("DocVQA", content=SHORTLY, answer="['{}']"),
    "InfoVQA_VAL": Case("InfoVQA", content=SHORTLY, answer="['{}']"),
    "ChartQA_TEST": Case("ChartQA", {"split": "test_human"}, SHORTLY),
    "OCRBench": Case("OCRBench", {"category": "Regular Text Recognition"}, SHORTLY, answer="['{}']", full=4),
    "MTVQA_TEST": Case("MTVQA", {"category": "FR", "split": "test"}, SHORTLY),
    "POPE": Case("POPE", {"category": "random"}, SHORTLY, answer=None),
    "MME": Case(  # asks twice about each image
        "MME",
        {"category": "color", "image_path": ["a.png", "a.png", "b.png", "b.png"]},
        [[IMAGES[i // 2], f"{QUESTIONS[i]}\n{SHORT}"] for i in range(4)],
        images=[png(IMAGES[i // 2]) for i in range(4)],
        answer=None,
    ),
    "AI2D_TEST": Case("AI2D", OPTIONS, answer=None),
    "MMStar": Case("MMStar", {**OPTIONS, "category": "math", "l2_category": "x"}, answer=None),
    "RealWorldQA": Case("RealWorldQA", {**OPTIONS, "hint": None}, answer=None),
    "R-Bench-Dis": Case("R-Bench", OPTIONS, answer=None),
    "SEEDBench2_Plus": Case("SEED-Bench-2-Plus", OPTIONS, answer=None),
    "BLINK": Case(
        "BLINK",
        {**OPTIONS, "split": "val", "category": "Counting"},
        [[IMAGES[i], IMAGES[i - 1], QUESTIONS[i] + CHOICES] for i in range(4)],
        images=PAIRS,
        answer=None,
    ),
    "MUIRBench": Case(
        "MuirBench",
        OPTIONS,
        [["Look: ", IMAGES[i], " and ", IMAGES[i - 1], " " + QUESTIONS[i] + CHOICES] for i in range(4)],
        [f"Look: <image> and <image> {question}" for question in QUESTIONS],
        PAIRS,
        answer=None,
    ),
    "MMMU_DEV_VAL": Case(
        "MMMU",
        {**OPTIONS, "split": "validation", "question_type": "multiple-choice"},
        [["Look: ", IMAGES[i - 1], " and ", IMAGES[i], " " + QUESTIONS[i] + CHOICES] for i in range(4)],
        [f"Look: <image 2> and <image 1> {question}" for question in QUESTIONS],
        PAIRS,
        answer=None,
    ),
    "MMT-Bench_VAL": Case("MMT-Bench", {**OPTIONS, "split": "VAL", "category": "a", "l2-category": "b"}, answer=None),
}


@pytest.mark.parametrize("name", CASES)
def test_rows_of_its_schema(run, tmp_path, monkeypatch, model, processor, name):
    """Prompts and images arrive as meant. Half of the answers are right where that can be arranged."""
    case = CASES[name]
    monkeypatch.setattr("vlmeval.dataset.utils.multiple_choice.MMT_abbrs", {"b": "b"})  # all of them must have rows
    own = [own_answer(model, processor, content) for content in case.content]
    answers = "A"
    if case.answer:
        answers = [case.answer.format(text if number % 2 else "nothing") for number, text in enumerate(own)]
    rows = {"question": case.questions, "image": case.images, "answer": answers, **case.columns}
    if name in ("POPE", "MME"):
        rows["answer"] = "Yes"
    pd.DataFrame({"index": range(4), **rows}).to_csv(tmp_path / f"{name}.tsv", sep="\t", index=False)
    predictions, scores = run(name)
    assert predictions == own
    if case.answer:
        assert scores == {case.row: pytest.approx(case.full / 2)}
    else:  # the small checkpoint never learned letters, nor to say yes or no
        assert scores.keys() == {case.row} and 0 <= scores[case.row] <= 100


@pytest.mark.parametrize(
    ("row", "name", "part", "columns"),
    [
        ("MMMB", "MMMB", "MMMB", {}),
        ("Multilingual MMBench", "MTL_MMBench_DEV", "MMBench_dev", {"split": "dev", "category": "x"}),
    ],
)
def test_languages(run, tmp_path, model, processor, row, name, part, columns):
    """Six files, a row of the table for each, and their mean. VLMEvalKit keeps their images as JPEG."""
    for number, language in enumerate(LANGUAGES):
        rows = {"question": QUESTIONS[:2], "image": [png(image) for image in IMAGES[:2]], "answer": "A", **OPTIONS}
        frame = pd.DataFrame({"index": [2 * number, 2 * number + 1], **rows, **columns})
        frame.to_csv(tmp_path / f"{part}_{language}.tsv", sep="\t", index=False)
    predictions, scores = run(name)
    kept = [
        Image.open(tmp_path / "images" / f"{part}_{language}" / f"{2 * number + i}.jpg")
        for number, language in enumerate(LANGUAGES)
        for i in (0, 1)
    ]
    asked = [[image, QUESTIONS[i % 2] + CHOICES] for i, image in enumerate(kept)]
    assert predictions == [own_answer(model, processor, content) for content in asked]
    of_languages = [score for found, score in scores.items() if found.startswith(f"{row}, ")]
    assert len(of_languages) == 6 and len(scores) == 7
    assert scores[row] == pytest.approx(sum(of_languages) / 6)


def test_hallusionbench(run, tmp_path, model, processor):
    rows = {"question": QUESTIONS, "image": [png(image) for image in IMAGES], "answer": "Yes", "category": "VD"}
    index = [f"VD_x_{i}_0_1_{i}" for i in range(4)]
    frame = pd.DataFrame({"index": index, "l2-category": "x", **rows})
    frame.to_csv(tmp_path / "HallusionBench.tsv", sep="\t", index=False)
    predictions, scores = run("HallusionBench")
    assert predictions == [own_answer(model, processor, content) for content in SHORTLY]
    assert scores.keys() == {"HallusionBench"}


def test_settings_reach_the_processor():
    processor = JinaVLM(str(CHECKPOINT), do_resize=False, max_tiles=3).processor.image_processor
    assert processor.do_resize is False and processor.max_tiles == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "shapes", "--model", "GPT4o"], "here --checkpoint names it"),
        (["--work-dir", "results"], "--data is missing"),
        (["--data", "shapes", "--max-tile", "3"], "unrecognized arguments: --max-tile"),
    ],
)
def test_arguments_that_cannot_be(monkeypatch, tmp_path, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["vlmevalkit", "--checkpoint", str(CHECKPOINT), *arguments])
    with pytest.raises(SystemExit):
        main()
    assert message in capsys.readouterr().err


def test_shapes_that_are_not_written(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"shapes\.parquet is not there: `python -m evaluation\.shapes` writes"
    ):
        DrawnShapes("shapes")
