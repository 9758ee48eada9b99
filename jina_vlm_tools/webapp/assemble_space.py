"""Put a Space together: `python -m jina_vlm_tools.webapp.assemble_space FOLDER`.

Then upload it: `hf upload OWNER/NAME FOLDER . --repo-type space`.

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
        for name in ("cli", "hub", "inference", "synthetic", "webapp")
    ),
    ("jina_vlm_tools/webapp/*.css", "jina_vlm_tools/webapp"),
    ("__init__.py", "jina_vlm"),
    ("*_jina_vlm.py", "jina_vlm"),
)


def assemble(folder: Path) -> list[Path]:
    """
    Returns:
        The files, in `folder`.

    Raises:
        FileExistsError: there is something in `folder`.
    """
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty. Name a new folder.")
    made = []
    for pattern, target in FILES:
        for source in sorted(ROOT.glob(pattern)):
            (folder / target).mkdir(parents=True, exist_ok=True)
            made.append(Path(shutil.copy(source, folder / target)))
    return made


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a new one")
    folder = parser.parse_args().folder
    try:
        print(f"{len(assemble(folder))} files in {folder}")
    except OSError as error:
        sys.exit(f"error: {error}")
