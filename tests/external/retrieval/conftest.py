import os


os.environ["HF_HUB_OFFLINE"] = "1"

import pytest  # noqa: E402
from comparing import table  # noqa: E402
from reference import Reference, write_folders  # noqa: E402


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("retrieval")
    write_folders(home)
    return home


@pytest.fixture(scope="session")
def reference(home) -> Reference:
    """Of the adapter on tower, connector and decoder."""
    return Reference(str(home / "all"))


@pytest.fixture(scope="session")
def vectors(reference):
    """Dense and multi-vectors by case, each computed alone."""
    return reference.vectors()


def pytest_terminal_summary(terminalreporter):
    terminalreporter.section("largest differences from the reference, float32")
    for line in table():
        terminalreporter.write_line(line)
