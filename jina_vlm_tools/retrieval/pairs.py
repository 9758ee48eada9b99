"""Pairs of queries and documents from data sets, and their batches: `jina-vlm train retrieval_pairs`."""

import dataclasses
import glob
import random
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from torch.utils.data import Dataset

from jina_vlm_tools.training import settings
from jina_vlm_tools.training.layouts import BadSample, load_image
from jina_vlm_tools.training.mixture import BUILDERS
from jina_vlm_tools.training.settings import SettingsError
from jina_vlm_tools.training.stages import LoraSettings, beside

from .inputs import prepare


@dataclasses.dataclass
class PairsSettings:
    """One source: local files (`path`: .parquet, .jsonl, .json; * is understood) or a data set of the Hub (`hub`, with
    its `config` and `split`), and the columns of it. `query` is a text. What it finds is a text, an image, or both
    beside each other. `negatives` are columns of more documents, of the same kind, that it must not find. `score` says
    how alike query and document are, for the loss "cosent". A batch is of one source; `weight` is a source's share of
    them."""

    name: str
    query: str
    path: str | None = None
    hub: str | None = None
    config: str | None = None
    split: str = "train"
    text: str | None = None
    image: str | None = None
    negatives: list[str] = dataclasses.field(default_factory=list)
    score: str | None = None
    weight: float = 1.0


@dataclasses.dataclass
class RetrievalStage:
    """
    A stage of training for retrieval, as a YAML file.

    Args:
        model (`str`): A checkpoint; or a retrieval folder, whose adapter and projector are trained on.
        task (`str`): What the adapter will be for.
        pairs (`list[PairsSettings]`): The data.
        steps, batch_size (`int`): Optimizer steps, and pairs of each process in one. All documents of a process's
            batch are compared with all its queries.
        learning_rate (`float`), warmup_steps (`int`): Of adapter and projector; it falls as a cosine.
        loss (`str`): "joint", InfoNCE of dense and multi-vectors and the distance between the two; or "cosent", which
            orders pairs by their `score`.
        lora (`LoraSettings`, *optional*): Of a new adapter.
        width (`int`): Of a new projector's multi-vectors.
        temperature, agreement (`float`): Of the joint loss, and the weight of the distance in it.
        max_tiles (`int`): Of an image. max_length (`int`): In tokens, of texts, which are cut.
    """

    model: str
    pairs: list[PairsSettings]
    steps: int
    batch_size: int
    learning_rate: float
    task: str = "retrieval"
    loss: Literal["joint", "cosent"] = "joint"
    lora: LoraSettings | None = None
    width: int = 128
    temperature: float = 0.02
    agreement: float = 0.5
    max_tiles: int = 4
    max_length: int = 2048
    warmup_steps: int = 0
    precision: Literal["bf16", "fp32"] = "bf16"
    gradient_checkpointing: bool = True
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    workers: int = 0
    log_every: int = 10
    save_every: int = 500
    seed: int = 0


def read_stage(file: str | Path) -> RetrievalStage:
    """A stage, checked.

    Raises:
        SettingsError: names the file, the key and the value that cannot be.
    """
    stage = settings.read(file, RetrievalStage)
    counts = ("steps", "batch_size", "width", "max_tiles", "max_length", "log_every", "save_every")
    settings.check_least(file, stage, counts, 1)
    settings.check_least(file, stage, ("warmup_steps", "agreement", "weight_decay", "max_grad_norm", "workers"), 0)
    for name in ("learning_rate", "temperature"):
        if not getattr(stage, name) > 0:
            raise SettingsError(file, name, getattr(stage, name), "expected a number above 0.")
    if stage.batch_size < 2:
        raise SettingsError(file, "batch_size", stage.batch_size, "expected 2 or more: pairs are compared.")
    if not stage.pairs:
        raise SettingsError(file, "pairs", [], "expected at least one source.")
    for index, source in enumerate(stage.pairs):
        key = f"pairs[{index}]"
        if (source.path is None) == (source.hub is None):
            raise SettingsError(file, key, source.name, "expected either `path` or `hub`.")
        if source.text is None and source.image is None:
            raise SettingsError(file, key, source.name, "expected `text`, `image` or both: what queries find.")
        if (source.score is not None) != (stage.loss == "cosent"):
            raise SettingsError(
                file, f"{key}.score", source.score, "expected with the loss cosent, and with no other."
            )
        if source.negatives and (stage.loss == "cosent" or None not in (source.text, source.image)):
            raise SettingsError(
                file, f"{key}.negatives", source.negatives, "expected with the loss joint, and documents of one kind."
            )
        if not source.weight > 0:
            raise SettingsError(file, f"{key}.weight", source.weight, "expected a number above 0.")
    return stage


