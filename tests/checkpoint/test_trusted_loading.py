"""Checkpoints from strangers: no pickles, no absurd sizes, no half of a file; and a bundle that does nothing but
define itself. Tensors that are missing or mis-shaped, and settings of the released layout, are tested in
`test_loading.py`."""

import json
import os
import pickle
import shutil
from pathlib import Path

import jina_vlm
import pytest
from conftest import ROOT, python
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForImageTextToText


@pytest.fixture
def copy(bundle, tmp_path):
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


def load(folder: Path):
    return AutoModelForImageTextToText.from_pretrained(folder)


# Pickles -------------------------------------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "pytorch_model-00001-of-00001.bin"])
def test_pickles_are_not_opened(copy, tmp_path, name):
    (copy / "model.safetensors").unlink()
    bomb = Bomb()
    bomb.target = tmp_path / "exploded"
    (copy / name).write_bytes(pickle.dumps({"model.connector.pad_embed": bomb}))
    if "of" in name:
        index = {"metadata": {}, "weight_map": {"model.connector.pad_embed": name}}
        (copy / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(OSError, match="safetensors"):
        load(copy)
    assert not bomb.target.exists()


def test_commands_open_safetensors_only():
    """None of our modules reads or writes a pickle."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py"), *ROOT.glob("*/*/*.py")]:
        if not {"tests", "library_tests", "tests/external/vllm", "build", ".venv"} & set(path.relative_to(ROOT).parts):
            text = path.read_text(encoding="utf-8")
            for call in ("torch.load(", "pickle.load", "torch.save(", "allow_pickle=True"):
                assert call not in text, f"{path.relative_to(ROOT)}: {call}"


# Configs -------------------------------------------------------------------------------------------------------------

SIZES = [
    "connector_head_dim", "connector_num_attention_heads", "connector_intermediate_size", "pooling_size",
    "vision_config.hidden_size", "vision_config.intermediate_size", "vision_config.num_hidden_layers",
    "vision_config.num_attention_heads", "vision_config.image_size", "vision_config.patch_size",
    "text_config.hidden_size", "text_config.intermediate_size", "text_config.num_hidden_layers",
    "text_config.vocab_size", "text_config.num_attention_heads", "text_config.num_key_value_heads",
    "text_config.head_dim", "text_config.max_position_embeddings",
]  # fmt: skip


@pytest.fixture
def no_memory(monkeypatch):
    """Fails the test where a layer is made, were it only on the meta device."""

    def refuse(*args, **kwargs):
        raise AssertionError("a model was made")

    monkeypatch.setattr(jina_vlm.JinaVLMModel, "__init__", refuse)


@pytest.mark.usefixtures("no_memory")
@pytest.mark.parametrize("value", [-1, 0, 2**40, 10**30, "../../etc/passwd", 1.5, [1], {"a": 1}], ids=str)
@pytest.mark.parametrize("path", SIZES)
def test_hostile_sizes_are_refused_before_a_model_is_made(copy, path, value):
    config = json.loads((copy / "config.json").read_text())
    *parents, name = path.split(".")
    part = config
    for parent in parents:
        part = part[parent]
    part[name] = value
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises((ValueError, TypeError, StrictDataclassError), match=name):
        load(copy)


@pytest.mark.usefixtures("no_memory")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_config": {"hidden_size": 2**16, "vocab_size": 2**22}}, "describes 5.5e.11 parameters"),
        ({"text_config": {"num_attention_heads": 3, "num_key_value_heads": 2}}, "multiple of"),
        ({"overlap_margin": -2}, "`overlap_margin` is -2"),
        ({"overlap_margin": 14}, "less than half of a tile's 27 patches"),
        ({"structural_token_ids": [-1, 514]}, "must lie in the vocabulary"),
        ({"structural_token_ids": [514]}, "must be 6 ids, those of <im_start>, <im_end>, <im_patch>"),
        ({"matryoshka_dimensions": [16, 10**9]}, "must be from 1 to"),
        ({"vision_feature_layers": [10**9]}, "deepest entry must be the last"),
        ({"vision_config": "../../etc/passwd"}, "vision_config"),
        ({"text_config": {"rope_parameters": "../../etc/passwd"}}, "(?i)rope"),
        ({"text_config": {"model_type": "../../etc"}}, "jina-vlm is made of 'qwen3'"),
    ],
)
def test_hostile_settings(bundle, copy, changes, message):
    config = json.loads((copy / "config.json").read_text())
    for name, value in changes.items():
        config[name] = {**config[name], **value} if isinstance(value, dict) else value
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises((ValueError, TypeError, StrictDataclassError), match=message):
        load(copy)


# Shards --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharded(model, processor, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    model.save_pretrained(folder, max_shard_size="500KB")
    return folder


@pytest.mark.parametrize("part", [0, 4, 0.25, 0.5, 0.75, 0.999], ids=str)
@pytest.mark.parametrize("file", ["model.safetensors", "shard"])
def test_truncated_weights_are_named(bundle, sharded, tmp_path, file, part):
    folder = Path(shutil.copytree(bundle if file == "model.safetensors" else sharded, tmp_path / "copy"))
    path = sorted(folder.glob("*.safetensors"))[-1]
    size = path.stat().st_size
    os.truncate(path, int(size * part) if part < 1 else part)
    with pytest.raises((ValueError, OSError), match=path.name.replace(".", r"\.")):
        load(folder)


def test_missing_shards_are_named(sharded, tmp_path):
    folder = Path(shutil.copytree(sharded, tmp_path / "copy"))
    path = sorted(folder.glob("*.safetensors"))[1]
    path.unlink()
    with pytest.raises((ValueError, OSError), match=path.name.replace(".", r"\.")):
        load(folder)


# What importing does -------------------------------------------------------------------------------------------------

GRAPH = """
import builtins, importlib.metadata, json, os, socket, sys
import torch, transformers, PIL.Image, PIL.ImageOps, PIL.ExifTags, numpy
# The library imports its own parts when they are first asked for.
from transformers.models.siglip import modeling_siglip
from transformers.models.qwen3 import modeling_qwen3
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationMixin, PreTrainedTokenizerFast
from transformers.generation import utils
from transformers import image_processing_utils, processing_utils

sys.path.insert(0, sys.argv[1])
before, done = set(sys.modules), []

def watch(event, args):
    if event.startswith("socket.") and event not in ("socket.__new__",):
        done.append([event, str(args)[:80]])
    elif event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        done.append([event, str(args[0])])
    elif event in (
        "os.mkdir", "os.rename", "os.remove", "os.symlink", "shutil.copyfile", "subprocess.Popen",
        "os.system", "os.exec",
    ):
        done.append([event, str(args)[:80]])

sys.addaudithook(watch)
sys.dont_write_bytecode = True
for name in ("conversion", "configuration", "image_processing", "processing", "modeling"):
    __import__(f"package.{name}_jina_vlm")
tops = {name.partition(".")[0] for name in set(sys.modules) - before}
print(json.dumps({"imported": sorted(tops - set(sys.stdlib_module_names)), "done": done}))

done.clear()  # and the watch sees what it should
open(os.devnull, "w").close()
socket.socket().connect_ex(("127.0.0.1", 9))
print(json.dumps(sorted(event for event, _ in done)))
"""


def test_importing_reaches_nothing_else(tmp_path):
    """No other package, no connection, no file, no process."""
    (tmp_path / "package").mkdir()
    for file in ROOT.glob("*_jina_vlm.py"):
        shutil.copy(file, tmp_path / "package")
    *_, result, seen = python(GRAPH, tmp_path).stdout.strip().splitlines()
    assert set(json.loads(seen)) >= {"open", "socket.connect"}
    result = json.loads(result)
    assert result["done"] == []
    # what comes with the library
    assert set(result["imported"]) <= {"package", "torch", "transformers", "PIL", "numpy", "huggingface_hub"}
