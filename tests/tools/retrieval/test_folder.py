"""The retrieval folder: what is found in it, in which place its base is, and what is refused. That each engine reads
it alike is tested by `make test-retrieval`."""

import json
import shutil
import sys
from pathlib import Path

import jina_vlm
import pytest
import torch
from conftest import refused
from miniature import save_miniature
from safetensors.torch import load_file, save_file
from torch import nn

from jina_vlm_tools.retrieval.folder import is_retrieval_folder, merge_folder, read_folder, write_folder
from jina_vlm_tools.training.lora import target_modules


peft = pytest.importorskip("peft")
HIDDEN, WIDTH = 32, 16
IDS = torch.arange(100, 120)[None]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A base, and beside it an adapter and a projector, whose base is named by a place that is gone."""
    home = tmp_path_factory.mktemp("home")
    save_miniature(home / "base")
    retrieval = home / "retrieval"
    adapted(home / "base").save_pretrained(retrieval)
    change(retrieval / "adapter_config.json", base_model_name_or_path="gone/base")
    (retrieval / "1_Dense").mkdir()
    save_file({"linear.weight": torch.eye(WIDTH, HIDDEN)}, retrieval / "1_Dense" / "model.safetensors")
    (retrieval / "1_Dense" / "config.json").write_text('{"bias": false, "activation_function": "torch.nn.Identity"}')
    modules = [{"path": "", "type": "some.Transformer"}, {"path": "1_Dense", "type": "some.Dense"}]
    (retrieval / "modules.json").write_text(json.dumps(modules))
    return home


@pytest.fixture
def moved(home, tmp_path) -> Path:
    shutil.copytree(home, tmp_path / "home")
    return tmp_path / "home" / "retrieval"


def adapted(base: Path, parts: tuple[str, ...] = ("connector", "decoder")) -> "peft.PeftModel":
    torch.manual_seed(0)
    ranks = {".*connector.*": 2}  # another in a part, as in training
    config = peft.LoraConfig(r=4, rank_pattern=ranks, alpha_pattern=ranks, target_modules=target_modules(list(parts)))
    model = peft.get_peft_model(jina_vlm.JinaVLMForConditionalGeneration.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)
    return model


def change(file: Path, **settings) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def test_read(moved):
    assert is_retrieval_folder(moved) and not is_retrieval_folder(moved.parent / "base")
    found = read_folder(moved)
    assert (found.path, found.base, found.task) == (str(moved), str(moved.parent / "base"), "retrieval")
    assert found.parts == ("connector", "language_model")
    assert torch.equal(found.projector.weight, torch.eye(WIDTH, HIDDEN)) and found.projector.bias is None


def test_the_base_is_found_by_its_name_where_none_is_beside(moved, monkeypatch):
    elsewhere = moved.parent.parent / "else" / "where"
    shutil.move(moved.parent / "base", elsewhere)
    change(moved / "adapter_config.json", base_model_name_or_path=str(elsewhere))
    assert read_folder(moved).base == str(elsewhere)
    change(moved / "adapter_config.json", base_model_name_or_path="else/where")
    monkeypatch.chdir(moved.parent.parent)
    assert read_folder(moved).base == "else/where"


def test_an_adapter_of_the_generating_model_is_one_of_the_model_without_its_head(moved):
    """Of the same name in both classes: engines load one or the other."""
    base = moved.parent / "base"
    generating = jina_vlm.JinaVLMForConditionalGeneration.from_pretrained(base)
    plain = generating.model(input_ids=IDS).last_hidden_state
    expected = (
        peft.PeftModel.from_pretrained(generating, moved).base_model.model.model(input_ids=IDS).last_hidden_state
    )
    assert not torch.allclose(expected, plain, atol=1e-2)
    for model_class in (jina_vlm.JinaVLMModel, jina_vlm.JinaVLMForConditionalGeneration):
        model = model_class.from_pretrained(base)
        model.load_adapter(str(moved))
        states = getattr(model, "model", model)(input_ids=IDS).last_hidden_state
        assert torch.equal(states, expected), model_class


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_no_adapter(moved, name):
    (moved / name).unlink()
    with refused(f"holds no adapter: there is no {name}", FileNotFoundError):
        read_folder(moved)


@pytest.mark.parametrize("name", ["modules.json", "1_Dense/model.safetensors"])
def test_no_projector(moved, name):
    (moved / name).unlink()
    with refused("holds no projector", FileNotFoundError):
        read_folder(moved)


@pytest.mark.parametrize(
    "settings", [{"bias": True}, {"activation_function": "torch.nn.Tanh"}, {"use_residual": True}]
)
def test_another_kind_of_projector(moved, settings):
    change(moved / "1_Dense" / "config.json", **settings)
    with refused("is not a plain matrix"):
        read_folder(moved)


def test_no_base(moved, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    shutil.rmtree(moved.parent / "base")
    with refused("The base 'gone/base' of the adapter in .* is not there: neither .*base nor gone/base", OSError):
        read_folder(moved, local_files_only=True)
    change(moved / "adapter_config.json", base_model_name_or_path=None)
    with refused("names no base", FileNotFoundError):
        read_folder(moved)
    (moved / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with refused("names no base: its `base_model_name_or_path` is None", FileNotFoundError):
        read_folder(moved)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("adapter_model.safetensors", None),
        ("adapter_config.json", None),
        ("adapter_config.json", "[]"),
        ("modules.json", None),
        ("modules.json", '[{"path": "1_Dense"}]'),
        ("1_Dense/config.json", None),
        ("1_Dense/model.safetensors", None),
        ("config_sentence_transformers.json", "{"),
        ("config_sentence_transformers.json", '{"task": null}'),
        ("config_sentence_transformers.json", '{"task": "a.b"}'),
        ("adapter_config.json", '{"base_model_name_or_path": 5, "peft_type": "LORA"}'),
        ("adapter_config.json", '{"base_model_name_or_path": "base"}'),
        ("processor_config.json", "[]"),
    ],
)
def test_a_damaged_file_is_named(moved, name, content):
    """Cut off, where no content is given."""
    file = moved / name
    file.write_bytes(file.read_bytes()[:-9] if content is None else content.encode())
    with refused(f"{file} is damaged .*Write or fetch the folder anew"):
        read_folder(moved).load_processor()


def test_a_missing_file_is_named(moved):
    file = moved / "1_Dense" / "config.json"
    file.unlink()
    with refused(f"{file} is missing. Write or fetch the folder anew", FileNotFoundError):
        read_folder(moved)


def test_parts_of_other_widths(moved):
    weight = moved / "1_Dense" / "model.safetensors"
    save_file({"linear.weight": torch.eye(WIDTH)}, weight)
    with refused("The projector in .* is for a model of width 16, but that of .*base is 32"):
        read_folder(moved)
    save_file({"linear.weight": torch.eye(WIDTH, HIDDEN)}, weight)
    adapter = moved / "adapter_model.safetensors"
    narrow = {name: tensor[:, :8].contiguous() for name, tensor in load_file(adapter).items()}
    save_file(narrow, adapter)
    with refused("The adapter in .* is for a model of width 8"):
        read_folder(moved)


# Writing ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(home):
    return adapted(home / "base")


@pytest.fixture
def parts(home, model):
    processor = jina_vlm.JinaVLMProcessor.from_pretrained(home / "base")
    return {"model": model, "projector": nn.Linear(HIDDEN, WIDTH, bias=False), "processor": processor}


def test_nothing_is_written_over(parts, home, tmp_path):
    with refused("is there already. Choose another folder, or pass `replace=True`", FileExistsError):
        write_folder(tmp_path, **parts)
    with refused("is there already", FileExistsError):
        merge_folder(home / "retrieval", tmp_path, "dense")


def test_without_the_library(parts, tmp_path, monkeypatch):
    """It says what to install, and leaves nothing behind."""
    for name in [name for name in sys.modules if name.startswith("sentence_transformers")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with refused('pip install "sentence-transformers>=6.2"', ImportError):
        write_folder(tmp_path / "made", **parts)
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit(parts, tmp_path):
    refusals = {
        "has no adapter 'other'; it has default": {"adapter": "other"},
        "has no adapter 'default'; it has none": {"model": nn.Linear(1, 1)},
        "The projector has a bias": {"projector": nn.Linear(HIDDEN, WIDTH)},
        "takes vectors of 8 numbers, but .*base makes 32": {"projector": torch.zeros(WIDTH, 8)},
    }
    for message, changes in refusals.items():
        with refused(message):
            write_folder(tmp_path / "made", **parts | changes)
    with refused('`kind` must be "dense" or "multi"'):
        merge_folder(tmp_path, tmp_path / "made", "late")


@pytest.mark.parametrize("settings", [{"modules_to_save": ["connector"]}, {"use_dora": True}])
def test_engines_read_lora_alone(home, parts, tmp_path, settings):
    base = jina_vlm.JinaVLMForConditionalGeneration.from_pretrained(home / "base")
    parts["model"] = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], **settings))
    with refused("Every engine reads LoRA alone"):
        write_folder(tmp_path / "made", **parts)
