"""Many short trainings of the small model, each of both stages, paired by seed, then asked.

All trainings of a seed have the same new connector to start with, the same number of steps and the same order of
samples: what is left out of one is passed over, and what remains comes as it came before, only sooner. All are asked
the same questions. A training that is done leaves a file of answers, and is not done again.
"""

import argparse
import csv
import dataclasses
import functools
import hashlib
import json
import math
import multiprocessing
import os
import random
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import set_seed
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.trainer_utils import SaveStrategy

from jina_vlm_tools.synthetic.questions import normalize
from jina_vlm_tools.training.collator import JinaVLMCollator
from jina_vlm_tools.training.layouts import to_conversation
from jina_vlm_tools.training.mixture import (
    MixtureSettings,
    Place,
    Plan,
    Source,
    SourceSettings,
)
from jina_vlm_tools.training.settings import SettingsError
from jina_vlm_tools.training.stages import Stage, beside, read_stage
from jina_vlm_tools.training.train import training_arguments
from jina_vlm_tools.training.trainer import JinaVLMTrainer, freeze

from .grid_data import COLUMNS_ASKED, held_out_file
from .grid_model import (
    DEPTH,
    learn,
    load_start,
    make_config,
    make_processor,
    mosaic,
    mosaics_to_see,
    scale_connector,
)
from .precision import ATTENTION, reduced_precision
from .seeing import IGNORED, match_sizes
from .small_model import make_model


RECIPES, RESULTS = (Path(__file__).parent / name for name in ("recipes", "results"))
MEAN = "all"
CATEGORIES = ("task", "domain", "modality", "language")
MAX_NEW_TOKENS = 12
MOSAICS = 640  # by which connectors are introduced
# Two-sided quantiles of Student's t, 95 %, by degrees of freedom
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclasses.dataclass(frozen=True)
class Training:
    """One cell of a grid.

    Args:
        seed (`int`): Of the connector and of the order of samples.
        left_out (`tuple[str, str]`, *optional*): A category and its value, such as ("domain", "charts").
        text_share (`float`, *optional*): Of the samples, in the place of the mixtures' own.
        feature_layers (`tuple[int]`, *optional*): Blocks of the tower that the connector sees.
        pooling_size (`int`): Side of a pooled window, 1 for no pooling.
        connector (`type`, *optional*): A class in the place of the model's connector.
    """

    seed: int
    left_out: tuple[str, str] | None = None
    text_share: float | None = None
    feature_layers: tuple[int, ...] | None = None
    pooling_size: int = 2
    connector: type | None = None

    @property
    def name(self) -> str:
        """What its file is called by: all that differs from the defaults."""
        parts = [f"without {self.left_out[0]} {self.left_out[1]}"] if self.left_out else []
        if self.text_share is not None:
            parts.append(f"text {self.text_share:g}")
        if self.feature_layers:
            parts.append("layers " + " ".join(map(str, self.feature_layers)))
        if self.pooling_size != 2:
            parts.append(f"pooling {self.pooling_size}")
        if self.connector:
            parts.append(self.connector.__name__)
        return f"{', '.join(parts) or 'base'}, seed {self.seed}".replace(", ", "__").replace(" ", "_")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all trainings of a grid share: the stages' recipes, where their models start, the questions, and steps of
    a new connector's introduction."""

    stages: tuple[Path, ...]
    start: Path
    questions: Path
    introduction: int = 70  # steps


# ---------------------------------------------------------------------------------------------------------------------
# Order
# ---------------------------------------------------------------------------------------------------------------------


class Order(Plan):
    """
    The samples of a stage one by one, without the sorting by size that longer runs gain from.

    Whether the next sample is a text, which source of images and which of texts comes next are drawn apart. So images
    keep their order whatever the share of texts is, and sources that are left out are passed over.

    Args:
        text_share (`float`): Of the samples.
        left_out (`frozenset[int]`): Numbers of the sources that are passed over.
        kwargs: Of [`Plan`].
    """

    def __init__(self, *args, text_share: float, left_out: frozenset[int], **kwargs):
        super().__init__(*args, **kwargs)
        self.text_share, self.left_out = text_share, left_out

    def samples(self) -> Iterator[Place]:
        """Without end."""
        draws = [source.places(self.seed) for source in self.sources]
        numbers = {True: [], False: []}  # of sources, by whether they are texts
        for number, source in enumerate(self.sources):
            numbers[source.settings.modality == "text"].append(number)
        weights = {kind: [self.weights[number] for number in numbers[kind]] for kind in numbers}
        rngs = {kind: random.Random(f"{self.seed}, sources, {kind}") for kind in numbers}
        modality = random.Random(f"{self.seed}, modality")
        while True:
            kind = modality.random() < self.text_share
            (number,) = rngs[kind].choices(numbers[kind], weights[kind])
            if number not in self.left_out:
                yield next(draws[number])

    def __iter__(self) -> Iterator[list[Place]]:
        samples = self.samples()
        for _ in range(len(self)):
            yield list(islice(samples, self.batch_size))


