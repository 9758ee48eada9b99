"""Base and adapter become one checkpoint, for engines without adapters."""

import errno
import shutil
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors import SafetensorError

from jina_vlm_tools.files import ROOT
from jina_vlm_tools.retrieval.folder import merge_folder, read_folder

from . import PublishingError
from .check import LICENSE, MODULES, SETTINGS, TEXT, weight_files
from .embedding import Base
from .retrieval import BASE_FILES, CONFIG, ENCODER, module_files


def find_source(adapter: str) -> tuple[Path, Base]:
    """
    The files of a retrieval folder and of its base, here or fetched.

    Raises:
        OSError, ValueError, HfHubHTTPError: one is not there, or they do not belong together.
    """
    found = read_folder(adapter)
    is_here = Path(found.base).is_dir()
    place = found.base if is_here else snapshot_download(found.base, allow_patterns=BASE_FILES)
    return Path(found.path), Base(found.base, Path(place))


def merge(source: Path, folder: Path, kind: str, dtype: str) -> None:
    """
    Write base and adapter as one checkpoint in the place of `folder`, an empty one.

    Raises:
        PublishingError: the disk is full.
        OSError, ValueError: as from `merge_folder`.
    """
    try:
        merge_folder(source, folder, kind, dtype=dtype, replace=True)
        shutil.copyfile(ROOT / "LICENSE", folder / LICENSE)
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise
        raise PublishingError(
            f"The merged folder could not be written to {folder.parent}: {error}. Make room there (twice the size of "
            "the weights is needed), or choose another folder. Nothing was left behind."
        ) from error


def list_merged(folder: Path) -> list[str]:
    """
    The names of a merged folder's files, which are all that it holds.

    Raises:
        PublishingError: it is none, or holds something else, too.
    """
    lacks = [name for name in (CONFIG, *ENCODER, *weight_files(folder)) if not (folder / name).is_file()]
    if lacks:
        raise PublishingError(f"{folder} lacks {', '.join(lacks)}: it is no merged folder.")
    known = {*MODULES, *SETTINGS, *TEXT, *ENCODER, LICENSE, *weight_files(folder), *module_files(folder)}
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    if others := sorted(there - known):
        raise PublishingError(f"{folder} holds {', '.join(others)}, which belongs to no merged folder.")
    return sorted(there)
