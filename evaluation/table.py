"""The paper's comparison, with what the harnesses measured beside it: `python -m evaluation.table results`.

Scores come from the result files of lm-eval, lmms-eval and VLMEvalKit alone, the paper's from `benchmarks.yaml`. What
was not run has no column, or an empty cell.
"""

import argparse
import fnmatch
import json
import math
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePath

import yaml

from jina_vlm_tools import markdown


BENCHMARKS = Path(__file__).parent / "benchmarks.yaml"
HARNESSES = ("lm-eval", "lmms-eval", "vlmevalkit")
FILES = ("*results*.json", "status.json")  # VLMEvalKit's is the second
PARTIAL = "†"


@dataclass(frozen=True)
class Results:
    """What one result file holds. `scores` are its metrics by task; `samples` by task how many questions were asked of
    how many, where the file says so; `partial`: that the harness was told to stop early."""

    path: Path
    harness: str
    checkpoint: str
    when: float
    scores: dict[str, dict]
    samples: dict[str, tuple[int, int]]
    partial: bool


@dataclass(frozen=True)
class Score:
    """What one result file says of a benchmark, in the paper's unit."""

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
    files = sorted({path for pattern in FILES for path in folder.rglob(pattern)})
    if not files:
        raise FileNotFoundError(
            f"No result file ({', '.join(FILES)}) under {folder}. "
            f"Run lm_eval or lmms_eval with --output_path {folder}, or VLMEvalKit with --work-dir {folder} first."
        )
    return files


