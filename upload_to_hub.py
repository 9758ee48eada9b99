"""Publish a checkpoint with this repository's code as a page on the Hub that loads by itself:

    python upload_to_hub.py --weights jinaai/jina-vlm --repo-id me/jina-vlm-transformers

It is `jina-vlm upload`, for a checkout in which nothing is installed.
"""

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path

from jina_vlm_tools.cli.main import main as jina_vlm


ROOT = Path(__file__).resolve().parent


class Checkout(MetaPathFinder):
    """The checkout is the package `jina_vlm` where none is installed."""

    def find_spec(self, name, path=None, target=None):
        if name == "jina_vlm":
            return importlib.util.spec_from_file_location(
                name, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
            )


def main() -> None:
    sys.meta_path.append(Checkout())  # asked after all others
    jina_vlm(["upload", *sys.argv[1:]])


if __name__ == "__main__":
    main()
