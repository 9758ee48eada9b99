"""What `jina-vlm convert --to transformers.js` makes: the same tokens in a browser as by torch, and the same tiles."""

import base64
import io
import json
import re
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from browser_folder import MODULES, Visitor, run_node, served
from conftest import ROOT, TINY
from jina_vlm import JinaVLMImageProcessor
from jina_vlm.tiling_jina_vlm import get_tile_positions
from PIL import Image

from jina_vlm_tools.engines.browser_folder import convert_for_browser
from jina_vlm_tools.synthetic.questions import evaluation_sample
from jina_vlm_tools.synthetic.shapes import draw_scene


SHAPES = ROOT / "docs" / "shapes.png"
NEW = 48
JPEG_TOLERANCE = 3  # of 255: decoders differ


def drawn(seed: int, width: int = 378, height: int = 378) -> Image.Image:
    return draw_scene(evaluation_sample(seed, "count", "en").scene).resize((width, height))


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turn(*parts: str | int, role: str = "user") -> dict:
    """Of texts, and of images by their places in a list."""
    content = [{"type": "image", "image": p} if isinstance(p, int) else {"type": "text", "text": p} for p in parts]
    return {"role": role, "content": content}


def shown(part: dict, images: list[Image.Image]) -> dict:
    """A part of a turn with its image in the place of that one's number."""
    return {**part, "image": images[part["image"]]} if "image" in part else part


def half_black() -> Image.Image:
    image = Image.new("RGB", (900, 500), "white")
    image.paste("black", (0, 0, 450, 500))
    return image


CHATS = {
    "one tile": ([drawn(1, 300, 280)], [turn(0, "Describe the picture.")]),
    "six tiles": ([drawn(2, 900, 640)], [turn(0, "How many shapes are there?")]),
    "twelve tiles": ([drawn(3, 1200, 1000)], [turn(0, "Welche Farbe hat die größte Form?")]),
    "tiles in a row": ([drawn(4, 2400, 200)], [turn(0, "¿Qué color tiene la figura de abajo?")]),
    "black tiles": ([half_black()], [turn(0, "Describe the picture.")]),
    "two images": ([drawn(5), drawn(6, 700, 380)], [turn(0, "et", 1, "Combien de formes y a-t-il ?")]),
    "no image": ([], [turn("What is the capital of France?")]),
    "turns": (
        [drawn(7), drawn(8, 640, 480)],
        [turn(0, "Describe the picture."), turn("2 shapes", role="assistant"), turn(1, "And here?")],
    ),
    "a system prompt": ([drawn(9)], [turn("Be brief.", role="system"), turn(0, "Describe the picture.")]),
}


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """A folder of the small checkpoint, as the command makes it: by the kind of its weights."""
    folders: dict[str | None, Path] = {}

    def convert(kind: str | None = None) -> Path:
        if kind not in folders:
            folder = tmp_path_factory.mktemp("converted") / (kind or "whole")
            folder.mkdir()
            convert_for_browser(str(TINY), folder, kind)
            folders[kind] = folder
        return folders[kind]

    return convert


@pytest.fixture(scope="session")
def open_folder(browser):
    with ExitStack() as stack:
        visitors = {}

        def visit(folder: Path) -> Visitor:
            if folder not in visitors:
                visitors[folder] = Visitor(browser, stack.enter_context(served(folder)))
            return visitors[folder]

        yield visit
        for visitor in visitors.values():
            visitor.context.close()
        assert [problem for visitor in visitors.values() for problem in visitor.problems] == []


@pytest.fixture(scope="session")
def visitor(converted, open_folder):
    return open_folder(converted())


@pytest.fixture(scope="session")
def expect(loaded):
    """Inputs and new tokens of a chat, by torch in float32."""
    model, processor = loaded
    assert model.dtype == torch.float32

    def generate(images: list[Image.Image], messages: list[dict]):
        chat = [{**message, "content": [shown(part, images) for part in message["content"]]} for message in messages]
        inputs = processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        output = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        return inputs, output[0, inputs["input_ids"].shape[1] :].tolist()

    return generate


