"""Answer a question about every image of a folder, parquet files or a data set, on one machine or many.

The output is a folder of parts, each a fixed range of the source's rows, however many processes work on it. A part
appears under its name once it is whole and on disk. The same command, run again after whatever stopped it and with any
number of processes, answers the parts that are missing: in the end each row of the source stands in exactly one part.
To have a part answered again, delete it.

An image that cannot be used becomes a row with an `error` and no answer; anything else that goes wrong stops the run.
Rows are `row` (its number in the source), `id`, `question`, `answer`, `error` and `answer_tokens`, the number of
tokens generated: as many as `--max-new-tokens` where the answer was cut off. Each process decodes images in
OMP_NUM_THREADS threads while its model answers; launchers set it to 1 where you do not.

`datasets` reads the sources and `accelerate` starts the processes: what users of the library's Trainer have, and what
runs under any launcher of a cluster without a service of its own. On several machines all see source and output at the
same paths.
"""

import argparse
import fcntl
import hashlib
import json
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import timedelta
from glob import glob
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from datasets import Dataset
from jina_vlm.image_loading_jina_vlm import open_image
from PIL import Image
from tqdm import tqdm

from jina_vlm_tools.files import UNFINISHED, write_whole

from .conversation import find_ends
from .loading import default_dtype, load_processor_and_class, quiet_libraries


SCHEMA = pa.schema(
    {
        "row": pa.int64(),
        "id": pa.string(),
        "question": pa.string(),
        "answer": pa.string(),
        "error": pa.string(),
        "answer_tokens": pa.int64(),
    }
)
SETTINGS = "settings.json"
# Arguments that do not change what is written
NO_SETTINGS = ("output", "batch_size", "engine", "run", "check", "interrupted")
DIGEST = "sha256 of ids and questions"
LOCK = ".lock"
# Processes wait for the slowest at the end, and for the first one's look at the source at the start.
LONGEST_WAIT = timedelta(days=30)


# ---------------------------------------------------------------------------------------------------------------------
# Sources: rows with an image each, none of which is read before it is asked for
# ---------------------------------------------------------------------------------------------------------------------


class Folder:
    """A folder of images: its files, and its subfolders', that are named like an image that Pillow can open, sorted by
    their paths. Hidden ones are left out. All are asked `question`."""

    def __init__(self, folder: Path, question: str):
        self.folder, self.question = folder, question
        endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
        self.paths = []
        for place, subfolders, files in os.walk(folder):
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            self.paths += [
                os.path.relpath(os.path.join(place, name), folder)
                for name in files
                if os.path.splitext(name)[1].lower() in endings and not name.startswith(".")
            ]
        self.paths.sort()

    def __len__(self) -> int:
        return len(self.paths)

    def digest(self) -> str:
        return hashlib.sha256("\0".join(self.paths).encode(errors="surrogateescape")).hexdigest()

    def row(self, number: int) -> tuple[dict, dict]:
        path = self.paths[number]
        row = {"row": number, "id": as_unicode(path), "question": self.question}
        return row, {"bytes": None, "path": str(self.folder / path)}


class Table:
    """Rows of a data set, whose images are not decoded.

    Args:
        dataset: The rows. image_column, id_column, question_column: Where images, ids and questions stand; without the
        latter two, rows are called by their numbers, and all are asked `question`.
    """

    def __init__(
        self, dataset: Dataset, image_column: str, id_column: str | None, question_column: str | None, question: str
    ):
        self.images = dataset.select_columns(image_column).cast_column(image_column, datasets.Image(decode=False))
        self.texts = dataset.select_columns([name for name in (id_column, question_column) if name])
        self.image_column, self.id_column, self.question_column, self.question = (
            image_column,
            id_column,
            question_column,
            question,
        )

    def __len__(self) -> int:
        return len(self.images)

    def digest(self) -> str:
        """Of the ids and questions that the rows bring."""
        digest = hashlib.sha256()
        for start in range(0, len(self) if self.texts.column_names else 0, 1000):
            digest.update(json.dumps(self.texts[start : start + 1000]).encode())
        return digest.hexdigest()

    def row(self, number: int) -> tuple[dict, dict | None]:
        """The beginning of a row of the output, and its image: {"bytes", "path"}, or None."""
        texts = self.texts[number] if self.texts.column_names else {}
        name = texts.get(self.id_column, number)
        row = {
            "row": number,
            "id": None if name is None else str(name),
            "question": texts.get(self.question_column, self.question),
        }
        return row, self.images[number][self.image_column]


