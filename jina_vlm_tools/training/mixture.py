"""What a stage is trained on: sources with weights, from a YAML file, and the order in which their samples come.

The order is a plan that every process makes for itself from the seed: batches of places in the sources, without
images. Of these each process loads its own. So nothing is sent from process to process, no batch is ever cut up, and a
run that goes on in the middle skips to it without loading what it skips.
"""

import dataclasses
import glob
import hashlib
import json
import logging
import random
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
import pyarrow as pa
from accelerate import PartialState
from datasets.fingerprint import Hasher
from torch.utils.data import Dataset, Sampler

from . import settings
from .layouts import LAYOUTS, BadSample, layout_of, to_conversation
from .settings import SettingsError


logger = logging.getLogger(__name__)

BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}
WINDOW = 16  # global batches whose samples are sorted together
MEASURES = datasets.Features(
    tokens=datasets.Value("int64"), tiles=datasets.Value("int64"), problem=datasets.Value("string")
)
LOGGED = 20  # bad samples of a source, one by one
ENOUGH = 100  # samples of a stream before its share of bad ones is judged


@dataclasses.dataclass
class SourceSettings:
    """One source. `weight` is its share of all samples. `path` names local files (.parquet, .jsonl, .json; * is
    understood), relative to the YAML file; or `hub` a data set of the Hub, with its `config` and `split`. `streaming`
    reads it front to back and again, rather than at random."""

    name: str
    weight: float
    task: str
    domain: str
    modality: Literal["image-text", "text"]
    language: str
    path: str | None = None
    hub: str | None = None
    config: str | None = None
    split: str = "train"
    streaming: bool = False


@dataclasses.dataclass
class MixtureSettings:
    """`text_share`: what the weights of all sources of modality text must add up to. `single_source_share`: of the
    steps, at the start, whose batches are of one source each; the rest mix all. `max_bad_share`: of a source's samples
    that may be bad."""

    sources: list[SourceSettings]
    text_share: float | None = None
    single_source_share: float = 0.0
    max_bad_share: float = 0.01


def read_mixture(file: str | Path) -> MixtureSettings:
    """
    Raises:
        SettingsError: a key, a value, a weight or a source that cannot be, by name.
    """
    mixture = settings.read(file, MixtureSettings)
    if not mixture.sources:
        raise SettingsError(file, "sources", [], "expected at least one.")
    names = Counter(source.name for source in mixture.sources)
    for index, source in enumerate(mixture.sources):
        key = f"sources[{index}]"
        if names[source.name] > 1:
            raise SettingsError(file, f"{key}.name", source.name, "two sources have this name.")
        if not 0 < source.weight <= 1:
            raise SettingsError(file, f"{key}.weight", source.weight, "expected a share, above 0 and up to 1.")
        if (source.path is None) == (source.hub is None):
            raise SettingsError(file, key, source.name, "expected either `path` or `hub`.")
        if source.path is not None:
            _files(source, file, key)
            for name in ("config", "split"):
                if getattr(source, name) != getattr(SourceSettings, name):
                    raise SettingsError(
                        file, f"{key}.{name}", getattr(source, name), "it is for sources of the Hub, not for files."
                    )
    for name in ("text_share", "single_source_share", "max_bad_share"):
        value = getattr(mixture, name)
        if value is not None and not 0 <= value <= 1:
            raise SettingsError(file, name, value, "expected a share, from 0 to 1.")
    total = sum(source.weight for source in mixture.sources)
    if abs(total - 1) > 1e-6:
        raise SettingsError(file, "sources[].weight", round(total, 6), "the weights must add up to 1.")
    texts = sum(source.weight for source in mixture.sources if source.modality == "text")
    if mixture.text_share is not None and abs(texts - mixture.text_share) > 1e-6:
        raise SettingsError(
            file, "text_share", mixture.text_share, f"the weights of the sources of modality text add up to {texts:g}."
        )
    return mixture


