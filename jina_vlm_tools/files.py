"""Where things lie, and files and folders that are there as a whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


_BESIDE = Path(__file__).resolve().parent.parent
# The folder of the package `jina_vlm`, with its modules, LICENSE and chat_template.jinja. A checkout is this folder.
ROOT = _BESIDE / "jina_vlm" if (_BESIDE / "jina_vlm").is_dir() else _BESIDE
TEMPLATE = ROOT / "chat_template.jinja"
TINY = ROOT / "checkpoints" / "tiny"  # in a checkout
TINY_RETRIEVAL = ROOT / "checkpoints" / "tiny-retrieval"  # its adapter and projector for retrieval, in a checkout
INDEX_FOLDER = ".jina-vlm-index"  # in a folder that was indexed, unless another place was named
UNFINISHED = ".unfinished"  # ends the name of a file that is being written


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears under its name with all of its content on disk. An older one stays until then; nothing
    else does where this fails or is interrupted."""
    unfinished = path.with_name(path.name + UNFINISHED)
    try:
        with open(unfinished, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def new_folder(target: Path, replace: bool = False) -> Iterator[Path]:
    """A folder beside `target`, to be filled, that takes its name when all went well, and is removed otherwise:
    `target` is there as a whole or not at all. An older `target` stays until then. Who may read the folder may read
    its files."""
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    made, old = (target.with_name(f".{target.name}.{kind}-{os.getpid()}") for kind in ("new", "old"))
    made.mkdir()
    try:
        yield made
        readers = made.stat().st_mode & 0o666
        for path in made.rglob("*"):
            if path.is_file():  # safetensors writes what its owner alone can read
                path.chmod(path.stat().st_mode | readers)
        if replace and target.exists():
            target.rename(old)
        made.rename(target)
    finally:
        shutil.rmtree(made, ignore_errors=True)
        if not target.exists() and old.exists():
            old.rename(target)
        shutil.rmtree(old, ignore_errors=True)
