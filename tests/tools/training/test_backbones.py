"""A SigLIP2 and a Qwen3 become a jina-vlm, whose parts do what they did."""

import sys
from types import SimpleNamespace

import jina_vlm
import pytest
import torch
from conftest import make_image
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from jina_vlm_tools.training import backbones
from jina_vlm_tools.training.backbones import END_OF_TEXT


def make_tower(folder, whole: bool = True, **changes):
    """A SigLIP2, with its text half as the Hub's have it, or without."""
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 11,
        "num_attention_heads": 2,
        "image_size": 384,
        "patch_size": 14,
        **changes,
    }
    torch.manual_seed(1)
    if whole:
        text = {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "vocab_size": 64,
        }
        model = SiglipModel(SiglipConfig(vision_config=vision, text_config=text))
    else:
        model = SiglipVisionModel(SiglipVisionConfig(**vision))
    model.save_pretrained(folder)
    return str(folder)


def make_decoder(folder, rows: int = 640, tied: bool = True, **changes):
    config = Qwen3Config(
        **{
            "vocab_size": rows, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 4096,
            "tie_word_embeddings": tied, **changes,
        }
    )  # fmt: skip
    torch.manual_seed(2)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=small_tokenizer(), eos_token=END_OF_TEXT)
    tokenizer.save_pretrained(folder)
    return str(folder)


def small_tokenizer():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(["which fox is this? the quick brown one"], trainer)
    backend.add_special_tokens([END_OF_TEXT, "<|im_start|>"])
    return backend


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbones")
    return make_tower(folder / "tower"), make_decoder(folder / "decoder")


def put_together(monkeypatch, tower, decoder, output, *more):
    monkeypatch.setattr(
        sys, "argv", ["backbones", "--tower", tower, "--decoder", decoder, "--output", str(output), *map(str, more)]
    )
    backbones.main()


@pytest.fixture(scope="module")
def bundle(parts, tmp_path_factory):
    output = tmp_path_factory.mktemp("out") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        put_together(patch, *parts, output)
    return output


@torch.no_grad()
def test_tower_and_decoder_do_what_they_did(parts, bundle):
    """As loaded again from the folder."""
    model = jina_vlm.JinaVLMForConditionalGeneration.from_pretrained(bundle).eval()
    assert model.dtype == torch.float32 and model.config.vision_feature_layers == [8, 2]
    tower, decoder = SiglipVisionModel.from_pretrained(parts[0]), Qwen3ForCausalLM.from_pretrained(parts[1])
    pixels = torch.rand(2, 3, 378, 378) * 2 - 1
    hidden = tower.eval()(pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(
        model.model.vision_model(pixels).last_hidden_state,
        torch.cat([hidden[9], hidden[3]], dim=-1),
        atol=1e-5,
        rtol=1e-5,
    )
    ids = torch.arange(100)[None]
    torch.testing.assert_close(model(ids).logits[..., :640], decoder.eval()(ids).logits, atol=1e-6, rtol=1e-6)


def test_new_rows_are_the_mean_of_the_old(parts, bundle):
    model = jina_vlm.JinaVLMForConditionalGeneration.from_pretrained(bundle)
    old = Qwen3ForCausalLM.from_pretrained(parts[1])
    for new, before in ((model.get_input_embeddings(), old.get_input_embeddings()), (model.lm_head, old.lm_head)):
        assert new.weight.shape == (640 + 128, 48) and torch.equal(new.weight[:640], before.weight)
        torch.testing.assert_close(new.weight[640:], before.weight.mean(dim=0).expand(128, -1))
    assert new.weight.data_ptr() != model.get_input_embeddings().weight.data_ptr(), "the head is its own"


@torch.no_grad()
def test_the_bundle_is_a_checkpoint_like_any_other(bundle):
    processor = AutoProcessor.from_pretrained(bundle, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(bundle, trust_remote_code=True).eval()
    image = Image.fromarray(make_image(300, 900))
    chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "which fox?"}]}]
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert (inputs["input_ids"] == model.config.image_token_id).sum() > 400
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] == inputs["input_ids"].shape[1] + 3
    assert processor.tokenizer.convert_ids_to_tokens(639) == "|<EXTRA_TOKENS_354>|" and len(processor.tokenizer) == 646
    assert processor.tokenizer.decode(processor.tokenizer("which fox?")["input_ids"]) == "<|endoftext|>which fox?"


