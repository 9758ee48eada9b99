"""Which engine a checkpoint is for, and what `convert --to` and `--engine` refuse: without any engine."""

import json
import re
import shutil
import sys

import pytest
import torch
from conftest import ROOT, refused
from jina_vlm.tiling_jina_vlm import count_tokens, get_image_token_indices, get_tile_positions

from jina_vlm_tools.cli import serve
from jina_vlm_tools.cli.main import main
from jina_vlm_tools.engines import BROWSER, CONVERTED_TYPE, FOLDERS, check_engine, find_engine
from jina_vlm_tools.engines.quantization import QUANTIZATIONS
from jina_vlm_tools.extras import EXTRAS, RUNTIMES
from jina_vlm_tools.files import TINY, TINY_RETRIEVAL


pytestmark = pytest.mark.skipif(not TINY.is_dir(), reason="checkpoints/tiny has not been trained yet")


@pytest.fixture(params=FOLDERS)
def engine(request):
    return request.param


@pytest.fixture
def converted(engine, tmp_path):
    """A folder that says it is for an engine."""
    folder = tmp_path / "converted"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": FOLDERS[engine].model_type}))
    return folder


def fails(*arguments) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return str(stopped.value.code)


def test_the_engine_is_told_by_the_folder(engine, converted, tmp_path):
    assert find_engine(TINY) == "torch" and find_engine("owner/name") == "torch" and find_engine(tmp_path) == "torch"
    assert find_engine(converted) == check_engine(converted, None) == check_engine(converted, engine) == engine
    (tmp_path / "config.json").write_text("[]")
    assert find_engine(tmp_path) == "torch"


@pytest.mark.parametrize(
    "verb",
    [
        ("ask", "Who?", "--model"),
        ("chat", "--model"),
        ("demo", "--model"),
        ("batch", ".", "--output", "answers", "--model"),
        ("serve",),
    ],
    ids=lambda verb: verb[0],
)
def test_an_engine_that_does_not_fit_is_refused(verb, engine, converted):
    wanted = f"jina-vlm convert {TINY} FOLDER --to {FOLDERS[engine].format} --quantize"
    assert wanted in fails(*verb, TINY, "--engine", engine)
    other = next(name for name in FOLDERS if name != engine)
    for wrong in ("torch", other):
        said = fails(*verb, converted, "--engine", wrong)
        assert f"was converted for {engine}, and does not run by {wrong}" in said
        assert ("Leave --engine" in said) == (wrong != "torch")
    assert f"was converted for {engine}" in fails("convert", converted, converted / "again")


