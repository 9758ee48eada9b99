"""`jina-vlm ask` does what the release's own command does; and what verbs have in common."""

import base64
import json
import re
import shutil
import sys
import tomllib
from pathlib import Path

import huggingface_hub
import jina_vlm
import pytest
import torch
from answers import answer_greedily, prepare
from conftest import ROOT, make_image, refused
from PIL import Image

from jina_vlm_tools import sources
from jina_vlm_tools.cli import demo, options
from jina_vlm_tools.cli.main import main, make_parser, parse_args
from jina_vlm_tools.extras import EXTRAS
from jina_vlm_tools.files import TINY
from jina_vlm_tools.inference import loading
from jina_vlm_tools.inference.asking import find_images
from jina_vlm_tools.inference.conversation import Conversation


MORE, FEWER = "How many shapes are there?", "Describe the picture."


@pytest.fixture(scope="module")
def checkpoint():
    processor, load_model = loading.load_processor_and_class(str(TINY))
    return loading.load_on_device(load_model, "cpu"), processor


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Two images of one size, of which the second one's grid depends on the fit to a budget; and a folder."""
    folder = tmp_path_factory.mktemp("photos")
    for index, name in enumerate(("b.png", "a.png")):
        Image.fromarray(make_image(186, 1177, seed=index)).save(folder / name)
    (folder / "more.png").mkdir()
    return folder


@pytest.fixture
def ask(monkeypatch, capsys, checkpoint):
    """The function `ask(*arguments)`: for each answer what the command reports and the inputs of the model."""
    model, _ = checkpoint
    seen, encoded = [], []
    generate = Conversation.generate

    def spy(conversation, inputs, show):
        seen.append({**inputs, "max_new_tokens": conversation.max_new_tokens})
        conversation.max_new_tokens = min(conversation.max_new_tokens, 6)
        encoded.clear()
        answer = generate(conversation, inputs, show)
        seen[-1]["tiles_encoded"] = sum(encoded)
        return answer

    monkeypatch.setattr(Conversation, "generate", spy)
    monkeypatch.setattr(loading, "load_on_device", lambda *_: model)
    hook = model.model.vision_model.register_forward_pre_hook(
        lambda module, arguments, keywords: encoded.append(len(keywords.get("pixel_values", *arguments[:1]))),
        with_kwargs=True,
    )

    def ask(*arguments):
        seen.clear()
        main(["ask", "--json", "--model", str(TINY), *map(str, arguments)])
        reports = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert len(reports) == len(seen)
        return list(zip(reports, seen, strict=True))

    yield ask
    hook.remove()


def check(checkpoint, asked: tuple[dict, dict], content: list, **settings) -> None:
    """That it was asked this, of strings and paths of images, and answered as the library alone answers it."""
    model, processor = checkpoint
    inputs = prepare(processor, content, **settings)
    report, seen = asked
    assert report["tokens"]["prompt"] == inputs["input_ids"].shape[1]
    assert [image["name"] for image in report["images"]] == [str(part) for part in content if isinstance(part, Path)]
    for name, tensor in inputs.items():
        assert torch.equal(seen[name], tensor), name
    assert report["answer"] == answer_greedily(model, processor, inputs, min(6, seen["max_new_tokens"])).strip()


NATIVE = {"do_resize": False}


def test_no_image(ask, checkpoint):
    (asked,) = ask("What is the capital of France?")
    check(checkpoint, asked, ["What is the capital of France?"])
    assert asked[1]["max_new_tokens"] == 1024 and asked[0]["images"] == []


def test_an_image_is_tiled_at_its_own_size_unless_told_what_to_fit_it_to(ask, checkpoint, photos):
    image = photos / "a.png"
    (native,), (fitted,) = ask(image, MORE), ask(image, MORE, "--max-pixels", 100_000)
    check(checkpoint, native, [image, MORE], **NATIVE)
    check(checkpoint, fitted, [image, MORE], max_pixels=100_000)
    grids = [(asked[0]["images"][0]["rows"], asked[0]["images"][0]["columns"]) for asked in (native, fitted)]
    assert grids[0] == (1, 5) != grids[1]


