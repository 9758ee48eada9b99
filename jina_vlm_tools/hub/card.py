"""The model page: `model_card.md.jinja`, which holds its text, filled with what the folder and its origin say."""

import csv
import json
import math
import re
import tomllib
from collections import Counter
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import safe_open

from jina_vlm_tools.files import ROOT
from jina_vlm_tools.markdown import table
from jina_vlm_tools.sources import RELEASED

from . import PublishingError
from .check import weight_files
from .origin import Origin


TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
Results = tuple[str, list[EvalResult]]
TAGS = ["jina-vlm", "custom_code"]  # of any weights that this code runs

# The first that fits counts.
PARTS = {
    "Vision tower": "model.vision_model.",
    "Connector": "model.connector.",
    "Embedding": "model.language_model.embed_tokens.",
    "Text model, without embedding": "model.language_model.",
    "`lm_head`": "lm_head.",
}


def write_card(
    folder: Path,
    name: str,
    origin: Origin,
    changes: list[str],
    commit: str | None = None,
    results: Results | None = None,
) -> ModelCard:
    """
    Write the folder's README.md.

    Args:
        name: The id that the page's code loads, owner/name on the Hub.
        changes, commit: See [`assemble.Assembled`].
        results: Of [`read_results`].

    Raises:
        PublishingError: the metadata would not be valid.
    """
    measured, evaluations = results or ("", [])
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        base_model=origin.base_model,
        tags=[*TAGS, *(origin.tags or [])],
        **shared_data(name, origin, evaluations),
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        origin=origin,
        changes=changes,
        commit=commit,
        license_url=license_url(origin),
        dependencies=read_dependencies(),
        measured=measured,
        released=RELEASED,
        config=json.loads((folder / "config.json").read_text(encoding="utf-8")),
        **weights_facts(folder),
    )
    card.save(folder / "README.md")
    check_card(folder / "README.md")
    return card


def shared_data(name: str, origin: Origin, evaluations: list[EvalResult]) -> dict:
    """The metadata of every page of ours: of license, languages and results."""
    return {
        "license": origin.license,
        "license_name": origin.license_name,
        "license_link": origin.license_link,
        "language": origin.languages,
        "model_name": name.split("/")[-1] if evaluations else None,
        "eval_results": evaluations or None,
    }


def read_dependencies() -> list[str]:
    """What users of the code have to install."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]


def weights_facts(folder: Path) -> dict:
    """From the files' headers: `parameters` by part, `dtypes` with their parameters, `files` with their sizes."""
    parameters, dtypes = Counter(dict.fromkeys(PARTS, 0)), Counter()
    files = {name: (folder / name).stat().st_size for name in weight_files(folder)}
    for file in files:
        if not file.endswith(".safetensors"):
            continue
        with safe_open(folder / file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  it is no dictionary
                part = next((part for part, prefix in PARTS.items() if name.startswith(prefix)), None)
                if part is None:
                    raise PublishingError(f"{file} holds {name}, which is no tensor of jina-vlm.")
                tensor = tensors.get_slice(name)
                parameters[part] += math.prod(tensor.get_shape())
                dtypes[tensor.get_dtype()] += math.prod(tensor.get_shape())
    return {"parameters": dict(parameters), "dtypes": dict(dtypes), "files": files}


def license_url(origin: Origin) -> str | None:
    """Find the license's text, which Creative Commons' licenses ask for on every copy."""
    if origin.license.startswith("cc-"):
        name, _, version = origin.license.removeprefix("cc-").rpartition("-")
        return f"https://creativecommons.org/licenses/{name}/{version}/"
    return "https://www.apache.org/licenses/LICENSE-2.0" if origin.license == "apache-2.0" else origin.license_link


def read_results(file: Path) -> Results:
    """
    Results for a page: a table in Markdown with a line that says where it comes from, and entries for its metadata.

    Args:
        file: JSON, {"command": "...", "results": [{...}]}: what printed the results, and the arguments of an
            `EvalResult` of `huggingface_hub` for each of them. Or a table, NAME.csv, which is shown as it is.

    Raises:
        PublishingError: it cannot be read as either.
    """
    return (_read_table(file), []) if file.suffix == ".csv" else _read_evaluations(file)


def _read_evaluations(file: Path) -> tuple[str, list[EvalResult]]:
    expected = (
        '{"command": "...", "results": [{"task_type": ..., "dataset_type": ..., "dataset_name": ..., '
        '"metric_type": ..., "metric_value": ...}]}'
    )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        command, results = content["command"], [EvalResult(**result) for result in content["results"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PublishingError(f"--results {file}: {type(error).__name__}: {error}. Expected {expected}.") from error
    for result in results:
        if isinstance(result.metric_value, bool) or not isinstance(result.metric_value, int | float):
            raise PublishingError(f"--results {file}: `metric_value` is {result.metric_value!r}, expected a number.")
    rows = [
        [
            f"{result.dataset_name}, {result.dataset_split}" if result.dataset_split else result.dataset_name,
            result.metric_name or result.metric_type,
            str(result.metric_value),
        ]
        for result in results
    ]
    return f"By `{command}`:\n\n{table(['Data set', 'Metric', 'Value'], rows, figures=2)}", results


def _read_table(file: Path) -> str:
    try:
        rows = [row for row in csv.reader(file.read_text(encoding="utf-8").splitlines()) if row]
    except (OSError, ValueError, csv.Error) as error:
        raise PublishingError(f"--results {file}: {type(error).__name__}: {error}.") from error
    if len(rows) < 2 or len({len(row) for row in rows}) > 1:
        raise PublishingError(f"--results {file}: not a table. Expected a line of names, then lines of as many cells.")
    head, *rows = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    words = [index for index, column in enumerate(zip(*rows, strict=True)) if not all(map(_is_number, column))]
    return f"As measured, in `{file.name}`:\n\n{table(head, rows, figures=max(words, default=-1) + 1)}"


def _is_number(cell: str) -> bool:
    try:
        float(cell or 0)
        return True
    except ValueError:
        return False


def check_card(file: Path) -> None:
    """
    What can be said of a card's metadata without asking the Hub, which is asked too before anything is sent.

    Raises:
        PublishingError: names what is missing or malformed.
    """
    try:
        data = ModelCard.load(file).data
    except Exception as error:  # YAML's own, and those of `huggingface_hub` for a malformed model-index
        raise PublishingError(f"{file}: its front matter cannot be read: {error}") from error
    faults = [
        f"`{key}` is missing" for key in ("library_name", "pipeline_tag", "license", "tags") if not data.get(key)
    ]
    if data.license and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", str(data.license)):
        faults.append(f"`license` is {data.license!r}, expected an identifier of the Hub such as apache-2.0")
    for key, pattern in (("tags", r"[^\n]+"), ("language", r"[a-z]{2,3}|multilingual|code")):
        for value in data.get(key) or []:
            if not isinstance(value, str) or not re.fullmatch(pattern, value):
                faults.append(f"`{key}` holds {value!r}")
    base_models = (
        data.base_model if isinstance(data.base_model, list) else [data.base_model] if data.base_model else []
    )
    for base_model in base_models:
        try:
            validate_repo_id(base_model)
        except HFValidationError as error:
            faults.append(f"`base_model`: {error}")
    if faults:
        raise PublishingError(f"{file}: {'; '.join(faults)}.")
