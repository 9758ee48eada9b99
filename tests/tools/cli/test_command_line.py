"""The command `jina-vlm`: as pip installs it, in an empty folder, in processes of its own."""

import base64
import json
import os
import pty
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import jina_vlm
import jinja2
import pytest
import torch
from answers import answer_greedily, prepare
from conftest import ROOT, largest_file, make_image
from hub_client import TOKEN
from hub_server import serve_hub
from PIL import Image
from safetensors.torch import load_file

from jina_vlm_tools.cli import chat, tiles
from jina_vlm_tools.cli.main import main
from jina_vlm_tools.files import TINY
from jina_vlm_tools.inference.conversation import Conversation
from jina_vlm_tools.inference.drawing import BLUE, TILE_COLORS, draw_page
from jina_vlm_tools.inference.loading import load_on_device, load_processor_and_class
from jina_vlm_tools.inference.tiling import compute_tiling
from jina_vlm_tools.synthetic.questions import evaluation_sample
from jina_vlm_tools.synthetic.shapes import draw_scene


QUESTIONS = ("How many shapes are there?", "Describe the picture.", "Which colour does the shape at the bottom have?")
COMMANDS = ("ask", "chat", "tiles", "batch", "index", "search", "app", "demo", "train", "convert", "merge", "upload")
REPORTING = ("ask", "chat", "tiles", "index", "search", "convert", "merge", "upload")  # by --json


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Where `pip install .` has put the package and the command, from a copy that holds nothing else of the
    checkout."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for path in (
        *ROOT.glob("*.py"),
        *(ROOT / name for name in ("README.md", "LICENSE", "pyproject.toml", "chat_template.jinja")),
    ):
        shutil.copy(path, source)
    for name in ("jina_vlm_tools",):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "runs"))
    options = [
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--disable-pip-version-check",
        "--target",
        str(target),
    ]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(source)], check=True)
    return target


@pytest.fixture(scope="module")
def environment(installed, tmp_path_factory) -> dict[str, str]:
    """Of somebody who has installed the package, is not logged in, and has no network."""
    home = tmp_path_factory.mktemp("home")
    return {
        "PATH": f"{installed / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(installed), "HOME": str(home),
        "TMPDIR": str(home), "JINA_VLM_MODEL": str(TINY), "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1", "no_proxy": "127.0.0.1,localhost",
    }  # fmt: skip


