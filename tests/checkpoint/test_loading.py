"""The released layout, the native one, and the three ways in."""

import json
import logging
import os
import re
import shutil
from pathlib import Path

import jina_vlm
import pytest
import torch
from conftest import ROOT, make_image, python
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor


@pytest.fixture(scope="module")
def inputs(processor):
    text = " User: <|image|>What? Assistant:"
    return processor(text=text, images=make_image(150, 100), return_tensors="pt")


@pytest.fixture(scope="module")
def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def assert_same(model, inputs, logits):
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**inputs).logits, logits, rtol=0, atol=1e-5)


@pytest.fixture
def released_copy(released_folder, tmp_path):
    folder = tmp_path / "released"
    shutil.copytree(released_folder, folder)
    for file in folder.iterdir():
        file.chmod(0o644)
    return folder


def edit_tensors(folder: Path, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_json(file: Path, edit) -> None:
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


# The released layout -------------------------------------------------------------------------------------------------


def test_every_auto_class_reads_the_released_folder(released_folder, inputs, logits):
    config = AutoConfig.from_pretrained(released_folder)
    assert type(config) is jina_vlm.JinaVLMConfig and config.model_type == "jina_vlm"
    assert config.vision_feature_layers == [24, 18] and config.vision_config.num_hidden_layers == 25
    assert not hasattr(config, "auto_map")
    for auto_class in (AutoModelForImageTextToText, AutoModelForCausalLM):
        model = auto_class.from_pretrained(released_folder)
        assert type(model) is jina_vlm.JinaVLMForConditionalGeneration
        assert_same(model, inputs, logits)
    base = AutoModel.from_pretrained(released_folder)
    assert type(base) is jina_vlm.JinaVLMModel
    assert type(AutoProcessor.from_pretrained(released_folder)) is jina_vlm.JinaVLMProcessor


def test_sharded_released_layout(released_copy, inputs, logits):
    tensors = load_file(released_copy / "model.safetensors")
    names = sorted(tensors)
    shards = {f"model-{i + 1:05}-of-00003.safetensors": names[i::3] for i in range(3)}  # fused tensors' parts apart
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, released_copy / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in shards.items() for name in part}}
    (released_copy / "model.safetensors.index.json").write_text(json.dumps(index))
    (released_copy / "model.safetensors").unlink()
    assert_same(AutoModelForImageTextToText.from_pretrained(released_copy), inputs, logits)


def test_released_layout_loads_without_a_word(released_folder, caplog):
    """The tower's last two blocks and final norm are in the file, and dropped silently; nothing is asked."""
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        model, info = AutoModelForImageTextToText.from_pretrained(released_folder, output_loading_info=True)
        AutoProcessor.from_pretrained(released_folder)
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info["unexpected_keys"]
    assert not caplog.records
    assert model.generation_config.max_length in (None, 20)  # nothing of the old config's leftovers
    assert model.generation_config.top_k is None or model.generation_config.top_k == 50
    assert model.generation_config.eos_token_id == 323


def test_unexpected_tensors_are_named_in_a_warning(released_copy, caplog):
    edit_tensors(released_copy, lambda tensors: tensors.update({"model.vision_model.layers.3.extra": torch.zeros(2)}))
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING, logger="transformers"):
        _, info = AutoModelForImageTextToText.from_pretrained(released_copy, output_loading_info=True)
    assert [name for name in info["unexpected_keys"] if name.endswith("layers.3.extra")]
    assert "layers.3.extra" in caplog.text