def sources_left_out(mixture: MixtureSettings, left_out: tuple[str, str] | None) -> frozenset[int]:
    """Numbers of the sources of a category's value. A stage may have none.

    Raises:
        ValueError: nothing would remain.
    """
    if left_out is None:
        return frozenset()
    category, value = left_out
    numbers = frozenset(number for number, source in enumerate(mixture.sources) if getattr(source, category) == value)
    if len(numbers) == len(mixture.sources):
        raise ValueError(f"Without {category} {value!r} nothing of a stage remains. Leave out another.")
    return numbers


# ---------------------------------------------------------------------------------------------------------------------
# Samples, encoded once
# ---------------------------------------------------------------------------------------------------------------------


class Seen(nn.Module):
    """In the place of a tower that stays as it is: given are, in the place of pixels, the outputs of all of its blocks
    [tiles, blocks, patches, width], of which it takes those that the connector sees."""

    def __init__(self, feature_layers: Sequence[int]):
        super().__init__()
        self.feature_layers = list(feature_layers)

    def forward(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        features = pixel_values[:, self.feature_layers].transpose(1, 2).flatten(2)
        return BaseModelOutputWithPooling(last_hidden_state=features)


@functools.cache
def open_tower(start: Path):
    """The tower, all of whose blocks' outputs are concatenated."""
    config = make_config(make_processor().tokenizer, range(DEPTH - 1, -1, -1))
    model = make_model(config)
    load_start(model, start)
    return model.model.vision_model


@torch.no_grad()
def see(batch: dict[str, torch.Tensor], start: Path) -> dict[str, torch.Tensor]:
    """A batch with what the tower makes of its tiles, kept in bfloat16. Pages are of one tile, which is their
    thumbnail once more: it is seen once."""
    if "pixel_values" not in batch:
        return batch
    with reduced_precision():
        features = open_tower(start)(batch["pixel_values"][1::2]).last_hidden_state
    seen = features.unflatten(2, (DEPTH, -1)).transpose(1, 2).flip(1).bfloat16()
    return batch | {"pixel_values": seen}


def twice(seen: torch.Tensor) -> torch.Tensor:
    """[pages, ...] to [tiles, ...]: thumbnail and tile."""
    return seen.repeat_interleave(2, dim=0).float()


class EncodedSource:
    """A source whose samples are encoded already, by their places' indices."""

    def __init__(self, source: Source, samples: dict[int, dict[str, torch.Tensor]]):
        self.settings, self.places, self.samples = source.settings, source.places, samples

    def sample(self, place: Place) -> dict[str, torch.Tensor]:
        return self.samples[place.index]


def encode(source: Source, start: Path) -> dict[int, dict[str, torch.Tensor]]:
    """All samples of a source, as their batches of one."""
    samples = {}
    for measured in source.measures:
        place = Place(source.number, *measured)
        samples[place.index] = see(source.collator([source.sample(place)]), start)
    return samples


def stack(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Encoded samples to a batch, padded on the right."""
    batch = {}
    for name, filler in (("input_ids", 0), ("attention_mask", 0), ("labels", IGNORED)):
        batch[name] = pad_sequence([sample[name][0] for sample in samples], True, filler)
    seen = [sample for sample in samples if "pixel_values" in sample]
    if seen:
        batch["pixel_values"] = twice(torch.cat([sample["pixel_values"] for sample in seen]))
        batch["tile_positions"] = torch.cat([sample["tile_positions"] for sample in seen])
    return batch


@functools.cache
def open_stage(file: Path, start: Path, pooling_size: int) -> tuple[Stage, MixtureSettings, list[EncodedSource]]:
    """A stage, its mixture and its sources. To encode a sample takes as long as to train on it: so it is done once,
    into a file beside the mixture's.

    Raises:
        SettingsError: the stage trains the tower.
    """
    stage, mixture = read_stage(file)
    if stage.encoder.learning_rate:
        raise SettingsError(
            file, "encoder.learning_rate", stage.encoder.learning_rate, "expected 0: pages are seen once."
        )
    processor, mixture_file = make_processor(pooling_size), beside(file, stage.mixture)
    collator = JinaVLMCollator(processor)
    sources = [
        Source(source, number, mixture_file, collator, mixture.max_bad_share)
        for number, source in enumerate(mixture.sources)
    ]
    depends = [processor.tokenizer.backend_tokenizer.to_str(), processor.chat_template, pooling_size]
    depends += [mixture_file.parent.joinpath(source.path).read_bytes() for source in mixture.sources]
    key = hashlib.sha256(repr([*depends, (start / "tower.safetensors").read_bytes()]).encode()).hexdigest()[:16]
    encoded_file = mixture_file.parent / f"encoded-{key}.safetensors"
    if not encoded_file.is_file():
        partial = encoded_file.with_suffix(f".{os.getpid()}")  # two trainings may find it missing at once
        tensors = {
            f"{source.number}.{index}.{name}": tensor.contiguous()
            for source in sources
            for index, sample in encode(source, start).items()
            for name, tensor in sample.items()
        }
        save_file(tensors, partial)
        partial.replace(encoded_file)
    samples = [defaultdict(dict) for _ in sources]
    for name, tensor in load_file(encoded_file).items():
        number, index, part = name.split(".")
        samples[int(number)][int(index)][part] = tensor
    return stage, mixture, [EncodedSource(*both) for both in zip(sources, samples, strict=True)]


@functools.cache
def open_questions(
    folder: Path, start: Path, pooling_size: int
) -> dict[str, tuple[dict[str, torch.Tensor], list[str]]]:
    """By column: the questions as one batch, and the words of their answers."""
    processor, columns = make_processor(pooling_size), {}
    for column in COLUMNS_ASKED:
        file = held_out_file(folder, column)
        settings = SourceSettings(column, 1.0, "", "", "image-text", "", path=str(file.resolve()))
        rows = Source(settings, 0, file, JinaVLMCollator(processor), max_bad_share=0.0)
        chats = [to_conversation(rows.sample(Place(0, *measured))) for measured in rows.measures]
        expected = [chat[-1]["content"][0]["text"] for chat in chats]
        inputs = processor.apply_chat_template(
            [chat[:-1] for chat in chats],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            padding=True,
        )
        columns[column] = (see(dict(inputs), start), [normalize(text) for text in expected])
    return columns


# ---------------------------------------------------------------------------------------------------------------------
# One training
# ---------------------------------------------------------------------------------------------------------------------


def make_start(training: Training, start: Path):
    """Tower and decoder as they were taught, and a new connector whose tokens are as large as words."""
    set_seed(training.seed)
    tokenizer = make_processor(training.pooling_size).tokenizer
    config = make_config(tokenizer, training.feature_layers, training.pooling_size)
    model, shown = make_model(config), mosaics_to_see()
    load_start(model, start)
    scale_connector(model, shown)
    if training.connector:
        connector = training.connector(config)
        connector.load_state_dict(model.model.connector.state_dict(), strict=False)  # what both have starts alike
        model.model.connector = connector
    match_sizes(model, shown)
    model.set_attn_implementation(ATTENTION)
    return model


def make_order(training: Training, stage: Stage, mixture: MixtureSettings, sources: list[Source]) -> Order:
    texts = sum(source.weight for source in mixture.sources if source.modality == "text")
    return Order(
        sources,
        [source.weight for source in mixture.sources],
        stage.steps,
        stage.global_batch_size,
        stage.batch_size,
        training.seed,
        text_share=texts if training.text_share is None else training.text_share,
        left_out=sources_left_out(mixture, training.left_out),
    )


@functools.cache
def open_mosaics(start: Path, pooling_size: int) -> list[dict[str, torch.Tensor]]:
    """Mosaics, encoded."""
    rng, collator = random.Random("introduction"), JinaVLMCollator(make_processor(pooling_size))
    return [see(collator([mosaic(rng)]), start) for _ in range(MOSAICS)]


def introduce(model, mosaics: list[dict[str, torch.Tensor]], seed: int, steps: int) -> None:
    """Let a new connector bring tower and decoder together, by mosaics in any order, while these stay as they are."""
    model.train().requires_grad_(False)
    model.model.connector.requires_grad_(True)
    order = random.Random(f"{seed}, mosaics")

    def loss_of(step: int) -> torch.Tensor:
        return model(**stack(order.sample(mosaics, 16))).loss

    learn(nn.ModuleDict({"connector": model.model.connector}), steps, 8e-3, loss_of, "connector")
    model.requires_grad_(True)


def introduced(training: Training, setting: Setting, folder: Path):
    """The model with its new connector introduced, which all trainings of a seed and variant share as a file."""
    model = make_start(training, setting.start)
    model.model.vision_model = Seen(model.config.vision_feature_layers)
    shared = dataclasses.replace(training, left_out=None, text_share=None)
    file = folder / "connectors" / f"{shared.name}.safetensors"
    if not file.is_file():
        mosaics = open_mosaics(setting.start, training.pooling_size)
        introduce(model, mosaics, training.seed, setting.introduction)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")  # two trainings may find it missing at once
        save_file(model.model.connector.state_dict(), partial)
        partial.replace(file)
    model.model.connector.load_state_dict(load_file(file))
    return model


class GridTrainer(JinaVLMTrainer):
    """The trainer with the same loss, for which only those logits are computed that it is about."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")[:, 1:]
        kept = labels != IGNORED
        with self.accelerator.autocast():
            states = model.model(**inputs).last_hidden_state[:, :-1]
            return F.cross_entropy(model.lm_head(states[kept]).float(), labels[kept])


def train(model, training: Training, setting: Setting, output: Path) -> list[float]:
    """Both stages, one after the other. Return each stage's last loss."""
    losses = []
    for file in setting.stages:
        stage, mixture, sources = open_stage(file, setting.start, training.pooling_size)
        stage = dataclasses.replace(stage, seed=training.seed)
        arguments = training_arguments(stage, output / "trainer", processes=1)
        arguments.save_strategy, arguments.report_to, arguments.disable_tqdm = SaveStrategy.NO, [], True
        freeze(model, stage.parts)
        trainer = GridTrainer(
            model.train(),
            arguments,
            stack,
            plan=make_order(training, stage, mixture, sources),
            parts=stage.parts,
            muon=stage.optimizer == "muon",
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1])
    return losses