def shares(mixture: MixtureSettings) -> dict[str, dict[str, float]]:
    """What share of the samples each task, domain, modality and language has."""
    result = {}
    for category in ("task", "domain", "modality", "language"):
        counted = Counter()
        for source in mixture.sources:
            counted[getattr(source, category)] += source.weight
        result[category] = {name: round(share, 6) for name, share in counted.most_common()}
    return result


def _files(source: SourceSettings, file: str | Path, key: str) -> list[str]:
    # beside the file, else in the working directory
    patterns = (str(Path(file).parent / source.path), source.path)
    found = next((sorted(names) for pattern in patterns if (names := glob.glob(pattern, recursive=True))), [])
    if not found:
        raise SettingsError(file, f"{key}.path", source.path, "no file has this name.")
    endings = {Path(name).suffix for name in found}
    if len(endings) > 1 or not endings <= set(BUILDERS):
        raise SettingsError(file, f"{key}.path", source.path, f"expected files of one kind, of {', '.join(BUILDERS)}.")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Sources
# ---------------------------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """A sample's place: its source and its index there, what it becomes, and for streams the row itself."""

    source: int
    index: int
    tokens: int
    tiles: int
    row: dict | None = None


class TooManyBadSamples(RuntimeError):
    """More of a source's samples are bad than is allowed."""