@pytest.fixture(scope="module")
def empty(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("empty")


@pytest.fixture(scope="module")
def run(environment, empty):
    """The function `run(*arguments, stdin=b"", **variables)`: the command in the empty folder."""

    def run(*arguments, stdin: bytes = b"", **variables) -> subprocess.CompletedProcess:
        command, env = ["jina-vlm", *map(str, arguments)], {**environment, **variables}
        return subprocess.run(command, input=stdin, capture_output=True, cwd=empty, env=env)

    return run


def scene(seed: int) -> Image.Image:
    return draw_scene(evaluation_sample(seed, "count", "en").scene)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> tuple[Path, Path]:
    """Two of the kind that checkpoints/tiny knows; the second is larger."""
    folder = tmp_path_factory.mktemp("images")
    paths = folder / "first image.png", folder / "second.png"
    scene(1).save(paths[0])
    scene(2).resize((640, 500)).save(paths[1])
    return paths


@pytest.fixture(scope="module")
def checkpoint():
    """The small model and its processor."""
    processor, load_model = load_processor_and_class(str(TINY))
    return load_on_device(load_model), processor


@pytest.fixture(scope="module")
def started(run, images, released_folder):
    """What takes seconds to start, two at a time: {name: the process' end to come}."""
    first, second = images
    said = [QUESTIONS[1], f"/image {second}", QUESTIONS[0], "", "/reset", QUESTIONS[2], "/image no.png", "never asked"]
    commands = {
        "ask": (["ask", first, "--max-new-tokens", 60, "-", QUESTIONS[1], "--json"], second.read_bytes()),
        "chat": (
            ["chat", "--json", "--max-new-tokens", 20, first],
            "\n".join(said).encode(),
        ),
        "tiles": (["tiles", second, "--save", "tiles.png", "--json", "--model", TINY], b""),
        "convert": (["convert", released_folder, "converted"], b""),
    }  # fmt: skip
    with ThreadPoolExecutor(2) as threads:
        yield {name: threads.submit(run, *arguments, stdin=stdin) for name, (arguments, stdin) in commands.items()}


def ended(future: Future, code: int = 0) -> tuple[str, str]:
    result = future.result()
    assert result.returncode == code, result.stderr.decode()
    return result.stdout.decode(), result.stderr.decode()


def expected_answer(
    checkpoint, images: list[Path], question: str, do_resize: bool = True, max_new_tokens: int = 256
) -> str:
    """By the library alone."""
    model, processor = checkpoint
    inputs = prepare(processor, [*images, question], do_resize=do_resize)
    return answer_greedily(model, processor, inputs, max_new_tokens).strip()


# ---------------------------------------------------------------------------------------------------------------------
# Help and usage
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_help_teaches_and_comes_at_once(environment, empty, command):
    process = subprocess.Popen(["jina-vlm", *command, "--help"], stdout=subprocess.PIPE, cwd=empty, env=environment)
    text = process.stdout.read().decode()
    _, status, usage = os.wait4(process.pid, 0)  # the process' own time, whatever else the machine does
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0 and usage.ru_utime + usage.ru_stime < 0.5
    assert "exit codes:" in text and "130" in text
    if command:
        assert f"  jina-vlm {command[0]} " in text.split("examples:")[1]
        assert ("--json" in text) == (command[0] in REPORTING)
    else:
        assert all(f"\n    {name} " in text for name in COMMANDS)


@pytest.mark.parametrize(
    "arguments",
    [(), ("look",), ("ask", "only.png"), ("ask", "a.png", "Q?", "--max-tiles", "0"), ("tiles",), ("convert", "x"),
     ("merge", "x", "y"), ("upload", "--weights", "x"), ("chat", "--max-new-tokens", "0"), ("ask",)],
)  # fmt: skip
def test_what_is_not_understood(run, arguments):
    result = run(*arguments)
    assert result.returncode == 2 and not result.stdout
    assert b"usage: jina-vlm" in result.stderr and b"error: " in result.stderr


# ---------------------------------------------------------------------------------------------------------------------
# ask, chat
# ---------------------------------------------------------------------------------------------------------------------


def test_ask_images_by_path_and_from_stdin(started, checkpoint, images):
    out, err = ended(started["ask"])
    report = json.loads(out)
    expected = expected_answer(checkpoint, images, QUESTIONS[1], max_new_tokens=60, do_resize=False)
    assert report["answer"] == expected and not err
    assert [image["name"] for image in report["images"]] == [str(images[0]), "-"]
    assert [(image["width"], image["height"]) for image in report["images"]] == [
        Image.open(path).size for path in images
    ]
    processor = checkpoint[1]
    for image in report["images"]:
        rows, columns = processor.image_processor.get_tiling(image["height"], image["width"], do_resize=False)[1]
        assert (image["rows"], image["columns"], image["tiles"]) == (rows, columns, 1 + rows * columns)
    sizes = [(image["height"], image["width"]) for image in report["images"]]
    counted = processor._get_num_multimodal_tokens(sizes, do_resize=False)["num_image_tokens"]
    assert [image["tokens"] for image in report["images"]] == counted
    assert report["tokens"]["prompt"] > sum(image["tokens"] for image in report["images"])
    assert report["is_cut_off"] is (report["tokens"]["answer"] == 60)
    parts = report["seconds"]
    assert {"import", "processor", "model", "tokens", "answer"} < parts.keys()
    assert 0 < parts["first_token"] <= parts["answer"] < parts["total"]


def test_progress_is_for_terminals_and_the_answer_comes_piece_by_piece(environment, empty, images, checkpoint):
    terminal, stderr = pty.openpty()
    uri = f"data:image/png;base64,{base64.b64encode(images[0].read_bytes()).decode()}"
    process = subprocess.Popen(
        ["jina-vlm", "ask", uri, QUESTIONS[1]], stdout=subprocess.PIPE, stderr=stderr, cwd=empty, env=environment
    )
    os.close(stderr)
    pieces, said = [], b""
    while piece := os.read(process.stdout.fileno(), 10_000).decode():
        pieces.append(piece)
    while chunk := read_terminal(terminal):
        said += chunk
    assert process.wait() == 0 and len(pieces) > 2
    assert "".join(pieces) == expected_answer(checkpoint, images[:1], QUESTIONS[1], do_resize=False) + "\n"
    assert b"Loading the model ...\r\n" in said and b"the first after" in said and b"arning" not in said
    tokens = f"{answer_tokens(checkpoint, images[0])} tokens in, 424 of them for images; ".encode()
    assert tokens in said


def answer_tokens(checkpoint, image: Path) -> int:
    """Of the prompt with one image and the second question."""
    _, processor = checkpoint
    (tokens,) = processor._get_num_multimodal_tokens([Image.open(image).size[::-1]])["num_image_tokens"]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTIONS[1]}]}],
        add_generation_prompt=True,
    )
    return tokens - 1 + len(processor.tokenizer(prompt, add_special_tokens=False)["input_ids"])


