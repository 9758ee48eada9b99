# Copyright 2026 The jina-vlm-transformers authors. Licensed under the Apache License, Version 2.0.
"""From the released `jvlm` layout to this one: config keys, processor settings and tensor names.

Nothing else in the bundle knows the released layout. Settings are supported as the released checkpoint
(`jinaai/jina-vlm`) has them; any other value is refused by name.
"""

from __future__ import annotations


from .compatibility_jina_vlm import OLDEST  # noqa: F401  before what old versions lack  # isort: skip

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, ConversionOps, WeightConverter, WeightRenaming


RELEASED_MODEL_TYPE = "jvlm"
NATIVE_MODEL_TYPE = "jina_vlm"

# The release appends these to the base vocabulary, in this order; 128 embedding rows are kept for them.
STRUCTURAL_TOKENS = ("<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<|image|>", "<im_slice>")


# -------------------------------------------------------------------------------------------------------------------
# Config
# -------------------------------------------------------------------------------------------------------------------

_RMS_NORM = {"type": "rms", "bias": False, "eps": 1e-6, "with_affine": True}
_LAYER_NORM = {"type": "default", "bias": True, "eps": 1e-6, "with_affine": True}
_NO_NORM = {"type": "default", "bias": None, "eps": None, "with_affine": True}


def _attention(biases: bool, head_norms: bool, lnorm: dict) -> dict:
    return {
        "clip_qkv": None, "fp32": False, "inner_lnorm": False, "sliding_window": -1, "softmax_scale": None,
        "q_bias": biases, "k_bias": biases, "v_bias": biases, "o_bias": biases,
        "q_lnorm": head_norms, "k_lnorm": head_norms, "qkv_lnorm_on_heads": head_norms,
        "v_lnorm": False, "o_lnorm": False, "lnorm_config": lnorm,
    }  # fmt: skip


def _ffn(bias: bool, gated: bool, activation: str, lnorm: dict) -> dict:
    return {
        "activation_type": activation, "bias": bias, "gated_activation": gated, "inner_lnorm": False,
        "lnorm_config": lnorm,
    }  # fmt: skip


# Every architectural setting of the release, with the value it must have
_SUPPORTED = {
    "tie_word_embeddings": False,
    "vision_config": {
        "patch_embedding_bias": True, "linear_patch_embedding": True, "n_channels": 3, "use_cls_token": False,
        "use_absolute_positional_embeddings": True, "positional_interpolation": "bicubic",
        "pre_lnorm": False, "post_lnorm": True, "tie_word_embeddings": False,
        "block_config": {
            "attn_lscale_init": None, "ffn_lscale_init": None, "postnorm": False, "lnorm_config": _LAYER_NORM,
            "attn_config": _attention(biases=True, head_norms=False, lnorm=_LAYER_NORM),
            "ffn_config": _ffn(bias=True, gated=False, activation="gelu_pytorch_tanh", lnorm=_LAYER_NORM),
        },
        "vl_connector_config": {
            "padding_embed_type": "pad_and_partial_pad", "pooling_type": "attention_meanq", "pooling_h": 2,
            "pooling_w": 2, "projector_type": "mlp", "spatial_merge_size": 2,
            "attn_pooling_config": _attention(biases=True, head_norms=False, lnorm=_NO_NORM),
            "mlp_projector_config": _ffn(bias=False, gated=True, activation="silu", lnorm=_NO_NORM),
        },
    },
    "text_config": {
        "rope": True, "rope_scaling": None, "partial_rotary_factor": 1.0, "normalize_input_embeds": False,
        "tie_word_embeddings": False,
        "block_config": {
            "attn_lscale_init": None, "ffn_lscale_init": None, "postnorm": False, "lnorm_config": _RMS_NORM,
            "attn_config": _attention(biases=False, head_norms=True, lnorm=_RMS_NORM),
            "ffn_config": _ffn(bias=False, gated=True, activation="silu", lnorm=_NO_NORM),
        },
    },
}  # fmt: skip

