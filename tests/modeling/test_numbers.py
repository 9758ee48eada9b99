"""No NaN and nothing infinite, whatever the image; bfloat16 and float16 stay near float32. The table of it is printed
by `python -m benchmarks.numbers`; batches in half precision and autocast are tested in `test_batches.py`."""

import jina_vlm
import pytest
import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from benchmarks import numbers
from jina_vlm_tools.files import TINY
from jina_vlm_tools.training.precision import cpu_multiplies_in_bf16


if not TINY.is_dir():
    pytest.skip("checkpoints/tiny has not been trained yet", allow_module_level=True)

HALF = [torch.bfloat16, torch.float16]
# Of logits from float32's, as a part of their norm; measured: 0.4 % and 0.05 %; in bfloat16, on a CPU that has no
# instructions for it, 1.6 %
NEAR = {torch.bfloat16: 0.01 if cpu_multiplies_in_bf16() else 0.025, torch.float16: 0.002}


@pytest.fixture(scope="module")
def tiny_processor():
    processor = jina_vlm.JinaVLMProcessor.from_pretrained(TINY)
    processor.tokenizer.model_max_length = numbers.POSITIONS
    return processor


@pytest.fixture(scope="module")
def exact_model():
    return numbers.load(torch.float32)


@pytest.fixture(scope="module")
def half_models():
    return {dtype: numbers.load(dtype) for dtype in HALF}


def assert_near(model, exact_model, given: dict):
    exact = numbers.last_logits(exact_model, given)
    assert exact.isfinite().all()
    finite, distance, same = numbers.compare(numbers.last_logits(model, given), exact)
    assert finite and distance < NEAR[model.dtype] and same > 0.9


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", list(numbers.sample_images()))
def test_extreme_images(tiny_processor, exact_model, half_models, name, dtype):
    assert_near(half_models[dtype], exact_model, numbers.inputs(tiny_processor, [numbers.sample_images()[name]], 600))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_both_attentions(tiny_processor, exact_model, half_models, attention, dtype):
    model = half_models[dtype]
    model.set_attn_implementation(attention)
    try:
        assert_near(model, exact_model, numbers.inputs(tiny_processor, [numbers.sample_images()["noise"]], 500))
    finally:
        model.set_attn_implementation("sdpa")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_32k_tokens(tiny_processor, exact_model, half_models, dtype):
    given = numbers.inputs(tiny_processor, list(numbers.sample_images().values()), 32_768)
    assert_near(half_models[dtype], exact_model, given)


def test_features_past_the_end_of_float16(tiny_processor, exact_model, half_models):
    """The small checkpoint makes some; else the tests above would say little of it."""
    given = numbers.inputs(tiny_processor, [numbers.sample_images()["noise"]], 500)
    pixels, places = given["pixel_values"], given["tile_positions"]
    with torch.inference_mode():
        exact, half = (
            model.get_image_features(pixels, places).pooler_output[0].float()
            for model in (exact_model, half_models[torch.float16])
        )
    assert exact.abs().max() > 65_504
    assert half.isfinite().all()
    assert torch.nn.functional.cosine_similarity(exact, half).min() > 0.995


# What is computed in float32 whatever the model's numbers


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("cast", ["loaded", "to", "half"])
def test_positions_are_not_rounded(exact_model, half_models, dtype, cast):
    if cast == "loaded":
        model = half_models[dtype]
    else:
        model = numbers.load(torch.float32)
        model = model.to(dtype) if cast == "to" else (model.half() if dtype == torch.float16 else model.bfloat16())
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    positions = torch.tensor([[0, 1, 4_000, 32_000, 40_959]])
    angles = [
        each.model.language_model.rotary_emb(torch.zeros(1, dtype=torch.float32), positions)[0]
        for each in (model, exact_model)
    ]
    assert torch.equal(*angles)


def test_positions_follow_to_another_device():
    """Also the meta device and back: only their type is kept."""
    model = numbers.load(torch.float32).to("meta")
    assert {buffer.device.type for buffer in model.buffers()} == {"meta"}
    assert numbers.load(torch.float32).double().model.language_model.rotary_emb.inv_freq.dtype == torch.float64


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_norms_do_not_overflow(half_models, dtype):
    """Squares of these would, in float16."""
    norms = [
        module for module in half_models[dtype].modules() if isinstance(module, (Qwen3RMSNorm, torch.nn.LayerNorm))
    ]
    assert len(norms) > 10
    generator = torch.Generator().manual_seed(0)
    for norm in norms:
        values = (30_000 * torch.randn(4, norm.weight.shape[0], generator=generator)).clamp(-60_000, 60_000).to(dtype)
        exact = {name: parameter.double() for name, parameter in norm.named_parameters()}
        with torch.inference_mode():
            near = norm(values).double()
            expected = torch.func.functional_call(norm.to(torch.float64), exact, values.double())
            norm.to(dtype)
        torch.testing.assert_close(near, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_softmax_over_many_keys(half_models, dtype):
    """Of 40,000 equal keys each gets its share: the sum of so many halves would stop growing."""
    layer = half_models[dtype].model.language_model.layers[0].self_attn
    keys, width = 40_000, layer.head_dim
    from transformers.models.qwen3.modeling_qwen3 import ALL_ATTENTION_FUNCTIONS, eager_attention_forward

    queries = torch.zeros(1, layer.config.num_attention_heads, 1, width, dtype=dtype)
    states = torch.zeros(1, layer.config.num_key_value_heads, keys, width, dtype=dtype)
    values = torch.ones_like(states)
    for attend in (eager_attention_forward, ALL_ATTENTION_FUNCTIONS["sdpa"]):
        with torch.inference_mode():
            attended, _ = attend(
                layer, queries, states, values, None, scaling=layer.scaling, dropout=0.0, is_causal=False
            )
        torch.testing.assert_close(attended.float(), torch.ones_like(attended).float(), rtol=0, atol=0.02)
