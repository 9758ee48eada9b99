"""A retrieval folder, or a merged one, embeds in a fresh process, by each library alike."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from . import PublishingError
from .check import run_alone


ADAPTER_CONFIG = "adapter_config.json"
AGREEMENT = 0.99  # cosine, of the same vectors by two libraries in half precision; another prompt or pooling is below


@dataclass(frozen=True)
class Base:
    """Of an adapter: its id on the Hub, a folder with its files, and the Hub's commit that these are of, if they are
    from there."""

    name: str
    place: Path
    commit: str | None = None


@contextmanager
def with_local_base(folder: Path, base: Base) -> Iterator[Path]:
    """A folder of links to the files of `folder`, whose adapter names the base by its place: what is to be published,
    for libraries that take the name as it stands, while nothing has been published."""
    with tempfile.TemporaryDirectory(prefix="jina-vlm-") as home:
        local = Path(home) / "adapter"
        shutil.copytree(folder, local, copy_function=lambda source, to: Path(to).symlink_to(Path(source).resolve()))
        settings = json.loads((local / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        (local / ADAPTER_CONFIG).unlink()
        settings["base_model_name_or_path"] = str(base.place.resolve())
        (local / ADAPTER_CONFIG).write_text(json.dumps(settings), encoding="utf-8")
        yield local


def embed(folder: Path, base: Base) -> dict:
    """
    Embed a text and an image by a page's folder in a fresh process, offline, with the code of folder and base alone.

    Returns:
        "shapes" of the vectors by kind, for text and image; "agreement", the cosine between vectors of
        sentence-transformers and of PEFT, by kind; "answer" of the base, which is also the one with the adapter
        off.

    Raises:
        PublishingError: it does not load, libraries disagree, the adapter changes nothing, or the answer with it off
            is another than the base's.
    """
    with with_local_base(folder, base) as local:
        result = run_alone("embed_once.py", local, base.place)
    faults = [f"{name} of the base: {', '.join(keys[:5])}" for name, keys in result["faults"].items()]
    if result["unloaded"]:
        faults.append(f"weights of the adapter that the base has no place for ({', '.join(result['unloaded'][:3])})")
    if not result["changes"] > 1e-6:
        faults.append("an adapter that changes no vector")
    if not result["answers_as_before"]:
        faults.append("another answer than the base's where the adapter is off")
    if not result["answer"]:
        faults.append("an empty answer of the base")
    return _judge(folder, result, faults)


def compare(folder: Path, source: Path, base: Base) -> dict:
    """
    Embed a text and an image by a merged folder in a fresh process, and by the retrieval folder that it was made of;
    see [`embed`].

    Raises:
        PublishingError: it does not load, or makes other vectors.
    """
    with with_local_base(source, base) as local:
        return _judge(folder, run_alone("embed_once.py", folder, local), [])


def _judge(folder: Path, result: dict, faults: list[str]) -> dict:
    faults += [
        f"vectors ({kind}) that differ between libraries: their cosine is {cosine:.4f}"
        for kind, cosine in result["agreement"].items()
        if not cosine >= AGREEMENT  # nor where it is no number
    ]
    if result["code"] != ["transformers_modules"]:
        faults.append(f"code that neither it nor its base brought ({', '.join(result['code'])})")
    if faults:
        raise PublishingError(f"{folder} loads, but with {'; '.join(faults)}.")
    return {name: result[name] for name in ("shapes", "agreement", "answer") if name in result}
