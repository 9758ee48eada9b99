"""What `jina-vlm convert --to transformers.js` makes, by ONNX Runtime. tests/external/web opens it in a browser."""

import json

import pytest
import torch
from chats import CHATS, NEW, new_tokens, prepare

from jina_vlm_tools.cli.main import main
from jina_vlm_tools.engines import find_engine
from jina_vlm_tools.engines.browser_folder import DTYPES, GRAPHS, SUFFIXES, generate
from jina_vlm_tools.engines.graph_parts import cache_names
from jina_vlm_tools.engines.graph_runners import OnnxGraph
from jina_vlm_tools.engines.graphs import BROWSER_PARTS
from jina_vlm_tools.files import TINY


WITH_IMAGES = [name for name in CHATS if not name.startswith("no image")]


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """The folder that the command makes, by the kind of its weights."""
    folders = {}

    def convert(kind: str | None = None):
        if kind not in folders:
            folder = tmp_path_factory.mktemp("command") / "page"
            quantized = ["--quantize", kind] if kind else []
            main(["convert", str(TINY), str(folder), "--to", "transformers.js", *quantized])
            folders[kind] = folder
        return folders[kind]

    return convert


@pytest.fixture(params=[None, "int8", "int4"], ids=str)
def kind(request):
    return request.param


def test_the_folder_is_whole_and_for_a_browser(kind, converted):
    folder, suffix = converted(kind), SUFFIXES[DTYPES[kind]]
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    graphs = {f"{GRAPHS}/{part}{suffix}.onnx{data}" for part in BROWSER_PARTS for data in ("", "_data")}
    settings = {"config.json", "generation_config.json", "processor_config.json"}
    assert files == graphs | settings | {"tokenizer.json", "tokenizer_config.json", "index.html", "jina_vlm.js"}
    assert find_engine(folder) == "transformers.js"
    with pytest.raises(SystemExit, match="runs in a browser: python -m http.server --directory"):
        main(["ask", "Who?", "--model", str(folder)])
    with pytest.raises(SystemExit, match="is not empty"):
        main(["convert", str(TINY), str(folder), "--to", "transformers.js"])


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_tokens_are_those_of_torch(name, converted, processor, by_torch):
    inputs = prepare(processor, CHATS[name])
    assert generate(converted(), inputs, NEW) == new_tokens(by_torch, inputs)[0]


def test_features_are_the_models(converted, processor, by_torch):
    inputs = prepare(processor, CHATS["two images"])
    images = {name: inputs[name] for name in ("pixel_values", "tile_positions")}
    (features,) = OnnxGraph(str(converted() / GRAPHS / "vision_encoder.onnx"), "float32")(images)
    with torch.no_grad():
        expected = torch.cat(by_torch.get_image_features(**images).pooler_output)
    assert features.shape == expected.shape
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4 * expected.std().item())


def test_structural_tokens_are_no_answer(kind, converted, by_torch):
    config, structural = by_torch.config.text_config, by_torch.config.structural_token_ids
    assert json.loads((converted(kind) / "generation_config.json").read_text())["suppress_tokens"] == structural
    path = converted(kind) / GRAPHS / f"decoder_model_merged{SUFFIXES[DTYPES[kind]]}.onnx"
    past = torch.zeros(1, config.num_key_value_heads, 0, config.head_dim)
    inputs = {
        "inputs_embeds": torch.randn(1, 5, config.hidden_size),
        "attention_mask": torch.ones(1, 5, dtype=torch.int64),
        "position_ids": torch.arange(5)[None],
        **dict.fromkeys(cache_names("past_key_values", config.num_hidden_layers), past),
    }
    decode = OnnxGraph(str(path), "float32")
    everywhere, last = (decode({**inputs, "num_logits_to_keep": torch.tensor(number)})[0] for number in (0, 1))
    assert everywhere.shape[1] == 5 and last.shape[1] == 1
    # Those who ignore `suppress_tokens` find the logit of an unused entry.
    unused = everywhere[..., min(structural) - 1, None]
    torch.testing.assert_close(everywhere[..., structural], unused.expand_as(everywhere[..., structural]))


@pytest.mark.parametrize(
    "options, message",
    [
        (["--quantize", "int8-a8"], "with --to transformers.js choose from int8, int4"),
        (["--dtype", "bfloat16"], "--dtype is of weights in torch"),
        (["--vision", "onnx"], "--vision is for llama.cpp"),
    ],
    ids=lambda option: option[0] if isinstance(option, list) else "",
)
def test_options_of_others_are_refused(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["convert", str(TINY), str(tmp_path / "page"), "--to", "transformers.js", *options])
    assert message in capsys.readouterr().err


def test_a_folder_is_replaced_where_that_is_asked_for(converted, tmp_path):
    folder, config = tmp_path / "page", json.loads((converted() / "config.json").read_text())
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    main(["convert", str(TINY), str(folder), "--to", "transformers.js", "--quantize", "int8", "--yes"])
    assert (folder / GRAPHS / "vision_encoder_quantized.onnx").is_file()
    # What another model's config says is kept.
    (folder / "config.json").write_text(json.dumps({**config, "converted_type": None}))
    with pytest.raises(SystemExit, match="that --yes could replace"):
        main(["convert", str(TINY), str(folder), "--to", "transformers.js", "--yes"])
