"""Everything that was measured, as one page of text and one figure: `python -m benchmarks.report`.

Writes docs/performance.md and benchmarks/report.png from benchmarks/results, and measures nothing.
"""

import argparse
import importlib
import os
import re
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jina_vlm_tools import markdown
from jina_vlm_tools.files import ROOT

from . import peer
from .growth import STAGES
from .results import RESULTS, load


PAGE, FIGURE = ROOT / "docs" / "performance.md", ROOT / "benchmarks" / "report.png"
# Module, title
BENCHMARKS = {
    "preprocessing": "From images to tiles",
    "tower": "Tower and connector",
    "distinct_tiles": "No tile twice",
    "decoder": "Prefill and decoding",
    "batches": "Batches",
    "loading": "Loading",
    "training_step": "A training step",
    "efficiency": "What pooling saves",
    "growth": "How cost grows",
    "search": "Finding a page",
}
INTRODUCTION = """\
This page is written by `python -m benchmarks.report` from the files in `benchmarks/results`. `make bench` measures all
of it anew in half an hour of two cores; `make bench-full` takes more rounds; `make bench-gpu` adds absolute figures
and the share of a card's rate, and has not been run: no GPU was at hand.

Every ratio is the median of the ratios of runs in turns, not the quotient of two medians that stand beside it: below 1
is faster, or less. The 2.4B model has random weights here."""
NOTES = """\
What is not as fast as one could wish, and why:

- **Images to tiles**: with one thread torch takes a slower kernel for straight calls, which gives other bits as well;
  against the faster one, which two threads get, there is less to gain. The least for the same bits is the channels
  taken out of Pillow's image, torch's own `interpolate`s and the output written, and nothing else.
- **The tower**: its matrix products and attention alone, as torch computes them, take nearly all of its time on this
  processor.
- **Batches**: the library's `generate` pads prompts of unlike length, and one image keeps two cores busy. No tile is
  computed for padding, and none twice, with beams and several answers neither.
- **The released layout**: the embeddings of words and images lie in two tensors, which must be put together.
  `jina-vlm convert` does it once."""
OURS, OTHER, LIMIT = "#0b6e8f", "#b9b9b9", "#d1495b"


def page(device: str = "cpu", figure: Path = FIGURE) -> str:
    """The text: a summary, what is slow and why, and each benchmark's description, command, machine and table."""
    parts = ["# Performance", INTRODUCTION]
    if device == "cpu" and (short := summary()):
        parts += ["## In short", short, NOTES]
    parts.append(f"![Times and ratios of all parts]({link(PAGE, figure)})")
    for name, title in BENCHMARKS.items():
        measured = load(name, device)
        if measured is None:
            continue
        module = importlib.import_module(f"benchmarks.{name}")
        described = module.__doc__.split("\n\n", 1)[1].strip()
        described = re.sub(r"(?<!\n)\n(?!\n)", " ", described)
        machine = ", ".join(f"{key} {value}" for key, value in measured["machine"].items())
        parts += [f"## {title}", described, module.table(measured["rows"]), f"`{measured['command']}`; {machine}."]
    return "\n\n".join(parts) + "\n"


def link(page: Path, target: Path) -> str:
    """The target as a page of the same repository links to it."""
    return Path(os.path.relpath(target, page.parent)).as_posix()


