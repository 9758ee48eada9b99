"""A thousand images by `jina-vlm batch`: one worker, two with a core each, and two that are killed in the middle.

Draws images of colored shapes in many sizes, some of them broken, and runs the command on them in fresh processes,
start-up included: one worker on one core; two workers on two; and two that are all killed (SIGKILL) once half of the
parts are there, after which one worker goes on.

    python -m benchmarks.many_images [--images 1000]
"""

import argparse
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
from PIL import Image

from jina_vlm_tools.files import ROOT
from jina_vlm_tools.synthetic.shapes import TRAINING_PAIRS, draw_scene, make_scene


BROKEN_EVERY = 125  # images
SCALES = (0.3, 3.0)  # of images whose sides lie between 250 and 378 pixels
OPTIONS = ("--question", "How many shapes are there?", "--max-tiles", "4", "--rows-per-part", "16")


def draw(folder: Path, number: int) -> int:
    """Draws the images; how many of them are broken."""
    folder.mkdir()
    broken = 0
    for index in range(number):
        rng = random.Random(index)
        image = draw_scene(make_scene(rng, TRAINING_PAIRS))
        scale = rng.uniform(*SCALES)
        path = folder / f"{index:06d}.png"
        image.resize((round(image.width * scale), round(image.height * scale))).save(path)
        if index % BROKEN_EVERY == BROKEN_EVERY // 2:
            match broken % 3:
                case 0:
                    os.truncate(path, path.stat().st_size // 2)
                case 1:
                    path.write_text("not an image")
                case 2:
                    Image.new("RGB", (1000, 4)).save(path)
            broken += 1
    return broken


def start(source: Path, output: Path, workers: int) -> subprocess.Popen:
    """The command with so many workers, and as many cores."""
    cores = sorted(os.sched_getaffinity(0))[:workers]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={workers}"] if workers > 1 else []
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "jina_vlm_tools", "batch", str(source), "--output", str(output), *OPTIONS],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )


def whole_run(source: Path, output: Path, workers: int) -> tuple[float, float]:
    """Seconds that the command takes, and those that processors were at work for it: fewer for each worker than the
    former where other programs had the cores as well."""
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    process = start(source, output, workers)
    if process.wait():
        sys.exit(f"The command failed: exit status {process.returncode}.")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - started, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def kill_in_the_middle(source: Path, output: Path, workers: int, parts: int) -> int:
    """Kills the command and all of its processes once half of the parts are there; how many there are then."""
    process = start(source, output, workers)
    while process.poll() is None and len(list(output.glob("part-*.parquet"))) < parts // 2:
        time.sleep(0.05)
    for victim in [*psutil.Process(process.pid).children(recursive=True), process]:
        victim.kill()
    process.wait()
    return len(list(output.glob("part-*.parquet")))


def rows_of(output: Path) -> list[dict]:
    return [row for part in sorted(output.glob("part-*.parquet")) for row in pq.read_table(part).to_pylist()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000, help="how many (default: %(default)s)")
    args = parser.parse_args()
    if len(os.sched_getaffinity(0)) < 2:
        sys.exit("Two cores are needed.")
    with tempfile.TemporaryDirectory() as folder:
        source, one, two, killed = (Path(folder, name) for name in ("images", "one", "two", "killed"))
        broken = draw(source, args.images)
        print(f"{args.images:,} images, {broken} of them broken\n", flush=True)
        seconds = {workers: whole_run(source, output, workers) for workers, output in ((1, one), (2, two))}
        expected = rows_of(one)
        parts = len(list(one.glob("part-*.parquet")))
        there = kill_in_the_middle(source, killed, 2, parts)
        resumed, _ = whole_run(source, killed, 1)

        print("\n| Workers, one core each | Seconds | Images per second | Against one worker | Processor seconds |")
        print("| ---: | ---: | ---: | ---: | ---: |")
        for workers, (took, processor_seconds) in seconds.items():
            speed = f"{args.images / took:.1f} | {seconds[1][0] / took:.2f} times"
            print(f"| {workers} | {took:.0f} | {speed} | {processor_seconds:.0f} |")
        print(
            f"\nTwo workers killed with {there} of {parts} parts written; one worker did the rest in {resumed:.0f} s."
        )
        for name, output in (("two workers", two), ("killed and resumed", killed)):
            rows = rows_of(output)
            once = [row["row"] for row in rows] == list(range(args.images))
            errors = sum(row["error"] is not None for row in rows)
            same = sum(row == other for row, other in zip(rows, expected, strict=True))
            print(
                f"{name}: each image once: {once}; errors: {errors}; "
                f"rows equal to one worker's: {same:,} of {len(rows):,}"
            )


if __name__ == "__main__":
    main()
