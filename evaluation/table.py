"""The paper's comparison, with what the harnesses measured beside it: `python -m evaluation.table results`.

Scores come from the result files of lm-eval and lmms-eval alone, the paper's from `benchmarks.yaml`. Where nothing was
run, or the paper's figure is not known, the cell is empty.
"""

import argparse
import json
import math
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePath

import yaml

from jina_vlm_tools import markdown


BENCHMARKS = Path(__file__).parent / "benchmarks.yaml"
HARNESSES = ("lm-eval", "lmms-eval")


@dataclass(frozen=True)
class Score:
    """What one result file says of a benchmark. `value` is in the paper's unit; `samples` is how many questions were
    asked of how many, None where the file does not say; `partial`: that the harness was told to stop early."""

    value: float
    when: float
    source: str
    samples: tuple[int, int] | None
    partial: bool


def result_files(folder: Path) -> list[Path]:
    """The harnesses' result files below a folder.

    Raises:
        FileNotFoundError: there is none.
    """
    files = sorted(folder.rglob("*results*.json"))
    if not files:
        raise FileNotFoundError(
            f"No result file (*results*.json) under {folder}. "
            f"Run lm_eval or lmms_eval with --output_path {folder} first."
        )
    return files


def read(path: Path) -> tuple[str, str, float, dict]:
    """Harness ("lm-eval" or "lmms-eval"), checkpoint, time in seconds and content of a result file.

    Raises:
        ValueError: it is not a result file of either.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        harness = "lm-eval" if "lm_eval_version" in content else "lmms-eval"
        date = content["date"]
        when = date if harness == "lm-eval" else datetime.strptime(date, "%Y%m%d_%H%M%S").timestamp()
        return harness, PurePath(content["model_name"]).name, float(when), content
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected a result file of lm-eval or lmms-eval, with `date`, "
            f"`model_name` and `results` ({error!r})."
        ) from error


def score(path: Path, harness: str, when: float, content: dict, benchmark: dict) -> Score | None:
    """What a file says of a benchmark; None if it was not run.

    Raises:
        ValueError: it was, but its metric is not there or not a number.
    """
    entry = benchmark.get(harness)
    if entry is None or entry["task"] not in content["results"]:
        return None
    task, metric = entry["task"], entry["metric"]
    metrics = content["results"][task]
    value = metrics.get(metric)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(
            f"{path}: expected a number as {metric!r} of {task!r}, got {value!r}. There are {sorted(metrics)}."
        )
    number = content.get("n-samples", {}).get(task)
    return Score(
        value=value * benchmark.get("scale", 100),
        when=when,
        source=f"{harness}, {task}, {metric}: {path}",
        samples=number and (number["effective"], number["original"]),
        partial=content["config"].get("limit") is not None,
    )


def collect(folder: Path, benchmarks: dict) -> dict[str, dict[tuple[str, str], Score]]:
    """Each harness's newest score of each benchmark: by model, then by benchmark and harness. Checkpoints that are no
    model of the comparison stand under their own names."""
    known = {checkpoint.lower(): model for model, names in benchmarks["models"].items() for checkpoint in names}
    scores: dict[str, dict[tuple[str, str], Score]] = {}
    for path in result_files(folder):
        harness, checkpoint, when, content = read(path)
        of_model = scores.setdefault(known.get(checkpoint.lower(), checkpoint), {})
        for benchmark in benchmarks["benchmarks"]:
            found = score(path, harness, when, content, benchmark)
            key = benchmark["name"], harness
            if found and (key not in of_model or of_model[key].when < found.when):
                of_model[key] = found
    return scores


def table(scores: dict[str, dict[tuple[str, str], Score]], benchmarks: dict) -> str:
    """A markdown table, with the source of each score below it. Of two harnesses, lm-eval's score comes first."""
    entries = benchmarks["benchmarks"]
    models = [*benchmarks["models"], *sorted(scores.keys() - benchmarks["models"].keys())]
    in_paper = {model for entry in entries for model in entry.get("paper", {})}
    columns = [(model, kind) for model in models for kind in ("paper", "here") if kind == "here" or model in in_paper]
    lines = []
    sources = []
    for entry in entries:
        decimals = 0 if entry.get("scale") == 1000 else 1
        cells = []
        for model, kind in columns:
            if kind == "paper":
                figure = entry.get("paper", {}).get(model)
                cells.append("" if figure is None else f"{figure:.{decimals}f}")
                continue
            found = [s for harness in HARNESSES if (s := scores.get(model, {}).get((entry["name"], harness)))]
            cells.append(" / ".join(f"{s.value:.{decimals}f}{'*' * s.partial}" for s in found))
            for s in found:
                asked = f"{s.samples[0]} of {s.samples[1]} questions, " if s.samples else ""
                sources.append(f"- {model}, {entry['name']}: {asked}{s.source}")
        lines.append([entry["name"], *cells])
    parts = [markdown.table(["Benchmark", *(f"{model}, {kind}" for model, kind in columns)], lines)]
    if any(s.partial for of_model in scores.values() for s in of_model.values()):
        parts.append("\\* on a part of the benchmark")
    return "\n\n".join([*parts, "\n".join(sources)]).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path, help="folder that --output_path of the harnesses named")
    args = parser.parse_args()
    benchmarks = yaml.safe_load(BENCHMARKS.read_text(encoding="utf-8"))
    try:
        print(table(collect(args.results, benchmarks), benchmarks))
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
