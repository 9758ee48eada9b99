"""The evaluation's own parts: scoring as the benchmarks define it, and the table of results. What needs a harness to
be installed is in `tests/external/harnesses`."""

import base64
import importlib.util
import io
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from evaluation import shapes, table
from experiments.eval_tiny import evaluate
from jina_vlm_tools.synthetic.questions import normalize


ROOT = Path(__file__).parents[3]
TASKS = ROOT / "evaluation" / "tasks"


def utils(name: str, folder: str = "tasks"):
    """A task's utils.py, loaded by its path, as the harnesses do."""
    path = ROOT / "evaluation" / folder / name / "utils.py"
    spec = importlib.util.spec_from_file_location(f"utils_of_{folder}_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TaskLoader(yaml.SafeLoader):
    """Reads task files; a function is its name there."""


TaskLoader.add_constructor("!function", lambda loader, node: node.value)


def task_file(path: Path) -> dict:
    config = yaml.load(path.read_text(encoding="utf-8"), TaskLoader)
    return {**task_file(path.parent / config["include"]), **config} if "include" in config else config


# ---------------------------------------------------------------------------------------------------------------------
# Scoring
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "answers", "accuracy"),
    [
        ("red", ["red"] * 10, 1.0),
        ("red", ["blue"] * 10, 0.0),
        ("red", ["red"] + ["blue"] * 9, (1 * 0 + 9 / 3) / 10),  # the one who said so is left out once
        ("red", ["red"] * 2 + ["blue"] * 8, (2 / 3 + 8 * 2 / 3) / 10),
        ("red", ["red"] * 3 + ["blue"] * 7, (3 * 2 / 3 + 7) / 10),
        ("red", ["red"] * 4 + ["blue"] * 6, 1.0),
        ("The red, star.", ["red star"] * 10, 1.0),
        ("three", ["3"] * 10, 1.0),
        ("dont walk", ["don't walk"] * 10, 1.0),
        ("don\u2019t walk", ["don't walk"] * 10, 1.0),
        ("1,000.50", ["1000.50"] * 10, 1.0),
        ("1000.5", ["10005"] * 10, 0.0),
        ("3.5", ["3 5"] * 10, 0.0),
        ("50%", ["50"] * 10, 0.0),
        ("coca-cola", ["coca cola"] * 10, 1.0),
    ],
)
def test_vqa_accuracy(answer, answers, accuracy):
    assert utils("textvqa").process_results({"answers": answers}, [answer]) == {
        "vqa_accuracy": pytest.approx(accuracy)
    }


@pytest.mark.parametrize(
    ("dataset", "answer", "expected", "right"),
    [
        ("IIIT5K", "It says CENTRE.", ["centre"], 1.0),
        ("IIIT5K", "It says", ["centre"], 0.0),
        ("IIIT5K", "two\nlines", ["one", "two lines"], 1.0),
        ("IIIT5K", "c e n t r e", ["centre"], 0.0),
        ("HME100k", "x ^ { 2 }\n+ y", ["x^{2} + y"], 1.0),
        ("HME100k", "X^{2}", ["x^{2}"], 0.0),
    ],
)
def test_ocrbench(dataset, answer, expected, right):
    assert utils("ocrbench").process_results({"dataset": dataset, "answer": expected}, [answer]) == {"acc": right}


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ("B", "B", 1.0),
        (" (B).", "B", 1.0),
        ("B. The left one", "B", 1.0),
        ("The answer is B.", "B", 1.0),
        ("Before the left one", "B", 0.0),
        ("C, not B", "B", 0.0),
        ("", "B", 0.0),
        ("yes.", "Yes", 1.0),
        ("3", "3", 1.0),
        ("3 cars", "3", 0.0),
    ],
)
def test_realworldqa(answer, expected, right):
    assert utils("realworldqa").process_results({"answer": expected}, [answer]) == {"acc": right}


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("Yes", 1),
        ("yes, there is", 1),
        ("No", 0),
        (" no.", 0),
        ("There is not. Yes.", 0),
        ("Nothing else is there", 1),
        ("Yes. No other.", 1),
    ],
)
def test_pope(answer, yes):
    process_results = utils("pope").process_results
    assert process_results({"answer": "Yes "}, [answer]) == {"acc": float(yes), "f1": (1, yes)}
    assert process_results({"answer": "No "}, [answer]) == {"acc": float(not yes), "f1": (0, yes)}