def test_a_reader_that_has_gone_ends_it_quietly(environment, empty):
    process = subprocess.Popen(
        ["jina-vlm", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=empty, env=environment
    )
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141


def read_terminal(terminal: int) -> bytes:
    try:
        return os.read(terminal, 10_000)
    except OSError:  # so ends a terminal whose other side is closed
        return b""


def test_chat_from_a_pipe_ends_at_the_first_error(started, checkpoint, images):
    out, err = ended(started["chat"], 1)
    first, second, third = map(json.loads, out.splitlines())
    assert err == "error: no.png: no such image. Expected a path, an http(s) URL, a data URI, or - for stdin.\n"
    assert first["answer"] == expected_answer(checkpoint, images[:1], QUESTIONS[1], max_new_tokens=20)
    assert first["is_cut_off"] and first["tokens"]["answer"] == 20
    assert [len(turn["images"]) for turn in (first, second, third)] == [1, 1, 0]
    assert second["tokens"]["prompt"] > first["tokens"]["prompt"] + 20 + second["images"][0]["tokens"]
    assert third["answer"] == expected_answer(checkpoint, [], QUESTIONS[2], max_new_tokens=20)


def test_a_conversation_is_one_prompt_whose_images_are_encoded_once(checkpoint, images):
    """Turn by turn it gives what the library gives for the whole chat, rendered and encoded anew."""
    model, processor = checkpoint
    conversation, chat, encoded = Conversation(model, processor, max_new_tokens=9), [], []
    hook = model.model.vision_model.register_forward_pre_hook(
        lambda module, arguments, keywords: encoded.append(len(keywords.get("pixel_values", *arguments[:1]))),
        with_kwargs=True,
    )
    try:
        for question, new in zip((*QUESTIONS, "And <|image|> there?"), (images[:1], [], images[1:], []), strict=True):
            opened = [Image.open(path) for path in new]
            parts = [{"type": "image", "image": image} for image in opened] + [{"type": "text", "text": question}]
            chat.append({"role": "user", "content": parts})
            answer = conversation.answer(question, opened)
            ids = conversation.ids[0, : answer.prompt_tokens]
            whole = processor.apply_chat_template(
                chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
            assert ids.tolist() == whole["input_ids"][0].tolist()
            tiles_encoded, encoded[:] = sum(encoded), []
            assert tiles_encoded == (len(processor.image_processor(opened)["pixel_values"]) if opened else 0)
            again = model.generate(**whole, max_new_tokens=9, do_sample=False)[0, whole["input_ids"].shape[1] :]
            encoded.clear()
            assert answer.text == processor.decode(again, skip_special_tokens=True).strip()
            chat.append(
                {"role": "assistant", "content": processor.decode(again, skip_special_tokens=True).removeprefix(" ")}
            )
    finally:
        hook.remove()


def test_an_answer_ends_by_a_token_of_the_generation_config(checkpoint, monkeypatch):
    """Which may be another than the tokenizer's, several, or none."""
    model, processor = checkpoint
    conversation, usual = Conversation(model, processor, max_new_tokens=20), model.generation_config.eos_token_id
    whole = conversation.answer(QUESTIONS[1], [scene(1)])
    assert whole.is_cut_off
    ids = conversation.ids[0, whole.prompt_tokens :].tolist()
    for end, tokens in ((ids[3], ids.index(ids[3]) + 1), ([usual, ids[3]], ids.index(ids[3]) + 1), (None, 20)):
        monkeypatch.setattr(model.generation_config, "eos_token_id", end)
        conversation.reset()
        answer = conversation.answer(QUESTIONS[1], [scene(1)])
        assert answer.tokens == tokens and answer.is_cut_off is (end is None)


def test_a_turn_that_failed_is_forgotten(checkpoint, images, monkeypatch):
    """Though the cache may hold a part of it."""
    model, processor = checkpoint
    image = [Image.open(images[0])]
    expected, conversation = [], Conversation(model, processor, max_new_tokens=9)
    for question in (QUESTIONS[0], QUESTIONS[1]):
        expected.append(conversation.answer(question, image if not expected else []).text)
    conversation.reset()
    assert conversation.answer(QUESTIONS[0], image).text == expected[0]
    with pytest.raises(RuntimeError, match="nobody listens"):
        conversation.answer("Is it raining?", image, show=Mock(side_effect=RuntimeError("nobody listens")))
    assert conversation.answer(QUESTIONS[1], []).text == expected[1]


def test_a_chat_that_is_too_long_says_so(checkpoint, monkeypatch):
    model, processor = checkpoint
    conversation = Conversation(model, processor, max_new_tokens=4)
    monkeypatch.setattr(processor.tokenizer, "model_max_length", 30)
    with pytest.raises(ValueError, match=r"has \d+ tokens, the model takes 30"):
        for _ in range(30):
            conversation.answer("Why?", [])


# ---------------------------------------------------------------------------------------------------------------------
# tiles
# ---------------------------------------------------------------------------------------------------------------------


def test_tiles_are_counted_and_drawn(started, empty, checkpoint, images):
    out, err = ended(started["tiles"])
    report = json.loads(out)
    processor = checkpoint[1]
    width, height = Image.open(images[1]).size
    assert report["image"] == {"width": width, "height": height} and not err
    assert report["tokens"]["total"] == processor._get_num_multimodal_tokens([(height, width)])["num_image_tokens"][0]
    assert report["saved"] == "tiles.png" and Image.open(empty / "tiles.png").width >= 1740


@pytest.mark.parametrize("size", [(900, 640), (60, 40), (60, 2000)])
def test_kept_regions_cover_the_canvas(size):
    """Once, but for a patch's width at each seam, where the last token of a tile covers half of its window. The
    numbers add up to the processor's own."""
    image_processor = jina_vlm.JinaVLMImageProcessor()
    image = Image.fromarray(make_image(*size[::-1], "black"))
    tiling = compute_tiling(image, image_processor)
    report = tiling.to_dict()
    canvas, side = torch.zeros(tiling.canvas[::-1], dtype=torch.int), report["tile"]["token_side"]
    for tile in report["tiles"]:
        left, top, right, bottom = tile["box"]
        kept_left, kept_top, kept_right, kept_bottom = (edge * side for edge in tile["kept"])
        canvas[top + kept_top : min(top + kept_bottom, bottom), left + kept_left : min(left + kept_right, right)] += 1
        assert tile["tokens"] == (tile["kept"][2] - tile["kept"][0]) * (tile["kept"][3] - tile["kept"][1])
    assert canvas.min() == 1
    seams = [(canvas.amin(dim=dim) > 1).sum() for dim in (1, 0)]
    assert seams == [14 * (tiling.rows - 1), 14 * (tiling.columns - 1)]
    rows, columns = image_processor.get_token_grid(tiling.rows, tiling.columns)
    assert (
        report["tokens"]["tiles"] == rows * columns
        and report["tokens"]["total"] == 196 + 18 - 2 + rows * (columns + 1) + 2
    )
    page = draw_page(tiling)
    colors = {color for _, color in page.getcolors(page.width * page.height)} - {BLUE}
    assert colors & set(TILE_COLORS) == set(TILE_COLORS[: len(tiling.tiles)]) - {BLUE}


def test_more_tiles_than_colors():
    image = Image.fromarray(make_image(1000, 1000))
    tiling = compute_tiling(image, jina_vlm.JinaVLMImageProcessor(), max_tiles=16)
    assert len(tiling.tiles) == 16 and tiling.tokens == 2194
    page = draw_page(tiling)
    colors = {color for _, color in page.getcolors(page.width * page.height)}
    assert colors >= set(TILE_COLORS)


def test_tiles_of_a_checkpoint_that_does_not_fit(tmp_path, bundle):
    """Its own settings count: the grid is chosen on the image's own size."""
    processor = jina_vlm.JinaVLMImageProcessor.from_pretrained(bundle, do_resize=False)
    image = Image.fromarray(make_image(186, 1177))
    tiling = compute_tiling(image, processor)
    assert (tiling.fitted, tiling.rows, tiling.columns) == ((1177, 186), 1, 5)


def test_tiles_without_a_fit(tmp_path, capsys):
    """What `ask` makes of an image, where that differs from what the other verbs do."""
    photo = tmp_path / "photo.png"
    Image.fromarray(make_image(186, 1177)).save(photo)
    said = []
    for more in ([], ["--no-resize"]):
        main(["tiles", str(photo), *more])
        said.append(capsys.readouterr().out.splitlines())
    assert said[0][0].startswith("1177 x 186 pixels, fitted to 1176 x 182, ")
    assert said[1][0].startswith("1177 x 186 pixels, not resized, ")
    assert said[0][1].startswith("1 x 4 tiles") and said[1][1].startswith("1 x 5 tiles")


def test_distinct_tiles_are_counted(tmp_path, capsys):
    """A white page and its thumbnail look the same everywhere; a drawing is told apart from its thumbnail."""
    for name, image, distinct, number in (
        ("page.png", Image.new("RGB", (900, 640), "white"), 1, 7),
        ("texture.png", Image.fromarray(make_image(640, 900)), 7, 7),
        ("small.png", Image.fromarray(make_image(300, 300)), 1, 2),
    ):
        image.save(tmp_path / name)
        main(["tiles", str(tmp_path / name)])
        said = capsys.readouterr().out.splitlines()
        assert said[2] == f"{distinct:>6,} of these {number} computed: no two that are the same"
        main(["tiles", str(tmp_path / name), "--json"])
        assert json.loads(capsys.readouterr().out)["distinct"] == distinct


def test_the_page_shows_the_models_own_pixels_overlaps_and_kept_regions():
    image = Image.new("RGB", (900, 640), "white")
    image.paste((250, 220, 0), (0, 0, 450, 640))
    tiling = compute_tiling(image, jina_vlm.JinaVLMImageProcessor())
    page = draw_page(tiling)
    for tile in tiling.tiles:  # a place between frames, labels and overlaps
        spot = (150, 120) if tile.corner[0] else (60, 120)
        shown = page.getpixel((760 + tile.corner[0] + spot[0], 150 + tile.corner[1] + spot[1]))
        assert shown == tile.image.getpixel(spot)
    assert page.getpixel((760 + 320, 150 + 120)) != page.getpixel((760 + 200, 150 + 120)), "no veil on the overlap"

    # the second tile below: its first two columns of tokens are dropped, and a frame is round the others
    assert [tile.kept_box for tile in tiling.tiles[:2]] == [(0, 0, 12, 12), (2, 0, 12, 12)]
    scale, left, top = 280 / 378, 760 + 315, 150 + 644 + 171 + 50
    dropped, frame, kept = (page.getpixel((left + round(x * scale), top)) for x in (20, 58, 77))
    assert max(abs(a - b) for a, b in zip(frame, TILE_COLORS[1], strict=True)) < 40
    assert (
        max(abs(a - b) for a, b in zip(kept, (250, 220, 0), strict=True))
        < 40
        < max(abs(a - b) for a, b in zip(dropped, kept, strict=True))
    )


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("tiles.xyz", ".xyz is no format"),
        ("tiles", "no ending is no format"),
        ("none/tiles.png", "its folder is not there"),
        ("image.png", "would replace the image"),
    ],
)
def test_places_where_no_drawing_can_be(tmp_path, monkeypatch, target, message):
    monkeypatch.chdir(tmp_path)
    scene(1).save("image.png")
    before = Path("image.png").read_bytes()
    with pytest.raises(SystemExit) as stopped:
        main(["tiles", "image.png", "--save", target])
    assert stopped.value.code.startswith("error: ") and message in stopped.value.code
    assert os.listdir() == ["image.png"] and Path("image.png").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "size", "message"),
    [
        (["tiles", "{image}", "--save", "{out}.png"], 10_000, "out.png could not be written"),
        (["convert", str(TINY), "{out}"], 1_000_000, "bundle could not be written"),
    ],
)
def test_a_full_disk_leaves_nothing_behind(images, tmp_path, arguments, size, message):
    arguments = [argument.format(image=images[1], out=tmp_path / "out") for argument in arguments]
    with largest_file(size), pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert (
        stopped.value.code.startswith("error: ")
        and message in stopped.value.code
        and "Make room there" in stopped.value.code
    )
    assert not list(tmp_path.iterdir())


