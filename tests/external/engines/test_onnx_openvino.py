"""ONNX Runtime and OpenVINO run the model: they give `generate`'s tokens, where nothing but a mistake separates them.

All are float32 and greedy here. Quantized weights are held to what they cost on a few questions.
"""

import base64
import io
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import servers
import torch
from chats import (
    CHATS,
    NEW,
    ask_without_converters,
    converse,
    drawn,
    half_black,
    new_tokens,
    prepare,
    refused,
    sampled,
    user,
)
from jina_vlm import JinaVLMForConditionalGeneration, JinaVLMProcessor
from transformers import AutoModelForImageTextToText, StaticCache

from jina_vlm_tools.cli.main import main
from jina_vlm_tools.engines import calibration, find_engine
from jina_vlm_tools.engines.graph_folder import convert_for_graphs, write_for_graphs
from jina_vlm_tools.engines.graph_weights import BLOCKS, quantize_blocks, quantize_rows
from jina_vlm_tools.engines.graphs import PARTS
from jina_vlm_tools.files import TEMPLATE, TINY
from jina_vlm_tools.inference.conversation import Conversation
from jina_vlm_tools.inference.loading import load_on_device, load_processor_and_class


ROOT = Path(__file__).parents[3]
RELEASED = ROOT / "tests" / "golden" / "released-tiny"
ENGINES = ("onnx", "openvino")


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """The function `converted(engine, quantization=None, weights=TINY)`: a folder for an engine, made once."""
    made = {}

    def convert(engine: str, quantization: str | None = None, weights=TINY) -> Path:
        key = (engine, quantization, weights)
        if key not in made:
            made[key] = tmp_path_factory.mktemp(f"{engine}-{quantization}")
            convert_for_graphs(str(weights), made[key], engine, quantization)
        return made[key]

    return convert


@pytest.fixture(scope="session", params=ENGINES)
def engine(request):
    return request.param


@pytest.fixture(scope="session")
def model(engine, converted):
    return AutoModelForImageTextToText.from_pretrained(converted(engine), dtype=torch.float32)


@pytest.fixture
def words(by_torch):
    """Which of the vocabulary are no structural tokens: their head is covered."""
    structural = torch.tensor(by_torch.config.structural_token_ids)
    return ~torch.isin(torch.arange(by_torch.config.text_config.vocab_size), structural)


@pytest.mark.parametrize("name", CHATS)
def test_the_tokens_of_generate(name, processor, by_torch, model):
    inputs = prepare(processor, CHATS[name])
    assert new_tokens(model, inputs) == new_tokens(by_torch, inputs)


@pytest.mark.parametrize("name", ["two images", "tiles, some black", "turns", "no image"])
def test_the_logits_of_every_place(name, processor, by_torch, model, words):
    inputs = prepare(processor, CHATS[name])
    with torch.no_grad():
        ours, expected = model(**inputs).logits, by_torch(**inputs).logits
    assert ours.shape == expected.shape and ours.dtype == torch.float32
    is_word = ~torch.isin(inputs["input_ids"], torch.tensor(by_torch.config.structural_token_ids))
    torch.testing.assert_close(ours[is_word][:, words], expected[is_word][:, words], rtol=0, atol=1e-4)
    torch.testing.assert_close(ours[..., words], expected[..., words], rtol=0, atol=1e-3)
    some = model(**inputs, logits_to_keep=torch.tensor([-1, 5])).logits
    torch.testing.assert_close(some, ours[:, [-1, 5]], rtol=0, atol=1e-5)
    torch.testing.assert_close(model(**inputs, logits_to_keep=2).logits, ours[:, -2:], rtol=0, atol=1e-5)


def test_the_features_of_images(processor, by_torch, model):
    inputs = prepare(processor, CHATS["tiles, some black"], CHATS["two images"])
    given = [inputs[name] for name in ("pixel_values", "tile_positions")]
    with torch.no_grad():
        ours, expected = (each.get_image_features(*given) for each in (model, by_torch))
    # To the largest number: they reach 100,000, and float32 itself is off by one at these.
    assert (ours.last_hidden_state - expected.last_hidden_state).abs().max() < 1e-4
    for one, other in zip(ours.pooler_output, expected.pooler_output, strict=True):
        assert one.shape == other.shape and (one - other).abs().max() < 1e-4 * other.abs().max()


