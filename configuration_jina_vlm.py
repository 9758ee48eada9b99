# Copyright 2026 The jina-vlm-transformers authors. Licensed under the Apache License, Version 2.0.
"""Configuration of jina-vlm. The defaults are those of the released 2.4B model."""

from .compatibility_jina_vlm import CACHE_NAME, put_into_package  # before what old versions lack  # isort: skip

import os
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig, Qwen3Config, SiglipVisionConfig

from .conversion_jina_vlm import STRUCTURAL_TOKENS, convert_config, is_released_config
from .tiling_jina_vlm import check_geometry


# SigLIP2-So400M/14 at 378 pixels: the first 25 of its 27 blocks, as no deeper one is used.
_VISION_DEFAULTS = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 25,
    "num_attention_heads": 16,
    "image_size": 378,
    "patch_size": 14,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "vision_use_head": False,
}

# Qwen3-1.7B with 128 more rows for image tokens.
_TEXT_DEFAULTS = {
    "vocab_size": 152064,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "pad_token_id": 151643,
}

AUTO_MAP = {
    "AutoConfig": "configuration_jina_vlm.JinaVLMConfig",
    "AutoModel": "modeling_jina_vlm.JinaVLMModel",
    "AutoModelForImageTextToText": "modeling_jina_vlm.JinaVLMForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_jina_vlm.JinaVLMForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_jina_vlm.JinaVLMForConditionalGeneration",
}