@torch.inference_mode()
def ask(model, setting: Setting, pooling_size: int) -> dict[str, list[bool]]:
    """By column: which questions are answered rightly, greedily."""
    model.eval()
    tokenizer, right = make_processor(pooling_size).tokenizer, {}
    for column, (inputs, expected) in open_questions(setting.questions, setting.start, pooling_size).items():
        with reduced_precision():
            if "pixel_values" in inputs:
                inputs = inputs | {"pixel_values": twice(inputs["pixel_values"])}
            ids = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        given = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right[column] = [normalize(text) == words for text, words in zip(given, expected, strict=True)]
    return right


def train_and_ask(training: Training, setting: Setting, output: Path) -> None:
    """Write the answers' file of a training."""
    torch.set_num_threads(1)
    questions = open_questions(setting.questions, setting.start, training.pooling_size)
    for file in setting.stages:
        open_stage(file, setting.start, training.pooling_size)
    model = introduced(training, setting, output)
    started = time.process_time()
    losses = train(model, training, setting, output)
    seconds = time.process_time() - started
    tokens = max(
        (inputs["input_ids"] == model.config.image_token_id).sum(dim=1).max().item()
        for inputs, _ in questions.values()
    )
    result = {
        "right": ask(model, setting, training.pooling_size),
        "losses": losses,
        "image_tokens": tokens,
        "cpu_seconds": round(seconds, 1),
    }
    file = answers_file(training, output)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(result) + "\n", encoding="utf-8")
    partial.replace(file)


