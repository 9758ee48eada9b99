"""Which kinds of data help which tasks: train a stage without one kind at a time, and see what changes.

    python -m experiments.leave_one_out experiments/recipes/small_leave_one_out.yaml --output runs/leave_one_out

For every task of the mixture, and for none, the stage is trained without the sources of that task, for the same number
of steps, the other sources' weights scaled up, once for each seed. All runs of a seed start alike and are asked the
same questions, so that changes are paired. Written are `changes.csv`, per task asked and task left out, and
`changes.png`, with intervals of 95 % (Student's t over the seeds). Runs that are done are kept: a second call goes on.
(The paper's study of its mixture, at a size that a person can run.)
"""

import argparse
import csv
import dataclasses
import glob
import json
import math
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

import yaml
from matplotlib.figure import Figure

from jina_vlm_tools.synthetic.page_questions import TASKS
from jina_vlm_tools.training.settings import SettingsError
from jina_vlm_tools.training.stages import MixtureSettings, Stage, beside, read_stage


# Two-sided quantiles of Student's t, 95 %, by degrees of freedom
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
NONE = "none"


def without(mixture: MixtureSettings, task: str) -> MixtureSettings:
    """The mixture less the sources of a task, the others' weights scaled to add up to 1."""
    kept = [source for source in mixture.sources if source.task != task]
    total = sum(source.weight for source in kept)
    kept = [dataclasses.replace(source, weight=source.weight / total) for source in kept]
    return dataclasses.replace(mixture, sources=kept, text_share=None)


def write_run(stage: Stage, mixture: MixtureSettings, file: Path, folder: Path) -> Path:
    """A stage's YAML files in a folder of their own."""
    folder.mkdir(parents=True, exist_ok=True)

    def absolute(base: Path, name: str) -> str:
        nearby = base.parent / name
        return str((nearby if glob.glob(str(nearby), recursive=True) else Path(name)).resolve())

    mixture_file = beside(file, stage.mixture)
    sources = [
        dataclasses.replace(source, path=absolute(mixture_file, source.path)) if source.path else source
        for source in mixture.sources
    ]
    (folder / "mixture.yaml").write_text(
        yaml.safe_dump(dataclasses.asdict(dataclasses.replace(mixture, sources=sources))), encoding="utf-8"
    )
    model = absolute(file, stage.model) if beside(file, stage.model).is_dir() else stage.model
    stage = dataclasses.replace(stage, model=model, mixture="mixture.yaml", evaluation=None)
    (folder / "stage.yaml").write_text(yaml.safe_dump(dataclasses.asdict(stage)), encoding="utf-8")
    return folder / "stage.yaml"


def train_and_ask(
    stage: Stage, mixture: MixtureSettings, file: Path, folder: Path, samples: int, threads: int
) -> dict[str, float]:
    """Train on so many threads and return the share of right answers per task; `answers.json` is read if it exists."""
    answers = folder / "answers.json"
    if not answers.is_file():
        stage_file = write_run(stage, mixture, file, folder)
        resume = ["--resume"] if list((folder / "model" / "run").glob("checkpoint-*/trainer_state.json")) else []
        _run(threads, "jina_vlm_tools", "train", str(stage_file), "--output", str(folder / "model"), *resume)
        partial = answers.with_suffix(".partial")
        _run(
            threads,
            "experiments.eval_pages",
            "--checkpoint",
            str(folder / "model"),
            "--samples",
            str(samples),
            "--json",
            str(partial),
        )
        partial.replace(answers)
    results = json.loads(answers.read_text(encoding="utf-8"))
    return {task: statistics.mean(result["right"] for result in results if result["task"] == task) for task in TASKS}