@pytest.mark.parametrize(
    "name",
    [
        "model.language_model.layers.1.attn.qkv_w.weight",
        "model.language_model.layers.0.attn.k_lnorm.weight",
        "model.language_model.embedding.embedding",
        "model.language_model.embedding.new_embedding",
        "model.vision_model.layers.7.attn.qkv_w.weight",
        "model.vision_model.layers.24.ffn.down.bias",
        "model.vision_model.pos_embed",
        "model.vision_model.vl_connector.pad_embed",
        "model.vision_model.vl_connector.pooling.kv_w.weight",
        "model.vision_model.vl_connector.projector.up.weight",
        "lm_head.weight",
    ],
)
@pytest.mark.parametrize("fault", ["missing", "mis-shaped"])
def test_missing_and_mis_shaped_tensors_are_errors_that_name_them(released_copy, name, fault):
    def edit(tensors):
        tensor = tensors.pop(name)
        if fault == "mis-shaped":
            tensors[name] = torch.cat([tensor, tensor[:3]]).contiguous()

    edit_tensors(released_copy, edit)
    if fault == "mis-shaped" and name.endswith("embedding.new_embedding"):
        name = "model.language_model.embedding.embedding"  # joined with it; the sum of both is wrong
    with pytest.raises(ValueError, match=re.escape(f"`{name}`")):
        AutoModelForImageTextToText.from_pretrained(released_copy)


@pytest.mark.parametrize("letter", "qkv")
def test_text_biases_other_than_zero_are_an_error(released_copy, letter):
    name = f"model.language_model.layers.1.attn.{letter}_b"
    edit_tensors(released_copy, lambda tensors: tensors[name].__setitem__(3, 0.5))
    with pytest.raises(ValueError, match=re.escape(f"`{name}` holds values other than zero")):
        AutoModelForImageTextToText.from_pretrained(released_copy)


@pytest.mark.parametrize(
    "path, value",
    [
        ("text_config.block_config.attn_config.sliding_window", 128),
        ("text_config.block_config.attn_config.q_bias", True),
        ("text_config.block_config.ffn_config.activation_type", "gelu"),
        ("text_config.rope_scaling", {"type": "linear", "factor": 2.0}),
        ("text_config.tie_word_embeddings", True),
        ("text_config.block_config.attn_config.new_setting", 7),
        ("vision_config.use_cls_token", True),
        ("vision_config.block_config.postnorm", True),
        ("vision_config.vl_connector_config.pooling_type", "mean"),
        ("vision_config.vl_connector_config.pooling_h", 3),
        ("vision_config.vit_layers", [-1, -10]),
        ("vision_config.output_size", 64),
        ("vision_config.block_config.attn_config.head_dim", 16),
        ("vision_config.hidden_size", None),
        ("quantization_config", {"quant_method": "gptq"}),
    ],
)
def test_unsupported_released_settings_are_refused_by_name(released_copy, path, value):
    def edit(config):
        *parents, last = path.split(".")
        for parent in parents:
            config = config[parent]
        config[last] = value

    edit_json(released_copy / "config.json", edit)
    key = path.rsplit(".", 1)[0] if path.endswith("head_dim") else path
    with pytest.raises(ValueError, match=re.escape(f"`{key}`")):
        AutoConfig.from_pretrained(released_copy)


@pytest.mark.parametrize(
    "key, value", [("cropping_method", "resize"), ("antialias", True), ("overlap_margins", [4, 2])]
)
def test_unsupported_released_image_settings_are_refused_by_name(released_copy, key, value):
    edit_json(released_copy / "preprocessor_config.json", lambda config: config.update({key: value}))
    with pytest.raises(ValueError, match=f"`{key}`"):
        AutoProcessor.from_pretrained(released_copy)


def test_what_has_no_effect_is_ignored(released_copy):
    def edit(config):
        config["text_config"]["block_config"]["attn_config"]["dropout"] = 0.1
        config["text_config"]["block_config"]["ffn_config"]["ratio"] = 3
        config["vision_config"]["top_k"] = 7
        config["dtype"] = "bfloat16"

    edit_json(released_copy / "config.json", edit)
    assert AutoConfig.from_pretrained(released_copy).dtype is torch.bfloat16


# The native layout ---------------------------------------------------------------------------------------------------


