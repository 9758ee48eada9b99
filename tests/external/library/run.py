"""
Run the library's test mixins on jina-vlm, Molmo2 and LFM2-VL and set the results side by side:

    python -m library_tests.run [--json results.json] [arguments of pytest, for example -k save_load]

Fails where jina-vlm fails a test that one of the other two passes.
"""

import argparse
import ast
import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
from sdist import shims


HERE = Path(__file__).parent
OURS = "jina_vlm"
FAMILIES = {OURS: "jina-vlm", "molmo2": "Molmo2", "lfm2_vl": "LFM2-VL"}
MIXINS = {
    "ModelTesterMixin": "model",
    "GenerationTesterMixin": "generation",
    "VLMModelTest": "configuration",
    "TrainingTesterMixin": "training",
    "TensorParallelTesterMixin": "tensor parallel",
    "PipelineTesterMixin": "pipeline",
    "ProcessorTesterMixin": "processor",
    "ImageProcessingTestMixin": "image processor",
}
OUTCOMES = ("passed", "skipped", "failed")


class Collector:
    """A plugin of pytest: for each family the outcome of each test, the mixin that it comes from, and why."""

    def __init__(self):
        self.tests = {family: {} for family in FAMILIES}

    def pytest_collection_finish(self, session):
        for item in session.items:
            # The first to define it: subclasses hold wrapped copies of what they inherit.
            origin = [base for base in item.cls.__mro__ if item.name in vars(base)][-1]
            self._of(item.nodeid)[self._name(item.nodeid)] = {
                "mixin": MIXINS[origin.__name__],
                "outcome": "passed",
                "why": "",
            }

    def pytest_runtest_logreport(self, report):
        # A test may report several times: for its parts, and for what goes before and after it.
        test = self._of(report.nodeid)[self._name(report.nodeid)]
        if OUTCOMES.index(report.outcome) > OUTCOMES.index(test["outcome"]):
            test.update(outcome=report.outcome, why=_why(report))

    def _of(self, nodeid: str) -> dict:
        return self.tests[nodeid.split("::")[0].split("/")[-2]]

    def _name(self, nodeid: str) -> str:
        return nodeid.split("::")[-1]


def _why(report) -> str:
    if isinstance(report.longrepr, tuple):
        why = report.longrepr[2].removeprefix("Skipped: ")
        return re.sub(r"^\w+::\w+ is skipped: `[\w-]+` is not in .*", "Not a task of this model.", why)
    crash = getattr(report.longrepr, "reprcrash", None)
    return " ".join((crash.message if crash else str(report.longrepr)).split())[:300]


def table(tests: dict[str, dict]) -> str:
    """Passed, skipped and failed of each mixin, as markdown."""
    lines = [f"| Mixin | {' | '.join(FAMILIES.values())} |", "| --- |" + " ---: |" * len(FAMILIES)]
    for mixin in [*MIXINS.values(), None]:
        cells = []
        for results in tests.values():
            counts = Counter(test["outcome"] for test in results.values() if mixin in (None, test["mixin"]))
            cells.append(" / ".join(str(counts[outcome]) for outcome in OUTCOMES))
        lines.append(f"| {mixin or 'all'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def worse(tests: dict[str, dict]) -> list[str]:
    """What jina-vlm fails and another passes."""
    return [
        f"{name} (passed by {', '.join(FAMILIES[family] for family in passing)})"
        for name, test in tests[OURS].items()
        if test["outcome"] == "failed"
        and (passing := [family for family in FAMILIES if tests[family].get(name, {}).get("outcome") == "passed"])
    ]


def losses() -> list[str]:
    """What each shim says that is lost by it."""
    said = {
        name: ast.get_docstring(ast.parse(path.read_text())) for name, path in shims().items() if path.suffix == ".py"
    }
    return [
        f"`{name}`: {' '.join(text.removeprefix('Lost: ').split())}"
        for name, text in said.items()
        if text.startswith("Lost: ")
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write each test's outcome here")
    options, arguments = parser.parse_known_args()
    collector = Collector()
    models = [str(HERE / "models" / family) for family in FAMILIES]
    code = pytest.main(
        ["-c", str(HERE / "pytest.ini"), "-q", "--tb=no", "--no-summary", *arguments, *models], plugins=[collector]
    )
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return int(code)
    tests = collector.tests
    if options.json:
        options.json.write_text(json.dumps(tests, indent=1) + "\n", encoding="utf-8")
    print(f"\nPassed / skipped / failed:\n\n{table(tests)}")
    for outcome in ("failed", "skipped"):
        reasons = {}
        for name, test in tests[OURS].items():
            if test["outcome"] == outcome:
                reasons.setdefault(test["why"], []).append(name)
        print(f"\n{FAMILIES[OURS]}, {outcome}:\n")
        print("\n".join(f"- {', '.join(names)}: {why}" for why, names in reasons.items()) or "nothing")
    print("\nLost with what the source distribution lacks:\n")
    print("\n".join(f"- {entry}" for entry in losses()))
    print("\nFailed by jina-vlm, passed by another:\n")
    print("\n".join(f"- {entry}" for entry in worse(tests)) or "nothing")
    return 1 if worse(tests) else 0


if __name__ == "__main__":
    sys.exit(main())