def test_a_folder_for_a_browser_is_run_by_no_command(tmp_path):
    config = {"model_type": "llava", CONVERTED_TYPE: BROWSER.model_type}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert find_engine(tmp_path) == "transformers.js"
    verbs = ("ask", "Who?", "--model"), ("chat", "--model"), ("serve",), ("demo", "--model"), ("app", "--model")
    for verb in verbs:
        assert f"runs in a browser: python -m http.server --directory {tmp_path}" in fails(*verb, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    assert find_engine(tmp_path) == "torch"


def test_serve_leaves_the_librarys_arguments_to_it(engine, converted):
    given = ["--port", "9000", str(converted), "--engine", engine, "--e"]
    assert serve.take_engine(given) == ["--port", "9000", str(converted), "--e"]
    with refused(f"name the folder that `jina-vlm convert --to {FOLDERS[engine].format}` made"):
        serve.take_engine(["--engine", engine])


def test_a_model_for_an_engine_needs_it(engine, converted, monkeypatch):
    from jina_vlm_tools.engines import graph_model, llama_cpp

    model_class = {
        "llama.cpp": llama_cpp.LlamaCppForConditionalGeneration,
        "onnx": graph_model.OnnxForConditionalGeneration,
        "openvino": graph_model.OpenVinoForConditionalGeneration,
    }[engine]
    extra = FOLDERS[engine].extra
    for module in EXTRAS[extra][1:]:
        monkeypatch.setitem(sys.modules, module, None)  # which convert
    monkeypatch.setitem(sys.modules, EXTRAS[extra][0], None)
    with refused(f"A checkpoint for {engine} needs `pip install {RUNTIMES[extra]}`", OSError):
        model_class.from_pretrained(converted)
    with refused("quantized when it was converted"):
        model_class.from_pretrained(converted, quantization_config={"quant_method": "quanto"})


def test_options_that_do_not_belong_together(tmp_path, capsys):
    for options, message in (
        (["--quantize", "Q8_0"], "--quantize is for engines beside torch: say --to gguf or onnx or openvino"),
        (["--to", "gguf", "--max-shard-size", "1GB"], "--max-shard-size divides this project's layout"),
        (["--to", "onnx", "--max-shard-size", "1GB"], "leave it out, or --to onnx"),
        (["--to", "gguf", "--quantize", "Q9"], "--quantize Q9: with --to gguf choose from F32, BF16"),
        (["--to", "gguf", "--quantize", "int8"], "--quantize int8: with --to gguf choose from F32, BF16"),
        (["--to", "openvino", "--quantize", "Q8_0"], "with --to openvino choose from int8, int4, int8-a8"),
        (["--to", "onnx", "--dtype", "bfloat16"], "--dtype is of weights in torch"),
        (["--to", "onnx", "--quantize", "int8", "--calibrate", "."], "--calibrate is for --quantize int8-a8"),
        (["--to", "onnx", "--quantize", "int8-a8", "--calibrate", "nowhere"], "nowhere: no such folder"),
        (["--to", "gguf", "--vision", "onnx", "--calibrate", "."], "--calibrate is for --quantize int8-a8"),
        (["--to", "gguf", "--vision", "openvino-int8", "--dtype", "bfloat16"], "leave it out, or --vision openvino"),
        (["--to", "gguf", "--vision", "int8"], "invalid choice: 'int8'"),
        (["--to", "onnx", "--vision", "onnx-int8"], "--vision is for llama.cpp"),
        (["--vision", "torch"], "--vision is for llama.cpp"),
    ):
        assert fails("convert", TINY, tmp_path / "made", *options) == "2"
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_overwritten(converted, tmp_path):
    assert "is not empty" in fails("convert", TINY, converted, "--to", "gguf")
    assert sorted(path.name for path in converted.iterdir()) == ["config.json"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    assert "no checkpoint that --yes could replace" in fails(
        "convert", TINY, tmp_path / "mine", "--to", "gguf", "--yes"
    )
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "all of it"


def test_yes_replaces_nothing_but_what_was_converted(converted, tmp_path):
    """Neither what a checkpoint is made of, nor what somebody else put there."""
    (converted / "mine").mkdir()
    (converted / "mine" / "thesis.txt").write_text("all of it")
    assert "also holds mine, mine/thesis.txt" in fails("convert", TINY, converted, "--to", "gguf", "--yes")
    assert (converted / "mine" / "thesis.txt").read_text() == "all of it"
    checkpoint = tmp_path / "given" / "tiny"
    shutil.copytree(TINY, checkpoint)
    for output in (checkpoint, checkpoint.parent):
        for options in ([], ["--to", "gguf"], ["--to", "onnx"]):
            assert "which --yes would replace too" in fails("convert", checkpoint, output, "--yes", *options)
    assert len(list(checkpoint.iterdir())) == len(list(TINY.iterdir()))


def test_commands_for_torch_refuse_what_was_converted(engine, converted, tmp_path):
    (tmp_path / "pages").mkdir()
    said = f"was converted for {engine}"
    assert said in fails("index", tmp_path / "pages", "--model", converted)
    assert said in fails("upload", "--weights", converted, "--dry-run")
    assert said in fails("search", tmp_path / "pages", "Who?", "--model", converted)
    assert said in fails("app", "--model", converted, "--retrieval", TINY_RETRIEVAL)


def test_a_folder_named_as_an_owner_on_the_hub_is_not_what_is_converted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jinaai").mkdir()
    (tmp_path / "jinaai" / "thesis.txt").write_text("all of it")
    said = fails("convert", "jinaai/jina-vlm", "jinaai", "--to", "gguf", "--yes")
    assert "no checkpoint that --yes could replace" in said and "replace too" not in said


def test_types_that_need_statistics_are_not_offered():
    assert {"F32", "BF16", "F16", "Q8_0", "Q4_K_M", "Q4_0"} <= {*QUANTIZATIONS}
    assert not [name for name in QUANTIZATIONS if name.startswith(("IQ1", "IQ2", "IQ3"))]


def test_the_order_that_a_port_is_told():
    """docs/mtmd.md writes out in ten lines where each token of a grid comes from."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "mtmd.md").read_text(), flags=re.DOTALL)
    exec(code, names := {})
    for rows in range(1, 13):
        for columns in range(1, 12 // rows + 1):
            index, features = names["order"](rows, columns), 14 * 14 * (1 + rows * columns)
            expected = get_image_token_indices(torch.tensor(get_tile_positions(rows, columns)), 14, 2).tolist()
            kept = [place for place in index if place < features]
            assert kept == expected[: len(kept)] and len(index) == count_tokens(rows, columns, 14, 2)
            marks = [place - features for place in index if place >= features]
            assert [marks.count(mark) for mark in (0, 1, 2)] == [2, 2, 14 + 10 * rows + 4]