# Keys that the conversion reads, and keys that mean nothing for inference (dropout, ratios of sizes)
_SIZES = {
    "hidden_size", "n_layers", "num_hidden_layers", "n_heads", "n_kv_heads", "num_key_value_heads", "head_dim", "size",
    "input_size", "output_size", "patch_size", "vit_layers", "vocab_size", "embedding_size", "additional_vocab_size",
    "rope_theta", "max_sequence_length", "max_position_embeddings",
}  # fmt: skip
_WITHOUT_EFFECT = re.compile(r"ratio|model_type|.*dropout|residual_.*|.*_token_id")


def is_released_config(config: dict) -> bool:
    """Tell whether a parsed `config.json` is in the released layout."""
    return config.get("model_type") == RELEASED_MODEL_TYPE


def _check_supported(given: dict, supported: dict, path: str = "") -> None:
    """Refuse what differs from the release. Unknown keys are refused in nested blocks only: old library versions wrote
    attributes such as `top_k` and `id2label` into every (sub-)config."""
    for key, value in given.items():
        where = f"{path}{key}"
        if key in supported:
            expected = supported[key]
            if isinstance(expected, dict):
                if not isinstance(value, dict):
                    raise ValueError(f"Released config: `{where}` must be a dictionary, got {value!r}.")
                _check_supported(value, expected, f"{where}.")
            elif value != expected:
                raise ValueError(
                    f"Released config: `{where}` is {value!r}; only {expected!r}, the released checkpoint's value, is "
                    "supported."
                )
        elif path.count(".") > 1 and key not in _SIZES and not _WITHOUT_EFFECT.fullmatch(key):
            raise ValueError(
                f"Released config: unknown setting `{where}` = {value!r}; it is not in the released checkpoint."
            )


def _get(config: dict, path: str) -> Any:
    value: Any = config
    for key in path.split("."):
        if not isinstance(value, dict) or value.get(key) is None:
            raise ValueError(f"Released config: `{path}` is missing.")
        value = value[key]
    return value