def read(path: Path) -> Results:
    """What a result file holds.

    Raises:
        ValueError: it is not a result file of any of the harnesses.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return _read_kit(path, content) if "datasets" in content else _read_lm_eval(path, content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: expected a result file of lm-eval or lmms-eval, with `date`, `model_name` and `results`, "
            f"or of VLMEvalKit, with `updated_at`, `model_name` and `datasets` ({error!r})."
        ) from error


def _read_lm_eval(path: Path, content: dict) -> Results:
    harness = "lm-eval" if "lm_eval_version" in content else "lmms-eval"
    date = content["date"]
    when = date if harness == "lm-eval" else datetime.strptime(date, "%Y%m%d_%H%M%S").timestamp()
    return Results(
        path=path,
        harness=harness,
        checkpoint=PurePath(content["model_name"]).name,
        when=float(when),
        scores=content["results"],
        samples={
            task: (number["effective"], number["original"]) for task, number in content.get("n-samples", {}).items()
        },
        partial=content.get("config", {}).get("limit") is not None,
    )


def _read_kit(path: Path, content: dict) -> Results:
    return Results(
        path=path,
        harness="vlmevalkit",
        checkpoint=PurePath(content["model_name"]).name,
        when=datetime.fromisoformat(content["updated_at"]).timestamp(),
        scores={name: found["metrics"] for name, found in content["datasets"].items() if "metrics" in found},
        samples={},
        partial=any(argument.split("=")[0] == "--limit" for argument in content.get("argv", [])),
    )


def score(results: Results, benchmark: dict) -> Score | None:
    """What a file says of a benchmark; None if it was not run.

    Raises:
        ValueError: it was, but its metric is not there or not a number.
    """
    entry = benchmark.get(results.harness)
    if entry is None or entry["task"] not in results.scores:
        return None
    task = entry["task"]
    names = entry["metric"] if isinstance(entry["metric"], list) else [entry["metric"]]
    metrics = results.scores[task]
    values = []
    for name in names:
        found = [metrics[key] for key in fnmatch.filter(metrics, name)]
        if len(found) != 1 or not _is_number(found[0]):
            given = ", ".join(map(repr, found)) or None
            raise ValueError(
                f"{results.path}: expected a number as {name!r} of {task!r}, got {given}. There are {sorted(metrics)}."
            )
        values += found
    return Score(
        value=sum(values) * entry.get("scale", 100),
        when=results.when,
        source=f"{results.harness}, {task}, {' + '.join(names)}: {results.path}",
        samples=results.samples.get(task),
        partial=results.partial,
    )


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def collect(folder: Path, benchmarks: dict) -> dict[str, dict[tuple[str, str], Score]]:
    """Each harness's newest score of each benchmark: by model, then by benchmark and harness. Checkpoints that are no
    model of the comparison stand under their own names."""
    known = {checkpoint.lower(): model for model, names in benchmarks["models"].items() for checkpoint in names}
    scores: dict[str, dict[tuple[str, str], Score]] = {}
    for path in result_files(folder):
        results = read(path)
        of_model = scores.setdefault(known.get(results.checkpoint.lower(), results.checkpoint), {})
        for section in benchmarks["sections"]:
            for benchmark in section["benchmarks"]:
                found = score(results, benchmark)
                key = benchmark["name"], results.harness
                if found and (key not in of_model or of_model[key].when < found.when):
                    of_model[key] = found
    return scores


def page(scores: dict[str, dict[tuple[str, str], Score]], benchmarks: dict) -> str:
    """A markdown table for each section, and below them the source of each score. Scores of several harnesses stand in
    one cell, in the order of [`HARNESSES`]. A model has a column of the paper where the paper has figures of it, and
    one that says "here" where something was measured."""
    models = [*benchmarks["models"], *sorted(scores.keys() - benchmarks["models"].keys())]
    parts, sources, signs = [], [], set()
    for section in benchmarks["sections"]:
        columns, lines = [], [[entry["name"]] for entry in section["benchmarks"]]
        for model in models:
            printed = [_printed(entry, model) for entry in section["benchmarks"]]
            measured = [_measured(entry, scores.get(model, {})) for entry in section["benchmarks"]]
            signs |= {sign for cell in [*printed, *measured] for sign in ("*", PARTIAL) if sign in cell}
            for name, cells in ((model, printed), (f"{model}, here", measured)):
                if any(cells):
                    columns.append(name)
                    lines = [[*line, cell] for line, cell in zip(lines, cells, strict=True)]
            for entry in section["benchmarks"]:
                for found in _of(entry, scores.get(model, {})):
                    asked = f"{found.samples[0]} of {found.samples[1]} questions, " if found.samples else ""
                    sources.append(f"- {model}, {entry['name']}: {asked}{found.source}")
        if columns:
            parts += [f"## {section['title']}", *([section["note"]] if "note" in section else [])]
            parts.append(markdown.table(["Benchmark", *columns], lines, padded=True))
    if "*" in signs:
        parts.append("\\* measured by the paper's authors, with VLMEvalKit; other figures of peers are the peers' own")
    if PARTIAL in signs:
        parts.append(f"{PARTIAL} on a part of the benchmark")
    return "\n\n".join([*parts, "\n".join(sources)]).strip()


def _printed(entry: dict, model: str) -> str:
    figure = str(entry.get("paper", {}).get(model, ""))
    return figure and f"{float(figure.removesuffix('*')):.{_decimals(entry)}f}{'*' * figure.endswith('*')}"


def _measured(entry: dict, of_model: dict[tuple[str, str], Score]) -> str:
    return " / ".join(f"{found.value:.{_decimals(entry)}f}{PARTIAL * found.partial}" for found in _of(entry, of_model))


def _of(entry: dict, of_model: dict[tuple[str, str], Score]) -> list[Score]:
    return [of_model[key] for harness in HARNESSES if (key := (entry["name"], harness)) in of_model]


def _decimals(entry: dict) -> int:
    return entry.get("decimals", 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path, help="folder that --output_path or --work-dir of the harnesses named")
    args = parser.parse_args()
    benchmarks = yaml.safe_load(BENCHMARKS.read_text(encoding="utf-8"))
    try:
        print(page(collect(args.results, benchmarks), benchmarks))
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