def test_names_of_the_releases_options(ask, checkpoint, photos):
    (asked,) = ask("-i", photos / "a.png", "-p", MORE, "--max-crops", 2, "--max-tokens", 3)
    check(checkpoint, asked, [photos / "a.png", MORE], max_tiles=2, **NATIVE)
    assert asked[0]["images"][0]["tiles"] == 3 and asked[1]["max_new_tokens"] == 3


@pytest.mark.parametrize("order", [(), ("--prompt-first",)], ids=["images first", "prompt first"])
def test_several_prompts_are_asked_apart_about_all_images(ask, checkpoint, photos, order):
    """A pattern stands for what it matches, sorted. What the cache holds of the images is no other answer."""
    images = [photos / "a.png", photos / "b.png"]
    asked = ask(photos / "[ab].png", "--max-tiles", 1, "-p", MORE, "-p", FEWER, "-p", FEWER, *order)
    for one, prompt in zip(asked, (MORE, FEWER, FEWER), strict=True):
        content = [prompt, *images] if order else [*images, prompt]
        check(checkpoint, one, content, max_tiles=1, **NATIVE)
    assert [seen["tiles_encoded"] for _, seen in asked] == ([4, 4, 0] if order else [4, 0, 0])


def test_map_asks_each_prompt_about_each_image(ask, checkpoint, photos):
    """Two images of one size make the same ids: neither answer may come from the other's cache."""
    asked = ask(photos / "*.png", "--map", "--max-tiles", 1, "-p", MORE, "-p", FEWER)
    expected = [[photos / name, prompt] for name in ("a.png", "b.png") for prompt in (MORE, FEWER)]
    for one, content in zip(asked, expected, strict=True):
        check(checkpoint, one, content, max_tiles=1, **NATIVE)
    assert [seen["tiles_encoded"] for _, seen in asked] == [2, 0, 2, 0]


def test_map_goes_on_behind_a_broken_image(photos, tmp_path, checkpoint, monkeypatch, capsys):
    """What is wrong with it is said, the others are answered, and the command has failed."""
    monkeypatch.setattr(loading, "load_on_device", lambda *_: checkpoint[0])
    for name in ("1.png", "3.png"):
        shutil.copy(photos / "a.png", tmp_path / name)
    (tmp_path / "2.png").write_bytes((photos / "a.png").read_bytes()[:400])
    command = ["ask", str(tmp_path / "*.png"), "--map", MORE, "--json", "--model", str(TINY), "--max-tokens", "1"]
    with pytest.raises(SystemExit, match="error: 1 of 3 images could not be asked about"):
        main([*command, "--max-tiles", "1"])
    said = capsys.readouterr()
    answered = [json.loads(line)["images"][0]["name"] for line in said.out.splitlines()]
    assert answered == [str(tmp_path / "1.png"), str(tmp_path / "3.png")]
    assert re.search(f"^error: .*{re.escape(str(tmp_path / '2.png'))}", said.err, re.M)


