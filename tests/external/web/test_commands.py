"""The page as people start it: from a clone, and as a Space."""

import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager

import pytest
import servers
from browsing import DONE, User
from conftest import ROOT, TINY
from huggingface_hub import SpaceCardData
from huggingface_hub.repocard import metadata_load

from jina_vlm_tools.webapp.assemble_space import RETRIEVAL_REQUIREMENTS, assemble


START_SECONDS = 120
SPACE = ROOT / "jina_vlm_tools" / "webapp" / "space"


@contextmanager
def page_of(folder, log, *arguments, **environment):
    """The URL of the page in a folder, a Space's or the checkout, in a process of its own, once it is there."""
    port = servers.free_port()
    url = f"http://127.0.0.1:{port}/"
    program = ["app.py"] if (folder / "app.py").is_file() else ["-m", "jina_vlm_tools", "app"]
    command = [sys.executable, *program, "--port", str(port), *arguments]
    with servers.running(command, url, log, seconds=START_SECONDS, cwd=folder, env={**os.environ, **environment}):
        yield url


def answer_of_an_example(browser, url) -> tuple[str, str]:
    user = User(browser, url)
    user.page.locator("#examples tbody tr").nth(1).click()
    answer, head = user.wait(), user.page.locator("#head").inner_text()
    assert user.problems == []
    user.context.close()
    return answer, head


def test_from_a_clone(browser, tmp_path):
    with page_of(ROOT, tmp_path / "log.txt") as url:
        answer, head = answer_of_an_example(browser, url)
    assert answer == "morado"
    assert "checkpoints/tiny · 2,471,424 parameters · cpu · float32" in head and "knows drawn, colored shapes" in head


def answer_of_a_search(browser, url) -> str:
    user = User(browser, url)
    user.page.get_by_role("tab", name="Search").click()
    user.page.locator("#search-example").click()
    user.page.get_by_text("Read 10 pages").wait_for(timeout=DONE)
    user.page.locator("#search-send").click()
    user.page.locator("#answer p").wait_for(timeout=DONE)
    assert user.page.locator(".hits button").count() == 5 and user.problems == []
    answer = user.page.locator("#answer").inner_text()
    user.context.close()
    return answer


def test_with_a_tab_for_searching(browser, retrieval_folder, tmp_path):
    with page_of(ROOT, tmp_path / "log.txt", "--retrieval", str(retrieval_folder)) as url:
        assert answer_of_a_search(browser, url)
        assert answer_of_an_example(browser, url)[0] == "morado"


def test_as_a_space_with_a_tab_for_searching(browser, retrieval_folder, tmp_path):
    assemble(tmp_path / "space", retrieval_folder)
    shutil.copytree(TINY, tmp_path / "weights", ignore=shutil.ignore_patterns("*.py"))
    with page_of(
        tmp_path / "space", tmp_path / "log.txt", JINA_VLM_MODEL=str(tmp_path / "weights"), PYTHONPATH=""
    ) as url:
        assert answer_of_a_search(browser, url)


def test_as_a_space(browser, tmp_path):
    """With what the Space holds, and a checkpoint without code of its own that the variable names."""
    assemble(tmp_path / "space")
    shutil.copytree(TINY, tmp_path / "weights", ignore=shutil.ignore_patterns("*.py"))
    module = "import jina_vlm, jina_vlm_tools as t; print(*(m.__path__[0] for m in (jina_vlm, t)))"
    found = subprocess.run(
        [sys.executable, "-c", module],
        cwd=tmp_path / "space",
        env=without_path(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(path.startswith(str(tmp_path)) for path in found.stdout.split())
    with page_of(
        tmp_path / "space", tmp_path / "log.txt", JINA_VLM_MODEL=str(tmp_path / "weights"), PYTHONPATH=""
    ) as url:
        answer, head = answer_of_an_example(browser, url)
    assert answer == "morado" and "weights" in head


def without_path() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def test_the_released_checkpoint_is_the_spaces_own(tmp_path):
    assemble(tmp_path / "space")
    shown = subprocess.run(
        [sys.executable, "app.py", "--help"],
        cwd=tmp_path / "space",
        env={**without_path(), "COLUMNS": "500"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "now jinaai/jina-vlm)" in shown.stdout


def test_a_space_is_put_into_an_empty_folder_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        assemble(tmp_path)


def test_a_space_takes_a_retrieval_folder_alone(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no retrieval folder"):
        assemble(tmp_path / "space", TINY)
    assert not (tmp_path / "space").exists()


def test_who_only_chats_imports_nothing_of_the_search():
    code = (
        "import sys; from jina_vlm_tools.webapp.layout import Page; import jina_vlm_tools.cli.app;"
        "print([name for name in sys.modules if 'retrieval' in name or name in ('peft', 'pypdfium2')])"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"


def test_the_spaces_front_matter_names_what_is_tested():
    import gradio

    card = metadata_load(SPACE / "README.md")
    assert SpaceCardData(**card).sdk == "gradio"
    assert card["sdk_version"] == gradio.__version__ and (SPACE / card["app_file"]).is_file()
    wanted = (SPACE / "requirements.txt").read_text() + RETRIEVAL_REQUIREMENTS
    pins = dict(re.findall(r"^([a-z0-9-]+)==(\S+)$", wanted.lower(), re.MULTILINE))
    tested = dict(
        re.findall(
            r"^([a-z0-9-]+)==(\S+)$",
            (ROOT / "tests" / "external" / "web" / "requirements.txt").read_text().lower(),
            re.MULTILINE,
        )
    )
    assert pins and all(tested[name] == version for name, version in pins.items())
    assert tested["gradio"] == gradio.__version__


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "no/such/folder"], "neither a folder nor the name of a repository"),
        (["--device", "cuda:9"], "--device cuda:9"),
        (["--retrieval", "no/such/folder"], "--retrieval no/such/folder: neither a folder nor the name of"),
        (["--retrieval", "checkpoints/tiny"], "checkpoints/tiny holds no adapter"),
    ],
)
def test_what_cannot_be_started_says_why(arguments, message):
    ended = subprocess.run(
        [sys.executable, "-m", "jina_vlm_tools", "app", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
    )
    assert ended.returncode == 1 and message in ended.stderr and "Traceback" not in ended.stderr
