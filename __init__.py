# Copyright 2026 The jina-vlm-transformers authors. Licensed under the Apache License, Version 2.0.
"""jina-vlm for transformers, as a package. Importing it registers the classes with the library's Auto classes, for
this layout (`jina_vlm`) and the released one (`jvlm`): `from_pretrained("jinaai/jina-vlm")` then runs this code."""

from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from .configuration_jina_vlm import JinaVLMConfig
from .conversion_jina_vlm import RELEASED_MODEL_TYPE
from .image_processing_jina_vlm import JinaVLMImageProcessor
from .modeling_jina_vlm import (
    JinaVLMConnector,
    JinaVLMForConditionalGeneration,
    JinaVLMModel,
    JinaVLMPreTrainedModel,
    JinaVLMVisionModel,
)
from .processing_jina_vlm import JinaVLMProcessor


__version__ = "0.1.0"

AutoConfig.register(JinaVLMConfig.model_type, JinaVLMConfig, exist_ok=True)
# `AutoConfig.register` would refuse it: the translated config is of this layout's type.
CONFIG_MAPPING.register(RELEASED_MODEL_TYPE, JinaVLMConfig, exist_ok=True)
AutoModel.register(JinaVLMConfig, JinaVLMModel, exist_ok=True)
for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    auto_class.register(JinaVLMConfig, JinaVLMForConditionalGeneration, exist_ok=True)
AutoImageProcessor.register(JinaVLMConfig, JinaVLMImageProcessor, exist_ok=True)
AutoProcessor.register(JinaVLMConfig, JinaVLMProcessor, exist_ok=True)

__all__ = [
    "JinaVLMConfig",
    "JinaVLMConnector",
    "JinaVLMForConditionalGeneration",
    "JinaVLMImageProcessor",
    "JinaVLMModel",
    "JinaVLMPreTrainedModel",
    "JinaVLMProcessor",
    "JinaVLMVisionModel",
]