def convert_config(released: dict) -> dict:
    """Translate the parsed `config.json` of a released checkpoint into the keyword arguments of `JinaVLMConfig`.

    Raises:
        ValueError: a setting is missing, or differs from what the released checkpoint uses; it names key and value.
    """
    for key in ("quantization", "quantization_config"):
        if released.get(key):
            raise ValueError(
                f"Released config: `{key}` is {released[key]!r}; quantized weights are not read in this layout. If "
                "this is a copy for MLX (`jinaai/jina-vlm-mlx`), `jina-vlm convert` makes a folder of it that loads."
            )
    _check_supported(released, _SUPPORTED)
    vision, connector, text = "vision_config", "vision_config.vl_connector_config", "text_config"

    height, width = _get(released, f"{vision}.input_size")
    if height != width:
        raise ValueError(f"Released config: `vision_config.input_size` must be square, got {[height, width]}.")
    for key, other in (
        (f"{vision}.output_size", f"{text}.hidden_size"),
        (f"{text}.embedding_size", f"{text}.vocab_size"),
    ):
        if _get(released, key) != _get(released, other):
            raise ValueError(
                f"Released config: `{key}` is {_get(released, key)}, but `{other}` is {_get(released, other)}; they "
                "must agree."
            )

    for key, size in (
        (f"{vision}.block_config.attn_config", _get(released, f"{vision}.hidden_size")),
        (f"{connector}.attn_pooling_config", None),
    ):
        heads, head_dim = _get(released, f"{key}.n_heads"), _get(released, f"{key}.head_dim")
        if size is not None and heads * head_dim != size:
            raise ValueError(
                f"Released config: `{key}` has {heads} heads of {head_dim}; they must make up the width {size}."
            )
        if (groups := _get(released, key).get("n_kv_heads")) not in (None, heads):
            raise ValueError(
                f"Released config: `{key}.n_kv_heads` is {groups}; only null, as many as heads, is supported."
            )

    # `vit_layers` indexes the outputs of all blocks and the final norm. What lies behind the deepest is left out.
    num_layers, layers = _get(released, f"{vision}.n_layers"), _get(released, f"{vision}.vit_layers")
    feature_layers = [layer if layer >= 0 else num_layers + 1 + layer for layer in layers]
    if not all(0 <= layer < num_layers for layer in feature_layers):
        raise ValueError(
            f"Released config: `vision_config.vit_layers` is {layers}; each must name one of the {num_layers} blocks' "
            "outputs."
        )

    base_vocab_size = _get(released, f"{text}.vocab_size")
    eos = released.get("eos_token_id")
    config = {
        "architectures": ["JinaVLMForConditionalGeneration"],
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": _get(released, f"{vision}.hidden_size"),
            "intermediate_size": _get(released, f"{vision}.block_config.ffn_config.size"),
            "num_hidden_layers": max(feature_layers) + 1,
            "num_attention_heads": _get(released, f"{vision}.block_config.attn_config.n_heads"),
            "image_size": height,
            "patch_size": _get(released, f"{vision}.patch_size"),
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-6,
            "vision_use_head": False,
        },
        "text_config": {
            "model_type": "qwen3",
            "vocab_size": base_vocab_size + _get(released, f"{text}.additional_vocab_size"),
            "hidden_size": _get(released, f"{text}.hidden_size"),
            "intermediate_size": _get(released, f"{text}.block_config.ffn_config.size"),
            "num_hidden_layers": _get(released, f"{text}.n_layers"),
            "num_attention_heads": _get(released, f"{text}.block_config.attn_config.n_heads"),
            "num_key_value_heads": _get(released, f"{text}.block_config.attn_config.n_kv_heads"),
            "head_dim": _get(released, f"{text}.block_config.attn_config.head_dim"),
            "max_position_embeddings": _get(released, f"{text}.max_sequence_length"),
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": float(_get(released, f"{text}.rope_theta"))},
            "bos_token_id": released.get("bos_token_id"),
            "eos_token_id": eos,
            "pad_token_id": released.get("pad_token_id", eos),
        },
        "vision_feature_layers": feature_layers,
        "connector_num_attention_heads": _get(released, f"{connector}.attn_pooling_config.n_heads"),
        "connector_head_dim": _get(released, f"{connector}.attn_pooling_config.head_dim"),
        "connector_intermediate_size": _get(released, f"{connector}.mlp_projector_config.size"),
        "structural_token_ids": [base_vocab_size + i for i in range(len(STRUCTURAL_TOKENS))],
        "image_token_id": base_vocab_size + STRUCTURAL_TOKENS.index("<im_patch>"),
        "tie_word_embeddings": False,
    }
    if (dtype := released.get("dtype") or released.get("torch_dtype")) is not None:
        config["dtype"] = dtype
    return config


# -------------------------------------------------------------------------------------------------------------------
# Image processor
# -------------------------------------------------------------------------------------------------------------------

_SUPPORTED_IMAGE_SETTINGS = {
    "cropping_method": "overlap-and-resize", "interpolation": "bilinear", "antialias": False,
    "normalization_method": "minmax", "image_min": -1.0, "image_max": 1.0, "resize_in_float32": False,
    "random_interpolation": False, "preserve_aspect_ratio": False, "padding_mask": False, "use_column_tokens": True,
    "do_convert_rgb": True,
}  # fmt: skip


def is_released_image_processor_config(config: dict) -> bool:
    """Tell whether a parsed `preprocessor_config.json` is in the released layout."""
    return "cropping_method" in config


def convert_image_processor_config(released: dict) -> dict:
    """Translate the parsed `preprocessor_config.json` of a released checkpoint for `JinaVLMImageProcessor`.

    Its CLIP mean and std, which the release does not use, and its token ids, which the tokenizer has, are left out.

    Raises:
        ValueError: a setting differs from what the released checkpoint uses; it names key and value.
    """
    for key, expected in _SUPPORTED_IMAGE_SETTINGS.items():
        if released.get(key, expected) != expected:
            raise ValueError(
                f"Released preprocessor config: `{key}` is {released[key]!r}; only {expected!r}, the released "
                "checkpoint's value, is supported."
            )
    squares = {}
    for key, default in (
        ("base_input_size", [378, 378]),
        ("overlap_margins", [4, 4]),
        ("pooling", [released.get("pooling_h", 2), released.get("pooling_w", 2)]),
    ):
        first, second = released.get(key, default)
        if first != second:
            raise ValueError(
                f"Released preprocessor config: `{key}` must hold one number twice, got {[first, second]}."
            )
        squares[key] = first
    return {
        "tile_size": squares["base_input_size"],
        "patch_size": released.get("patch_size", 14),
        "overlap_margin": squares["overlap_margins"],
        "pooling_size": squares["pooling"],
        "do_resize": released.get("do_resize", True),
        "max_tiles": released.get("max_crops", 12),
        "min_pixels": released.get("min_pixels", 3136),
        "max_pixels": released.get("max_pixels", 1003520),
    }