def test_which_images_patterns_stand_for(photos, tmp_path, monkeypatch):
    """Folders within are looked through by **; a file is meant by its own name, whatever is in it."""
    names = ["a.png", "x[1].png", "x1.png", "deep/er/b.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(photos / "a.png", tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert find_images(["x[1].png", "-"]) == ["x[1].png", "-"]
    assert find_images(["**/*.png"]) == sorted(names)
    assert find_images(["[a]*.png", "data:image/png;base64,[a]"]) == ["a.png", "data:image/png;base64,[a]"]
    with pytest.raises(ValueError, match="given several times"):
        find_images(["-", "a.png", "-"])
    with pytest.raises(FileNotFoundError, match="What is it\\?: no such image.* If it is a question, put it last"):
        find_images(["What is it?"])


@pytest.mark.parametrize(
    "arguments", [["ask", "{}", "Why?"], ["ask", "*.png", "Why?"], ["tiles", "{}"], ["chat", "{}"]]
)
def test_a_pdf_has_pages(arguments, tmp_path, monkeypatch):
    """Whatever its name; and an image of that name is one."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (60, 60)).save("page.png", format="PDF")
    Image.new("RGB", (60, 60)).save("image.pdf", format="PNG")
    main(["tiles", "image.pdf"])
    with pytest.raises(SystemExit, match="page.png is a PDF. Ask about its pages by `jina-vlm index FOLDER`"):
        main([argument.format("page.png") for argument in arguments])


def test_the_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"jina-vlm {jina_vlm.__version__}\n"


def test_labels_of_images(ask, checkpoint, photos):
    a, b = photos / "a.png", photos / "b.png"
    (asked,) = ask(a, b, "--image-labels", "--max-tiles", 1, "How does Image 2 differ?")
    content = ["Image 1:", a, "Image 2:", b, "How does Image 2 differ?"]
    check(checkpoint, asked, content, max_tiles=1, **NATIVE)


def test_urls(ask, web):
    folder, url = web
    Image.fromarray(make_image(60, 60)).save(folder / "asked.png")
    (asked,) = ask(f"{url}/asked.png", MORE)
    assert asked[0]["images"][0]["name"] == f"{url}/asked.png" and asked[1]["pixel_values"].shape[0] == 2
    uri = f"data:image/png;base64,{base64.b64encode((folder / 'asked.png').read_bytes()).decode()}"
    (again,) = ask(uri, MORE)
    assert torch.equal(again[1]["pixel_values"], asked[1]["pixel_values"])
    assert again[0]["images"][0]["name"] == f"{uri[:200]}..."


def test_answers_are_told_apart_and_counted(photos, checkpoint, monkeypatch, capsys):
    """As text: several have headings, and come piece by piece or, if it is wished, as a whole."""
    monkeypatch.setattr(loading, "load_on_device", lambda *_: checkpoint[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    arguments = ["ask", str(photos / "a.png"), "-p", MORE, "-p", "Why?", "--max-tiles", "1", "--max-tokens", "1"]
    said = []
    for more in ([], ["--no-stream"]):
        main([*arguments, "--model", str(TINY), *more])
        said.append(capsys.readouterr())
    lines = said[0].out.splitlines()
    assert lines[0] == f"{photos / 'a.png'}: {MORE}" and lines[3] == f"{photos / 'a.png'}: Why?" and lines[2] == ""
    assert said[0].out == said[1].out and lines[1] and lines[4]
    reports = re.findall(r"(\d+) tokens in, 424 of them for images; (\d+) out", said[0].err)
    assert len(reports) == 2 and all(int(tokens) > 424 for tokens, _ in reports)
    assert "checkpoints/tiny knows drawn shapes and nothing else" in said[0].err
    assert said[0].err.count("The answer is cut off: raise --max-new-tokens.") == 2


@pytest.mark.parametrize("question", ["OCR:", "Caption:short", "data: what?", "图片:这是什么？"])
def test_a_colon_makes_no_url(question):
    args = parse_args(["ask", "a.png", question])
    assert (args.image, args.prompt) == (["a.png"], [question])


@pytest.mark.parametrize("name", ["s3://bucket/a.png", "HTTP://host/a.png", "git+ssh://host/a.png", "data:image/png,"])
def test_urls_of_any_scheme_are_judged_where_they_are_opened(name):
    """A new source of images is added in one place, and the command line knows it."""
    assert sources.is_url(name) and find_images([name]) == [name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say what to ask"),
        (["photo.png"], "photo.png is an image. Say what to ask about it"),
        (["a.png", str(ROOT / "docs" / "shapes.png")], "shapes.png is an image. Say what to ask"),
        (["-"], "- is an image"),
        (["https://none.example/photo"], "https://none.example/photo is an image"),
        (["a.png", " "], "a question is empty"),
        (["a.png", "-p", ""], "a question is empty"),
        (["a.png", "-i", "b.png", "Why?"], "named in two ways, a.png and --image b.png"),
        (["Why?", "--map"], "--map is about images"),
        (["Why?", "--prompt-first"], "--prompt-first is about images"),
        (["Why?", "--image-labels"], "--image-labels is about images"),
        (["Why?", "--max-tiles", "4"], "--max-tiles is about images"),
        (["Why?", "--max-pixels", "4"], "--max-pixels is about images"),
        (["a.png", "b.png", "Why?", "--map", "--image-labels"], "leave it, or --map"),
        (["a.png", "Why?", "--json", "--stream"], "leave --stream, or --json"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_args(["ask", *arguments])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and message in said and said.startswith("usage: jina-vlm ask")


def test_a_budget_that_is_too_small_says_so(photos):
    with pytest.raises(SystemExit, match="got 3136 and 5. Give at least 3136 as `max_pixels`"):
        main(["ask", str(photos / "a.png"), "Why?", "--model", str(TINY), "--max-pixels", "5"])


# ---------------------------------------------------------------------------------------------------------------------
# Which checkpoint, in which numbers
# ---------------------------------------------------------------------------------------------------------------------

LOADING = {
    "ask": ["Why?"],
    "chat": [],
    "batch": ["photos", "--output", "answers"],
    "demo": [],
    "app": [],
}


@pytest.mark.parametrize("verb", LOADING)
def test_one_rule_says_which_checkpoint(verb, monkeypatch):
    command = [verb, *LOADING[verb]]
    monkeypatch.setenv("JINA_VLM_MODEL", "me/mine")
    assert parse_args(command).model == "me/mine"
    assert parse_args([*command, "--model", "me/other"]).model == parse_args([*command, "-m", "me/other"]).model
    assert parse_args([*command, "--model", "me/other"]).model == "me/other"
    monkeypatch.setenv("JINA_VLM_MODEL", "")
    assert parse_args(command).model == str(TINY)
    monkeypatch.setattr(options, "TINY", TINY / "none")
    assert parse_args(command).model == "jinaai/jina-vlm"


def test_one_text_says_it():
    _, commands = make_parser()
    for option in ("--model", "--dtype"):
        texts = {commands[verb]._option_string_actions[option].help for verb in LOADING}
        assert len(texts) == 1
    assert "JINA_VLM_MODEL" in commands["tiles"]._option_string_actions["--model"].help


def test_tiles_take_the_variable_too(monkeypatch, photos, bundle, capsys, tmp_path):
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    settings = json.loads((folder / "processor_config.json").read_text())
    settings["image_processor"]["max_tiles"] = 2
    (folder / "processor_config.json").write_text(json.dumps(settings))
    monkeypatch.setenv("JINA_VLM_MODEL", str(folder))
    main(["tiles", str(photos / "a.png"), "--json"])
    assert len(json.loads(capsys.readouterr().out)["tiles"]) == 2


@pytest.mark.parametrize("option", [("--seed", "2"), ("--language", "de")])
def test_the_demo_draws_or_takes_an_image(option, photos, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--image", str(photos / "a.png"), *option])
    assert stop.value.code == 2 and f"{option[0]} is of an image that is drawn" in capsys.readouterr().err


def test_the_demo_leaves_another_image_as_it_is(tmp_path, monkeypatch, photos):
    monkeypatch.chdir(tmp_path)
    demo.draw(1, "en")
    demo.draw(2, "de")
    shutil.copy(photos / "a.png", demo.DRAWN)
    with refused("demo.png is something else. Move it away", FileExistsError):
        demo.draw(1, "en")
    assert demo.DRAWN.read_bytes() == (photos / "a.png").read_bytes()
    demo.DRAWN.unlink()
    demo.DRAWN.symlink_to("nowhere.png")
    with refused("demo.png is something else", FileExistsError):
        demo.draw(1, "en")
    assert not (tmp_path / "nowhere.png").exists()


def test_the_demos_old_name_of_the_model_warns(capsys):
    assert parse_args(["demo", "--checkpoint", "me/mine"]).model == "me/mine"
    assert capsys.readouterr().err == "warning: --checkpoint is called --model now, and will go.\n"


@pytest.mark.parametrize("command", [["ask", "Why?"], ["tiles", str(ROOT / "docs" / "shapes.png")]])
@pytest.mark.parametrize("model", ["me/mine", "{empty}"])
def test_a_checkpoint_that_is_not_there(command, model, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    model = model.format(empty=tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--model", model])
    assert stopped.value.code.startswith(f"error: --model {model} cannot be loaded: ")
    assert stopped.value.code.endswith(sources.MODEL_ADVICE)


def test_large_models_are_computed_in_bfloat16(released_folder, monkeypatch):
    for device, small in (("cpu", "float32"), ("cuda:1", "auto")):
        assert loading.default_dtype(str(ROOT), device) == "bfloat16"  # the release's sizes
        assert loading.default_dtype(str(TINY), device) == loading.default_dtype(str(released_folder), device) == small
    _, load_model = loading.load_processor_and_class(str(released_folder))
    assert loading.load_on_device(load_model, "cpu").dtype == torch.float32
    monkeypatch.setattr(loading, "LARGE", 1000)
    assert loading.load_on_device(load_model, "cpu").dtype == torch.bfloat16
    assert loading.load_on_device(load_model, "cpu", "auto").dtype == torch.float32


def test_the_default_question():
    assert options.default_question("jinaai/jina-vlm") == "Describe the image."
    assert options.default_question(str(TINY)) == FEWER  # the words that it was trained on


# ---------------------------------------------------------------------------------------------------------------------
# Extras of the package
# ---------------------------------------------------------------------------------------------------------------------

NEEDING = {
    "serve": ["serve", str(TINY)],
    "batch": ["batch", ".", "--output", "answers", "--model", str(TINY)],
    "app": ["app", "--model", str(TINY)],
    "search": ["search", ".", "What is it?", "--model", str(TINY)],
    "train": ["train", "finetune_lora", "--output", "mine"],
    "llama": ["convert", str(TINY), "made", "--to", "gguf"],
    "onnx": ["convert", str(TINY), "made", "--to", "onnx"],
    "openvino": ["convert", str(TINY), "made", "--to", "openvino"],
}
# Of modules with other names
PACKAGES = {
    "yaml": "pyyaml",
    "sentence_transformers": "sentence-transformers",
    "llama_cpp": "llama-cpp-python",
    "onnx_ir": "onnx-ir",
}


@pytest.mark.parametrize("extra", NEEDING)
def test_what_is_not_installed_is_told_in_a_line(extra, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    command = NEEDING[extra]
    what = f"convert --to {command[-1]}" if command[0] == "convert" else extra
    for module in EXTRAS[extra]:
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(SystemExit) as stopped:
                main(NEEDING[extra])
        # others may be missing here as well
        needed, missing = stopped.value.code.split(" (not installed: ")
        assert needed == f'error: `jina-vlm {what}` needs `pip install ".[{extra}]"` in a checkout'
        assert module in missing.removesuffix(").").split(", ")
    assert not list(tmp_path.iterdir())


def test_extras_bring_what_verbs_need():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == "jina-vlm-transformers" and NEEDING.keys() | {"retrieval"} == EXTRAS.keys()
    for extra, modules in EXTRAS.items():
        brought = {re.match(r"[\w-]+", each)[0] for each in project["optional-dependencies"][extra]}
        assert {PACKAGES.get(name, name) for name in modules} <= brought