def test_tiles_that_are_the_same_run_once(processor, model, monkeypatch):
    inputs, tiles = prepare(processor, [user(drawn(1), "What?")]), []
    run = model.model.vision_model.tower.run
    monkeypatch.setattr(
        model.model.vision_model.tower,
        "run",
        lambda given: tiles.append(len(given["pixel_values"])) or run(given),
    )
    with torch.no_grad():
        model.get_image_features(inputs["pixel_values"], inputs["tile_positions"])
    assert inputs["pixel_values"].shape[0] == 2 and tiles == [1]


def test_a_batch_of_different_lengths(processor, by_torch, model):
    chats = [CHATS[name] for name in ("no image", "two images", "turns", "one image, color, de")]
    inputs = prepare(processor, *chats)
    assert new_tokens(model, inputs) == new_tokens(by_torch, inputs)


def test_beams_and_samples_have_the_options_of_generate(processor, by_torch, model):
    inputs = prepare(processor, CHATS["turns"], CHATS["two images"])
    options = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5}
    assert new_tokens(model, inputs, **options) == new_tokens(by_torch, inputs, **options)
    answers = [sampled(each, inputs) for each in (by_torch, model)]
    assert answers[0] == answers[1] and len({tuple(answer) for answer in answers[0]}) > 1


def test_structural_tokens_are_never_sampled(processor, model):
    torch.manual_seed(0)
    inputs = prepare(processor, CHATS["no image"])
    drawn_ids = new_tokens(model, inputs, do_sample=True, temperature=1e6, max_new_tokens=300, min_new_tokens=300)
    assert not {*drawn_ids[0]} & {*model.config.structural_token_ids}


def test_turns_go_on_from_the_cache(processor, by_torch, model, monkeypatch):
    conversation, answers = converse(model, processor)
    assert answers == converse(by_torch, processor)[1]

    read, decoder = [], model.model.language_model.decoder
    run = decoder.run
    monkeypatch.setattr(model.model.vision_model.tower, "run", None)
    monkeypatch.setattr(decoder, "run", lambda given: read.append(given["inputs_embeds"].shape[1]) or run(given))
    answer = conversation.answer("Describe the picture.", [])
    assert read[0] < 40 < answer.prompt_tokens  # the new turn alone


def test_without_a_cache(processor, by_torch, model):
    inputs = prepare(processor, CHATS["two images"], CHATS["no image"])
    for use_cache in (False, 0, None):
        assert new_tokens(model, inputs, use_cache=use_cache) == new_tokens(by_torch, inputs)


def test_streams_the_answer(processor, model):
    pieces = []
    answer = Conversation(model, processor, NEW).answer("Describe the picture.", [drawn(1)], pieces.append)
    assert len(pieces) > 1 and "".join(pieces).strip() == answer.text


def test_what_it_does_not_do_is_refused(processor, model):
    inputs = prepare(processor, CHATS["two images"])
    static = StaticCache(config=model.config.text_config, max_cache_len=64)
    for change, message in (
        ({"labels": inputs["input_ids"]}, "does not train"),
        ({"output_hidden_states": True}, "leave `output_hidden_states` out"),
        ({"cache": static}, "Expected a cache of `new_cache"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(1, 4, 128)}, "texts are tokens"),
        ({"attention_mask": torch.zeros(1, 3)}, "Expected `attention_mask`"),
        (
            {"attention_mask": 1 - inputs["attention_mask"].cumsum(1) // inputs["input_ids"].shape[1]},
            "padded on the left",
        ),
        ({"input_ids": inputs["input_ids"][:, 40:], "attention_mask": None}, "places"),
    ):
        with refused(message):
            model(**{**inputs, **change})
    with refused("call the model with head", NotImplementedError):
        model.model(**inputs)


def test_other_types_than_the_engines_are_refused(engine, converted):
    with refused(f"{engine} computes in float32.*not in float16"):
        AutoModelForImageTextToText.from_pretrained(converted(engine), dtype=torch.float16)
    with refused("quantized when it was converted"):
        AutoModelForImageTextToText.from_pretrained(converted(engine), quantization_config={"quant_method": "quanto"})


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def test_the_released_layout(engine, converted):
    folder = converted(engine, weights=RELEASED)
    expected = JinaVLMForConditionalGeneration.from_pretrained(RELEASED, dtype=torch.float32).eval()
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = JinaVLMProcessor.from_pretrained(folder)
    assert processor.chat_template == TEMPLATE.read_text()
    for chat in ([user("What?")], [user(half_black(500, 400), "What?")]):
        inputs = prepare(processor, chat)
        assert new_tokens(model, inputs) == new_tokens(expected, inputs)


