"""Answers about many images: one row for each, whatever is broken, killed or run again."""

import fcntl
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
import torch
from conftest import largest_file
from PIL import Image

from jina_vlm_tools.cli.main import main
from jina_vlm_tools.files import TINY, UNFINISHED
from jina_vlm_tools.inference.batch import LOCK, Answerer
from jina_vlm_tools.inference.loading import load_processor_and_class
from jina_vlm_tools.synthetic.shapes import TRAINING_PAIRS, draw_scene, make_scene


ROOT = Path(__file__).parents[3]
QUESTION = "How many shapes are there?"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
COLUMNS = ["row", "id", "question", "answer", "error", "answer_tokens"]


@pytest.fixture(scope="module", autouse=True)
def caches(tmp_path_factory):
    """Data sets are prepared in a temporary folder, here and in processes that are started."""
    folder = str(tmp_path_factory.mktemp("datasets"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        patch.setenv("HF_DATASETS_CACHE", folder)
        yield


def shapes(seed: int) -> Image.Image:
    """An image of shapes, of one to seven tiles."""
    image = draw_scene(make_scene(random.Random(seed), TRAINING_PAIRS))
    scale = (1, 2, 0.5)[seed % 3]
    return image.resize((round(image.width * scale), round(image.height * scale)))


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def drawn() -> list[bytes]:
    return [png(shapes(seed)) for seed in range(7)]


@pytest.fixture(scope="module")
def photos(drawn, tmp_path_factory) -> Path:
    """A folder of seven good images in two folders, and of what is no image by its name."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more" / ".cache").mkdir(parents=True)
    for index, content in enumerate(drawn):
        (folder / ("more" if index % 2 else ".") / f"{index}.PNG").write_bytes(content)
    for name in ("notes.txt", ".hidden.png", "more/.cache/small.png"):
        (folder / name).write_bytes(drawn[0])
    return folder


@pytest.fixture(scope="module")
def checkpoint():
    """The small model and its processor."""
    processor, load_model = load_processor_and_class(str(TINY))
    return load_model(dtype="float32").eval(), processor


@pytest.fixture(scope="module")
def alone(checkpoint, drawn) -> dict[str, list[tuple[str, int]]]:
    """What `generate` by itself says about each drawn image: {question: [(answer, its tokens), ...]}."""
    model, processor = checkpoint

    def answer(content: bytes, question: str) -> tuple[str, int]:
        chat = [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": Image.open(io.BytesIO(content))},
                    {"type": "text", "text": question},
                ],
            }
        ]
        inputs = processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        ids = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        return processor.decode(ids, skip_special_tokens=True).strip(), len(ids)

    questions = (QUESTION, "Describe the picture.")
    return {question: [answer(content, question) for content in drawn] for question in questions}


def answer(source, output, *options) -> list[dict]:
    """Runs the command in this process, and reads its rows in order."""
    arguments = [str(source), "--output", str(output), "--max-new-tokens", "20", "--rows-per-part", "3"]
    if "--question-column" not in options:
        arguments += ["--question", QUESTION]
    main(["batch", *arguments, *map(str, options)])
    return rows_of(output)


def rows_of(output: Path) -> list[dict]:
    rows = []
    for part in sorted(output.glob("part-*")):
        if part.suffix == ".jsonl":
            rows += [json.loads(line) for line in part.read_text(encoding="utf-8").splitlines()]
        else:
            rows += pq.read_table(part).to_pylist()
    return rows


def answers(rows: list[dict]) -> list[tuple[str | None, int | None]]:
    return [(row["answer"], row["answer_tokens"]) for row in rows]


NONE = (None, None)


def refused(source, output, *options) -> str:
    with pytest.raises(SystemExit) as stop:
        answer(source, output, *options)
    return str(stop.value)


# Sources and formats


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_folder(photos, alone, tmp_path, capsys, monkeypatch, form):
    """A bar shows how far it is where somebody looks, and nothing is drawn elsewhere."""
    is_terminal = form == "parquet"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    rows = answer(photos, tmp_path / "answers", "--format", form, "--batch-size", 2)
    assert [list(row) for row in rows] == [COLUMNS] * 7
    assert [row["row"] for row in rows] == list(range(7))
    assert [row["id"] for row in rows] == [
        "0.PNG",
        "2.PNG",
        "4.PNG",
        "6.PNG",
        "more/1.PNG",
        "more/3.PNG",
        "more/5.PNG",
    ]
    assert answers(rows) == [alone[QUESTION][index] for index in (0, 2, 4, 6, 1, 3, 5)]
    assert all(row["question"] == QUESTION and row["error"] is None for row in rows)
    assert len(list((tmp_path / "answers").glob(f"part-*.{form}"))) == 3
    captured = capsys.readouterr()
    assert captured.out.startswith("7 rows: 7 answered, 0 with an error; in 3 parts, 3 of them new")
    if is_terminal:
        assert "7/7" in captured.err and "image/s" in captured.err.splitlines()[-1]
    else:
        assert captured.err == ""
    loaded = datasets.load_dataset(
        form.replace("jsonl", "json"), data_files=f"{tmp_path}/answers/*.{form}", split="train"
    )
    assert loaded.to_list() == rows


def test_answers_that_are_cut_off_show_it(photos, tmp_path):
    rows = answer(
        photos, tmp_path / "answers", "--max-new-tokens", 3, "--question", "Describe the picture.", "--max-tiles", 1
    )
    assert all(row["answer_tokens"] == 3 for row in rows)


def test_parquet_files_with_questions(drawn, alone, tmp_path):
    """Two files, images as plain bytes, questions and ids of their own."""
    questions = [[QUESTION, "Describe the picture."][index % 2] for index in range(7)]
    for name, chosen in (("a", range(4)), ("b", range(4, 7))):
        datasets.Dataset.from_dict(
            {
                "photo": [drawn[index] for index in chosen],
                "number": [100 + index for index in chosen],
                "asked": [None if index == 3 else questions[index] for index in chosen],
            }
        ).to_parquet(tmp_path / f"{name}.parquet")
    columns = ("--image-column", "photo", "--id-column", "number", "--question-column", "asked")
    rows = answer(f"{tmp_path}/*.parquet", tmp_path / "answers", *columns)
    assert [row["id"] for row in rows] == [str(100 + index) for index in range(7)]
    assert rows[3]["question"] is None and "no question" in rows[3]["error"]
    assert answers(rows) == [NONE if index == 3 else alone[questions[index]][index] for index in range(7)]
    assert all(row["question"] == questions[row["row"]] for row in rows if row["row"] != 3)


def test_data_set(photos, drawn, alone, tmp_path):
    """As it is saved, and as a folder of the Hub's layout; images as `datasets` stores them, or as paths."""
    images = {"image": [{"bytes": content, "path": None} for content in drawn]}
    paths = {"image": [str(photos / "more" / f"{index}.PNG") for index in (1, 3)]}
    saved = datasets.DatasetDict(
        train=datasets.Dataset.from_dict(images, features=datasets.Features({"image": datasets.Image()})),
        test=datasets.Dataset.from_dict(paths),
    )
    saved.save_to_disk(tmp_path / "saved")
    rows = answer(tmp_path / "saved", tmp_path / "answers", "--split", "train")
    assert answers(rows) == alone[QUESTION] and [row["id"] for row in rows] == [str(row) for row in range(7)]
    rows = answer(tmp_path / "saved", tmp_path / "two", "--split", "test")
    assert answers(rows) == [alone[QUESTION][index] for index in (1, 3)]
    (tmp_path / "hub" / "data").mkdir(parents=True)
    saved["train"].to_parquet(tmp_path / "hub" / "data" / "validation-00000-of-00001.parquet")
    rows = answer(tmp_path / "hub", tmp_path / "three", "--split", "validation[:2]")
    assert answers(rows) == alone[QUESTION][:2]
    message = refused(tmp_path / "saved", tmp_path / "four")
    assert "--split" in message and "train, test" in message


# Bad images


def test_bad_images_are_rows_with_errors(photos, drawn, alone, tmp_path):
    """Each stands in a batch with good ones."""
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.png").write_bytes(drawn[0])
    (folder / "b truncated.png").write_bytes(drawn[1][: len(drawn[1]) // 2])
    (folder / "c text.jpg").write_text("just text")
    (folder / "d empty.png").write_bytes(b"")
    (folder / "e elongated.png").write_bytes(png(Image.new("RGB", (1000, 4))))
    (folder / "f gone.png").symlink_to(tmp_path / "nowhere.png")
    Path(os.fsdecode(os.fsencode(folder) + b"/g \xff.png")).write_bytes(drawn[2])
    rows = answer(folder, tmp_path / "answers", "--batch-size", 7, "--rows-per-part", 7)
    assert answers(rows) == [alone[QUESTION][0], *[NONE] * 5, alone[QUESTION][2]]
    expected = ["damaged or incomplete", "not an image", "not an image", "longer side", "No such image"]
    for row, message in zip(rows[1:6], expected, strict=True):
        assert message in row["error"] and row["error"].partition(":")[0] in ("ValueError", "FileNotFoundError")
    assert rows[6]["id"] == "g \\udcff.png"


def test_bad_bytes_are_rows_with_errors(drawn, alone, tmp_path, capsys):
    bad = [None, b"", b"just text", drawn[1][:-100]]
    datasets.Dataset.from_dict({"image": [*bad, drawn[0]]}).to_parquet(tmp_path / "bad.parquet")
    rows = answer(tmp_path / "bad.parquet", tmp_path / "answers")
    assert answers(rows) == [*[NONE] * 4, alone[QUESTION][0]]
    expected = ["has no image", "not an image", "not an image", "damaged or incomplete"]
    assert all(message in row["error"] for row, message in zip(rows, expected, strict=False))
    assert "5 rows: 1 answered, 4 with an error" in capsys.readouterr().out


def test_what_is_no_images_fault_stops_the_run(photos, tmp_path, checkpoint):
    """A checkpoint without a chat template would make an error of every row."""
    model, processor = checkpoint
    model.save_pretrained(tmp_path / "checkpoint")
    processor.save_pretrained(tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "chat_template.jinja").unlink()
    with pytest.raises(SystemExit, match="chat template"):
        answer(photos, tmp_path / "answers", "--model", tmp_path / "checkpoint")
    assert not list((tmp_path / "answers").glob("part-*"))


def allocate() -> None:
    torch.empty(2**60, dtype=torch.uint8)


def refuse_memory() -> None:
    raise MemoryError("can't allocate memory")


@pytest.mark.parametrize("run_out", [allocate, refuse_memory])
def test_memory_that_suffices_for_fewer(checkpoint, photos, drawn, alone, capsys, run_out):
    """The allocator's own error, or one like llama.cpp's: of more than four tiles at a time, and so also of a large
    image by itself."""
    model, processor = checkpoint

    def fill_memory(module, arguments, keywords):
        pixels = keywords["pixel_values"] if "pixel_values" in keywords else arguments[0]
        if len(pixels) > 4:
            run_out()

    answerer = Answerer(model, processor, max_new_tokens=20, max_tiles=None, batch_size=7)
    prepared = [
        answerer.prepare({"row": index, "id": "", "question": QUESTION}, {"bytes": content, "path": None})
        for index, content in enumerate(drawn)
    ]
    tiles = [len(inputs["pixel_values"]) for _, inputs in prepared]
    assert min(tiles) == 2 < max(tiles) > 4
    hook = model.model.vision_model.register_forward_pre_hook(fill_memory, with_kwargs=True)
    try:
        answered = answerer.answer(prepared)
    finally:
        hook.remove()
    assert [row["row"] for row in answered] == list(range(7))
    assert answers(answered) == [
        right if number <= 4 else NONE for right, number in zip(alone[QUESTION], tiles, strict=True)
    ]
    assert ["can't allocate memory" in (row["error"] or "") for row in answered] == [number > 4 for number in tiles]
    assert "Memory ran out with 7 images; going on with 3 at a time." in capsys.readouterr().err


# Kills, resumes and mistakes


def contents(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.iterdir() if path.name != LOCK}


def test_kill_and_resume(photos, tmp_path):
    """One process is killed in the middle, two go on: each row once, and the same as without a kill."""
    (tmp_path / "photos").mkdir()
    for index in range(24):
        (tmp_path / "photos" / f"{index:02}.png").write_bytes(png(shapes(index).resize((300, 300))))
    (tmp_path / "photos" / "13.png").write_text("just text")
    output = tmp_path / "killed"
    options = ["--max-new-tokens", "20", "--rows-per-part", "2", "--batch-size", "2", "--question", QUESTION]
    command = ["-m", "jina_vlm_tools", "batch", str(tmp_path / "photos"), "--output", str(output), *options]
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE)
    try:
        while len(list(output.glob("part-*.parquet"))) < 3 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGSTOP)  # so that what follows need not hurry
        assert "Another run is at work" in refused(tmp_path / "photos", output, *options)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    (output / f"part-000011-of-000012.parquet{UNFINISHED}").write_bytes(b"half")
    before = {path.name: path.read_bytes() for path in output.glob("part-*.parquet")}
    assert 3 <= len(before) < 12

    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    result = subprocess.run([*launch, *command], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].startswith(  # gloo of torch 2.9 writes there, too
        f"24 rows: 23 answered, 1 with an error; in 12 parts, {12 - len(before)} of them new"
    )
    assert "image/s" not in result.stderr, "a bar, without a terminal"
    rows = answer(tmp_path / "photos", tmp_path / "whole", *options)
    assert [row["row"] for row in rows] == list(range(24))
    assert rows_of(output) == rows
    after = contents(output)
    assert sorted(after) == sorted(contents(tmp_path / "whole"))
    assert before.items() <= after.items()


def test_part_that_cannot_be_written_whole(photos, tmp_path):
    """Of a disk that is full in the middle of a part, nothing stays that looks like one."""
    options = ("--question", "why? " * 1600, "--format", "jsonl")
    with largest_file(2**14), pytest.raises(SystemExit, match="too large"):
        answer(photos, tmp_path / "answers", *options)
    assert not list((tmp_path / "answers").glob("part-*.jsonl"))
    assert len(answer(photos, tmp_path / "answers", *options)) == 7


def test_parts_that_were_deleted_are_answered_again(photos, tmp_path, capsys):
    rows = answer(photos, tmp_path / "answers")
    parts = sorted((tmp_path / "answers").glob("part-*"))
    parts[1].unlink()
    written = parts[0].stat().st_mtime_ns
    capsys.readouterr()
    assert answer(photos, tmp_path / "answers", "--batch-size", 1) == rows
    assert "3 parts, 1 of them new" in capsys.readouterr().out
    assert parts[0].stat().st_mtime_ns == written
    answer(photos, tmp_path / "answers", "--model", TINY)
    assert "3 parts, 0 of them new" in capsys.readouterr().out


def test_other_settings_are_refused(photos, drawn, tmp_path):
    answer(photos, tmp_path / "answers")
    before = contents(tmp_path / "answers")
    for options, message in {
        ("--question", "What is it?"): f"question was '{QUESTION}', is 'What is it?'",
        ("--max-tiles", 2): "max_tiles was None, is 2",
        ("--no-resize",): "do_resize was None, is False",
        ("--rows-per-part", 4): "rows_per_part was 3, is 4",
        ("--format", "jsonl"): "format was 'parquet', is 'jsonl'",
        ("--dtype", "bfloat16"): "dtype was 'float32', is 'bfloat16'",
    }.items():
        shown = refused(photos, tmp_path / "answers", *options)
        assert message in shown and shown.count(" was ") == 2, shown
    new = photos / "7.png"
    new.write_bytes(drawn[0])
    try:
        assert "rows was 7, is 8" in refused(photos, tmp_path / "answers")
    finally:
        new.unlink()
    (photos / "0.PNG").rename(photos / "8.PNG")
    try:
        assert "sha256 of ids and questions was" in refused(photos, tmp_path / "answers")
    finally:
        (photos / "8.PNG").rename(photos / "0.PNG")
    assert contents(tmp_path / "answers") == before


def test_settings_count_from_the_first_part_on(photos, tmp_path):
    """A slip of the first command, found before anything was answered, does not spoil the folder."""
    assert "missing" in refused(photos, tmp_path / "answers", "--model", tmp_path / "missing")
    assert len(answer(photos, tmp_path / "answers")) == 7


def test_sources_that_cannot_be_used(photos, drawn, tmp_path):
    output = tmp_path / "answers"
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("nothing")
    assert "holds no images" in refused(tmp_path / "empty", output)
    assert "nothing there" in refused(tmp_path / "missing", output)
    assert "expected a folder of images" in refused(photos / "0.PNG", output)
    assert "--id-column" in refused(photos, output, "--id-column", "name")
    source = tmp_path / "some.parquet"
    datasets.Dataset.from_dict({"photo": [drawn[0]], "text": ["hi"], "number": [1.5]}).to_parquet(source)
    columns = "photo (binary), text (string), number (float64)"
    for options, name in {
        (): "image",
        ("--image-column", "number"): "number",
        ("--image-column", "photo", "--id-column", "path"): "path",
        ("--image-column", "photo", "--id-column", "number"): "number",
        ("--image-column", "photo", "--question-column", "number"): "number",
    }.items():
        message = refused(source, output, *options)
        assert repr(name) in message and columns in message, message
    assert "no data" in refused(source, output, "--split", "train[:0]")
    datasets.Dataset.from_dict({"image": ["a.png"]}).save_to_disk(tmp_path / "saved")
    assert "--split" in refused(tmp_path / "saved", output, "--split", "train")
    assert "--subset" in refused(source, output, "--subset", "en")
    (tmp_path / "broken.parquet").write_bytes(b"half")
    assert "broken.parquet cannot be loaded" in refused(tmp_path / "broken.parquet", output)
    assert not output.exists()


def test_output_that_is_something_else(photos, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mine.png").write_bytes(b"")
    message = refused(photos, tmp_path / "photos")
    assert "'mine.png'" in message and "Choose a new folder" in message
    (tmp_path / "new").mkdir()
    lock = open(tmp_path / "new" / LOCK, "a+")  # noqa: SIM115
    fcntl.flock(lock, fcntl.LOCK_SH)
    assert "Another run is at work" in refused(photos, tmp_path / "new")
    lock.close()
    assert len(answer(photos, tmp_path / "new")) == 7


def test_without_a_fit(checkpoint):
    model, processor = checkpoint
    wide = Image.new("RGB", (1177, 186))
    for do_resize, tiles in ((None, 5), (True, 5), (False, 6)):
        answerer = Answerer(model, processor, max_new_tokens=20, max_tiles=None, batch_size=7, do_resize=do_resize)
        assert len(answerer.inputs(wide, QUESTION)["pixel_values"]) == tiles
