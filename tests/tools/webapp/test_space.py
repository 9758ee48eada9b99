"""A Space has all that its page needs. That it works in a browser: `make test-page`."""

import subprocess
import sys
from pathlib import Path

from jina_vlm_tools.webapp.assemble_space import assemble


IMPORTED = """
import sys
import jina_vlm_tools.inference.loading, jina_vlm_tools.webapp.answering
from jina_vlm_tools.cli.main import parse_args
parse_args(["app"])
for name, module in sys.modules.items():
    if name.startswith("jina_vlm"):
        print(module.__file__)
"""


def test_what_a_space_imports_is_in_it(tmp_path):
    """Not taken from a package that happens to be installed."""
    space = tmp_path / "space"
    assemble(space)
    process = subprocess.run([sys.executable, "-c", IMPORTED], cwd=space, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    files = [Path(line) for line in process.stdout.splitlines()]
    assert len(files) > 20
    assert [file for file in files if not file.resolve().is_relative_to(space.resolve())] == []
