"""A retrieval folder becomes a page of its own, whose base is another page."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

from . import PublishingError
from .check import CARD, LICENSE, MODULES, TEXT
from .embedding import ADAPTER_CONFIG, Base
from .origin import is_repo_id


ADAPTER, CONFIG = "adapter_model.safetensors", "config.json"
ENCODER_MODULES = "modules.json"
ENCODER = (ENCODER_MODULES, "config_sentence_transformers.json", "sentence_bert_config.json")
BASE_FILES = ["*.json", "*.jinja", "*.py", "*.safetensors"]
PARTS = {"vision_model": "vision tower", "connector": "connector", "language_model": "decoder"}


@dataclass(frozen=True)
class Facts:
    """Of a retrieval folder, as its card tells them: `parts` of the model that the adapter changes, its rank and
    parameters, `width` of multi-vectors, `hidden` and `dims` of dense ones, tiles of an image."""

    task: str
    parts: tuple[str, ...]
    rank: int
    parameters: int
    width: int
    hidden: int
    dims: list[int]
    max_tiles: int
    prompts: dict[str, str]


# Which folder, which base --------------------------------------------------------------------------------------------


def check_kind(folder: Path) -> None:
    """
    Raises:
        PublishingError: this is no retrieval folder; says what it is, where that can be told.
    """
    if not folder.is_dir():
        raise PublishingError(f"--adapter {folder}: no such folder. Name one that `write_folder` wrote.")
    has = {name for name in (ADAPTER_CONFIG, CONFIG, ENCODER_MODULES) if (folder / name).is_file()}
    if ADAPTER_CONFIG in has and ENCODER_MODULES in has:
        return
    if ADAPTER_CONFIG in has:
        what = (
            f"an adapter alone: it has no {ENCODER_MODULES}, which names the projector. Write it together with one, "
            "by `jina_vlm_tools.retrieval.folder.write_folder`"
        )
    elif CONFIG in has and ENCODER_MODULES in has:
        what = "an adapter and a base that were merged. Name the retrieval folder that it was made of"
    elif CONFIG in has:
        what = "a whole checkpoint. Publish it by --weights"
    else:
        what = f"no retrieval folder: it has no {ADAPTER_CONFIG}"
    raise PublishingError(f"--adapter {folder}: this is {what}.")


def name_base(folder: Path, given: str | None) -> str:
    """
    The base's id on the Hub: as given, or as the adapter names it.

    Raises:
        PublishingError: it is named by a folder, which no reader of the page has, or not at all.
    """
    if given is not None:
        if not is_repo_id(given) or Path(given).is_dir():
            raise PublishingError(
                f"--base {given}: expected the base's id on the Hub (owner/name), under which readers of the page "
                f"find it{', not a folder' if Path(given).is_dir() else ''}."
            )
        return given
    name = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    beside = folder.resolve().parent / Path(name or ".").name
    is_path = name and (Path(name).is_dir() or beside.is_dir() and beside.parts[-2:] == Path(name).parts[-2:])
    if not name or is_path or not is_repo_id(name):
        raise PublishingError(
            f"{folder / ADAPTER_CONFIG} names the base by {f'a folder, {name}' if name else 'nothing'}. Say by --base "
            "OWNER/NAME which repository of the Hub holds it; publish it there first (`jina-vlm upload --weights`)."
        )
    return name


def find_files(folder: Path, name: str, from_hub: bool) -> Base:
    """
    Find a base's files: on the Hub, or where the adapter finds them.

    Args:
        name: Its id on the Hub.
        from_hub: Whether those of the Hub count, also where a folder beside the adapter has that name.

    Raises:
        PublishingError: it is in the released layout, whose code is another.
        FileNotFoundError, HfHubHTTPError: it is nowhere.
    """
    from jina_vlm.conversion_jina_vlm import is_released_config

    from jina_vlm_tools.retrieval.folder import find_base

    place = name
    if not from_hub:
        said = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
        try:
            place = find_base(folder, said)
        except FileNotFoundError:
            place = find_base(folder, name)
    base = Base(name, Path(place))
    if from_hub or not base.place.is_dir():
        commit = HfApi().repo_info(place).sha
        base = Base(name, Path(snapshot_download(place, revision=commit, allow_patterns=BASE_FILES)), commit)
    config = base.place / CONFIG
    if not config.is_file():
        raise PublishingError(f"The base {name} holds no {CONFIG}: it is no checkpoint. Name another by --base.")
    if is_released_config(json.loads(config.read_text(encoding="utf-8"))):
        raise PublishingError(
            f"The base {name} is in the released layout, whose own code does not load on transformers 5: neither "
            "would the adapter. Publish it in this layout (`jina-vlm upload --weights`), and name that page by --base."
        )
    return base


# The page's files ----------------------------------------------------------------------------------------------------


def assemble(source: Path, folder: Path, base: Base) -> Facts:
    """
    Write into `folder`, an empty one, what of `source` belongs on the page, with this repository's code, and the base
    named by its id.

    Raises:
        PublishingError, OSError, ValueError: a part is missing, or does not belong to this base.
    """
    from jina_vlm import JinaVLMProcessor

    from jina_vlm_tools.files import ROOT

    # The folder's own settings and tokenizer, this version's code
    JinaVLMProcessor.from_pretrained(source).save_pretrained(folder)
    for name in (ADAPTER, *ENCODER, *module_files(source)):
        if not (source / name).is_file():
            raise PublishingError(f"{source} lacks {name}. Write it anew, by `write_folder`.")
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, folder / name)
    settings = json.loads((source / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    settings |= {"base_model_name_or_path": base.name, "revision": None}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    shutil.copyfile(ROOT / "LICENSE", folder / LICENSE)
    return find_facts(folder, base)


def module_files(folder: Path) -> list[str]:
    """Names of the files in the folders that `modules.json` names; none, where there is no such file.

    Raises:
        PublishingError: it names code that is not sentence-transformers' own, or places outside.
    """
    if not (folder / ENCODER_MODULES).is_file():
        return []
    modules = json.loads((folder / ENCODER_MODULES).read_text(encoding="utf-8"))
    names = []
    for module in modules:
        path = module["path"]
        if not module["type"].startswith("sentence_transformers.") or len(Path(path).parts) > 1 or path == "..":
            raise PublishingError(
                f"{folder / ENCODER_MODULES} names {module['type']} in {path!r}. Expected modules of "
                "sentence-transformers alone, as `write_folder` writes them."
            )
        if path:
            inside = sorted(
                file.name for file in (folder / path).glob("*") if file.suffix in (".json", ".safetensors")
            )
            names += [f"{path}/{name}" for name in inside]
    return names


def list_files(folder: Path, with_card: bool = True) -> list[str]:
    """
    The names of a page's files, which are all that the folder holds.

    Raises:
        PublishingError: a file is missing, or does not belong there.
    """
    modules = [name for name in MODULES if (folder / name).is_file()]
    if "processing_jina_vlm.py" not in modules:
        raise PublishingError(f"{folder} lacks processing_jina_vlm.py: it is no whole page. Assemble it again.")
    names = {*modules, "processor_config.json", *TEXT, ADAPTER_CONFIG, ADAPTER, *ENCODER, LICENSE}
    names |= {*module_files(folder), *[CARD] * with_card}
    if missing := sorted(name for name in names if not (folder / name).is_file()):
        raise PublishingError(f"{folder} lacks {', '.join(missing)}: it is no whole page. Assemble it again.")
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    if others := sorted(there - names):
        raise PublishingError(f"{folder} holds {', '.join(others)}, which belongs to no page.")
    return sorted(names)


def find_facts(folder: Path, base: Base) -> Facts:
    """Read what the card tells of a folder.

    Raises:
        PublishingError, OSError, ValueError: adapter, projector and base do not belong together.
    """
    from safetensors import safe_open

    from jina_vlm_tools.retrieval.folder import read_folder

    found = read_folder(folder, base=str(base.place))
    config = json.loads((base.place / CONFIG).read_text(encoding="utf-8"))
    hidden = config["text_config"]["hidden_size"]
    settings = json.loads((folder / ENCODER[1]).read_text(encoding="utf-8"))
    if settings.get("model_type") != "MultiVectorEncoder":
        raise PublishingError(
            f"{folder / ENCODER[1]} says {settings.get('model_type')!r}. A page holds a MultiVectorEncoder, which "
            "opens as a SentenceTransformer, too; the other way round the projector would be random."
        )
    with safe_open(folder / ADAPTER, "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return Facts(
        task=found.task,
        parts=tuple(PARTS.get(part, part) for part in found.parts),
        rank=json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))["r"],
        parameters=sum(rows * columns for rows, columns in shapes.values()),
        width=found.projector.out_features,
        hidden=hidden,
        dims=config.get("matryoshka_dimensions") or [hidden],
        max_tiles=found.load_processor().image_processor.max_tiles,
        prompts=settings["prompts"],
    )