@pytest.mark.parametrize("quantization", ["int8", "int4", "int8-a8"])
def test_quantized_weights(quantization, engine, converted, processor, by_torch, words):
    folder = converted(engine, quantization)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    divergences = []
    for name in ("two images", "turns", "tiles, some black", "no image"):
        inputs = prepare(processor, CHATS[name])
        with torch.no_grad():
            given, expected = (
                each(**inputs, logits_to_keep=1).logits[0, 0, words].softmax(0) for each in (model, by_torch)
            )
        divergences.append(float((expected * (expected / given).log()).sum()))
    assert 1e-8 < np.mean(divergences) < {"int8": 0.01, "int8-a8": 0.05, "int4": 0.3}[quantization]
    size = {
        each: sum(path.stat().st_size for path in converted(engine, each).iterdir()) for each in (None, quantization)
    }
    assert size[quantization] < size[None] / 2


def test_types_of_matrices_in_onnx(converted):
    """Products in 8 or 4 bits, the head in 8; the tower's with int8 activations are ONNX's own operators."""
    for quantization, bits in (("int8", {8: 23}), ("int4", {4: 21, 8: 1})):
        graph = onnx.load(converted("onnx", quantization) / "decoder.onnx", load_external_data=False).graph
        nodes = [node for node in graph.node if node.op_type == "MatMulNBits"]
        given = [attribute.i for node in nodes for attribute in node.attribute if attribute.name == "bits"]
        assert {each: given.count(each) for each in set(given)} == {
            **bits,
            **({8: 22} if quantization == "int8" else {}),
        }
    tower = onnx.load(converted("onnx", "int8-a8") / "tower.onnx", load_external_data=False).graph
    kinds = [node.op_type for node in tower.node]
    assert kinds.count("QuantizeLinear") >= 20 and "MatMulNBits" not in kinds


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_the_towers_attention_is_one_operator_of_onnx_runtime(quantization, converted):
    """Which never holds all scores of a tile: half of what the tower takes beyond its weights."""
    graph = onnx.load(converted("onnx", quantization) / "tower.onnx", load_external_data=False).graph
    kinds = [node.op_type for node in graph.node]
    layers = JinaVLMForConditionalGeneration.from_pretrained(TINY).model.vision_model.tower.encoder.layers
    assert kinds.count("MultiHeadAttention") == len(layers) and "Softmax" not in kinds


