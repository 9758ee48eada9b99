"""A plugin for pytest: a test fails where code of this repository calls something that a library deprecates.

Libraries say so by Python's warnings or in their logs. Either way, the caller is the innermost code on the stack
beyond the library that speaks; what a third party (TRL, PEFT) calls is its own affair. A test that asks for a warning
with `pytest.warns` gets it.
"""

import logging
import re
import sys
import sysconfig
import warnings
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest
from transformers.utils import logging as transformers_logging


ROOT = Path(__file__).parents[2]
STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib"))
REPORTERS = ("warnings", "_py_warnings", "logging", __name__)
WARNINGS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)


class DeprecatedCalls(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "deprecat" in (message := record.getMessage()).lower():
            self.note(message, sys._getframe())

    def note(self, message: str, frame: FrameType) -> None:
        if caller := our_caller(frame):
            self.found.append(f"{caller}: {message}")

    @pytest.hookimpl(wrapper=True)
    def pytest_collection(self):
        with self.listening():
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self):
        with self.listening():
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self):
        result = yield
        found, self.found = self.found, []
        if found:
            pytest.fail("Deprecated, and called from here:\n" + "\n".join(dict.fromkeys(found)), pytrace=False)
        return result

    @contextmanager
    def listening(self):
        """Within pytest's own recording of warnings, which goes on."""

        def note_and_show(message, category, *where):
            if issubclass(category, WARNINGS):
                self.note(f"{category.__name__}: {message}", sys._getframe())
            show(message, category, *where)

        show, warnings.showwarning = warnings.showwarning, note_and_show
        transformers_logging.warning_once.cache_clear()  # or what another test was warned of is kept from this one
        # The library's logger tells nothing to the root.
        loggers = [logging.getLogger(), logging.getLogger("transformers")]
        for logger in loggers:
            logger.addHandler(self)
        yield
        for logger in loggers:
            logger.removeHandler(self)
        warnings.showwarning = show


def our_caller(frame: FrameType | None) -> str | None:
    """`file:line` of this repository's code that called what speaks at `frame`; None if others did."""
    speaker, called = None, set()
    while frame := frame.f_back:
        owner = _owner(frame.f_code.co_filename)
        if owner is None:
            # An override that the library called hands on what the library gave it.
            hands_on = frame.f_code.co_name in called and frame.f_back is not None
            if hands_on and _owner(frame.f_back.f_code.co_filename) == speaker:
                return None
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        called.add(frame.f_code.co_name)
        if owner == "python":
            reports = frame.f_globals["__name__"] in REPORTERS
            speaker = speaker or (None if reports else owner)
            continue
        speaker = speaker or owner
        calls_for_others = owner == "torch" and speaker != "python"  # it calls modules, for whoever called them
        if owner != speaker and not calls_for_others:
            return None
    return None


def _owner(filename: str) -> str | None:
    """The distribution that a file is of, "python", or None where it is ours."""
    if found := re.search(r"site-packages[/\\](\w+)", filename):
        return found[1]
    path = Path(filename)
    if filename.startswith("<") or path.is_relative_to(STANDARD_LIBRARY) or path == Path(__file__):
        return "python"
    # beside the checkout, copies that the library runs as remote code
    return None if path.is_relative_to(ROOT) or path.name.endswith("_jina_vlm.py") else "others"