def answers_file(training: Training, output: Path) -> Path:
    return output / f"{training.name}.json"


# ---------------------------------------------------------------------------------------------------------------------
# All of them
# ---------------------------------------------------------------------------------------------------------------------


def run(trainings: list[Training], setting: Setting, output: Path, workers: int) -> dict[Training, dict]:
    """Do what is not done yet, `workers` at a time with one thread each, seed by seed; return all answers' files."""
    output.mkdir(parents=True, exist_ok=True)
    mixtures = [read_stage(file)[1] for file in setting.stages]
    for training in trainings:
        if training.left_out and not any(sources_left_out(mixture, training.left_out) for mixture in mixtures):
            category, value = training.left_out
            raise ValueError(f"No source of either stage has {category} {value!r}.")
    missing = [training for training in trainings if not answers_file(training, output).is_file()]
    missing.sort(key=lambda training: training.seed)
    started = time.perf_counter()
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = [pool.submit(train_and_ask, training, setting, output) for training in missing]
        for number, (training, done) in enumerate(zip(missing, waiting, strict=True), start=1):
            try:
                done.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
            minutes = (time.perf_counter() - started) / 60
            print(f"{number} of {len(missing)}: {training.name}, {minutes:.0f} min", flush=True)
    return {training: json.loads(answers_file(training, output).read_text(encoding="utf-8")) for training in trainings}