class Pairs(Dataset):
    """The samples of a whole training, batch after batch, each batch of one source.

    Args:
        stage (`RetrievalStage`): With its data.
        file: The stage's YAML file, which names in it are relative to.
        samples (`int`): Of one batch, over all processes.

    Raises:
        SettingsError: a source cannot be opened, lacks a column, or is smaller than a batch.
    """

    def __init__(self, stage: RetrievalStage, file: str | Path, samples: int):
        self.sources = [_open(source, file, f"pairs[{index}]", samples) for index, source in enumerate(stage.pairs)]
        self.settings, self.places = stage.pairs, []
        rng, left = random.Random(stage.seed), [[] for _ in self.sources]
        weights = [source.weight for source in stage.pairs]
        for _ in range(stage.steps):
            number = rng.choices(range(len(self.sources)), weights)[0]
            if len(left[number]) < samples:  # what remains is too few for a batch
                left[number] = rng.sample(range(len(self.sources[number][0])), len(self.sources[number][0]))
            self.places += [(number, left[number].pop()) for _ in range(samples)]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """
        Returns:
            {"query": text, "documents": inputs of `prepare`, its own first, "score": number or None}

        Raises:
            BadSample: a row has no query, no document, or an image that cannot be opened.
        """
        number, row_number = self.places[index]
        (data, folder), source = self.sources[number], self.settings[number]
        row = data[row_number]

        def document(text: str | None, image: str | None) -> dict[str, Any]:
            content = {}
            if text is not None:
                content["text"] = _text(row, text, row_number)
            if image is not None:
                content["image"] = load_image(row[image], folder)
            return content

        own = document(source.text, source.image)
        others = [document(*((name, None) if source.image is None else (None, name))) for name in source.negatives]
        score = None if source.score is None else float(row[source.score])
        return {"query": _text(row, source.query, row_number), "documents": [own, *others], "score": score}


def _open(source: PairsSettings, file: str | Path, key: str, samples: int) -> tuple[datasets.Dataset, str | None]:
    """A source's rows, images undecoded, and the folder that paths of images are relative to."""
    where, folder = ("hub" if source.hub else "path"), None
    try:
        if source.hub:
            data = datasets.load_dataset(source.hub, source.config, split=source.split)
        else:
            files = sorted(glob.glob(str(beside(file, source.path)))) or sorted(glob.glob(source.path))
            if not files or Path(files[0]).suffix not in BUILDERS:
                raise ValueError(f"expected files that end in {', '.join(BUILDERS)}, found {files or 'none'}")
            folder = str(Path(files[0]).parent)
            data = datasets.load_dataset(BUILDERS[Path(files[0]).suffix], data_files=files, split="train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise SettingsError(file, f"{key}.{where}", getattr(source, where), f"it cannot be opened: {error}") from error
    wanted = [source.query, source.text, source.image, source.score, *source.negatives]
    for name in (name for name in wanted if name is not None):
        if name not in data.column_names:
            columns = ", ".join(data.column_names)
            raise SettingsError(file, f"{key}", name, f"no column has this name. There are {columns}.")
        if isinstance(data.features[name], datasets.Image):
            data = data.cast_column(name, datasets.Image(decode=False))
    if len(data) < samples:
        raise SettingsError(
            file, f"{key}.{where}", getattr(source, where), f"it has {len(data)} rows, a batch {samples}."
        )
    return data, folder


def _text(row: dict, name: str, number: int) -> str:
    if not isinstance(row[name], str) or not row[name].strip():
        raise BadSample(f"Row {number} has {row[name]!r} in `{name}`, expected a text.")
    return row[name]


class PairsCollator:
    """Samples of [`Pairs`] to a batch of [`Retriever`]. What is asked twice finds both documents, and a document that
    stands there twice is found twice: neither is taken for wrong."""

    def __init__(self, processor, max_length: int):
        self.processor, self.settings = processor, {"truncation": True, "max_length": max_length}

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        queries = [sample["query"] for sample in samples]
        # Each query's own first, then all that they must not find
        documents = [sample["documents"][0] for sample in samples]
        documents += [other for sample in samples for other in sample["documents"][1:]]
        keys = [(one.get("text"), _pixels(one)) for one in documents]
        by_query: dict[str, set] = {}
        for query, key in zip(queries, keys, strict=False):
            by_query.setdefault(query, set()).add(key)
        batch = {
            "queries": dict(prepare(self.processor, queries, "query", **self.settings)),
            "documents": [dict(prepare(self.processor, documents, "document", **self.settings))],
            "own": torch.arange(len(samples)),
            "relevant": torch.tensor([[key in by_query[query] for key in keys] for query in queries]),
        }
        if samples[0]["score"] is not None:
            batch["truth"] = torch.tensor([sample["score"] for sample in samples])
        return batch


def _pixels(content: dict) -> bytes | None:
    return content["image"].tobytes() if "image" in content else None
