"""Copies of the release that MLX quantized, read by conversion."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import largest_file, refused
from mlx_copy import STAND_IN, quantize, save_mlx_copy
from released import RELEASED_TEMPLATE, save_released
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from experiments.eval_tiny import evaluate
from jina_vlm_tools.files import TINY, new_folder
from jina_vlm_tools.hub import PublishingError, mlx
from jina_vlm_tools.hub.assemble import assemble
from jina_vlm_tools.hub.check import ask, list_bundle
from jina_vlm_tools.hub.mlx import dequantize, restore_released


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture(scope="module")
def made(released_folder, tmp_path_factory):
    """A small copy in groups of 32 weights of 4 bits, and what its tensors stand for."""
    folder = tmp_path_factory.mktemp("mlx") / "copy"
    return folder, save_mlx_copy(released_folder, folder, group_size=32)


@pytest.fixture
def copy(made, tmp_path) -> Path:
    return shutil.copytree(made[0], tmp_path / "copy")


def edit_tensors(folder: Path, edit) -> None:
    """All in one file then."""
    tensors = {**load_file(folder / FIRST), **load_file(folder / SECOND)}
    edit(tensors)
    for name in (FIRST, SECOND):
        (folder / name).unlink()
    save_file(tensors, folder / "model.safetensors")


def edit_json(file: Path, edit) -> None:
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("bits", "group_size", "dtype"),
    [(4, 32, torch.bfloat16), (2, 32, torch.float16), (8, 64, torch.float32)],
)
def test_the_values_are_those_that_mlx_computes_with(released_folder, tmp_path, bits, group_size, dtype):
    after = save_mlx_copy(released_folder, tmp_path / "copy", bits, group_size, dtype)
    before = load_file(released_folder / "model.safetensors")
    rounded = [name for name, tensor in after.items() if not torch.equal(tensor, before[name].to(dtype))]
    assert rounded and not [name for name in rounded if "layers.0." in name and "language" in name]
    expected = load_released(after, released_folder, tmp_path / "whole").state_dict()

    (tmp_path / "converted").mkdir()
    changes = assemble(str(tmp_path / "copy"), tmp_path / "converted").changes
    groups = f"the {len(rounded)} matrices that it holds in groups of {group_size} weights of {bits} bits"
    assert groups in changes[0]
    tensors = load_file(tmp_path / "converted" / "model.safetensors")
    assert tensors.keys() == expected.keys() and {tensor.dtype for tensor in tensors.values()} == {dtype}
    base = after["lm_head.weight"].shape[0]  # rows behind it are made equal in every checkpoint
    for name, tensor in tensors.items():
        end = base if name == "lm_head.weight" else None
        assert torch.equal(tensor[:end], expected[name][:end]), name


def load_released(tensors: dict, like: Path, folder: Path) -> torch.nn.Module:
    folder.mkdir()
    shutil.copyfile(like / "config.json", folder / "config.json")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")


@pytest.mark.skipif(not TINY.is_dir(), reason="checkpoints/tiny has not been trained yet")
def test_a_copy_answers_as_the_checkpoint_does_that_it_was_made_of(released_folder, tmp_path):
    """With the tokenizer, the settings and the template that were not quantized, by its own code."""
    save_released(TINY, released_folder, tmp_path / "released")
    save_mlx_copy(tmp_path / "released", tmp_path / "copy", bits=8)
    (tmp_path / "converted").mkdir()
    assemble(str(tmp_path / "copy"), tmp_path / "converted")
    list_bundle(tmp_path / "converted", with_card=False)
    assert ask(tmp_path / "converted")
    given = []
    for folder in (TINY, tmp_path / "converted"):
        processor = AutoProcessor.from_pretrained(folder)
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype="float32").eval()
        given.append([result["given"] for result in evaluate(model, processor, samples=8, batch_size=8)])
    assert given[0] == given[1]


def test_numbers_lie_in_words_from_the_lowest_bits_on():
    packed = torch.tensor([[0x76543210, 0xFEDCBA98 - 2**32]], dtype=torch.int32).view(torch.uint32)
    scales, biases = torch.tensor([[1.0, 0.5]]), torch.tensor([[0.0, -2.0]])
    expected = torch.cat([torch.arange(8.0), torch.arange(8, 16) * 0.5 - 2])
    assert torch.equal(dequantize(packed, scales, biases, bits=4)[0], expected)
    assert dequantize(packed, scales, biases, bits=8)[0, :4].tolist() == [0x10, 0x32, 0x54, 0x76]
    assert dequantize(packed, scales, biases, bits=2)[0, :4].tolist() == [0, 0, 1, 0]


def test_the_product_is_rounded_before_the_sum():
    packed = torch.tensor([[3]], dtype=torch.int32).view(torch.uint32)
    scale, bias = torch.tensor([[171 / 256]], dtype=torch.bfloat16), torch.tensor([[-2.0]], dtype=torch.bfloat16)
    assert 3 * scale.item() + bias.item() == 1 / 256
    assert dequantize(packed, scale, bias, bits=4)[0, 0].item() == 0


def test_the_head_may_stand_outside_the_text_model_and_a_module_have_its_own_bits(released_folder, tmp_path):
    restored = {}
    for name in ("as mlx-vlm writes it", "other"):
        save_mlx_copy(released_folder, tmp_path / name, group_size=16)
        (tmp_path / f"{name} restored").mkdir()
    other = tmp_path / "other"

    def edit(tensors):
        for part in ("weight", "scales", "biases"):
            tensors[f"lm_head.{part}"] = tensors.pop(f"language_model.lm_head.{part}")
        down = "vision_model.layers.3.attn.out"
        whole = dequantize(*(tensors[f"{down}.{part}"] for part in ("weight", "scales", "biases")), bits=4)
        parts, restored["again"] = quantize(whole, bits=8, group_size=8)
        tensors |= {f"{down}.{part}": values for part, values in parts.items()}

    edit_tensors(other, edit)
    edit_json(
        other / "config.json",
        lambda config: config["quantization"].update({"vision_model.layers.3.attn.out": {"bits": 8, "group_size": 8}}),
    )
    for name in ("as mlx-vlm writes it", "other"):
        said = restore_released(tmp_path / name, tmp_path / f"{name} restored")
        restored[name] = load_file(tmp_path / f"{name} restored" / "model-00001.safetensors")
    assert "of 8 weights of 8 bits and 16 weights of 4 bits" in said
    own = "model.vision_model.layers.3.attn.out.weight"
    assert torch.equal(restored["other"].pop(own), restored["again"])
    assert not torch.equal(restored["as mlx-vlm writes it"].pop(own), restored["again"])
    assert restored["other"].keys() == restored["as mlx-vlm writes it"].keys()
    for name, tensor in restored["other"].items():
        assert torch.equal(tensor, restored["as mlx-vlm writes it"][name]), name


def test_tensors_are_written_in_files_of_bounded_size(made, released_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(mlx, "SHARD_SIZE", 200_000)
    restore_released(made[0], tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 3 and max(file.stat().st_size for file in files) < 400_000
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == tensors.keys()
    assert all(torch.equal(tensor, made[1][name]) for name, tensor in tensors.items())
    dropped = made[1].keys() - tensors.keys()
    assert dropped == {name for name in made[1] if re.match(r"model\.language_model\..*\.[qkv]_b$", name)}


# What cannot be read ------------------------------------------------------------------------------------------------


OUT = "vision_model.layers.0.attn.out"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors.pop(f"{OUT}.scales"), f"`{OUT}.weight` is U32, and `{OUT}.scales` is missing"),
        (lambda tensors: tensors.pop(f"{OUT}.biases"), f"`{OUT}.biases` is missing"),
        (lambda tensors: tensors.pop(f"{OUT}.weight"), f"`{OUT}.weight` is missing"),
        (lambda tensors: tensors.pop("vl_connector.pad_embed"), "`vl_connector.pad_embed` is missing"),
        (lambda tensors: change(tensors, f"{OUT}.scales", lambda t: t[:-1]), rf"`{OUT}.scales` is BF16 .*\[31, 1\]"),
        (lambda tensors: change(tensors, f"{OUT}.weight", lambda t: t[:, 1:]), rf"`{OUT}.scales`.*expected \[32, 0\]"),
        (lambda tensors: change(tensors, f"{OUT}.biases", torch.Tensor.float), f"`{OUT}.biases` is .*F32.*BF16"),
        (lambda tensors: change(tensors, f"{OUT}.weight", torch.Tensor.long), f"`{OUT}.weight` is I64"),
        (lambda tensors: change(tensors, f"{OUT}.bias", torch.Tensor.long), f"`{OUT}.bias` is I64"),
        (lambda tensors: change(tensors, OUT.replace("out", "qkv") + ".bias", lambda t: t[1:]), "95 rows.*attn.q_b"),
        (lambda tensors: tensors.update({f"{OUT}.extra": torch.zeros(2)}), f"`{OUT}.extra` is unknown"),
        (
            lambda tensors: tensors.update(
                {name.replace("s.26.", "s.27."): tensor.clone() for name, tensor in tensors.items()}
            ),
            r"`vision_model.layers.27.attn.out.biases` is unknown[\s\S]*`vision_model.layers.27.ffn",
        ),
        (lambda tensors: tensors.clear(), r"`language_model.embedding.embedding` is missing[\s\S]*And \d{3} more"),
        (lambda tensors: tensors.update({"lm_head.weight": torch.zeros(2)}), "holds `lm_head.weight` twice"),
    ],
)  # fmt: skip
def test_tensors_that_are_not_such_a_copy_are_named(copy, tmp_path, edit, message):
    edit_tensors(copy, edit)
    check_refused(copy, tmp_path, message)


def change(tensors: dict, name: str, edit) -> None:
    tensors[name] = edit(tensors[name]).contiguous()


def check_refused(copy: Path, tmp_path: Path, message: str) -> None:
    (tmp_path / "converted").mkdir()
    with pytest.raises(ValueError, match=message):
        assemble(str(copy), tmp_path / "converted")
    assert not list((tmp_path / "converted").iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 3}, r"in groups of 32 weights of 3 bits; only \(2, 4, 8\) bits"),
        ({"bits": 8}, r"\.scales` is BF16 of shape .* in groups of 32 weights of 8 bits"),
        ({"group_size": None}, "in groups of None weights of 4 bits"),
        ({"group_size": 64}, "in groups of 64 weights of 4 bits"),
        ({"mode": "mxfp4"}, "in the mode 'mxfp4'; only 'affine'"),
        ({OUT: {"bits": 6}}, f"`{OUT}.weight` is quantized .* of 6 bits"),
        ({OUT: {"mode": "nvfp4"}}, f"`{OUT}.weight` is quantized in the mode 'nvfp4'"),
    ],
)
def test_another_quantization_is_refused_by_name(copy, tmp_path, settings, message):
    edit_json(copy / "config.json", lambda config: config["quantization"].update(settings))
    check_refused(copy, tmp_path, message)


def test_a_damaged_file_and_another_config_are_named(copy, tmp_path):
    content = (copy / SECOND).read_bytes()
    (copy / SECOND).write_bytes(content[:5000])
    check_refused(copy, tmp_path, f"{SECOND} cannot be read .*download it again")
    (copy / SECOND).write_bytes(content)
    edit_json(copy / "config.json", lambda config: config["text_config"].pop("n_layers"))
    with refused("`text_config.n_layers` is missing"):
        assemble(str(copy), tmp_path / "converted")


@pytest.mark.parametrize("name", ["preprocessor_config.json", "tokenizer.json"])
def test_a_missing_setting_or_tokenizer_is_named_with_the_folder(copy, tmp_path, name):
    (copy / name).unlink()
    (tmp_path / "converted").mkdir()
    with pytest.raises(OSError) as raised:
        assemble(str(copy), tmp_path / "converted")
    assert name in str(raised.value) and str(copy) in str(raised.value)


def test_a_full_disk_leaves_nothing(copy, tmp_path):
    with pytest.raises(PublishingError, match="could not be written"), new_folder(tmp_path / "converted") as folder:  # noqa: SIM117
        with largest_file(100_000):
            assemble(str(copy), folder)
    assert {path.name for path in tmp_path.iterdir()} == {"copy"}


# The template -------------------------------------------------------------------------------------------------------


TEXT_ALONE = "{% for m in messages %} {{ m.role }}: {% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"


@pytest.mark.parametrize("place", ["none", "tokenizer", "file", "text alone"])
def test_mlx_vlms_stand_in_for_a_template_is_replaced(copy, tmp_path, chat_template, place):
    if place == "tokenizer":
        edit_json(copy / "tokenizer_config.json", lambda config: config.update(chat_template=STAND_IN))
    if place == "file":
        (copy / "chat_template.jinja").write_text(STAND_IN)
    if place == "text alone":
        (copy / "chat_template.jinja").write_text(TEXT_ALONE)
    (tmp_path / "converted").mkdir()
    changes = assemble(str(copy), tmp_path / "converted").changes
    assert (tmp_path / "converted" / "chat_template.jinja").read_text() == chat_template
    assert [change for change in changes if "chat template" in change]
    processor = AutoProcessor.from_pretrained(tmp_path / "converted")
    assert processor.tokenizer.chat_template != STAND_IN


def test_a_template_that_writes_images_is_kept(copy, tmp_path):
    (copy / "chat_template.jinja").write_text(RELEASED_TEMPLATE)
    (tmp_path / "converted").mkdir()
    changes = assemble(str(copy), tmp_path / "converted").changes
    assert (tmp_path / "converted" / "chat_template.jinja").read_text().endswith(RELEASED_TEMPLATE)
    assert not [change for change in changes if "chat template" in change]


# Loading without conversion -----------------------------------------------------------------------------------------


def test_loading_it_as_it_is_names_the_way(copy):
    for load in (AutoConfig, AutoModel, AutoModelForImageTextToText):
        with refused("`quantization` is {'group_size': 32, 'bits': 4, .*`jina-vlm convert`"):
            load.from_pretrained(copy)
