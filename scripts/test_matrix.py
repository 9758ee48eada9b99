"""Run the fast tests in every cell of the version matrix, and print what came of each: `make test-matrix`, or some cells,

    python -m scripts.test_matrix --only 5.17.0 --only python3.12

A cell is a Python, a transformers and a torch. Its environment, kept in `.venv/matrix`, holds what `requirements.txt` or, for
another transformers, `requirements/transformers-<version>.txt` pins. A Python that this machine lacks, or a torch that has no
build for it, is told as such and is no failure.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree


ROOT = Path(__file__).parent.parent
ENVIRONMENTS = ROOT / ".venv" / "matrix"
NEWEST = {
    name: re.search(rf"^{name}==(.*)$", (ROOT / "requirements.txt").read_text(), flags=re.MULTILINE)[1]
    for name in ("transformers", "torch")
}
OLDER_TRANSFORMERS = sorted(path.stem.removeprefix("transformers-") for path in (ROOT / "requirements").glob("transformers-*.txt"))
OLDER_TORCH = ("2.9.1",)
PYTHONS = ("3.11", "3.12", "3.13")


@dataclass(frozen=True)
class Cell:
    python: str = PYTHONS[0]
    transformers: str = NEWEST["transformers"]
    torch: str = NEWEST["torch"]

    def __str__(self) -> str:
        return f"python{self.python}-transformers{self.transformers}-torch{self.torch}"

    def requirements(self) -> str:
        path = ROOT / "requirements.txt"
        if self.transformers != NEWEST["transformers"]:
            path = ROOT / "requirements" / f"transformers-{self.transformers}.txt"
        return re.sub(r"^torch==.*$", f"torch=={self.torch}", path.read_text(), flags=re.MULTILINE)


CELLS = (
    *(Cell(transformers=version) for version in (*OLDER_TRANSFORMERS, NEWEST["transformers"])),
    *(Cell(python=version) for version in PYTHONS[1:]),
    *(Cell(torch=version) for version in OLDER_TORCH),
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
    command = [python, "-m", "pytest", "tests", "-m", "not slow", "-n", "2", "--dist", "loadfile", "-q", f"--junitxml={report}", *arguments]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", action="append", default=[], help="cells whose name contains this (repeatable)")
    parser.add_argument("--list", action="store_true", help="list the cells' names")
    args, pytest_arguments = parser.parse_known_args()
    cells = [cell for cell in CELLS if not args.only or any(text in str(cell) for text in args.only)]
    if args.list:
        print("\n".join(map(str, cells)))
        return
    rows, broken = [], False
    for cell in cells:
        print(f"== {cell}", flush=True)
        python, note = set_up(cell)
        result = run_tests(cell, python, pytest_arguments) if python else {"note": note}
        broken |= bool(result.get("failed"))
        numbers = [str(result.get(name, "")) for name in ("passed", "skipped", "failed", "minutes")]
        rows.append([cell.python, cell.transformers, cell.torch, *numbers, result.get("note", "")])
    header = ["Python", "transformers", "torch", "passed", "skipped", "failed", "minutes", ""]
    for row in (header, ["---"] * len(header), *rows):
        print(f"| {' | '.join(row)} |")
    sys.exit(broken)


if __name__ == "__main__":
    main()