def open_source(args: argparse.Namespace) -> Folder | Table:
    """What the arguments name.

    Raises:
        SystemExit: there is no such thing, it has no images, or it lacks a column; the message says what it has.
    """
    path = Path(args.source)
    if path.is_dir() and not is_saved(path):
        folder = Folder(path, args.question)
        if len(folder):
            for option in ("question_column", "image_column", "id_column", "subset", "split"):
                if getattr(args, option):
                    raise SystemExit(f"--{option.replace('_', '-')}: {path} is a folder of images, which has none.")
            return folder
        if not any(file.suffix in (".parquet", ".arrow", ".jsonl", ".csv", ".tar") for file in path.rglob("*")):
            raise SystemExit(f"{path} holds no images: no file in it ends in .jpg, .png or what else Pillow can open.")
    dataset = load_dataset(args)
    return Table(
        dataset,
        image_column(dataset, args.image_column),
        text_column(dataset, "--id-column", args.id_column, ("string", "int")),
        text_column(dataset, "--question-column", args.question_column, ("string",)),
        args.question,
    )


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote it."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def load_dataset(args: argparse.Namespace) -> Dataset:
    """The data set's rows; from the Hub, of a folder, or of parquet files. Images stay as they are stored."""
    path = Path(args.source)
    files = [args.source] if path.is_file() else sorted(glob(args.source, recursive=True)) if not path.is_dir() else []
    if files and not all(file.endswith(".parquet") for file in files):
        raise SystemExit(f"{args.source}: expected a folder of images, parquet files or a data set.")
    if not files and not path.is_dir() and (args.source.startswith((".", "/", "~")) or args.source.count("/") > 1):
        raise SystemExit(
            f"{args.source}: nothing there. Expected a folder, parquet files, or a data set's name (owner/name)."
        )
    if args.subset and (files or is_saved(path)):
        raise SystemExit(f"--subset: {args.source} has none.")
    try:
        if files:
            loaded = datasets.load_dataset("parquet", data_files=files, split=args.split)
        elif is_saved(path):
            loaded = datasets.load_from_disk(args.source)
        else:
            loaded = datasets.load_dataset(args.source, name=args.subset, split=args.split)
    except Exception as error:  # of many types, by where it looked
        raise SystemExit(f"{args.source} cannot be loaded: {error}") from error
    if isinstance(loaded, Dataset):
        if args.split and is_saved(path):
            raise SystemExit(f"--split: {args.source} has none.")
        return loaded
    if len(loaded) == 1 and not args.split:
        return next(iter(loaded.values()))
    if args.split not in loaded:
        raise SystemExit(f"{args.source}: choose one of its splits with --split: {', '.join(loaded)}.")
    return loaded[args.split]