# -------------------------------------------------------------------------------------------------------------------
# Tensors
# -------------------------------------------------------------------------------------------------------------------

# (released, native) names: fixed ones, then those in a block. The library renames first, then converts by the end of
# the name: names in CAPITALS go to a converter below.
_FIXED_NAMES = (
    ("vision_model.patch_embed.proj.weight", "vision_model.tower.embeddings.patch_embedding.FLAT"),
    ("vision_model.patch_embed.proj.bias", "vision_model.tower.embeddings.patch_embedding.bias"),
    ("vision_model.pos_embed", "vision_model.tower.embeddings.position_embedding.weight"),
    ("vision_model.post_lnorm.", "vision_model.tower.post_layernorm."),
    ("vision_model.vl_connector.pad_embed", "connector.pad_embed"),
    ("vision_model.vl_connector.pooling.q_w.weight", "connector.q_proj.weight"),
    ("vision_model.vl_connector.pooling.kv_w.weight", "connector.KV"),
    ("vision_model.vl_connector.pooling.q_b", "connector.q_proj.bias"),
    ("vision_model.vl_connector.pooling.k_b", "connector.k_proj.bias"),
    ("vision_model.vl_connector.pooling.v_b", "connector.v_proj.bias"),
    ("vision_model.vl_connector.pooling.out.", "connector.out_proj."),
    ("vision_model.vl_connector.projector.up.weight", "connector.UP"),
    ("vision_model.vl_connector.projector.down.weight", "connector.down_proj.weight"),
    ("language_model.embedding.embedding", "language_model.embed_tokens.BASE"),
    ("language_model.embedding.new_embedding", "language_model.embed_tokens.NEW"),
    ("language_model.ln_f.weight", "language_model.norm.weight"),
)
_VISION_BLOCK_NAMES = (
    ("attn_lnorm.", "layer_norm1."),
    ("ffn_lnorm.", "layer_norm2."),
    ("attn.qkv_w.weight", "self_attn.STACKED"),
    ("attn.q_b", "self_attn.q_proj.bias"),
    ("attn.k_b", "self_attn.k_proj.bias"),
    ("attn.v_b", "self_attn.v_proj.bias"),
    ("attn.out.", "self_attn.out_proj."),
    ("ffn.up.", "mlp.fc1."),
    ("ffn.down.", "mlp.fc2."),
)
_TEXT_BLOCK_NAMES = (
    ("attn_lnorm.weight", "input_layernorm.weight"),
    ("ffn_lnorm.weight", "post_attention_layernorm.weight"),
    ("attn.qkv_w.weight", "self_attn.QKV"),
    ("attn.q_lnorm.weight", "self_attn.QNORM"),
    ("attn.k_lnorm.weight", "self_attn.KNORM"),
    ("attn.q_b", "self_attn.QBIAS"),
    ("attn.k_b", "self_attn.KBIAS"),
    ("attn.v_b", "self_attn.VBIAS"),
    ("attn.out.weight", "self_attn.o_proj.weight"),
    ("ffn.up.weight", "mlp.UP"),
    ("ffn.down.weight", "mlp.down_proj.weight"),
)
_BLOCKS = (
    ("vision_model.layers.", "vision_model.tower.encoder.layers.", _VISION_BLOCK_NAMES),
    ("language_model.layers.", "language_model.layers.", _TEXT_BLOCK_NAMES),
)
_QKV_WEIGHTS = ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"]