# ---------------------------------------------------------------------------------------------------------------------
# Answers
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHATS)
def test_tokens_are_those_of_torch(name, visitor, expect, loaded):
    images, messages = CHATS[name]
    inputs, tokens = expect(images, messages)
    ours = visitor.answer_chat([encode(image) for image in images], messages, maxNewTokens=NEW)
    assert ours["input_ids"] == inputs["input_ids"].tolist()
    assert ours.get("tile_positions") == (inputs["tile_positions"].tolist() if images else None)
    assert ours["tokens"] == tokens
    assert ours["text"] == ours["streamed"].strip() == loaded[1].decode(tokens, skip_special_tokens=True).strip()
    assert ours["promptTokens"] == len(ours["input_ids"][0])


@pytest.mark.parametrize("size", [None, (900, 640)], ids=["as it is", "six tiles"])
def test_the_page_answers(size, visitor, expected, tmp_path):
    image = tmp_path / "shapes.png"
    picture = Image.open(SHAPES)
    (picture.resize(size) if size else picture).save(image)
    for question in ("Describe the picture.", "How many stars are there?"):
        (answer,) = expected(image, question)
        assert visitor.ask(question, image) == answer.text
        assert visitor.status.startswith(f"{answer.tokens} tokens after {answer.prompt_tokens} of the question, in ")
    assert not visitor.page.locator("#stop").is_visible() and visitor.page.locator("#ask").is_enabled()


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantized_weights_answer(kind, converted, open_folder, expected):
    (answer,) = expected(SHAPES, "Describe the picture.")
    assert open_folder(converted(kind)).ask("Describe the picture.", SHAPES) == answer.text


def test_an_answer_can_be_stopped(visitor):
    images, messages = CHATS["one tile"]
    whole = visitor.answer_chat([encode(image) for image in images], messages)
    part = visitor.answer_chat([encode(image) for image in images], messages, stopAtOnce=True)
    assert 0 < len(part["tokens"]) < len(whole["tokens"]) and whole["text"].startswith(part["text"])


def test_typed_control_tokens_are_text(visitor, loaded):
    ids = visitor.answer_chat([], [turn("<|image|> <im_patch> <|endoftext|>")], maxNewTokens=1)["input_ids"][0]
    special = loaded[1].tokenizer.added_tokens_decoder
    assert [special[token].content for token in ids if token in special] == ["<|endoftext|>"]


def test_what_the_page_says_of_what_it_cannot_do(visitor, tmp_path):
    (tmp_path / "no.png").write_bytes(b"no image")
    visitor.ask("What is it?", tmp_path / "no.png")
    assert visitor.status == "It did not work: no.png is no image that this browser reads."
    Image.new("RGB", (3000, 10)).save(tmp_path / "line.png")
    visitor.ask("What is it?", tmp_path / "line.png")
    assert "at most 200 times the shorter" in visitor.status
    visitor.ask("Why? " * 4000)
    assert "the model takes 4096" in visitor.status
    assert visitor.ask("How many stars are there?", SHAPES) == "1"


def test_what_the_page_says_of_a_folder_that_is_not_whole(converted, browser, tmp_path):
    for name in ("index.html", "jina_vlm.js"):
        (tmp_path / name).write_bytes((converted() / name).read_bytes())
    with served(tmp_path) as url:
        visitor = Visitor(browser, url)
        assert visitor.status == "It did not work: . has no processor_config.json: is it a converted folder?"
        assert visitor.page.locator("#ask").is_disabled() and visitor.problems == []
        visitor.context.close()


def test_without_a_network(converted, browser, expected, tmp_path):
    for path in converted().iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "node_modules").symlink_to(MODULES)
    page, paths = (converted() / "index.html").read_text(), "./node_modules/"
    local = {
        "@huggingface/transformers": paths + "@huggingface/transformers/dist/transformers.min.js",
        "onnxruntime-web/": paths + "onnxruntime-web/dist/",
    }
    (tmp_path / "index.html").unlink()
    (tmp_path / "index.html").write_text(re.sub(r"\{\s*\"imports\"[^<]*", json.dumps({"imports": local}), page))
    (answer,) = expected(SHAPES, "How many shapes are there?")
    with served(tmp_path) as url:
        visitor = Visitor(browser, url)
        assert visitor.ask("How many shapes are there?", SHAPES) == answer.text
        assert visitor.problems == [] and visitor.brought == []
        visitor.context.close()


# ---------------------------------------------------------------------------------------------------------------------
# Tiles
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def image_processor():
    return JinaVLMImageProcessor.from_pretrained(TINY)