class Source:
    """
    One source's samples, the good ones of them. All of a local one are measured once, which `datasets` remembers on
    disk; those of a stream as they come.

    Args:
        source (`SourceSettings`): Where it is.
        number (`int`): Of this source in the mixture.
        file (`str` or `Path`): The mixture's YAML file.
        collator: Its `measure` gives (tokens, tiles) of a row or raises [`BadSample`].
        max_bad_share (`float`): Above it, the run stops.
        limit (`int`, *optional*): Take the first so many samples alone.
        workers (`int`): Processes that measure a local source, 0 for this one.
        key (`str`, *optional*): Where the source stands in the file, for errors.

    Raises:
        SettingsError: it cannot be opened, or has the columns of no layout.
        TooManyBadSamples: of a local source.
    """

    def __init__(
        self,
        source: SourceSettings,
        number: int,
        file: str | Path,
        collator,
        max_bad_share: float,
        limit: int | None = None,
        workers: int = 0,
        key: str | None = None,
    ):
        self.settings, self.number, self.collator, self.max_bad_share = source, number, collator, max_bad_share
        key = key or f"sources[{number}]"
        where = "hub" if source.hub else "path"
        self.folder = "."
        try:
            if source.hub:
                self.data = datasets.load_dataset(
                    source.hub, source.config, split=source.split, streaming=source.streaming
                )
            else:
                files = _files(source, file, key)
                folders = {str(Path(name).parent) for name in files}
                self.folder = folders.pop() if len(folders) == 1 else None  # paths of images are relative to it
                self.data = datasets.load_dataset(
                    BUILDERS[Path(files[0]).suffix], data_files=files, split="train", streaming=source.streaming
                )
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise SettingsError(
                file, f"{key}.{where}", getattr(source, where), f"it cannot be opened: {error}"
            ) from error
        if limit is not None:
            self.data = self.data.take(limit)
        columns = self.data.column_names
        if layout_of(columns) is None:
            raise SettingsError(
                file,
                f"{key}.{where}",
                getattr(source, where),
                f"it has the columns {', '.join(columns)}, but none of {', '.join(LAYOUTS)}.",
            )
        self.data = self.data.with_format("arrow")  # whose images are files, not decoded
        self.bad, self.seen = Counter(), 0
        self.measures = None if source.streaming else self._measure_all(workers)

    def __len__(self) -> int:
        return len(self.measures)

    def _measure_all(self, workers: int) -> list[tuple[int, int, int]]:
        """(index, tokens, tiles) of each good sample."""
        fingerprint = Hasher.hash(
            [self.data._fingerprint, self.folder, self.settings.modality, _fingerprint(self.collator)]
        )
        with PartialState().main_process_first():
            measured = self.data.map(
                self._measure_table,
                batched=True,
                batch_size=64,
                num_proc=min(workers, len(self.data)) or None,
                remove_columns=self.data.column_names,
                features=MEASURES,
                new_fingerprint=fingerprint,
                desc=f"Measuring {self.settings.name}",
            ).with_format(None)
        measures = []
        rows = zip(*(measured[name] for name in MEASURES), strict=True)
        for index, (tokens, tiles, problem) in enumerate(rows):
            self.seen += 1
            if problem is not None:  # what was measured earlier is kept; its image may have come since
                tokens, tiles, problem = self._measure(read_rows(self.data[index])[0])
            if problem is None:
                measures.append((index, tokens, tiles))
            else:
                self._skip(index, problem)
        self._judge()
        return measures

    def _measure_table(self, table) -> dict[str, list]:
        columns = zip(*map(self._measure, read_rows(table)), strict=True)
        return dict(zip(MEASURES, map(list, columns), strict=True))

    def _measure(self, row: dict) -> tuple[int, int, str | None]:
        try:
            tokens, tiles = self.collator.measure({"messages": to_conversation(row, self.folder)})
            if tiles and self.settings.modality == "text":
                raise BadSample("It has images, but its source is of modality text.")
        except BadSample as error:
            return 0, 0, str(error)
        return tokens, tiles, None

    def _skip(self, index: int, problem: str) -> None:
        self.bad[problem] += 1
        if self.bad.total() <= LOGGED:
            logger.warning("%s: sample %d is skipped: %s", self.settings.name, index, problem)

    def _judge(self) -> None:
        if self.bad.total() > self.max_bad_share * self.seen or self.bad.total() == self.seen:
            raise TooManyBadSamples(
                f"More than {self.max_bad_share:.1%} of the samples are bad (`max_bad_share`).\n{self.report()}"
            )

    def report(self) -> str:
        """How many samples were bad, and why."""
        lines = [f"{self.settings.name}: {self.bad.total():,} of {self.seen:,} samples are bad"]
        lines += [f"    {number:,} x {problem}" for problem, number in self.bad.most_common(10)]
        return "\n".join(lines)

    def places(self, seed: int) -> Iterator[Place]:
        """Places without end: all samples in random order, then all in another one. A stream's always in its own."""
        for epoch in range(2**63):
            if self.measures is None:
                yield from self._stream(first=epoch == 0)
                continue
            order = list(range(len(self.measures)))
            _random(seed, self.settings.name, epoch).shuffle(order)
            for position in order:
                yield Place(self.number, *self.measures[position])

    def _stream(self, first: bool) -> Iterator[Place]:
        good = 0
        for index, table in enumerate(self.data):
            (row,) = read_rows(table)
            tokens, tiles, problem = self._measure(row)
            if problem is None:
                good += 1
                yield Place(self.number, index, tokens, tiles, row)
            elif first:
                self._skip(index, problem)
            if first:
                self.seen += 1
                if self.seen >= ENOUGH:
                    self._judge()
        if first:
            self._judge()
        if not good:
            raise TooManyBadSamples(self.report())

    def sample(self, place: Place) -> dict[str, list[dict]]:
        """The place's row as a chat, its images opened."""
        row = place.row or read_rows(self.data[place.index])[0]
        return {"messages": to_conversation(row, self.folder)}


def read_rows(table: pa.Table) -> list[dict]:
    """Rows of a table. `datasets` keeps columns of mixed types as JSON: chats whose contents are texts and lists."""
    rows = table.to_pylist()
    return [{field.name: _decode(row[field.name], field.type) for field in table.schema} for row in rows]


def _decode(value: Any, kind: pa.DataType) -> Any:
    if value is None:
        return None
    if isinstance(kind, pa.JsonType):
        return json.loads(value)
    if isinstance(kind, (pa.ListType, pa.LargeListType)):
        return [_decode(item, kind.value_type) for item in value]
    if isinstance(kind, pa.StructType):
        return {field.name: _decode(value[field.name], field.type) for field in kind}
    return value