def test_saved_weights_are_native_and_load_to_the_same_logits(bundle, model, inputs, logits):
    assert sorted(load_file(bundle / "model.safetensors")) == sorted(model.state_dict())
    assert_same(jina_vlm.JinaVLMForConditionalGeneration.from_pretrained(bundle), inputs, logits)
    config = json.loads((bundle / "config.json").read_text())
    assert config["model_type"] == "jina_vlm" and set(config["auto_map"]) == {
        "AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM",
    }  # fmt: skip
    with pytest.raises(ValueError, match="save_original_format"):
        model.save_pretrained(bundle / "other", save_original_format=True)


@pytest.mark.parametrize("layout", ["released", "native"])
def test_what_a_loaded_model_keeps_can_be_reversed(released_folder, bundle, layout):
    """llm-compressor reverses it when it saves."""
    model = jina_vlm.JinaVLMForConditionalGeneration.from_pretrained(
        released_folder if layout == "released" else bundle
    )
    for conversion in model._weight_conversions:
        conversion.reverse_transform()


def test_native_sharded_and_base_model(bundle, model, tmp_path, inputs, logits):
    model.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").exists()
    assert_same(jina_vlm.JinaVLMForConditionalGeneration.from_pretrained(tmp_path / "sharded"), inputs, logits)
    base = jina_vlm.JinaVLMModel.from_pretrained(bundle)
    with torch.no_grad():
        hidden = base.eval()(**inputs).last_hidden_state
        torch.testing.assert_close(model.lm_head(hidden), logits, rtol=0, atol=1e-5)


def test_missing_tensor_of_the_native_layout_is_an_error(bundle, tmp_path):
    shutil.copytree(bundle, tmp_path / "broken")
    edit_tensors(tmp_path / "broken", lambda tensors: tensors.pop("model.connector.q_proj.bias"))
    with pytest.raises(ValueError, match=r"`model\.connector\.q_proj\.bias`.* is missing"):
        jina_vlm.JinaVLMForConditionalGeneration.from_pretrained(tmp_path / "broken")


def test_generation_settings_survive_saving(model, bundle, tmp_path):
    copy = jina_vlm.JinaVLMForConditionalGeneration.from_pretrained(bundle)
    copy.generation_config.max_new_tokens = 33
    copy.save_pretrained(tmp_path)
    again = jina_vlm.JinaVLMForConditionalGeneration.from_pretrained(tmp_path).generation_config
    assert again.max_new_tokens == 33 and again.suppress_tokens == model.config.structural_token_ids


# Three ways in -------------------------------------------------------------------------------------------------------

ANSWER = """
import sys
import numpy as np, torch
from PIL import Image

def answer(model, processor):
    pixels = (np.arange(120 * 90 * 3).reshape(120, 90, 3) % 251).astype("uint8")
    content = [{"type": "image", "image": Image.fromarray(pixels)}, {"type": "text", "text": "What?"}]
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True, return_dict=True,
                                           return_tensors="pt", add_generation_prompt=True)
    with torch.no_grad():
        return model.eval().generate(**inputs, max_new_tokens=6, do_sample=False)[0, -6:].tolist()
"""


@pytest.fixture(scope="module")
def expected_answer(model, processor):
    namespace = {}
    exec(ANSWER, namespace)
    return namespace["answer"](model, processor)


def test_bundle_loads_offline_from_a_read_only_folder(bundle, tmp_path, expected_answer):
    folder = tmp_path / "read-only"
    shutil.copytree(bundle, folder)
    for file in [*folder.iterdir(), folder]:
        file.chmod(0o555 if file.is_dir() else 0o444)
    code = (
        ANSWER
        + """
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers import AutoProcessor, AutoTokenizer
folder = sys.argv[1]
for auto_class in (AutoModelForImageTextToText, AutoModelForCausalLM):
    model = auto_class.from_pretrained(folder, trust_remote_code=True)
    print(answer(model, AutoProcessor.from_pretrained(folder, trust_remote_code=True)))
print(type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__)
print(type(AutoConfig.from_pretrained(folder, trust_remote_code=True)).__name__)
print(len(AutoTokenizer.from_pretrained(folder, trust_remote_code=True)))
assert "jina_vlm" not in sys.modules
"""
    )
    lines = python(code, folder, HF_HOME=str(tmp_path / "cache")).stdout.split("\n")
    assert lines[:5] == [str(expected_answer)] * 2 + ["JinaVLMModel", "JinaVLMConfig", "518"]