@pytest.mark.parametrize("path", ["ai2d/ai2d.yaml", "mmmb/mmmb_en.yaml"])
def test_letters(path):
    [found] = task_file(TASKS / path)["filter_list"]
    regex = re.compile(found["filter"][0]["regex_pattern"])
    answers = {"B": "B", " B.": "B", "(C)": "C", "D: roots": "D", "The answer is B.": "B", "Answer:A": "A"}
    assert {answer: regex.search(answer)[1] for answer in answers} == answers
    assert not any(map(regex.search, ("", "b", "Because", "A's", "E", "DNA")))


def test_ai2d_prompt():
    doc = {"question": "What is q?", "options": ["leaf", "root", "stem", "bud"], "answer": "2"}
    assert utils("ai2d").doc_to_text(doc).splitlines()[:-1] == [
        "<image>What is q?",
        "A. leaf",
        "B. root",
        "C. stem",
        "D. bud",
    ]
    assert utils("ai2d").doc_to_target(doc) == "C"


def test_mmmb_rows():
    png = io.BytesIO()
    Image.new("RGB", (3, 2), "red").save(png, "PNG")
    row = {
        "question": "Which?",
        "A": "None",
        "B": 7,
        "C": "",
        "D": None,
        "answer": "B",
        "image": base64.b64encode(png.getvalue()).decode(),
    }
    mmmb = utils("mmmb")
    assert mmmb.doc_to_text(row).splitlines()[:-1] == ["<image>Which?", "A. None", "B. 7"]
    [image] = mmmb.doc_to_image(row)
    assert image.size == (3, 2)
    for content in ("images/17.png", base64.b64encode(b"no image").decode()):
        with pytest.raises(ValueError, match="Expected an image in base64"):
            mmmb.doc_to_image({**row, "image": content})


@pytest.mark.parametrize("folder", ["tasks", "lmms_tasks"])
@pytest.mark.parametrize(
    ("answer", "expected"),
    [(" Oben links.", "oben links"), ("3", "3"), ("rojo", "roja"), ("red star", "red"), ("", "red")],
)
def test_shapes_are_scored_as_our_own_count(folder, answer, expected):
    right = float(normalize(answer) == normalize(expected))
    assert utils("shapes", folder).process_results({"answer": expected}, [answer]) == {"exact_words": right}


def test_shapes_are_those_of_our_own_count(tmp_path, monkeypatch):
    from datasets import load_dataset

    asked = []
    monkeypatch.setattr(
        "experiments.eval_tiny.answer", lambda model, processor, chats, limit: asked.extend(chats) or [""] * len(chats)
    )
    own = evaluate(None, None, samples=18, batch_size=4)
    path = tmp_path / "build" / "shapes.parquet"
    shapes.write(path, 18)
    stored = load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    for row, result, [message] in zip(stored, own, asked, strict=True):
        assert (row["question"], row["answer"], row["task"]) == (
            result["question"],
            result["expected"],
            result["task"],
        )
        image, text = message["content"]
        assert row["image"].tobytes() == image["image"].tobytes() and row["question"] == text["text"]


def test_no_shapes_are_refused(tmp_path):
    command = [
        sys.executable,
        "-m",
        "evaluation.shapes",
        "--output",
        str(tmp_path / "shapes.parquet"),
        "--samples",
        "0",
    ]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 2 and "--samples must be at least 1, got 0" in ran.stderr


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------

BENCHMARKS = {
    "models": {"ours": ["jina-vlm", "jina-vlm-native"], "theirs": ["Other-2B"], "theirs, thinking": []},
    "sections": [
        {
            "title": "First",
            "note": "A note.",
            "benchmarks": [
                {
                    "name": "One",
                    "lm-eval": {"task": "one", "metric": "acc,none"},
                    "lmms-eval": {"task": "one", "metric": "right,none"},
                    "vlmevalkit": {"task": "ONE_TEST", "metric": "split=*|Overall", "scale": 1},
                    "paper": {"ours": 68.25, "theirs": "50.0*", "theirs, thinking": 70},
                },
                {
                    "name": "Two",
                    "lm-eval": {"task": "two", "metric": ["acc,none", "more,none"], "scale": 1000},
                    "decimals": 0,
                    "paper": {"ours": 778, "theirs": 800},
                },
                {"name": "Overall", "paper": {"ours": 60.0}},
            ],
        },
        {"title": "Second", "benchmarks": [{"name": "Three", "lmms-eval": {"task": "three", "metric": "acc,none"}}]},
    ],
}