# Problems that the operations below find while a checkpoint loads. The library only logs them.
_problems: ContextVar[list[str] | None] = ContextVar("jina_vlm_conversion_problems", default=None)


@contextmanager
def collect_conversion_problems() -> Iterator[list[str]]:
    """Collect, as sentences, what is wrong with the tensors of a released checkpoint while it loads."""
    problems: list[str] = []
    token = _problems.set(problems)
    try:
        yield problems
    finally:
        _problems.reset(token)


class _ReleasedOp(ConversionOps):
    """An operation on released tensors: `run` gets them in the order of the source patterns."""

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str,
        config: Any,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        tensors = [input_dict.pop(pattern, [None]) for pattern in source_patterns]
        tensors = [tensor[0] if isinstance(tensor, list) else tensor for tensor in tensors]
        try:
            return dict(zip(target_patterns, self.run(tensors, full_layer_name, config), strict=True))
        except ValueError as error:
            if (problems := _problems.get()) is not None:
                problems.append(str(error))
            raise

    def run(self, tensors: list, name: str, config: Any) -> list[torch.Tensor]:
        raise NotImplementedError

    @property
    def reverse_op(self) -> Any:
        raise NotImplementedError("The released layout is read, not written: save with `save_original_format=False`.")


class _PatchLinearToConv(_ReleasedOp):
    """[out, rows * columns * channels] of a linear layer over flattened patches -> [out, channels, rows, columns]."""

    def run(self, tensors: list, name: str, config: Any) -> list[torch.Tensor]:
        (weight,) = tensors
        side = math.isqrt(weight.shape[1] // 3)
        if weight.ndim != 2 or side * side * 3 != weight.shape[1]:
            raise ValueError(
                f"`{released_name(name)}` has shape {list(weight.shape)}, expected [out, rows * columns * 3]."
            )
        return [weight.view(-1, side, side, 3).permute(0, 3, 1, 2).contiguous()]


class _SplitHeads(_ReleasedOp):
    """[(heads + 2 * key-value heads) * head_dim, in] -> q, k, v."""

    def run(self, tensors: list, name: str, config: Any) -> list[torch.Tensor]:
        (weight,) = tensors
        text = config.get_text_config()
        rows = [heads * text.head_dim for heads in (text.num_attention_heads, *[text.num_key_value_heads] * 2)]
        if weight.shape[0] != sum(rows):
            raise ValueError(
                f"`{released_name(name)}` has {weight.shape[0]} rows, expected {sum(rows)} = {rows} for q, k, v."
            )
        return [part.contiguous() for part in weight.split(rows)]


class _JoinEmbedding(_ReleasedOp):
    """The base vocabulary's rows, then the additional ones."""

    def run(self, tensors: list, name: str, config: Any) -> list[torch.Tensor]:
        for tensor, source in zip(tensors, ("embedding", "new_embedding"), strict=True):
            if tensor is None:
                raise ValueError(f"`model.language_model.embedding.{source}` is missing.")
        return [torch.cat(tensors)]


class _NormOfUnbiasedHeads(_ReleasedOp):
    """The per-head norm's weight, if the biases beside it are zero. The release stores biases that it never trained;
    this architecture has none."""

    def run(self, tensors: list, name: str, config: Any) -> list[torch.Tensor]:
        norm, *biases = tensors
        for bias, letter in zip(biases, "q" if "q_norm" in name else "kv", strict=True):
            if bias is not None and bool(torch.count_nonzero(bias)):
                source = re.sub(r"[qk]_lnorm\.weight$", f"{letter}_b", released_name(name))
                raise ValueError(
                    f"`{source}` holds values other than zero: biases in the text model's attention are not supported."
                )
        if norm is None:
            raise ValueError(f"`{released_name(name)}` is missing.")
        return [norm]


class _FillVocabulary(_ReleasedOp):
    """The head, with copies of the last base row, a filler entry that no text uses, for the additional vocabulary, of
    which the release has no rows. A native checkpoint's head passes unchanged."""

    def run(self, tensors: list, name: str, config: Any) -> list[torch.Tensor]:
        (weight,) = tensors
        missing = config.get_text_config().vocab_size - weight.shape[0]
        if missing > 0 and weight.shape[0] == config.structural_token_ids[0]:
            weight = torch.cat([weight, weight[-1:].expand(missing, -1)])
        return [weight]


def register_released_layout() -> None:
    """Make `from_pretrained` read released tensors. If several copies of this module call it, the last one counts."""
    renamings = [
        WeightRenaming(rf"^model\.{re.escape(released)}", f"model.{native}") for released, native in _FIXED_NAMES
    ]
    for released_prefix, native_prefix, names in _BLOCKS:
        renamings += [
            WeightRenaming(
                rf"^model\.{re.escape(released_prefix)}(\d+)\.{re.escape(released)}",
                rf"model.{native_prefix}\1.{native}",
            )
            for released, native in names
        ]
    converters = [
        WeightConverter("patch_embedding.FLAT", "patch_embedding.weight", [_PatchLinearToConv()]),
        WeightConverter("self_attn.STACKED", list(_QKV_WEIGHTS), [Chunk(dim=0)]),
        WeightConverter("connector.KV", ["connector.k_proj.weight", "connector.v_proj.weight"], [Chunk(dim=0)]),
        # The release has a SwiGLU's values before its gate.
        WeightConverter("connector.UP", ["connector.up_proj.weight", "connector.gate_proj.weight"], [Chunk(dim=0)]),
        WeightConverter("mlp.UP", ["mlp.up_proj.weight", "mlp.gate_proj.weight"], [Chunk(dim=0)]),
        WeightConverter(["embed_tokens.BASE", "embed_tokens.NEW"], "embed_tokens.weight", [_JoinEmbedding()]),
        WeightConverter("self_attn.QKV", list(_QKV_WEIGHTS), [_SplitHeads()]),
        WeightConverter(["self_attn.QNORM", "self_attn.QBIAS"], "self_attn.q_norm.weight", [_NormOfUnbiasedHeads()]),
        WeightConverter(
            ["self_attn.KNORM", "self_attn.KBIAS", "self_attn.VBIAS"],
            "self_attn.k_norm.weight",
            [_NormOfUnbiasedHeads()],
        ),
        # To its end: quantizers have `lm_head.weight_scale` and the like, and add them to what ends in ".weight".
        WeightConverter("lm_head.weight$", "lm_head.weight", [_FillVocabulary()]),
    ]  # fmt: skip
    register_checkpoint_conversion_mapping(NATIVE_MODEL_TYPE, renamings + converters, overwrite=True)


# Patterns of native names that a converter makes, and the name it makes them from
_CONVERTED = (
    (r"patch_embedding\.weight$", "patch_embedding.FLAT"),
    (r"(vision_model\..*self_attn)\.[qkv]_proj\.weight$", r"\1.STACKED"),
    (r"(language_model\..*self_attn)\.[qkv]_proj\.weight$", r"\1.QKV"),
    (r"connector\.[kv]_proj\.weight$", "connector.KV"),
    (r"(connector|mlp)\.(up|gate)_proj\.weight$", r"\1.UP"),
    (r"embed_tokens\.weight$", "embed_tokens.BASE"),
    (r"self_attn\.q_norm\.weight$", "self_attn.QNORM"),
    (r"self_attn\.k_norm\.weight$", "self_attn.KNORM"),
)


def released_name(native: str) -> str:
    """Find the name of the released tensor that the parameter `native` is made from."""
    name = native.removeprefix("model.")
    for pattern, source in _CONVERTED:
        name = re.sub(pattern, source, name)
    for released, end in _FIXED_NAMES:
        if name.startswith(end):
            return f"model.{released}{name.removeprefix(end)}"
    for released_prefix, native_prefix, names in _BLOCKS:
        if name.startswith(native_prefix):
            layer, _, rest = name.removeprefix(native_prefix).partition(".")
            for released, end in names:
                if rest.startswith(end):
                    return f"model.{released_prefix}{layer}.{released}{rest.removeprefix(end)}"
    return native