@strict
class JinaVLMConfig(PreTrainedConfig):
    r"""
    Configuration of a [`JinaVLMModel`] (arXiv 2512.04032, section 3). The released checkpoint's `config.json`
    (`model_type: jvlm`) is read as well.

    Args:
        vision_config (`SiglipVisionConfig` or `dict`, *optional*):
            The vision tower, up to its deepest block in use. Its final norm and head are not built.
        text_config (`Qwen3Config` or `dict`, *optional*):
            The text model. `vocab_size` counts the image tokens.
        vision_feature_layers (`list[int]`, *optional*, defaults to `[24, 18]`):
            Indices of the tower's blocks whose outputs are concatenated, in this order. The deepest is the last block.
        connector_num_attention_heads (`int`, *optional*, defaults to 16):
            Heads of the attention that pools each window of patches.
        connector_head_dim (`int`, *optional*, defaults to 72):
            Width of each of these heads.
        connector_intermediate_size (`int`, *optional*, defaults to 6144):
            Inner width of the SwiGLU that projects to the text model's width.
        pooling_size (`int`, *optional*, defaults to 2):
            Side, in patches, of a window that is pooled to one token.
        overlap_margin (`int`, *optional*, defaults to 4):
            Patches at each inner edge of a tile that its neighbor shows too; their tokens are dropped.
        image_token_id (`int`, *optional*, defaults to 151938):
            Id of `<im_patch>`, the placeholder of one image feature.
        structural_token_ids (`list[int]`, *optional*, defaults to `[151936, ..., 151941]`):
            Ids of `<im_start>`, `<im_end>`, `<im_patch>`, `<im_col>`, `<|image|>` and `<im_slice>`: never generated.
        matryoshka_dimensions (`list[int]`, *optional*, defaults to `[128, 256, 512, 1024, 2048]`):
            To which an embedding may be cut; by default the text model's width, halved up to four times. Engines that
            embed read it, such as vLLM.
        tie_word_embeddings (`bool`, *optional*, defaults to `False`):
            Whether `lm_head` shares the embedding's weights.
    """

    model_type = "jina_vlm"
    sub_configs = {"vision_config": SiglipVisionConfig, "text_config": Qwen3Config}
    # The Trainer gathers outputs by sample; these have no dimension of samples.
    keys_to_ignore_at_inference = [CACHE_NAME, "image_outputs"]
    _auto_class = "AutoConfig"

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    vision_feature_layers: list[int] | None = None
    connector_num_attention_heads: int = 16
    connector_head_dim: int = 72
    connector_intermediate_size: int = 6144
    pooling_size: int = 2
    overlap_margin: int = 4
    image_token_id: int = 151938
    structural_token_ids: list[int] | None = None
    matryoshka_dimensions: list[int] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        defaults = {"vision_config": _VISION_DEFAULTS, "text_config": _TEXT_DEFAULTS}
        for name, config_class in self.sub_configs.items():
            given = getattr(self, name)
            if given is None:
                setattr(self, name, config_class(**defaults[name]))
            elif isinstance(given, dict):
                if (model_type := given.get("model_type", config_class.model_type)) != config_class.model_type:
                    raise ValueError(
                        f"`{name}.model_type` is {model_type!r}; jina-vlm is made of {config_class.model_type!r}."
                    )
                setattr(self, name, config_class(**{**defaults[name], **given}))
        if self.vision_feature_layers is None:
            self.vision_feature_layers = [24, 18]
        if self.structural_token_ids is None:
            self.structural_token_ids = list(range(151936, 151942))
        if self.matryoshka_dimensions is None:
            hidden = self.text_config.hidden_size
            self.matryoshka_dimensions = [hidden >> halved for halved in (4, 3, 2, 1, 0) if hidden >> halved]
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Refuse sizes that do not fit together."""
        super().validate_architecture()
        vision, text = self.vision_config, self.text_config
        if text.num_key_value_heads < 1 or text.num_attention_heads % text.num_key_value_heads:
            raise ValueError(
                f"`text_config.num_attention_heads` ({text.num_attention_heads}) must be a multiple of "
                f"`text_config.num_key_value_heads` ({text.num_key_value_heads})."
            )
        layers, num_layers = self.vision_feature_layers, vision.num_hidden_layers
        if not layers or min(layers) < 0 or max(layers) != num_layers - 1:
            raise ValueError(
                f"`vision_feature_layers` is {layers}; its deepest entry must be the last of the tower's "
                f"`vision_config.num_hidden_layers` ({num_layers}) blocks, {num_layers - 1}, and none may be negative."
            )
        try:
            check_geometry(vision.image_size, vision.patch_size, self.overlap_margin, self.pooling_size)
        except (ValueError, TypeError) as error:
            raise ValueError(
                "`vision_config.image_size` (of a tile), `vision_config.patch_size`, `overlap_margin` and "
                f"`pooling_size` do not fit together: {error}"
            ) from None
        token_ids = self.structural_token_ids
        if self.image_token_id not in token_ids:
            raise ValueError(
                f"`image_token_id` ({self.image_token_id}) must be one of `structural_token_ids` ({token_ids})."
            )
        if not 0 <= min(token_ids) <= max(token_ids) < text.vocab_size:
            raise ValueError(
                f"`structural_token_ids` ({token_ids}) must lie in the vocabulary of `text_config.vocab_size` "
                f"({text.vocab_size})."
            )
        if len(token_ids) != len(STRUCTURAL_TOKENS):
            raise ValueError(
                f"`structural_token_ids` ({token_ids}) must be {len(STRUCTURAL_TOKENS)} ids, those of "
                f"{', '.join(STRUCTURAL_TOKENS)}."
            )
        dims, hidden = self.matryoshka_dimensions, text.hidden_size
        if not all(1 <= dim <= hidden for dim in dims):
            raise ValueError(
                f"`matryoshka_dimensions` ({dims}) must be from 1 to `text_config.hidden_size` ({hidden})."
            )

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return _translated(config_dict), kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "JinaVLMConfig":
        return super().from_dict(_translated(config_dict), **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        # The library would write only the class that the model was loaded by.
        self.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


def _translated(config_dict: dict[str, Any]) -> dict[str, Any]:
    """Translate a released config, without its `auto_map`: the release's code is not run."""
    return convert_config(config_dict) if is_released_config(config_dict) else config_dict


__all__ = ["JinaVLMConfig"]

put_into_package(__name__)