def result_file(path: Path, harness: str, model: str, results: dict, day: int = 1, limit=None, samples=None) -> None:
    """As the harnesses write them."""
    version = {"lm_eval_version": "0.4.13", "date": 1.7e9 + 86400 * day}
    if harness == "lmms-eval":
        version = {"lmms_eval_version": "0.7.3", "date": f"202611{day:02}_120000"}
    numbers = {task: {"original": 500, "effective": samples or 500} for task in results}
    content = {"results": results, "n-samples": numbers, "config": {"limit": limit}, "model_name": model, **version}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def kit_file(path: Path, model: str, datasets: dict, argv: tuple = ()) -> None:
    """As VLMEvalKit writes it."""
    content = {
        "model_name": model,
        "updated_at": "2026-11-20T12:00:00.000000+00:00",
        "argv": ["run.py", *argv],
        "datasets": {name: {"status": "done", "metrics": metrics} for name, metrics in datasets.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def cells(folder: Path) -> dict[str, list[list[str]]]:
    """The lines of each section's table, but for the rule."""
    result = {}
    for part in table.page(table.collect(folder, BENCHMARKS), BENCHMARKS).split("## ")[1:]:
        lines = [line for line in part.splitlines() if line.startswith("|")]
        assert len({len(line) for line in lines}) == 1, "a terminal shows columns"
        rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
        assert set("".join(rows.pop(1))) == set("-:")
        result[part.splitlines()[0]] = rows
    return result


def test_only_what_was_run_is_filled(tmp_path):
    result_file(
        tmp_path / "a" / "results_1.json",
        "lm-eval",
        "me/jina-vlm-native",
        {"two": {"acc,none": 0.7, "more,none": 0.0654}, "else": {"acc,none": 1}},
    )
    assert cells(tmp_path) == {
        "First": [
            ["Benchmark", "ours", "ours, here", "theirs", "theirs, thinking"],
            ["One", "68.2", "", "50.0*", "70.0"],
            ["Two", "778", "765", "800", ""],
            ["Overall", "60.0", "", "", ""],
        ]
    }
    text = table.page(table.collect(tmp_path, BENCHMARKS), BENCHMARKS)
    assert "A note." in text and "measured by the paper's authors" in text and table.PARTIAL not in text


def test_all_harnesses_all_models_and_the_newest_file(tmp_path):
    result_file(tmp_path / "b" / "results_2.json", "lm-eval", "jina-vlm", {"one": {"acc,none": 0.5}}, day=2)
    result_file(tmp_path / "c" / "results_3.json", "lm-eval", "JINA-VLM", {"one": {"acc,none": 0.4}}, day=1)
    result_file(tmp_path / "d" / "1_results.json", "lmms-eval", "jina-vlm", {"one": {"right,none": 0.6}}, day=1)
    result_file(tmp_path / "e" / "2_results.json", "lmms-eval", "hub/Other-2B", {"three": {"acc,none": 0.25}})
    kit_file(tmp_path / "g" / "status.json", "jina-vlm", {"ONE_TEST": {"split=test|Overall": 55.55}, "X": {}})
    result_file(
        tmp_path / "f" / "results_4.json",
        "lm-eval",
        "checkpoints/tiny",
        {"one": {"acc,none": 1.0}},
        limit=8.0,
        samples=8,
    )
    kit_file(tmp_path / "h" / "status.json", "tiny", {"ONE_TEST": {"split=test|Overall": 99}}, ("--limit=8",))
    assert cells(tmp_path) == {
        "First": [
            ["Benchmark", "ours", "ours, here", "theirs", "theirs, thinking", "tiny, here"],
            ["One", "68.2", "50.0 / 60.0 / 55.5", "50.0*", "70.0", "100.0† / 99.0†"],
            ["Two", "778", "", "800", "", ""],
            ["Overall", "60.0", "", "", "", ""],
        ],
        "Second": [["Benchmark", "theirs, here"], ["Three", "25.0"]],
    }
    text = table.page(table.collect(tmp_path, BENCHMARKS), BENCHMARKS)
    assert "† on a part of the benchmark" in text
    assert re.search(r"- tiny, One: 8 of 500 questions, lm-eval, one, acc,none: .*results_4\.json", text)
    assert "results_3.json" not in text


@pytest.mark.parametrize(
    "content", ["{}", "[1]", "{", '{"datasets": []}', '{"lm_eval_version": "1", "date": "x", "model_name": "y"}']
)
def test_files_that_are_no_results(tmp_path, content):
    (tmp_path / "results_1.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"results_1\.json: expected a result file of lm-eval or lmms-eval, .*VLMEv"):
        table.collect(tmp_path, BENCHMARKS)


@pytest.mark.parametrize(
    "metrics", [{}, {"acc,letter": 0.5}, {"acc,none": "N/A"}, {"acc,none": float("nan")}, {"acc,none": True}]
)
def test_scores_that_are_not_there(tmp_path, metrics):
    result_file(tmp_path / "results_1.json", "lm-eval", "jina-vlm", {"one": metrics})
    with pytest.raises(ValueError, match=r"results_1\.json: expected a number as 'acc,none' of 'one', got"):
        table.collect(tmp_path, BENCHMARKS)


def test_a_metric_that_several_are(tmp_path):
    metrics = {"split=test|Overall": 1, "split=dev|Overall": 2}
    kit_file(tmp_path / "status.json", "jina-vlm", {"ONE_TEST": metrics})
    with pytest.raises(
        ValueError, match=r"expected a number as 'split=\*\|Overall' of 'ONE_TEST', got 1, 2\. There are"
    ):
        table.collect(tmp_path, BENCHMARKS)


def test_command(tmp_path):
    def run():
        command = [sys.executable, "-m", "evaluation.table", str(tmp_path)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    empty = run()
    assert (
        empty.returncode == 1
        and "No result file" in empty.stderr
        and "--output_path" in empty.stderr
        and "Traceback" not in empty.stderr
    )
    result_file(tmp_path / "results_1.json", "lm-eval", "jinaai/jina-vlm", {"docvqa_val": {"anls,none": 0.5}})
    filled = run()
    assert filled.returncode == 0, filled.stderr
    assert re.search(r"^\| DocVQA +\| +90\.6 \| +50\.0 \| +89\.2\* \|", filled.stdout, flags=re.MULTILINE)


def all_entries() -> list[dict]:
    sections = yaml.safe_load(table.BENCHMARKS.read_text(encoding="utf-8"))["sections"]
    return [entry for section in sections for entry in section["benchmarks"]]


def test_the_papers_figures_are_whole():
    """Tables 3 to 8: nothing is missing, and its means follow from what they are means of, where they do in the
    paper. A figure that was copied wrong does not pass."""
    found = yaml.safe_load(table.BENCHMARKS.read_text(encoding="utf-8"))
    models = list(found["models"])

    def figures(entry: dict, model: str) -> float | None:
        figure = entry.get("paper", {}).get(model)
        return None if figure is None else float(str(figure).removesuffix("*")) / {"MME": 28}.get(entry["name"], 1)

    count = 0
    for section in found["sections"]:
        entries = {entry["name"]: entry for entry in section["benchmarks"]}
        count += sum(len(entry.get("paper", {})) for entry in entries.values())
        means = {m: [n for n in entries if n.startswith(f"{m}, ")] for m in ("MMMB", "Multilingual MMBench")}
        means["Overall"] = [name for name in entries if name != "Overall" and "," not in name]
        for name, model in itertools.product(means.keys() & entries.keys(), models):
            mean = figures(entries[name], model)
            if mean is None or {section["title"], (name, model)} & DO_NOT_FOLLOW:
                continue
            own = [figures(entries[part], model) for part in means[name]]
            assert mean == pytest.approx(sum(own) / len(own), abs=0.08), (section["title"], name, model)
    # Rows of five models; of mathematics, where one of them answers in two ways; of text, with two models
    assert count == 5 * (10 + 4 + 4 + 4 + 3 + 16) + (6 * 5 + 5 + 5) + 2 * 6
    assert {entry["paper"]["jina-vlm"] for entry in all_entries() if entry["name"] in ("MMMU", "MathVista")} == {
        45.6,
        59.5,
    }


DO_NOT_FOLLOW = {"Diagrams, charts, documents", ("MMMB", "Qwen3-VL-2B"), ("Overall", "InternVL3.5-2B, thinking")}


def test_no_mean_of_ours_stands_beside_the_papers():
    assert all(entry.keys() == {"name", "paper"} for entry in all_entries() if entry["name"] == "Overall")


def test_benchmarks_name_the_metrics_of_our_tasks():
    by_task = {entry["lm-eval"]["task"]: entry["lm-eval"]["metric"] for entry in all_entries() if "lm-eval" in entry}
    known = set()
    for path in TASKS.glob("*/*.yaml"):
        config = task_file(path)
        known.add(name := config.get("group") or config["task"])
        if name in by_task:
            filters = {found["name"] for found in config.get("filter_list", [])} or {"none"}
            if "group" in config:
                filters = {config["aggregate_metric_list"][0]["filter_list"]}
            metrics = config.get("metric_list") or config["aggregate_metric_list"]
            assert by_task[name] in {f"{metric['metric']},{found}" for metric in metrics for found in filters}
    assert {
        "ai2d",
        "docvqa_val",
        "textvqa_val",
        "ocrbench",
        "realworldqa",
        "pope",
        "mmmb",
        "shapes",
    } <= by_task.keys() & known
