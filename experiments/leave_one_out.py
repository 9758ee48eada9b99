"""Which kinds of data help which tasks: train the small model without one kind at a time, and see what changes.

    python -m experiments.leave_one_out

As in the paper's study (section 6, table 9), a task, a domain, texts alone or all that is not English is left out of
both stages, and every training has as many steps as the base, in the same order of what remains. Unlike there, each is
trained once for each of several seeds, so that changes have intervals (of 95 %, Student's t over the paired seeds).
Written are `leave_one_out.csv`, per kind left out and column asked, and `leave_one_out.png`, with the paper's table
below. (With all that it needs: `make leave-one-out`.)
"""

import argparse
import csv
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .grid import CATEGORIES, Setting, Training, add_arguments, chance, changes, check_arguments, run, write_csv


PAPER = Path(__file__).parent / "paper_table_9.csv"
LEFT_OUT = (
    ("task", "questions"),
    ("task", "counting"),
    ("task", "reading"),
    ("domain", "drawings"),
    ("domain", "boards"),
    ("domain", "tables"),
    ("domain", "charts"),
    ("modality", "text"),
    ("language", "not English"),
)


def summary(
    answers: dict[Training, dict], left_out: list[tuple[str, str]], seeds: list[int], chances: dict[str, float]
) -> list[dict]:
    """Per kind left out and column: what `changes` gives."""

    def results(kind: tuple[str, str] | None) -> list[dict]:
        return [answers[Training(seed, kind)] for seed in seeds]

    return [
        {"category": kind[0], "left_out": kind[1]} | row
        for kind in left_out
        for row in changes(results(None), results(kind), chances)
    ]


def read_paper() -> list[dict]:
    """The paper's table as changes in points, in the form of `summary`'s rows: one training each, so no intervals."""
    with open(PAPER, encoding="utf-8") as file:
        base, *others = csv.DictReader(file)
    rows = []
    for other in others:
        for column in list(base)[1:]:
            scale = 10 if column == "OCRBench" else 1  # of 1,000 questions
            before, after = float(base[column]) / scale, float(other[column]) / scale
            rows.append(
                {
                    "left_out": other["without"],
                    "column": column,
                    "base": before,
                    "accuracy": after,
                    "change": round(after - before, 1),
                }
            )
    return rows


def draw(rows: list[dict], file: Path) -> None:
    """The changes as a heat map, above the paper's."""
    paper = read_paper()
    heights = [len({row["left_out"] for row in one}) for one in (rows, paper)]
    figure = Figure(figsize=(13, 2.6 + 0.55 * heights[0] + 0.36 * heights[1]), layout="constrained")
    ours, theirs = figure.subplots(2, 1, height_ratios=[1.5 * heights[0], heights[1]])
    _heat_map(ours, rows, "The small model: change in points, mean over seeds [interval of 95 %]")
    _heat_map(
        theirs, paper, "The paper's table 9 (2.4B parameters, 10 % of its training): change in points, one run each"
    )
    figure.savefig(file, dpi=110)


def _heat_map(axes: Axes, rows: list[dict], title: str) -> None:
    """In bold: changes whose interval excludes zero."""
    left_out = list(dict.fromkeys(row["left_out"] for row in rows))
    columns = list(dict.fromkeys(row["column"] for row in rows))
    values = [[0.0] * len(columns) for _ in left_out]
    for row in rows:
        values[left_out.index(row["left_out"])][columns.index(row["column"])] = row["change"]
    largest = max(1.0, max(abs(value) for line in values for value in line))
    image = axes.imshow(values, cmap="RdBu", vmin=-largest, vmax=largest, aspect="auto")
    for row in rows:
        text, told = f"{row['change']:+.1f}", False
        if "low" in row:
            text, told = f"{text}\n[{row['low']:+.0f}, {row['high']:+.0f}]", row["low"] * row["high"] > 0
        axes.text(
            columns.index(row["column"]),
            left_out.index(row["left_out"]),
            text,
            ha="center",
            va="center",
            fontsize=8,
            fontweight="bold" if told else "normal",
            color="white" if abs(row["change"]) > 0.6 * largest else "black",
        )
    under = {row["column"]: f"{row['base']:.0f} %" for row in rows}
    for row in rows:
        if "chance" in row:
            under[row["column"]] = f"{row['base']:.0f} %, by chance {row['chance']:.0f}"
    axes.set_xticks(range(len(columns)), [f"{column}\n{under[column]}" for column in columns], fontsize=8)
    names = [f"without {kind}".replace("not English", "non-English") for kind in left_out]
    axes.set_yticks(range(len(left_out)), names)
    axes.set_title(title, fontsize=10)
    axes.figure.colorbar(image, ax=axes, pad=0.01)


def kind(text: str) -> tuple[str, str]:
    """ "domain=charts" to ("domain", "charts")."""
    category, _, value = text.partition("=")
    if category not in CATEGORIES or not value:
        raise argparse.ArgumentTypeError(f"expected {' or '.join(f'{name}=...' for name in CATEGORIES)}, got {text!r}")
    return category, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument(
        "--leave-out", type=kind, nargs="+", metavar="CATEGORY=VALUE", default=LEFT_OUT, help="otherwise nine kinds"
    )
    args = parser.parse_args()
    check_arguments(args)
    setting = Setting(tuple(args.stages), args.start, args.questions)
    trainings = [Training(seed, one) for seed in args.seeds for one in (None, *args.leave_out)]
    answers = run(trainings, setting, args.output, args.workers)
    rows = summary(answers, list(args.leave_out), args.seeds, chance(setting))
    write_csv(rows, args.results / "leave_one_out.csv")
    draw(rows, args.results / "leave_one_out.png")


if __name__ == "__main__":
    main()
