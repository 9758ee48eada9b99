"""Put a Space together: `python -m jina_vlm_tools.webapp.assemble_space FOLDER`.

With `--retrieval RETRIEVAL_FOLDER` its page has a tab that searches images and PDFs, too. Then upload it:
`hf upload OWNER/NAME FOLDER . --repo-type space`.

The repository itself is none: its front page is a model's, and its requirements are those of its tests.
"""

import argparse
import shutil
import sys
from pathlib import Path

from jina_vlm_tools.files import ROOT


# Where it comes from, and the folder of the Space that it goes to. The bundle's modules become the package `jina_vlm`,
# so that nothing has to be installed.
FILES = (
    ("LICENSE", "."),
    ("jina_vlm_tools/webapp/space/*", "."),
    ("jina_vlm_tools/*.py", "jina_vlm_tools"),
    *(
        (f"jina_vlm_tools/{name}/*.py", f"jina_vlm_tools/{name}")
        for name in ("cli", "engines", "hub", "inference", "synthetic", "webapp")
    ),
    ("jina_vlm_tools/retrieval/__init__.py", "jina_vlm_tools/retrieval"),  # defaults that commands name
    ("jina_vlm_tools/webapp/*.css", "jina_vlm_tools/webapp"),
    ("__init__.py", "jina_vlm"),
    ("*_jina_vlm.py", "jina_vlm"),
)
# What the tab for searching adds
RETRIEVAL_FILES = (("jina_vlm_tools/retrieval/*.py", "jina_vlm_tools/retrieval"),)
RETRIEVAL_REQUIREMENTS = "accelerate==1.15.0\npeft==0.21.2\npyarrow==26.0.1\npypdfium2==5.15.2\nscipy==1.17.1\n"
RETRIEVAL = "retrieval"  # the folder of the Space that the page looks for


def assemble(folder: Path, retrieval: Path | None = None) -> list[Path]:
    """
    Args:
        folder: A new one, for the Space.
        retrieval: A retrieval folder, for a tab that searches.

    Returns:
        The files, in `folder`.

    Raises:
        FileExistsError: there is something in `folder`.
        FileNotFoundError: `retrieval` is none.
    """
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty. Name a new folder.")
    if retrieval is not None and not (retrieval / "adapter_config.json").is_file():
        raise FileNotFoundError(f"{retrieval} is no retrieval folder: it holds no adapter_config.json.")
    made = []
    for pattern, target in FILES + (RETRIEVAL_FILES if retrieval else ()):
        for source in sorted(ROOT.glob(pattern)):
            (folder / target).mkdir(parents=True, exist_ok=True)
            made.append(Path(shutil.copy(source, folder / target)))
    if retrieval is not None:
        # Without code: the Space brings its own.
        shutil.copytree(retrieval, folder / RETRIEVAL, ignore=shutil.ignore_patterns("*.py"))
        made += [path for path in (folder / RETRIEVAL).rglob("*") if path.is_file()]
        with open(folder / "requirements.txt", "a", encoding="utf-8") as requirements:
            requirements.write(RETRIEVAL_REQUIREMENTS)
    return made


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a new one")
    parser.add_argument("--retrieval", type=Path, metavar="RETRIEVAL_FOLDER", help="an adapter and a projector")
    args = parser.parse_args()
    try:
        print(f"{len(assemble(args.folder, args.retrieval))} files in {args.folder}")
    except OSError as error:
        sys.exit(f"error: {error}")