def _run(threads: int, module: str, *arguments: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    subprocess.run([sys.executable, "-m", module, *arguments], env=environment, check=True)


def interval(differences: list[float]) -> tuple[float, float, float]:
    """Mean of paired differences, and the ends of its interval."""
    mean = statistics.mean(differences)
    half = STUDENT[len(differences) - 1] * statistics.stdev(differences) / math.sqrt(len(differences))
    return mean, mean - half, mean + half


def changes(scores: dict[str, list[dict[str, float]]]) -> list[dict]:
    """
    Args:
        scores (`dict[str, list[dict[str, float]]]`): By the task left out, `NONE` among them, and by seed: share right
            per task.

    Returns:
        `list[dict]`: Per task left out and task asked: the accuracy with all data, and how the accuracy changes, in
        points.
    """
    rows = []
    for left_out, by_seed in scores.items():
        if left_out == NONE:
            continue
        for task in TASKS:
            differences = [
                100 * (after[task] - before[task]) for before, after in zip(scores[NONE], by_seed, strict=True)
            ]
            mean, low, high = (round(float(value), 1) for value in interval(differences))
            rows.append(
                {
                    "left_out": left_out,
                    "task": task,
                    "with_all": round(float(100 * statistics.mean(one[task] for one in scores[NONE])), 1),
                    "change": mean,
                    "low": low,
                    "high": high,
                    "per_seed": " ".join(f"{difference:+.1f}" for difference in differences),
                }
            )
    return rows


def draw(rows: list[dict], file: Path) -> None:
    """The changes as a heat map."""
    left_out = list(dict.fromkeys(row["left_out"] for row in rows))
    values = [
        [next(row["change"] for row in rows if (row["left_out"], row["task"]) == (out, task)) for task in TASKS]
        for out in left_out
    ]
    largest = max(1.0, max(abs(value) for line in values for value in line))
    figure = Figure(figsize=(1.7 + 1.35 * len(TASKS), 1.4 + 0.62 * len(left_out)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, cmap="RdBu", vmin=-largest, vmax=largest, aspect="auto")
    for row in rows:
        x, y = TASKS.index(row["task"]), left_out.index(row["left_out"])
        color = "white" if abs(row["change"]) > 0.6 * largest else "black"
        axes.text(
            x,
            y,
            f"{row['change']:+.1f}\n[{row['low']:+.0f}, {row['high']:+.0f}]",
            ha="center",
            va="center",
            fontsize=8,
            color=color,
        )
    with_all = {row["task"]: row["with_all"] for row in rows}
    axes.set_xticks(range(len(TASKS)), [f"{task}\n{with_all[task]:.0f} %" for task in TASKS])
    axes.set_yticks(range(len(left_out)), [f"without {task}" for task in left_out])
    axes.set_xlabel("task asked, and its accuracy with all data")
    figure.colorbar(image, label="change, points")
    figure.savefig(file, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="2 to 10 of them (default: 0 1 2)")
    parser.add_argument(
        "--leave-out", nargs="+", metavar="TASK", help="these tasks of the mixture; otherwise each in turn"
    )
    parser.add_argument(
        "--samples", type=int, default=360, help="questions after each training (default: %(default)s)"
    )
    parser.add_argument(
        "--workers", type=int, default=1, help="trainings at a time, which share the cores (default: %(default)s)"
    )
    args = parser.parse_args()
    if len(set(args.seeds)) != len(args.seeds) or not 2 <= len(args.seeds) <= 1 + max(STUDENT):
        sys.exit(f"--seeds: expected 2 to {1 + max(STUDENT)} different numbers, got {args.seeds}.")
    if args.samples < len(TASKS):
        sys.exit(f"--samples: expected at least {len(TASKS)}, one for each task, got {args.samples}.")
    try:
        stage, mixture = read_stage(args.stage)
    except (SettingsError, ValueError) as error:
        sys.exit(str(error))
    known = list(dict.fromkeys(source.task for source in mixture.sources))
    left_out = args.leave_out or known
    if unknown := [task for task in left_out if task not in known]:
        sys.exit(
            f"--leave-out: {', '.join(map(repr, unknown))}: no source of the mixture has this task. "
            f"Known are: {', '.join(known)}."
        )

    if args.workers < 1:
        sys.exit(f"--workers: expected at least 1, got {args.workers}.")

    started, threads = time.perf_counter(), max(1, os.cpu_count() // args.workers)

    def one(task: str, seed: int) -> dict[str, float]:
        smaller = mixture if task == NONE else without(mixture, task)
        folder = args.output / f"{task.replace(' ', '_')}-{seed}"
        return train_and_ask(dataclasses.replace(stage, seed=seed), smaller, args.stage, folder, args.samples, threads)

    with ThreadPoolExecutor(args.workers) as pool:
        runs = {task: [pool.submit(one, task, seed) for seed in args.seeds] for task in [NONE, *left_out]}
        done, _ = wait([run for by_seed in runs.values() for run in by_seed], return_when=FIRST_EXCEPTION)
        pool.shutdown(cancel_futures=True)  # where one has failed, those that have not begun
    for run in done:
        run.result()
    scores = {task: [run.result() for run in by_seed] for task, by_seed in runs.items()}
    rows = changes(scores)
    with open(args.output / "changes.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, args.output / "changes.png")
    print(
        f"{len(scores) * len(args.seeds)} trainings in {(time.perf_counter() - started) / 60:.0f} minutes. "
        f"See {args.output / 'changes.csv'}."
    )


if __name__ == "__main__":
    main()
