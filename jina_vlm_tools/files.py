"""Where things lie, and files that are there as a whole or not at all."""

import os
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