def test_files_name_nothing_of_the_machine(converted):
    for path in converted("onnx").glob("*.onnx"):
        content = path.read_bytes()
        assert b"site-packages" not in content and str(ROOT).encode() not in content


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(7, 256), (5, 300), (3, 33)])
def test_blocks_are_rounded_to_their_nearest_level(bits, shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    matrix[0] = 0
    numbers, scales, zero_points = quantize_blocks(matrix, bits)
    if bits == 4:
        numbers, zero_points = (
            torch.stack([each & 15, each >> 4], dim=-1).flatten(-2) for each in (numbers, zero_points)
        )
    zero_points = zero_points[:, : scales.shape[1], None]
    whole = ((numbers.float() - zero_points.float()) * scales[..., None]).flatten(1)[:, : shape[1]]
    step = scales.repeat_interleave(BLOCKS[bits], dim=1)[:, : shape[1]]
    assert ((whole - matrix).abs() <= step * 1.01).all() and whole[0].eq(0).all()
    numbers, scales = quantize_rows(matrix)
    assert ((numbers.float() * scales[:, :1] + scales[:, 1:] - matrix).abs() <= scales[:, :1] * 0.51).all()


def test_drawn_pages_need_a_font(processor, monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.startswith("jina_vlm_tools.synthetic")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with refused("^Drawn pages need `pip install matplotlib`.*--calibrate DIR", OSError):
        convert_for_graphs(str(TINY), tmp_path, "onnx", "int8-a8")


def test_calibration_takes_pages_of_a_folder(processor, tmp_path):
    tiles = calibration.collect_tiles(processor, None)
    assert len(tiles) == calibration.TILES and all(tile.shape == (1, 3, 378, 378) for tile in tiles)
    half_black(900, 500).save(tmp_path / "page.png")
    drawn(1).save(tmp_path / "page.pdf")
    (tmp_path / "broken.png").write_bytes(b"no image")
    tiles = calibration.collect_tiles(processor, tmp_path)
    assert 1 + calibration.TILES_OF_A_PAGE <= len(tiles) <= 2 * calibration.TILES_OF_A_PAGE
    (tmp_path / "empty").mkdir()
    with refused("has no image or PDF"):
        calibration.collect_tiles(processor, tmp_path / "empty")


def test_damaged_and_missing_files(engine, converted, tmp_path):
    graphs, weights = {"onnx": (".onnx", ".onnx.data"), "openvino": (".xml", ".bin")}[engine]
    for path in converted(engine).iterdir():
        shutil.copy(path, tmp_path)
    (tmp_path / f"tower{graphs}").write_bytes((tmp_path / f"tower{graphs}").read_bytes()[:10_000])
    with refused(f"cannot load .*tower{graphs}", OSError):
        AutoModelForImageTextToText.from_pretrained(tmp_path)
    (tmp_path / f"tower{weights}").unlink()
    with refused(f"has no tower{weights}", OSError):
        AutoModelForImageTextToText.from_pretrained(tmp_path)


@pytest.mark.parametrize("part", ["tower", "connector", "embedding", "decoder"])
def test_graphs_of_another_checkpoint_are_refused(part, engine, converted, tmp_path):
    for path in converted(engine).iterdir():
        (tmp_path / path.name).symlink_to(path)
    for path in converted(engine, None, RELEASED).glob(f"{part}.*"):
        (tmp_path / path.name).unlink()
        shutil.copy(path, tmp_path)
    with refused(f"{part}.* it is of another checkpoint than its config.json"):
        AutoModelForImageTextToText.from_pretrained(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def folder(engine, tmp_path_factory):
    """As the command makes it, and asks it in a fresh process."""
    folder = tmp_path_factory.mktemp("command") / f"for-{engine}"
    main(["convert", str(TINY), str(folder), "--to", engine])
    return folder


def test_convert_makes_a_whole_folder(folder, engine):
    suffixes = {"onnx": (".onnx", ".onnx.data"), "openvino": (".bin", ".xml")}[engine]
    assert {path.name for path in folder.iterdir()} == {
        *(part + suffix for part in PARTS for suffix in suffixes),
        *("chat_template.jinja", "config.json", "generation_config.json", "processor_config.json"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    assert find_engine(folder) == engine and "auto_map" not in (folder / "config.json").read_text()
    with pytest.raises(SystemExit, match="is not empty"):
        main(["convert", str(TINY), str(folder), "--to", engine])


def test_ask_and_chat(folder, engine, tmp_path, capsys, monkeypatch):
    image = tmp_path / "shapes.png"
    drawn(1).save(image)
    reports = {}
    for name, model in (("torch", TINY), (engine, folder)):
        main(["ask", str(image), "Describe the picture.", "--model", str(model), "--engine", name, "--json"])
        reports[name] = json.loads(capsys.readouterr().out)
    ours, expected = reports[engine], reports["torch"]
    same = ("answer", "tokens", "images", "device", "dtype")
    assert {key: ours[key] for key in same} == {key: expected[key] for key in same} and ours["engine"] == engine
    monkeypatch.setattr(sys, "stdin", io.StringIO("Describe the picture.\nHow many shapes are there?\n"))
    main(["chat", str(image), "--model", str(folder), "--json"])
    answers = [json.loads(line)["answer"] for line in capsys.readouterr().out.splitlines()]
    processor, load_model = load_processor_and_class(str(TINY))
    conversation = Conversation(load_on_device(load_model, "cpu"), processor, 256)
    expected = [
        conversation.answer("Describe the picture.", [drawn(1)]),
        conversation.answer("How many shapes are there?", []),
    ]
    assert answers == [answer.text for answer in expected]


def test_to_run_it_needs_one_package(folder, engine, tmp_path):
    drawn(1).save(tmp_path / "shapes.png")
    report = ask_without_converters(engine, tmp_path / "shapes.png", "How many shapes are there?", "--model", folder)
    assert report["answer"] and report["engine"] == engine


def test_batch(folder, engine, tmp_path):
    (tmp_path / "images").mkdir()
    for seed, width in ((1, 300), (2, 700), (3, 378)):
        drawn(seed, width).save(tmp_path / "images" / f"{seed}.png")
    answers = {}
    for name, model in (("torch", TINY), (engine, folder)):
        output = tmp_path / name
        command = ["batch", str(tmp_path / "images"), "--output", str(output), "--model", str(model)]
        main([*command, "--engine", name, "--format", "jsonl", "--question", "How many shapes are there?"])
        rows = [json.loads(line) for path in output.rglob("*.jsonl") for line in path.read_text().splitlines()]
        answers[name] = {row["id"]: row["answer"] for row in rows}
    assert answers[engine] == answers["torch"] and len(answers["torch"]) == 3
    with pytest.raises(SystemExit, match="does not run by llama.cpp. Leave --engine"):
        main([*command, "--engine", "llama.cpp"])


def test_serve(folder, engine, tmp_path, processor, by_torch):
    openai = pytest.importorskip("openai")
    port, content = servers.free_port(), io.BytesIO()
    drawn(1).save(content, "PNG")
    command = [sys.executable, "-m", "jina_vlm_tools", "serve", str(folder), "--engine", engine]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "no_proxy": "127.0.0.1"}
    url = f"http://127.0.0.1:{port}"
    uri = "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
    parts = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": "Describe the picture."}]
    request = {"model": str(folder), "messages": [{"role": "user", "content": parts}], "temperature": 0}
    inputs = prepare(processor, [user(drawn(1), "Describe the picture.")])
    expected = processor.batch_decode(new_tokens(by_torch, inputs, max_new_tokens=24), skip_special_tokens=True)[0]
    with (
        servers.running(command, f"{url}/health", tmp_path / "log", seconds=300, cwd=ROOT, env=environment),
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300) as client,
    ):
        whole = client.chat.completions.create(**request, max_tokens=24)
        assert whole.choices[0].message.content.strip() == expected.strip()
        stream = list(client.chat.completions.create(**request, max_tokens=24, stream=True))
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
        assert "".join(pieces).strip() == expected.strip() and len([piece for piece in pieces if piece]) > 1


def test_quantized_by_command_and_replaced(engine, tmp_path, capsys):
    (tmp_path / "pages").mkdir()
    half_black(900, 500).save(tmp_path / "pages" / "page.png")
    made = [str(TINY), str(tmp_path / "made"), "--to", engine]
    main(["convert", *made, "--quantize", "INT8-A8", "--calibrate", str(tmp_path / "pages"), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["tensors"]["tower"] == "int8-a8" and report["tensors"]["decoder"] == "int8" and report["answer"]
    main(["convert", *made, "--quantize", "int4", "--yes", "--json"])
    assert json.loads(capsys.readouterr().out)["tensors"]["decoder"] == "int4, its head int8"


def test_a_full_disk_leaves_nothing(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    with pytest.raises(SystemExit, match="is too small: 0.00 GB are free"):
        main(["convert", str(TINY), str(tmp_path / "made"), "--to", engine])
    assert not list(tmp_path.iterdir())


def test_ropes_that_change_with_a_texts_length_are_refused(engine, tmp_path):
    (tmp_path / "given").mkdir()
    for path in TINY.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path / "given")
    settings = json.loads((TINY / "config.json").read_text())
    settings["text_config"]["rope_parameters"].update(rope_type="dynamic", factor=2.0)
    (tmp_path / "given" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(SystemExit, match="`rope_parameters`"):
        main(["convert", str(tmp_path / "given"), str(tmp_path / "made"), "--to", engine])
    assert [path.name for path in tmp_path.iterdir()] == ["given"]


def test_rows_that_make_no_whole_groups(by_torch, processor, tmp_path, monkeypatch):
    """NNCF raises at them, and ONNX Runtime's blocks are filled up."""
    monkeypatch.setattr(by_torch.config.text_config, "intermediate_size", 400)
    with refused("rows of 128, 400, 256, which NNCF cannot cut"):
        write_for_graphs(by_torch, processor, tmp_path, "openvino", "int4")
    assert not list(tmp_path.iterdir())