@pytest.mark.parametrize(
    "changed", [{}, {"do_resize": False}, {"max_tiles": 5}, {"max_tiles": 40, "max_pixels": 4_000_000}]
)
def test_grids_are_those_of_python(changed, image_processor, loaded):

    processor = JinaVLMImageProcessor(**changed)
    generator = np.random.default_rng(0)
    sizes = [(side, other) for side in (1, 7, 8, 14, 20, 21, 111, 112, 113, 378, 644) for other in (1, 112, 400, 1000)]
    sizes += np.exp(generator.uniform(0, np.log(6000), (3000, 2))).astype(int).tolist()
    script = """
    const [sizes, settings] = JSON.parse(fs.readFileSync(0));
    console.log(JSON.stringify(sizes.map(([height, width]) => {
      try {
        const { size, grid } = page.getTiling(height, width, settings);
        const text = page.imageText(...grid, settings).length;
        return [size, grid, page.tilePositions(...grid), text];
      } catch (error) {
        return error.message.split(";")[0];
      }
    })));
    """
    sizes = [[int(height), int(width)] for height, width in sizes]
    ours = json.loads(run_node(script, given=json.dumps([sizes, processor.to_dict()])))
    for (height, width), found in zip(sizes, ours, strict=True):
        try:
            size, grid = processor.get_tiling(height, width)
        except ValueError as error:
            assert isinstance(found, str) and str(error).startswith(found[:30]), (height, width, found)
            continue
        grids = [processor.get_token_grid(*each) for each in ((1, 1), grid)]
        text = "".join(f"<im_start>{('<im_patch>' * x + '<im_col>') * y}<im_end>" for y, x in grids)
        assert found == [list(size), list(grid), get_tile_positions(*grid), len(text)], (height, width)


@pytest.mark.parametrize("do_resize", [True, False])
@pytest.mark.parametrize("size", [(378, 378), (5, 900), (333, 500), (640, 900), (1600, 1201), (500, 37)])
def test_pixels_are_those_of_python(size, do_resize, tmp_path):
    processor = JinaVLMImageProcessor(do_resize=do_resize)
    colors = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    expected = processor(Image.fromarray(colors), return_tensors="np")
    opaque = np.full((*size, 1), 255, np.uint8)
    (tmp_path / "image").write_bytes(np.concatenate([colors, opaque], axis=2).tobytes())
    script = """
    const [file, height, width, settings] = JSON.parse(fs.readFileSync(0));
    const tiles = page.makeTiles({ data: fs.readFileSync(file), height, width }, settings);
    fs.writeFileSync(`${file}-tiles`, tiles.pixelValues);
    console.log(JSON.stringify([tiles.dims, tiles.positions]));
    """
    given = [str(tmp_path / "image"), *size, processor.to_dict()]
    dims, positions = json.loads(run_node(script, given=json.dumps(given)))
    ours = np.fromfile(tmp_path / "image-tiles", np.float32).reshape(dims)
    assert positions == expected["tile_positions"].tolist()
    np.testing.assert_array_equal(ours, expected["pixel_values"])


def test_images_are_read_as_by_python(visitor, image_processor):
    """Transparency on white, EXIF's rotation, 16 bits, a palette: as a browser reads them."""
    generator = np.random.default_rng(0)
    colors = Image.fromarray(generator.integers(0, 256, (60, 90, 4), dtype=np.uint8))
    smooth, turned = drawn(1, 90, 60).convert("RGB"), Image.Exif()
    turned[274] = 6
    cases = {
        "transparent": (encode(colors), 1),
        "palette": (encode(smooth.quantize(16)), 0),
        "gray": (encode(smooth.convert("L")), 0),
        "turned": (encode(smooth, "JPEG", quality=95, subsampling=0, exif=turned), JPEG_TOLERANCE),
        "WebP": (encode(smooth, "WEBP", lossless=True), 0),
    }
    script = """async (file) => {
      const { readImage } = await import("./jina_vlm.js");
      const { data, height, width } = await readImage(await (await fetch(`data:;base64,${file}`)).blob());
      return [height, width, ...data];
    }"""
    for name, (file, tolerance) in cases.items():
        height, width, *data = visitor.page.evaluate(script, base64.b64encode(file).decode())
        expected = image_processor.process_image(Image.open(io.BytesIO(file))).permute(1, 2, 0).numpy().astype(int)
        ours = np.array(data).reshape(height, width, 4)
        assert ours.shape[:2] == expected.shape[:2], name
        assert np.abs(ours[..., :3] - expected).max() <= tolerance, name
        assert (ours[..., 3] == 255).all()