def test_an_older_drawing_stays_until_the_new_one_is_whole(tmp_path):
    (tmp_path / "old.png").write_bytes(b"old")

    class Page:
        def save(self, file, format):
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiles.save_whole(Page(), tmp_path / "old.png")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"old.png": b"old"}


# ---------------------------------------------------------------------------------------------------------------------
# convert, upload
# ---------------------------------------------------------------------------------------------------------------------


def test_convert_writes_a_folder_that_loads_by_its_own_code(started, installed, empty, model):
    """It was asked in a fresh process by the command; here its weights are compared."""
    out, err = ended(started["convert"])
    assert out.endswith("It is in converted.\n") and "released layout" in out and not err
    folder = empty / "converted"
    assert {"config.json", "modeling_jina_vlm.py", "tokenizer.json", "chat_template.jinja", "CODE_LICENSE"} < set(
        os.listdir(folder)
    )
    for name in ("modeling_jina_vlm.py", "conversion_jina_vlm.py", "chat_template.jinja"):
        assert (folder / name).read_bytes() == (installed / "jina_vlm" / name).read_bytes()
    tensors = load_file(folder / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert name == "lm_head.weight" or torch.equal(tensors[name].float(), parameter)


def test_convert_replaces_only_what_it_wrote(run, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    for options in ((), ("--yes",)):
        result = run("convert", TINY, tmp_path / "thesis", *options)
        assert result.returncode == 1 and b"is not empty" in result.stderr
    assert os.listdir(tmp_path / "thesis") == ["thesis.tex"]


def test_a_missing_shard_is_named_at_once(run, tmp_path):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    for arguments in (
        ("convert", tmp_path, "out"),
        ("upload", "--weights", tmp_path, "--output", "out", "--license", "mit", "--origin", "me/base"),
    ):
        result = run(*arguments)
        assert result.returncode == 1 and result.stderr.startswith(b"error: ")
        assert (
            b"lacks model-00002-of-00002.safetensors" in result.stderr and b"Fetch the missing ones" in result.stderr
        )


def test_what_the_hub_is_asked_first(run, empty, tmp_path):
    """Each of these is told before anything is loaded, and leaves nothing behind."""
    before = set(os.listdir(empty))
    upload = ("upload", "--weights", TINY, "--repo-id")
    (tmp_path / "notes.txt").write_text("mine")
    with serve_hub({TOKEN: "me"}) as hub:
        hub.put("me/page", tmp_path)
        online = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN}
        cases = {
            "There is no token for the Hub. Run `hf auth login`": run(*upload, "me/page", HF_ENDPOINT=hub.url),
            "The token is not valid": run(*upload, "me/page", HF_ENDPOINT=hub.url, HF_TOKEN="hf_WrongToken9876543210"),
            "--repo-id me/my page:": run(*upload, "me/my page", **online),
            "me/page holds 1 files on main: notes.txt. Say --yes": run(*upload, "me/page", **online),
            "Check the network": run(*upload, "me/page", HF_TOKEN=TOKEN),
            "neither a folder nor the name of a repository": run(
                "upload", "--weights", "./nothing", "--dry-run", **online
            ),
        }
        assert not [request for request in hub.requests if request.method == "POST"]
    for message, result in cases.items():
        said = result.stderr.decode()
        assert result.returncode == 1 and not result.stdout and said.startswith("error: ") and message in said, said
        assert "Traceback" not in said and TOKEN not in said
    assert set(os.listdir(empty)) == before


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_termination(environment, empty, sent, code):
    """While the Hub lets one wait."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        process = subprocess.Popen(
            ["jina-vlm", "upload", "--weights", TINY, "--repo-id", "me/page"],
            env={**environment, "HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}", "HF_TOKEN": TOKEN},
            cwd=empty, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        )  # fmt: skip
        connection, _ = silent.accept()
        process.send_signal(sent)
        out, err = process.communicate(timeout=60)
        connection.close()
    assert process.returncode == code and not out
    assert err == b"\nInterrupted. Nothing is half-written; run the same command again to go on.\n"


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ask", "no.png", "Why?"], "no.png: no such image. Expected a path"),
        (["ask", ".", "Why?"], '. is a folder. Name one image in it, or a quoted pattern such as "./*.png"'),
        (["chat", "."], ". is a folder. Name one image in it."),
        (["ask", "-", "-", "Why?"], "was given several times"),
        (["ask", "-", "Why?", "--model", "nowhere"], "--model nowhere: neither a folder nor the name of a repository"),
        (["ask", "Why?", "-m", "nowhere"], "Give --model, or the environment variable JINA_VLM_MODEL, a folder"),
        (["ask", "no/*.png", "Why?"], "no/*.png: no such image, and no file that this pattern matches."),
        (["batch", ".", "--output", "out", "--model", "nowhere"], "--model nowhere: neither a folder"),
        (["demo", "--model", "nowhere"], "--model nowhere: neither a folder"),
        (["app", "--model", "nowhere"], "--model nowhere: neither a folder"),
        (["chat", "-"], "In a chat stdin brings the questions"),
        (["tiles", "no.png"], "no.png: no such image"),
        (["convert", "./nowhere", "out"], "./nowhere: neither a folder"),
        (["merge", "./nowhere", "out", "--multi"], "ADAPTER ./nowhere: neither a folder"),
        (["upload", "--adapter", "nowhere", "--dry-run"], "--adapter nowhere: no such folder."),
        (["upload", "--adapter", str(TINY), "--dry-run"], "this is a whole checkpoint. Publish it by --weights"),
    ],
)
def test_mistakes_are_told_at_once(run, arguments, message):
    result = run(*arguments, PYTHONPROFILEIMPORTTIME="1")
    imports, said = [], []
    for line in result.stderr.decode().splitlines():
        (imports if line.startswith("import time:") else said).append(line)
    assert result.returncode == 1 and not result.stdout
    assert said[0].startswith("error: ") and message in said[0]
    assert imports and not [line for line in imports if line.endswith(("| torch", "| transformers"))]


@pytest.mark.parametrize(
    ("stdin", "options", "message"),
    [
        (b"just text", [], "What came on stdin: 9 bytes: not an image"),
        (b"", [], "What came on stdin: 0 bytes: not an image"),
        (None, ["--device", "cuda:99"], "--device cuda:99: "),
        (None, ["--model", "{empty}"], "{empty}"),
    ],
)
def test_mistakes_that_are_found_later(stdin, options, message, tmp_path, monkeypatch, images):
    """In this process, which has imported torch already."""
    options = [option.format(empty=tmp_path) for option in options]
    content = tmp_path / "stdin"
    content.write_bytes(images[0].read_bytes() if stdin is None else stdin)
    with content.open() as file, pytest.raises(SystemExit) as stopped:
        monkeypatch.setattr(sys, "stdin", file)
        main(["ask", "-", "Why?", "--model", str(TINY), *options])
    assert stopped.value.code.startswith("error: ") and message.format(empty=tmp_path) in stopped.value.code


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (jinja2.TemplateError("roles must alternate"), "chat template refuses this .*: roles must alternate"),
        (
            torch.OutOfMemoryError("CUDA out of memory.\nSee docs"),
            r"memory is full: CUDA out of memory\.\n.*--max-tiles",
        ),
        (MemoryError("llama.cpp has no memory"), r"memory is full: llama.cpp has no memory\n.*--max-tiles"),
        (MemoryError(), r"memory is full: MemoryError\n.*--max-tiles"),
    ],
)
def test_errors_of_libraries_say_what_to_do(error, message, monkeypatch, images):
    """A template of somebody else's and a full GPU, neither of which is a fault of ours."""

    def fail(*args):
        raise error

    monkeypatch.setattr(Conversation, "prepare_turn", fail)
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        main(["ask", str(images[0]), "Why?", "--model", str(TINY)])


def test_an_image_that_makes_no_tiles_does_not_stay_in_a_chat(checkpoint, images, tmp_path):
    """It would be refused with every later question. Its name is said, and the chat is as before."""
    Image.new("RGB", (2100, 10)).save(tmp_path / "wide.png")
    conversation = Conversation(*checkpoint, max_new_tokens=1)
    with pytest.raises(ValueError, match="wide.png: The image is 2100 x 10 pixels; its longer side"):
        chat.take(f"/image {tmp_path / 'wide.png'}", conversation, [], as_json=False)
    with pytest.raises(ValueError, match="Say which image: /image PATH"):
        chat.take("/image", conversation, [], as_json=False)
    assert len(chat.take(f"/image {images[0]}", conversation, [], as_json=False)) == 1


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_closed_streams(images, closed):
    command = f"{sys.executable} -m jina_vlm_tools tiles {shlex.quote(str(images[0]))} {closed}"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    assert ("tokens in all" in done.stdout) == (">&-" not in closed.replace("2>&-", ""))


def test_a_config_with_a_wrong_value(images, tmp_path):
    shutil.copytree(TINY, tmp_path / "tiny")
    config = json.loads((tmp_path / "tiny" / "config.json").read_text())
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(config | {"pooling_size": "two"}))
    with pytest.raises(SystemExit, match="^error: the checkpoint's config.json is not valid: .*pooling_size"):
        main(["ask", str(images[0]), "Why?", "--model", str(tmp_path / "tiny")])


def test_a_name_that_is_not_utf8(images, tmp_path):
    """Where output must be UTF-8, and as JSON."""
    name = os.fsencode(tmp_path) + b"/\xff.png"
    shutil.copy(images[0], name)
    command = [sys.executable, "-m", "jina_vlm_tools", "tiles", name, "--json"]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert os.fsencode(json.loads(done.stdout)["name"]) == name