def summary() -> str:
    """A table of the ratios alone. Empty where a benchmark has not been run."""
    measured = {name: load(name) for name in BENCHMARKS}
    if not all(measured.values()):
        return ""
    rows = {name: of["rows"] for name, of in measured.items()}

    def values(name: str, key: str, **where) -> str:
        return ", ".join(
            f"{row[key]:.2f}"
            for row in rows[name]
            if key in row and all(row[at] == value for at, value in where.items())
        )

    loaded = {row["what"]: row["seconds"] / row["weights"] for row in rows["loading"] if "weights" in row}
    library = loaded.pop("the library's Qwen3-1.7B")
    sizes = ", ".join(dict.fromkeys(row["image"].replace(",", "") for row in rows["preprocessing"]))
    grown = {
        row["at"]: sum(row["seconds"].values()) / row["peer"]["seconds"] for row in rows["growth"] if "peer" in row
    }
    most = rows["efficiency"][-1]["times"]
    batched = {row["batch"]: 1 / row["to_one_by_one"] for row in rows["batches"][1:] if "to_one_by_one" in row}
    tiles = ", ".join(str(row["tiles"]) for row in rows["tower"])
    straight, tower = "the same arithmetic in straight torch calls", "the library's SigLIP and plain pooling"

    def listed(figures) -> str:
        return ", ".join(f"{figure:.2f}" for figure in figures)

    lines = [
        [
            "preprocessing",
            f"Images to tiles, one thread: {sizes}",
            straight,
            values("preprocessing", "to_straight", threads=1),
        ],
        [
            "preprocessing",
            "The least for the same bits, one thread",
            straight,
            values("preprocessing", "floor_to_straight", threads=1),
        ],
        ["preprocessing", "Images to tiles, two threads", straight, values("preprocessing", "to_straight", threads=2)],
        [
            "preprocessing",
            "The least for the same bits, two threads",
            straight,
            values("preprocessing", "floor_to_straight", threads=2),
        ],
        ["preprocessing", "Memory for the first five", "their tiles", values("preprocessing", "memory")],
        ["tower", f"Tower and connector: {tiles} tiles", tower, values("tower", "to_library")],
        ["tower", "Its matrix products and attention alone", tower, values("tower", "limit_to_library")],
        [
            "distinct_tiles",
            f"Tower: {', '.join(row['image'].replace(',', '') for row in rows['distinct_tiles'] if 'image' in row)}",
            "as many tiles that all differ",
            values("distinct_tiles", "to_before"),
        ],
        *(
            ["decoder", row["what"].capitalize(), "the library's Qwen3 with these weights", f"{row['to_text']:.2f}"]
            for row in rows["decoder"]
        ),
        ["batches", f"An image's time, {' / '.join(batched)} at a time", "one at a time", listed(batched.values())],
        [
            "loading",
            f"Loading a GB of {' / '.join(loaded)}",
            "the library's Qwen3-1.7B",
            listed(value / library for value in loaded.values()),
        ],
        [
            "training_step",
            "A training step of the small model",
            "the library's SigLIP and Qwen3, added up",
            values("training_step", "to_parts"),
        ],
        ["growth", f"Image to first token: {', '.join(grown)}", f"the library's {peer.NAME}", listed(grown.values())],
        [
            "efficiency",
            "Tokens, prefill, cache, all operations of 12 tiles, counted",
            "without pooling",
            ", ".join(f"1 / {most[key]:.2f}" for key in ("tokens", "prefill", "cache", "all")),
        ],
    ]
    lines = [[what, against, f"`{measured[name]['command']}`", times] for name, what, against, times in lines]
    return markdown.table(["What", "Against", "By", "Times as much"], lines, figures=3)


def _bars(axes: Axes, labels: list[str], groups: dict[str, list[float]], colors: list[str]) -> None:
    width = 0.8 / len(groups)
    for index, ((name, values), color) in enumerate(zip(groups.items(), colors, strict=True)):
        places = [place + (index - (len(groups) - 1) / 2) * width for place in range(len(labels))]
        drawn = axes.bar(places, values, width, label=name, color=color)
        axes.bar_label(drawn, [f"{value:.2f}" for value in values], fontsize=7)
    axes.set_xticks(range(len(labels)), labels, fontsize=8)
    axes.margins(y=0.3)  # for the legend
    axes.legend(fontsize=7, frameon=False)


def _preprocessing(axes: Axes, rows: list[dict]) -> None:
    if "to_cpu" in rows[0]:
        _bars(
            axes,
            [row["image"].replace(", ", "\n") for row in rows],
            {"ours": [row["to_cpu"] for row in rows]},
            [OURS],
        )
        axes.set_ylabel("to one CPU thread and the way there")
        return
    labels = list(dict.fromkeys(row["image"] for row in rows))
    by_threads = {
        f"{threads} thread{'s' * (threads > 1)}": [row["to_straight"] for row in rows if row["threads"] == threads]
        for threads in (1, 2)
    }
    _bars(axes, [label.replace(", ", "\n") for label in labels], by_threads, [OURS, "#7fb7c9"])
    axes.axhline(1, color=LIMIT, linewidth=1)
    axes.set_ylabel("to straight torch calls (line)")


def _tower(axes: Axes, rows: list[dict]) -> None:
    per_tile = {
        name: [row["seconds"][key] / row["tiles"] for row in rows]
        for name, key in (("ours", "ours"), ("the library's", "library"), ("products and attention alone", "limit"))
    }
    _bars(axes, [f"{row['tiles']} tile{'s' * (row['tiles'] > 1)}" for row in rows], per_tile, [OURS, OTHER, LIMIT])
    axes.set_ylabel("seconds a tile")


