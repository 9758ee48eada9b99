"""What users of quantized weights rely on, by the packages themselves: parts that stay whole, and exact reloading."""

import pytest
import torch
from jina_vlm import JinaVLMForConditionalGeneration, JinaVLMProcessor
from PIL import Image
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from experiments.eval_quantized import METHODS, load
from jina_vlm_tools.cli.main import main
from jina_vlm_tools.files import ROOT, TINY


SAVED = ["torchao int8", "torchao int8, int8 activations", "torchao int4, text", "torchao fp8", "bitsandbytes int8",
         "bitsandbytes nf4, text"]  # fmt: skip
NOT_SAVED = ["torchao int4 for CPUs, bfloat16", "quanto int8", "quanto fp8"]


@pytest.fixture(scope="module")
def inputs():
    image = Image.radial_gradient("L").resize((400, 300)).convert("RGB")
    return JinaVLMProcessor.from_pretrained(TINY)(text="<|image|>What is it?", images=image, return_tensors="pt")


def logits(model, inputs) -> torch.Tensor:
    with torch.inference_mode():
        return model(**inputs | {"pixel_values": inputs["pixel_values"].to(model.dtype)}).logits.float()


@pytest.fixture(scope="module")
def whole():
    return load(TINY)


@pytest.mark.parametrize("name", [*SAVED, *NOT_SAVED])
def test_connector_embedding_and_head_stay_whole(whole, inputs, name):
    model = load(TINY, METHODS[name](), torch.bfloat16 if "bfloat16" in name else torch.float32)
    expected = whole.state_dict()
    kept = {key: tensor for key, tensor in model.state_dict().items()
            if "connector" in key or "embed_tokens" in key or "lm_head" in key}  # fmt: skip
    assert len(kept) == 14 and all(torch.equal(value.float(), expected[key]) for key, value in kept.items())
    one, other = logits(model, inputs), logits(whole, inputs)
    assert not torch.equal(one, other) and torch.cosine_similarity(one, other, dim=-1).mean() > 0.95


@pytest.mark.parametrize("name", SAVED)
@pytest.mark.parametrize("as_dict", [False, True], ids=["object", "dict"])
def test_saved_weights_load_to_the_same_bits(inputs, tmp_path, name, as_dict):
    config = METHODS[name]()
    model = load(TINY, config.to_dict() if as_dict else config)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(logits(again, inputs), logits(model, inputs))


@pytest.mark.parametrize("name", SAVED)
def test_saved_weights_answer_on_the_command_line(tmp_path, capsys, name):
    load(TINY, METHODS[name](), torch.bfloat16).save_pretrained(tmp_path)
    JinaVLMProcessor.from_pretrained(TINY).save_pretrained(tmp_path)
    main(["ask", "--model", str(tmp_path), str(ROOT / "docs" / "shapes.png"), "How many shapes are there?"])
    assert capsys.readouterr().out.strip()


def test_released_layout_is_quantized_alike(inputs, tmp_path):
    """Released tensors are joined and split while they are read, and quantized after that."""
    released = ROOT / "tests" / "golden" / "released-tiny"
    config = BitsAndBytesConfig(load_in_8bit=True)
    model = load(released, config)
    load(released).save_pretrained(tmp_path)
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.equal(model(input_ids=ids).logits, load(tmp_path, config)(input_ids=ids).logits)


def test_llm_compressors_weights_are_saved_and_load(inputs, tmp_path):
    """Of the text model alone: the library's SigLIP does not load packed weights. The head must stay by name."""
    llmcompressor = pytest.importorskip("llmcompressor", reason="llm-compressor is not installed")
    from llmcompressor.modifiers.quantization import QuantizationModifier

    model = load(TINY)
    ignore = ["lm_head", "re:.*connector.*", "re:.*vision_model.*"]
    llmcompressor.oneshot(model=model, recipe=QuantizationModifier(targets="Linear", scheme="W4A16", ignore=ignore))
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path)
    again = JinaVLMForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    packed = {name.split(".")[1] for name in again.state_dict() if name.endswith("weight_packed")}
    assert packed == {"language_model"}
    assert torch.equal(logits(again, inputs), expected)