def accuracy(result: dict) -> dict[str, float]:
    """Per cent right, by column."""
    return {column: 100 * sum(right) / len(right) for column, right in result["right"].items()}


def interval(differences: list[float]) -> tuple[float, float, float]:
    """Mean of paired differences, and the ends of its interval of 95 %, by Student's t."""
    mean = statistics.mean(differences)
    half = STUDENT[len(differences) - 1] * statistics.stdev(differences) / math.sqrt(len(differences))
    return mean, mean - half, mean + half


def chance(setting: Setting) -> dict[str, float]:
    """Per cent right of always giving the most frequent answer, by column."""
    questions = open_questions(setting.questions, setting.start, 2)
    return {column: 100 * max(Counter(answers).values()) / len(answers) for column, (_, answers) in questions.items()}


def changes(base: list[dict], others: list[dict], chances: dict[str, float]) -> list[dict]:
    """
    Args:
        base, others (`list[dict]`): Answers' files of two kinds of trainings, by the same seeds in the same order.
        chances (`dict[str, float]`): What [`chance`] gives.

    Returns:
        `list[dict]`: Per column, and for their mean: per cent right of chance, of the base and of the others, and how
        it changes, in points.
    """
    chances = _with_mean(chances)
    before, after = ([_with_mean(accuracy(result)) for result in results] for results in (base, others))
    rows = []
    for column in before[0]:
        differences = [new[column] - old[column] for old, new in zip(before, after, strict=True)]
        mean, low, high = interval(differences)
        rows.append(
            {
                "column": column,
                "chance": round(chances[column], 1),
                "base": round(statistics.mean(one[column] for one in before), 1),
                "accuracy": round(statistics.mean(one[column] for one in after), 1),
                "change": round(mean, 1),
                "low": round(low, 1),
                "high": round(high, 1),
                "per_seed": " ".join(f"{difference:+.1f}" for difference in differences),
            }
        )
    return rows


def _with_mean(by_column: dict[str, float]) -> dict[str, float]:
    return by_column | {MEAN: statistics.mean(by_column.values())}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What both grids are told."""
    data = Path("runs/grid")
    parser.add_argument(
        "--stages", type=Path, nargs=2, default=[RECIPES / "grid_stage1.yaml", RECIPES / "grid_stage2.yaml"]
    )
    parser.add_argument("--start", type=Path, default=data / "start", help="what `experiments.grid_model` taught")
    parser.add_argument("--questions", type=Path, default=data / "data" / "held_out")
    parser.add_argument("--output", type=Path, default=data / "answers", help="where answers are kept, and found")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of what is made of them")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="2 to 10 of them (default: 0 1 2)")
    parser.add_argument(
        "--workers", type=int, default=2, help="trainings at a time, of one thread each (default: %(default)s)"
    )


def check_arguments(args: argparse.Namespace) -> None:
    """
    Raises:
        SystemExit: they cannot be.
    """
    if len(set(args.seeds)) != len(args.seeds) or not 2 <= len(args.seeds) <= 1 + max(STUDENT):
        sys.exit(f"--seeds: expected 2 to {1 + max(STUDENT)} different numbers, got {args.seeds}.")
    if args.workers < 1:
        sys.exit(f"--workers: expected at least 1, got {args.workers}.")
    for name in ("tower", "decoder"):
        if not (args.start / f"{name}.safetensors").is_file():
            sys.exit(f"--start {args.start}: it has no {name}. Run `python -m experiments.grid_model` first.")


def write_csv(rows: list[dict], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