def _decoder(axes: Axes, rows: list[dict]) -> None:
    _bars(
        axes,
        [
            row["what"].replace(", ", "\n").replace(" of ", "\nof ").replace("a token after ", "token\nafter ")
            for row in rows
        ],
        {"ours": [row["to_text"] for row in rows]},
        [OURS],
    )
    axes.axhline(1, color=LIMIT, linewidth=1)
    axes.set_ylabel("to the text model alone (line)")
    axes.get_legend().remove()


def _batches(axes: Axes, rows: list[dict]) -> None:
    rows = [row for row in rows if "images_per_second" in row]
    _bars(
        axes,
        [f"{row['batch']} at a time" for row in rows],
        {"ours": [row["images_per_second"] for row in rows]},
        [OURS],
    )
    axes.set_ylabel("images a second")


def _loading(axes: Axes, rows: list[dict]) -> None:
    rows = [row for row in rows if "weights" in row]
    groups = {
        "seconds a GB": [row["seconds"] / row["weights"] * 1e9 for row in rows],
        "peak memory / weights": [row["peak"] / row["weights"] for row in rows],
    }
    _bars(
        axes,
        [row["what"].replace(", ", "\n").replace("library's ", "library's\n") for row in rows],
        groups,
        [OURS, OTHER],
    )


def _efficiency(axes: Axes, rows: list[dict]) -> None:
    tiles = [row["tiles"] for row in rows]
    for kind, color in (("pooled", OURS), ("unpooled", OTHER)):
        axes.plot(
            tiles, [row[kind]["prefill"] / 1e12 for row in rows], marker="o", color=color, label=f"prefill, {kind}"
        )
        axes.plot(
            tiles,
            [row[kind]["all"] / 1e12 for row in rows],
            marker="o",
            linestyle="--",
            color=color,
            label=f"with the tower, {kind}",
        )
    axes.set(xlabel="tiles", ylabel="10^12 operations", xticks=tiles)
    axes.legend(fontsize=7, frameon=False)


def _growth(axes: Axes, rows: list[dict], grows: str) -> None:
    rows = [row for row in rows if row["grows"] == grows]
    base = [0.0] * len(rows)
    for stage, color in zip(STAGES, ("#edae49", OURS, "#7fb7c9", OTHER), strict=True):
        values = [row["seconds"][stage] for row in rows]
        axes.bar(range(len(rows)), values, bottom=base, label=stage, color=color)
        base = [below + value for below, value in zip(base, values, strict=True)]
    if beside := {place: row["peer"]["seconds"] for place, row in enumerate(rows) if "peer" in row}:
        axes.scatter(beside.keys(), beside.values(), marker="_", s=400, color=LIMIT, label=peer.NAME)
    axes.set_xticks(
        range(len(rows)), [f"{row['at']}\n{row['tiles']} tiles, {row['tokens']:,} tokens" for row in rows], fontsize=7
    )
    axes.set_ylabel("seconds")
    axes.legend(fontsize=7, frameon=False)


def draw(device: str = "cpu") -> Figure:
    """The figure: a panel for each benchmark that has been run."""
    drawers = {
        "preprocessing": _preprocessing,
        "tower": _tower,
        "decoder": _decoder,
        "batches": _batches,
        "loading": _loading,
        "efficiency": _efficiency,
    }
    panels = [(BENCHMARKS[name], drawer, load(name, device)) for name, drawer in drawers.items()]
    growth = load("growth", device)
    for grows, title in (("image", "A larger image"), ("images", "More images"), ("answer", "A longer answer")):
        panels.append((title, lambda axes, rows, grows=grows: _growth(axes, rows, grows), growth))
    panels = [panel for panel in panels if panel[2] is not None]
    figure = Figure(figsize=(17, 4.4 * -(-len(panels) // 3)), layout="constrained")
    for axes, (title, drawer, measured) in zip(
        figure.subplots(-(-len(panels) // 3), 3, squeeze=False).flat, panels, strict=False
    ):
        drawer(axes, measured["rows"])
        axes.set_title(title, loc="left", fontweight="bold")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in figure.axes[len(panels) :]:
        axes.set_axis_off()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    if not any((RESULTS / args.device).glob("*.json")):
        raise SystemExit(f"Nothing was measured on {args.device} yet: `make bench` measures.")
    page_file, figure = (
        (PAGE, FIGURE) if args.device == "cpu" else (PAGE.with_stem("performance-gpu"), FIGURE.with_stem("report-gpu"))
    )
    page_file.write_text(page(args.device, figure), encoding="utf-8")
    draw(args.device).savefig(figure, dpi=110)
    print(f"Wrote {page_file} and {figure}.")


if __name__ == "__main__":
    main()
