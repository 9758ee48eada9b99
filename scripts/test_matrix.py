"""Run the fast tests in every cell of the version matrix, and print the results: `make test-matrix`, or some cells:

    python -m scripts.test_matrix --only 5.19.0 --only python3.12

A cell is a Python, a transformers and a torch. The oldest, the newest and the pinned one run all fast tests; those
between them the bundle's own, which is where versions matter. A cell's environment, kept in `.venv/matrix`, holds what
`requirements.txt` pins but for these two. A Python is looked for on the path, then among pyenv's: `pyenv install 3.12
3.13` is enough. One that this machine lacks, or a torch that has no build for it, is told as such and is no failure.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from xml.etree import ElementTree

from jina_vlm_tools import markdown


ROOT = Path(__file__).parent.parent
ENVIRONMENTS = ROOT / ".venv" / "matrix"
REQUIREMENTS = (ROOT / "requirements.txt").read_text(encoding="utf-8")


def pinned(name: str) -> str:
    return re.search(rf"^{name}==(.*)$", REQUIREMENTS, flags=re.MULTILINE)[1]


# From the oldest that are supported (`pyproject.toml`) to the newest
TRANSFORMERS = ("5.19.0", "5.22.2", "5.23.0", pinned("transformers"))
TORCH = ("2.9.1", "2.13.0", "2.15.0")
PYTHONS = ("3.11", "3.12", "3.13")
NOT_THE_BUNDLES = ("--ignore=tests/tools", "--ignore=tests/studies")


@dataclass(frozen=True)
class Cell:
    python: str = PYTHONS[0]
    transformers: str = TRANSFORMERS[-1]
    torch: str = pinned("torch")

    def __str__(self) -> str:
        return f"python{self.python}-transformers{self.transformers}-torch{self.torch}"

    def is_corner(self) -> bool:
        """Whether it runs all tests."""
        newest, oldest = (PYTHONS[-1], TRANSFORMERS[-1]), (PYTHONS[0], TRANSFORMERS[0])
        return (self.python, self.transformers) in (oldest, newest, (PYTHONS[0], TRANSFORMERS[-1]))

    def requirements(self) -> str:
        wanted = {"transformers": f"=={self.transformers}", "torch": f"=={self.torch}"}
        if self.torch != pinned("torch"):
            wanted["setuptools"] = ">=77"  # some do not take the newest
        text = REQUIREMENTS
        for name, version in wanted.items():
            text = re.sub(rf"^{name}==.*$", f"{name}{version}", text, flags=re.MULTILINE)
        return text


CELLS = (
    *(Cell(python, version) for version in TRANSFORMERS for python in PYTHONS),
    *(Cell(torch=version) for version in TORCH if version != Cell.torch),
)


def find_python(version: str) -> str | None:
    """On the path, or among pyenv's, whose commands on the path run only where a version is switched on."""
    pyenv = sorted(map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python")), reverse=True)
    for candidate in (shutil.which(f"python{version}"), *pyenv):
        if candidate and subprocess.run([candidate, "--version"], capture_output=True).returncode == 0:
            return candidate
    return None


def set_up(cell: Cell) -> tuple[str | None, str]:
    """The cell's own Python with all that it needs, or None; and why not."""
    folder = ENVIRONMENTS / str(cell)
    python, wanted = folder / "bin" / "python", folder / "requirements.txt"
    if wanted.is_file() and wanted.read_text() == cell.requirements():
        return str(python), ""
    base = find_python(cell.python)
    if base is None:
        return None, f"no python{cell.python} here"
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([base, "-m", "venv", folder], check=True)
    unfinished = folder / "unfinished.txt"
    unfinished.write_text(cell.requirements())
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for arguments in (["-r", unfinished], ["--no-deps", "--no-build-isolation", "-e", ROOT]):
        result = subprocess.run([*pip, *arguments], capture_output=True, text=True)
        if result.returncode:
            errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
            return None, f"does not install: {(errors or ['see pip'])[-1].removeprefix('ERROR: ')}"
    unfinished.rename(wanted)
    return str(python), ""


def run_tests(cell: Cell, python: str, arguments: list[str]) -> dict:
    """Numbers of tests passed, skipped and failed, and the minutes they took."""
    report = ENVIRONMENTS / str(cell) / "report.xml"
    report.unlink(missing_ok=True)
    started = time.perf_counter()
    command = [python, "-m", "pytest", "tests", "-m", "not slow", "-n", "2", "--dist", "loadfile", "-q"]
    command += [f"--junitxml={report}", *(() if cell.is_corner() else NOT_THE_BUNDLES), *arguments]
    returncode = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
    minutes = (time.perf_counter() - started) / 60
    if not report.is_file():
        return {"note": f"pytest ended with {returncode}", "failed": 1}
    suites = list(ElementTree.parse(report).iter("testsuite"))
    total, failed, errors, skipped = (
        sum(int(suite.get(name)) for suite in suites) for name in ("tests", "failures", "errors", "skipped")
    )
    failed += errors
    return {"passed": total - failed - skipped, "skipped": skipped, "failed": failed, "minutes": f"{minutes:.1f}"}


def commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=7"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "no commit"


def table(results: dict[Cell, dict]) -> str:
    numbers = ["passed", "skipped", "failed", "minutes"]
    rows = [
        [cell.python, cell.transformers, cell.torch, "all" if cell.is_corner() else "bundle"]
        + [str(result.get(name, "")) for name in numbers]
        for cell, result in results.items()
    ]
    notes = [f"\n{cell}: {result['note']}." for cell, result in results.items() if "note" in result]
    return markdown.table(["Python", "transformers", "torch", "tests", *numbers], rows, figures=4) + "".join(notes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", action="append", default=[], help="cells whose name contains this (repeatable)")
    parser.add_argument("--list", action="store_true", help="list the cells' names")
    parser.add_argument("--resume", action="store_true", help="leave out cells that passed at this commit")
    args, pytest_arguments = parser.parse_known_args()
    cells = [cell for cell in CELLS if not args.only or any(text in str(cell) for text in args.only)]
    if args.list:
        print("\n".join(map(str, cells)))
        return
    run = {"commit": commit(), "arguments": pytest_arguments}
    results = {}
    for cell in cells:
        kept = ENVIRONMENTS / str(cell) / "result.json"
        if args.resume and kept.is_file() and (before := json.loads(kept.read_text()))["run"] == run:
            results[cell] = before["result"]
            continue
        print(f"== {cell}", flush=True)
        python, note = set_up(cell)
        results[cell] = run_tests(cell, python, pytest_arguments) if python else {"note": note}
        kept.unlink(missing_ok=True)
        if python and not results[cell]["failed"] and not run["commit"].endswith("dirty"):
            kept.write_text(json.dumps({"run": run, "result": results[cell]}))
    print(f"{run['commit']}, {date.today()}, {platform.platform()}:\n\n{table(results)}")
    sys.exit(any(result.get("failed") for result in results.values()))


if __name__ == "__main__":
    main()