def image_column(dataset: Dataset, name: str | None) -> str:
    """The column that was asked for; else the one column of images; else "image"."""
    if name is None:
        images = [column for column, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
        name = images[0] if len(images) == 1 else "image"
    feature = dataset.features.get(name)
    is_stored = isinstance(feature, datasets.Value) and feature.dtype in (
        "string",
        "large_string",
        "binary",
        "large_binary",
    )
    is_struct = isinstance(feature, dict) and set(feature) == {"bytes", "path"}
    if not (is_stored or is_struct or isinstance(feature, datasets.Image)):
        raise no_column(dataset, "--image-column", name, "images (image, binary, or string for paths)")
    return name


def text_column(dataset: Dataset, option: str, name: str | None, types: tuple[str, ...]) -> str | None:
    """The column that was asked for by this option, if one was."""
    kind = str(getattr(dataset.features.get(name), "dtype", None)).removeprefix("large_").removeprefix("u")
    if name is not None and not kind.startswith(types):
        raise no_column(dataset, option, name, f"type {' or '.join(types)}")
    return name


def no_column(dataset: Dataset, option: str, name: str, expected: str) -> SystemExit:
    columns = ", ".join(
        f"{name} ({getattr(feature, 'dtype', type(feature).__name__)})" for name, feature in dataset.features.items()
    )
    return SystemExit(
        f"{option}: expected the name of a column of {expected}, got {name!r}. The columns are {columns}."
    )


def as_unicode(text: str) -> str:
    """File names may hold bytes that are no UTF-8, which the output is."""
    return text.encode(errors="backslashreplace").decode()


# ---------------------------------------------------------------------------------------------------------------------
# Answers
# ---------------------------------------------------------------------------------------------------------------------


class Answerer:
    """Answers questions greedily, `batch_size` at a time.

    Args:
        model, processor: Of one checkpoint.
        max_new_tokens: Longest answer.
        max_tiles: At most so many tiles of each image; None for the processor's own setting.
        batch_size: At most so many at a time; becomes less where memory does not suffice.
        do_resize: Whether images are fitted before their tiles are chosen; None for the processor's own setting.
    """

    def __init__(
        self,
        model,
        processor,
        max_new_tokens: int,
        max_tiles: int | None,
        batch_size: int,
        do_resize: bool | None = None,
    ):
        self.model, self.processor, self.max_new_tokens, self.batch_size = model, processor, max_new_tokens, batch_size
        self.limits = {"max_tiles": max_tiles, "do_resize": do_resize}
        # What fails for this one is no fault of any image.
        self.inputs(Image.new("RGB", (64, 64)), "?")

    def prepare(self, row: dict, image: dict | None) -> tuple[dict, dict | None]:
        """A row and the model inputs of its image. Where there can be none, the row's `error` says why."""
        row = row | {"answer": None, "error": None, "answer_tokens": None}
        try:
            if not row["question"]:
                raise ValueError("The row has no question.")
            return row, self.inputs(load_image(image), row["question"])
        except Exception as error:  # whatever an image can bring about; it must not stop the others
            return row | {"error": as_unicode(f"{type(error).__name__}: {error}")}, None

    def inputs(self, image: Image.Image, question: str) -> dict:
        content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=self.limits,
        )

    def answer(self, prepared: list[tuple[dict, dict | None]]) -> list[dict]:
        """The rows with `answer` and `answer_tokens`. Where memory runs out, fewer are taken at a time from then on;
        an image that is too much by itself gets an `error`."""
        waiting = deque((row, inputs) for row, inputs in prepared if inputs)
        while waiting:
            batch = [waiting.popleft() for _ in range(min(self.batch_size, len(waiting)))]
            try:
                answers = self.generate([inputs for _, inputs in batch])
            except (RuntimeError, MemoryError) as error:
                if not isinstance(error, MemoryError) and not should_reduce_batch_size(error):
                    raise
                message = f"{type(error).__name__}: {error}"
            else:
                for (row, _), (text, tokens) in zip(batch, answers, strict=True):
                    row.update(answer=text, answer_tokens=tokens)
                continue
            clear_device_cache(garbage_collection=True)  # out here, where the error no longer holds the memory
            if len(batch) == 1:
                batch[0][0]["error"] = message
            else:
                self.batch_size = len(batch) // 2
                waiting.extend(batch)
                tqdm.write(
                    f"Memory ran out with {len(batch)} images; going on with {self.batch_size} at a time.",
                    file=sys.stderr,
                )
        return [row for row, _ in prepared]

    @torch.inference_mode()
    def generate(self, prompts: list[dict]) -> list[tuple[str, int]]:
        """For each prompt, [1, length] ids and its image's tiles, the answer and how many tokens it took."""
        padded = self.processor.tokenizer.pad(
            {"input_ids": [prompt["input_ids"][0].tolist() for prompt in prompts]},
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        tiles = {name: torch.cat([prompt[name] for prompt in prompts]) for name in ("pixel_values", "tile_positions")}
        inputs = {name: tensor.to(self.model.device) for name, tensor in {**padded, **tiles}.items()}
        ids = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        ids = ids[:, inputs["input_ids"].shape[1] :].cpu()
        ends = find_ends(self.model, ids)
        before = (ends.cumsum(1) - ends.int() == 0).sum(1)  # tokens up to the end's own
        texts = self.processor.batch_decode(ids, skip_special_tokens=True)
        return [(text.strip(), length) for text, length in zip(texts, before.tolist(), strict=True)]


def load_image(image: dict | None) -> Image.Image:
    """An image from {"bytes", "path"}; its pixels are not read yet."""
    if image is None or image["bytes"] is None and not image["path"]:
        raise ValueError("The row has no image.")
    return open_image(image["path"] if image["bytes"] is None else image["bytes"])


def prefetched(function: Callable, batches: Iterable[Iterable]) -> Iterator[list]:
    """`function` of each item of each batch, made in threads one batch ahead of its use."""
    with ThreadPoolExecutor(torch.get_num_threads()) as executor:
        ahead = deque()
        for batch in batches:
            ahead.append([executor.submit(function, item) for item in batch])
            if len(ahead) > 1:
                yield [future.result() for future in ahead.popleft()]
        while ahead:
            yield [future.result() for future in ahead.popleft()]


# ---------------------------------------------------------------------------------------------------------------------
# The output
# ---------------------------------------------------------------------------------------------------------------------


class Output:
    """A folder of parts. Part i holds the answers of rows `rows_per_part * i` and following, whoever wrote it."""

    def __init__(self, folder: Path, rows: int, rows_per_part: int, ending: str):
        self.folder, self.rows, self.rows_per_part, self.ending = folder, rows, rows_per_part, ending
        self.parts = range(-(-rows // rows_per_part))

    def numbers(self, part: int) -> range:
        return range(part * self.rows_per_part, min(self.rows, (part + 1) * self.rows_per_part))

    def path(self, part: int) -> Path:
        return self.folder / f"part-{part:06d}-of-{len(self.parts):06d}.{self.ending}"

    def missing(self) -> list[int]:
        """The parts that are not there yet."""
        there = set(os.listdir(self.folder))
        return [part for part in self.parts if self.path(part).name not in there]

    def write(self, part: int, rows: list[dict]) -> None:
        """Make a part of the answered rows."""
        if self.ending == "parquet":
            buffer = BytesIO()
            pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), buffer)
            write_whole(self.path(part), buffer.getvalue())
        else:
            write_whole(self.path(part), "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode())

    def errors(self, part: int) -> list[str | None]:
        """For each row of a part its error, or None."""
        if self.ending == "parquet":
            return pq.read_table(self.path(part), columns=["error"])["error"].to_pylist()
        with open(self.path(part), encoding="utf-8") as file:
            return [json.loads(line)["error"] for line in file]


def claim(lock: IO, mode: int) -> None:
    """Locks an output: `LOCK_EX` to be alone with it, `LOCK_SH` together with the processes of one run. It lasts as
    long as the process, however that ends.

    Raises:
        SystemExit: another run has it.
    """
    try:
        fcntl.flock(lock, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SystemExit(
            f"Another run is at work in {Path(lock.name).parent}. Wait for its end, or end its processes."
        ) from None


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Writes what the answers depend on into an output that has no part yet, and compares it in one that has.

    Raises:
        SystemExit: the folder is something else's, or was begun with other settings; the message says which.
    """
    path = folder / SETTINGS
    if not path.exists() and (others := sorted(set(os.listdir(folder)) - {LOCK, SETTINGS + UNFINISHED})):
        raise SystemExit(
            f"{folder} holds {others[0]!r} but no {SETTINGS}: it is no output to go on with. Choose a new folder."
        )
    for leftover in folder.glob(f"part-*{UNFINISHED}"):
        leftover.unlink()
    if not any(folder.glob("part-*")):
        write_whole(path, json.dumps(settings, indent=2).encode())
    before = json.loads(path.read_text())
    changed = [
        f"{name} was {before.get(name)!r}, is {value!r}"
        for name, value in settings.items()
        if before.get(name) != value
    ]
    if changed:
        raise SystemExit(
            f"{folder} was begun with other settings: {'; '.join(changed)}. Take those, or choose a new folder."
        )


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


def settings_of(args: argparse.Namespace, source: Folder | Table) -> dict[str, Any]:
    """All that the answers depend on. Contents of images and weights are not compared."""

    def full(name: str) -> str:
        return str(Path(name).resolve()) if Path(name).exists() else name

    chosen = {name: value for name, value in vars(args).items() if name not in NO_SETTINGS}
    names = {"source": full(args.source), "model": full(args.model)}
    return chosen | names | {"rows": len(source), DIGEST: source.digest()}


def plan(args: argparse.Namespace, source: Folder | Table, lock: IO) -> tuple[str, list[int]]:
    """By the first process, for all of them: the digest of the source, and the parts that are missing."""
    claim(lock, fcntl.LOCK_EX)
    settings = settings_of(args, source)
    check_settings(args.output, settings)
    missing = Output(args.output, len(source), args.rows_per_part, args.format).missing()
    claim(lock, fcntl.LOCK_SH)
    return settings[DIGEST], missing


class Progress:
    """A bar, on a terminal, of the images that all processes have answered. `answered`: by this one; others' are seen
    in their parts."""

    def __init__(self, output: Output, missing: list[int], mine: list[int], shown: bool):
        self.folder, self.answered = output.folder, 0
        self.others = {output.path(part).name: len(output.numbers(part)) for part in set(missing) - set(mine)}
        self.before = output.rows - sum(len(output.numbers(part)) for part in missing)
        shown = shown and sys.stderr.isatty()
        self.bar = tqdm(total=output.rows, initial=self.before, unit="image", disable=not shown)
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.follow)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        self.thread.join()
        self.show()
        self.bar.close()

    def follow(self) -> None:
        while not self.bar.disable and not self.ended.wait(1):
            self.show()

    def show(self) -> None:
        for name in self.others.keys() & set(os.listdir(self.folder) if self.others else ()):
            self.before += self.others.pop(name)
        self.bar.update(self.before + self.answered - self.bar.n)


def run(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """What each of the processes does."""
    with ExitStack() as held:
        planned, refusal = None, None
        if accelerator.is_main_process:
            try:
                source = open_source(args)
                args.output.mkdir(parents=True, exist_ok=True)
                lock = held.enter_context(open(args.output / LOCK, "a+"))
                planned = plan(args, source, lock)
            except SystemExit as stop:
                refusal = stop
        planned = broadcast_object_list([planned])[0]
        if planned is None:
            raise refusal or SystemExit(1)  # the first process says why
        digest, missing = planned
        if not accelerator.is_main_process:
            source = open_source(args)
            claim(held.enter_context(open(args.output / LOCK, "a+")), fcntl.LOCK_SH)
            if source.digest() != digest:
                raise SystemExit(
                    f"Process {accelerator.process_index} sees other rows in {args.source} than the first one."
                )

        output = Output(args.output, len(source), args.rows_per_part, args.format)
        mine = missing[accelerator.process_index :: accelerator.num_processes]
        with Progress(output, missing, mine, shown=accelerator.is_main_process) as progress:
            if mine:
                answer_parts(args, source, output, mine, accelerator.device, progress)
            accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            print(summary(output, new=len(missing)))


def summary(output: Output, new: int) -> str:
    """
    What is in an output that has all of its parts, `new` of them by this run.

    Raises:
        SystemExit: it lacks rows, or has too many.
    """
    errors = [error for part in output.parts for error in output.errors(part)]
    if len(errors) != output.rows:
        raise SystemExit(
            f"{output.folder} holds {len(errors):,} rows, expected {output.rows:,}: "
            "delete the parts that were changed."
        )
    failed = sum(error is not None for error in errors)
    return (
        f"{output.rows:,} rows: {output.rows - failed:,} answered, {failed:,} with an error; "
        f"in {len(output.parts):,} parts, {new:,} of them new: {output.folder}/part-*.{output.ending}"
    )


def answer_parts(
    args: argparse.Namespace, source: Folder | Table, output: Output, parts: list[int], device, progress: Progress
) -> None:
    """Answers these parts, one after the other."""
    processor, load_model = load_processor_and_class(args.model)
    model = load_model(dtype=args.dtype).eval().to(device)
    answerer = Answerer(model, processor, args.max_new_tokens, args.max_tiles, args.batch_size, args.do_resize)
    batches = [
        (part, output.numbers(part)[start : start + args.batch_size])
        for part in parts
        for start in range(0, len(output.numbers(part)), args.batch_size)
    ]
    all_prepared = prefetched(
        lambda number: answerer.prepare(*source.row(number)), (numbers for _, numbers in batches)
    )
    rows = []
    for (part, _), prepared in zip(batches, all_prepared, strict=True):
        rows += answerer.answer(prepared)
        progress.answered += len(prepared)
        if len(rows) == len(output.numbers(part)):
            output.write(part, rows)
            rows = []


def answer_all(args: argparse.Namespace) -> None:
    """Answer as `jina-vlm batch` was told."""
    datasets.disable_progress_bars()
    quiet_libraries()
    # Unless told that there are only CPUs, accelerate takes a launcher's processes for separate runs of one process.
    on_cpu = not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=on_cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)])
    args.dtype = args.dtype or default_dtype(args.model, accelerator.device.type)
    run(args, accelerator)
    accelerator.end_training()