def test_two_bundles_the_package_and_a_changed_folder_in_one_process(
    bundle, released_folder, tmp_path, expected_answer
):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        shutil.copytree(bundle, folder)
    code = (
        ANSWER
        + """
import importlib.util
from pathlib import Path
from transformers import AutoModelForImageTextToText, AutoProcessor
first, second, root, released = sys.argv[1:]

def load(folder, **kwargs):
    model = AutoModelForImageTextToText.from_pretrained(folder, **kwargs)
    return model, AutoProcessor.from_pretrained(folder, **kwargs)

trusted = dict(trust_remote_code=True)
a, b = load(first, **trusted), load(second, **trusted)
spec = importlib.util.spec_from_file_location("jina_vlm", root + "/__init__.py", submodule_search_locations=[root])
sys.modules["jina_vlm"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
c = load(released)
c[1].chat_template = a[1].chat_template
d = load(first)   # the package's classes come first, and ask for no trust
assert len({type(pair[0]) for pair in (a, b, c)}) == 3
assert type(c[0]) is type(d[0]) is module.JinaVLMForConditionalGeneration
for pair in (a, b, c, d):
    print(answer(*pair))

# a folder changed after a first load is loaded anew
from transformers.dynamic_module_utils import get_class_from_dynamic_module
file = Path(first) / "modeling_jina_vlm.py"
file.write_text(file.read_text() + "\\nJinaVLMModel.changed = True\\n")
changed = get_class_from_dynamic_module("modeling_jina_vlm.JinaVLMForConditionalGeneration", first)
print(changed is not type(a[0]), sys.modules[changed.__module__].JinaVLMModel.changed)
print(answer(changed.from_pretrained(first), a[1]))
# and the first one's code still reads the released layout
print(answer(type(a[0]).from_pretrained(released), a[1]))
"""
    )
    lines = python(code, first, second, ROOT, released_folder, HF_HOME=str(tmp_path / "cache")).stdout.split("\n")
    assert lines[:7] == [str(expected_answer)] * 4 + ["True True"] + [str(expected_answer)] * 2


def test_the_package_asks_nothing_and_runs_no_foreign_code(released_copy, tmp_path, expected_answer, chat_template):
    for name in ("configuration", "modeling", "processing", "image_processing"):
        (released_copy / f"{name}_jvlm.py").write_text("raise SystemExit('foreign code ran')")
    code = (
        ANSWER
        + f"""
sys.path.insert(0, {str(tmp_path)!r})
import jina_vlm
from transformers import AutoModelForImageTextToText, AutoProcessor
processor = AutoProcessor.from_pretrained(sys.argv[1])
processor.chat_template = {chat_template!r}
print(answer(AutoModelForImageTextToText.from_pretrained(sys.argv[1]), processor))
"""
    )
    (tmp_path / "jina_vlm").mkdir()
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path / "jina_vlm")
    assert python(code, released_copy).stdout.strip() == str(expected_answer)


def test_an_old_library_gets_one_clear_error():
    code = """
    import sys, types
    old = types.ModuleType("transformers")
    old.__version__ = "4.57.6"
    sys.modules["transformers"] = old
    sys.path.insert(0, sys.argv[1])
    for name in ("configuration", "conversion"):  # what any loader of the library imports first
        try:
            __import__(f"package.{name}_jina_vlm")
        except ImportError as error:
            print(error)
    """
    folder = Path(os.environ.get("TMPDIR", "/tmp")) / f"old-library-{os.getpid()}"
    (folder / "package").mkdir(parents=True)
    try:
        for file in ROOT.glob("*_jina_vlm.py"):
            shutil.copy(file, folder / "package")
        lines = python(code, folder).stdout.strip().split("\n")
    finally:
        shutil.rmtree(folder)
    message = "jina-vlm needs transformers 5.19 or newer, found 4.57.6. Run `pip install -U transformers`."
    assert lines == [message] * 2
