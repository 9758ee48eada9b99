"""Which engine a checkpoint is for, and what `convert --to gguf` and `--engine` refuse: without llama.cpp."""

import json
import re
import sys

import pytest
import torch
from conftest import ROOT, refused
from jina_vlm.tiling_jina_vlm import count_tokens, get_image_token_indices, get_tile_positions

from jina_vlm_tools.cli import serve
from jina_vlm_tools.cli.main import main
from jina_vlm_tools.engines import check_engine, find_engine
from jina_vlm_tools.engines.quantization import QUANTIZATIONS
from jina_vlm_tools.files import TINY


pytestmark = pytest.mark.skipif(not TINY.is_dir(), reason="checkpoints/tiny has not been trained yet")


@pytest.fixture
def converted(tmp_path):
    """A folder that says it is for llama.cpp."""
    folder = tmp_path / "converted"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "jina_vlm_llama_cpp"}))
    return folder


def fails(*arguments) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return str(stopped.value.code)


def test_the_engine_is_told_by_the_folder(converted, tmp_path):
    assert find_engine(TINY) == "torch" and find_engine("owner/name") == "torch" and find_engine(tmp_path) == "torch"
    assert (
        find_engine(converted) == check_engine(converted, None) == check_engine(converted, "llama.cpp") == "llama.cpp"
    )
    (tmp_path / "config.json").write_text("[]")
    assert find_engine(tmp_path) == "torch"


@pytest.mark.parametrize(
    "verb", [("ask", "Who?", "--model"), ("chat", "--model"), ("serve",)], ids=lambda verb: verb[0]
)
def test_an_engine_that_does_not_fit_is_refused(verb, converted):
    assert f"jina-vlm convert {TINY} FOLDER --to gguf" in fails(*verb, TINY, "--engine", "llama.cpp")
    assert "was converted for llama.cpp, and holds no text model for torch" in fails(
        *verb, converted, "--engine", "torch"
    )
    assert "was converted for llama.cpp" in fails("convert", converted, converted / "again")


def test_serve_leaves_the_librarys_arguments_to_it(converted):
    given = ["--port", "9000", str(converted), "--engine", "llama.cpp", "--e"]
    assert serve.take_engine(given) == ["--port", "9000", str(converted), "--e"]
    with refused("name the folder"):
        serve.take_engine(["--engine", "llama.cpp"])


def test_a_model_for_llama_cpp_needs_it(converted, monkeypatch):
    from jina_vlm_tools.engines.llama_cpp import LlamaCppForConditionalGeneration

    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with refused('needs `pip install ".\\[llama\\]"`', OSError):
        LlamaCppForConditionalGeneration.from_pretrained(converted)
    with refused("quantized when it was converted"):
        LlamaCppForConditionalGeneration.from_pretrained(converted, quantization_config={"quant_method": "quanto"})


def test_options_that_do_not_belong_together(tmp_path, capsys):
    for options, message in (
        (["--quantize", "Q8_0"], "--quantize is llama.cpp's"),
        (["--to", "gguf", "--max-shard-size", "1GB"], "--max-shard-size divides this project's layout"),
        (["--to", "gguf", "--quantize", "Q9"], "invalid choice: 'Q9'"),
    ):
        assert fails("convert", TINY, tmp_path / "made", *options) == "2"
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_overwritten(converted, tmp_path):
    assert "is not empty" in fails("convert", TINY, converted, "--to", "gguf")
    assert sorted(path.name for path in converted.iterdir()) == ["config.json"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    assert "no bundle that --yes could replace" in fails("convert", TINY, tmp_path / "mine", "--to", "gguf", "--yes")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "all of it"


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