def _fingerprint(collator) -> str:
    """Of what the measures depend on."""
    processor = collator.processor
    return Hasher.hash(
        [
            processor.tokenizer.backend_tokenizer.to_str(),
            processor.chat_template,
            processor.image_processor.to_json_string(),
            collator.max_length,
            collator.checks,
        ]
    )


def _random(*key: Any) -> random.Random:
    """The same for the same key, in every process and version of Python."""
    return random.Random(hashlib.sha256(repr(key).encode()).digest())


# ---------------------------------------------------------------------------------------------------------------------
# The plan
# ---------------------------------------------------------------------------------------------------------------------


class Plan(Sampler):
    """
    The batches of a stage in their order, as lists of [`Place`]: a batch sampler. `global_batch_size` / `batch_size`
    batches in a row make one step, whatever number of processes they are dealt to.

    Samples are drawn by the weights of their sources; those of `WINDOW` steps are sorted by tiles and by tokens, so
    that batches are of samples alike, and the batches shuffled. Within a step they come by size: processes that
    compute side by side get batches alike.

    Args:
        sources (`list[Source]`), weights (`list[float]`): What to draw from.
        steps (`int`): Optimizer steps.
        single_source_share (`float`): Of the steps, at the start, that are of one source each.
    """

    def __init__(
        self,
        sources: list[Source],
        weights: list[float],
        steps: int,
        global_batch_size: int,
        batch_size: int,
        seed: int,
        single_source_share: float = 0.0,
    ):
        self.sources, self.weights, self.steps, self.seed = sources, weights, steps, seed
        self.global_batch_size, self.batch_size, self.drop_last = global_batch_size, batch_size, True
        self.single_steps = round(single_source_share * steps)

    def __len__(self) -> int:
        return self.steps * self.global_batch_size // self.batch_size

    def __iter__(self) -> Iterator[list[Place]]:
        draws = [source.places(self.seed) for source in self.sources]
        choice = _random(self.seed, "source")

        def mixed() -> Iterator[Place]:
            while True:
                yield next(choice.choices(draws, self.weights)[0])

        single = [self._grouped(draw, _random(self.seed, "group", number)) for number, draw in enumerate(draws)]
        for _ in range(self.single_steps):
            yield from next(choice.choices(single, self.weights)[0])
        yield from _flat(islice(self._grouped(mixed(), _random(self.seed, "group")), self.steps - self.single_steps))

    def _grouped(self, places: Iterator[Place], rng: random.Random) -> Iterator[list[list[Place]]]:
        """Steps, each a list of batches."""
        per_step = self.global_batch_size // self.batch_size
        while True:
            window = list(islice(places, WINDOW * self.global_batch_size))
            rng.shuffle(window)  # equals come in any order
            # Up and down by turns, so that the last of one number of tiles are as long as the first of the next.
            window.sort(key=lambda place: (place.tiles, place.tokens if place.tiles % 2 else -place.tokens))
            batches = [window[start : start + self.batch_size] for start in range(0, len(window), self.batch_size)]
            rng.shuffle(batches)
            for start in range(0, len(batches), per_step):
                yield sorted(batches[start : start + per_step], key=_cost)


def _cost(batch: list[Place]) -> tuple[int, int]:
    return sum(place.tiles for place in batch), max(place.tokens for place in batch)


def _flat(steps: Iterator[list[list[Place]]]) -> Iterator[list[Place]]:
    for step in steps:
        yield from step


def padding_share(batches: Iterator[list[Place]]) -> float:
    """What share of all tokens is padding."""
    used = total = 0
    for batch in batches:
        used += sum(place.tokens for place in batch)
        total += len(batch) * max(place.tokens for place in batch)
    return 1 - used / total


class MixtureDataset(Dataset):
    """Places to samples, in whatever process loads them. `length` is the number of samples of the whole stage."""

    def __init__(self, sources: list[Source], length: int):
        self.sources, self.length = sources, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, place: Place) -> dict[str, list[dict]]:
        return self.sources[place.source].sample(place)
