"""That a test fails where our code calls what a library deprecates: `deprecations.py`."""

import os
import re
import subprocess
import sys

from conftest import ROOT


CONFTEST = """
from deprecations import DeprecatedCalls

def pytest_configure(config):
    config.pluginmanager.register(DeprecatedCalls())
"""
# By its name a module of the bundle, as the library runs copies of them from other folders.
CASES = '''
import locale
import warnings
import pytest
from transformers.utils import logging
from transformers.utils.deprecation import deprecate_kwarg

@deprecate_kwarg("old", "100.0", new_name="new")
def deprecating(new=None):
    return new

third_party = {"deprecating": deprecating, "locale": locale}
source = """
def call(): return deprecating(old=1)
def call_python(): return locale.getdefaultlocale()
"""
exec(compile(source, "/lib/site-packages/trl/trainer.py", "exec"), third_party)

library = {"deprecating": deprecating}
source = """
class Model:
    def generate(self, **kwargs): return deprecating(**kwargs)
def assist(model): return model.generate(old=1)
"""
exec(compile(source, "/lib/site-packages/transformers/generation.py", "exec"), library)

class Model(library["Model"]):
    def generate(self, **kwargs):
        return super().generate(**kwargs)

@pytest.fixture(scope="module")
def prepared():
    return deprecating(old=1)

def test_warned():
    assert deprecating(old=1) == 1

def test_warned_of_a_fixture(prepared):
    pass

def test_logged_once():
    logging.get_logger("transformers.models").warning_once("`old` is deprecated.")

def test_logged_once_in_another_test():
    logging.get_logger("transformers.models").warning_once("`old` is deprecated.")

def test_passes_where_another_library_calls():
    assert third_party["call"]() == 1

def test_warned_through_an_override():
    assert Model().generate(old=1) == 1

def test_passes_where_the_library_calls_an_override():
    assert library["assist"](Model()) == 1

def test_warned_by_the_standard_library():
    locale.getdefaultlocale()

def test_passes_where_another_library_calls_the_standard_one():
    third_party["call_python"]()

def test_passes_where_it_is_asked_for():
    with pytest.warns(FutureWarning, match="old"):
        deprecating(old=1)

def test_passes_with_other_warnings():
    warnings.warn("deprecated, says a UserWarning")
    logging.get_logger("transformers.models").warning("a word")
'''


def test_deprecated_calls_of_ours_fail(tmp_path):
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_calls_jina_vlm.py").write_text(CASES)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", "test_calls_jina_vlm.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests" / "helpers"), "PYTHONWARNINGS": ""},
    )
    failed = set(re.findall(r"^ERROR test_calls_jina_vlm.py::(\w+)", result.stdout, flags=re.MULTILINE))
    assert failed == {
        "test_warned",
        "test_warned_by_the_standard_library",
        "test_warned_through_an_override",
        "test_warned_of_a_fixture",
        "test_logged_once",
        "test_logged_once_in_another_test",
    }, result.stdout
    line = 1 + CASES.splitlines().index("    assert deprecating(old=1) == 1")
    assert f"test_calls_jina_vlm.py:{line}: FutureWarning: `old` is deprecated" in result.stdout
    assert re.search(r"^11 passed, .*6 errors", result.stdout, flags=re.MULTILINE), result.stdout