@torch.no_grad()
@pytest.mark.parametrize(("image_size", "patch_size", "tokens"), [(256, 16, 8), (224, 14, 8), (512, 16, 16)])
def test_other_towers(parts, tmp_path, monkeypatch, image_size, patch_size, tokens):
    tower = make_tower(
        tmp_path / "tower", whole=False, image_size=image_size, patch_size=patch_size, num_hidden_layers=4
    )
    put_together(monkeypatch, tower, parts[1], tmp_path / "out", "--feature-layers", 2, 0)
    model = jina_vlm.JinaVLMForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    processor = jina_vlm.JinaVLMProcessor.from_pretrained(tmp_path / "out")
    assert processor.image_processor.tokens_per_side == tokens
    inputs = processor(images=[Image.fromarray(make_image(700, 500))], text="<|image|>", return_tensors="pt")
    assert inputs["pixel_values"].shape[1:] == (3, image_size, image_size)
    assert model(**inputs).logits.isfinite().all()


def test_what_does_not_fit_is_said(parts, tmp_path, monkeypatch):
    """Before a model is built, and nothing is written."""
    tower, decoder = parts
    monkeypatch.setattr(jina_vlm.JinaVLMForConditionalGeneration, "__init__", None)
    output = tmp_path / "out"

    def refused(tower, decoder, *more) -> str:
        with pytest.raises(SystemExit) as stop:
            put_together(monkeypatch, tower, decoder, output, *more)
        return str(stop.value)

    assert f"--tower {decoder}: expected a SigLIP of fixed size, got 'qwen3'" in refused(decoder, decoder)
    assert f"--decoder {tower}: expected a Qwen3, got 'siglip'" in refused(tower, tower)
    assert "nowhere/at-all: its config cannot be read" in refused("nowhere/at-all", decoder)
    assert "--feature-layers [11, 2]: expected blocks from 0 to 10" in refused(
        tower, decoder, "--feature-layers", 11, 2
    )
    assert "--feature-layers [2, 8]: expected blocks" in refused(tower, decoder, "--feature-layers", 2, 8)
    coarse = make_tower(tmp_path / "coarse", whole=False, image_size=64, patch_size=16)
    assert "`image_size` 64 and `patch_size` 16 make 4 patches a side; more than 8 are needed" in refused(
        coarse, decoder
    )
    few = make_decoder(tmp_path / "few", rows=280)
    assert "its tokenizer has 285 tokens, its embedding 280 rows" in refused(tower, few)
    assert not output.exists()
    output.mkdir()
    (output / "mine").touch()
    assert "this folder is not empty" in refused(tower, decoder)


def test_weights_that_are_missing(parts, tmp_path, monkeypatch):
    tower = make_tower(tmp_path / "tower", whole=False)
    weights = load_file(tmp_path / "tower" / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.3.mlp.fc1.weight"))
    del weights[name]
    save_file(weights, tmp_path / "tower" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit, match="lacks the weights .*layers.3.mlp.fc1.weight"):
        put_together(monkeypatch, tower, parts[1], tmp_path / "out")


def test_a_change_would_be_noticed(parts, tmp_path, monkeypatch):
    """Of the tower's weights, others are copied than it computes with."""

    def load(name, **kwargs):
        tower, info = SiglipVisionModel.from_pretrained(name, **kwargs)
        weights = tower.state_dict()
        first = next(iter(weights))
        weights[first] = weights[first] * 1.01
        tower.state_dict = lambda: weights
        return tower, info

    monkeypatch.setattr(backbones, "SiglipVisionModel", SimpleNamespace(from_pretrained=load))
    with pytest.raises(SystemExit, match="its outputs have changed, by"):
        put_together(monkeypatch, *parts, tmp_path / "out")
    assert not (tmp_path / "out").exists()
