"""jina-vlm run by ONNX Runtime or OpenVINO: tower, connector, embedding and decoder are graphs.

It is a model of the library like any other, with the library's own cache. So `generate` with all its options,
conversations, batch jobs and the server run on it unchanged. Where tiles belong, which of them are the same and where
features go is decided by the bundle's code. `graph_folder.py` makes its checkpoints.
"""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from jina_vlm import JinaVLMConfig, JinaVLMForConditionalGeneration, JinaVLMModel
from jina_vlm.modeling_jina_vlm import JinaVLMPreTrainedModel
from torch import nn
from transformers import Cache, DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer

from . import FOLDERS, ONNX, OPENVINO
from .graph_parts import Graph, GraphTower, OnCPU, cache_names, load_graphs, make_connector
from .model import EngineForConditionalGeneration, count_padding, find, register


@strict
class OnnxConfig(JinaVLMConfig):
    model_type = FOLDERS[ONNX].model_type


@strict
class OpenVinoConfig(JinaVLMConfig):
    model_type = FOLDERS[OPENVINO].model_type


class _Text(nn.Module):
    def __init__(self, config: Any):
        super().__init__()
        self.embed_tokens = Graph(config.hidden_size, "input_ids")
        held = cache_names("past_key_values", config.num_hidden_layers)
        self.decoder = Graph(config.vocab_size, "inputs_embeds", "attention_mask", "position_ids", "kept", *held)


class GraphModel(OnCPU, JinaVLMModel):
    """Everything but the call of the text model."""

    def __init__(self, config: JinaVLMConfig):
        super(JinaVLMModel, self).__init__(config)
        self.vision_model = GraphTower(config)
        self.connector = make_connector(config)
        self.language_model = _Text(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.embed_tokens

    _apply = JinaVLMPreTrainedModel._apply  # the base class minds a rotary embedding

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("The decoder is a graph that gives logits alone: call the model with head.")


class GraphForConditionalGeneration(OnCPU, EngineForConditionalGeneration):
    """jina-vlm, for inference on CPUs: see the module. Engines take as many threads as torch. Loaded by
    `from_pretrained` of a subclass, or of an Auto class."""

    def __init__(self, config: JinaVLMConfig):
        super(JinaVLMForConditionalGeneration, self).__init__(config)
        self.model = GraphModel(config)
        self.post_init()
        self.generation_config.suppress_tokens = self._with_structural_tokens(None)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any) -> Any:
        """
        Load a checkpoint that `jina-vlm convert --to onnx` or `--to openvino` made.

        Args:
            dtype: Of the computation: float32, or, with OpenVINO, bfloat16 where the machine computes in it. Weights
                are as they were converted. Other arguments than this and where files are found say how torch should
                load weights, and there are none.

        Raises:
            OSError: the engine is not installed, or a file is missing or damaged.
            ValueError: another `dtype`, or `quantization_config` is given.
        """
        found = find(kwargs)
        with cls.importing(kwargs):
            config = kwargs.get("config") or cls.config_class.from_pretrained(pretrained_model_name_or_path, **found)
            model = cls(config).eval()
            parts = {
                "tower": model.model.vision_model.tower,
                "connector": model.model.connector,
                "embedding": model.model.language_model.embed_tokens,
                "decoder": model.model.language_model.decoder,
            }
            load_graphs(parts, cls.engine, kwargs.get("dtype"), pretrained_model_name_or_path, found)
        model.generation_config = GenerationConfig.from_pretrained(pretrained_model_name_or_path, **found)
        return model

    def get_output_embeddings(self) -> None:
        """None: the head is a part of the decoder's graph."""

    def new_cache(self) -> DynamicCache:
        """Make an empty cache, for `generate` and `forward`."""
        return DynamicCache(config=self.config.text_config)

    def check_cache(self, cache: Cache) -> None:
        layers = self.config.text_config.num_hidden_layers
        if len(cache.layers) != layers or any(type(layer) is not DynamicLayer for layer in cache.layers):
            raise ValueError(
                f"Expected a cache of `new_cache()`, {layers} layers that grow, got {type(cache).__name__} of "
                f"{len(cache.layers)}. Leave it out for one."
            )

    def read(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: Cache,
        image_outputs: Any,
        kept: list[int],
    ) -> torch.Tensor:
        (batch, length), held = input_ids.shape, cache.get_seq_length()
        count_padding(attention_mask, batch, held + length)
        if attention_mask is None:
            attention_mask = torch.ones(batch, held + length, dtype=torch.int64)
        if position_ids is None:
            position_ids = torch.arange(held, held + length).expand(batch, -1)
        embeds = self.get_input_embeddings()(input_ids)
        if image_outputs is not None:
            features = torch.cat(tuple(image_outputs.pooler_output)).to(embeds)
            embeds = embeds.masked_scatter(self.model.get_placeholder_mask(input_ids, embeds, features), features)
        inputs = {
            "inputs_embeds": embeds,
            "attention_mask": attention_mask.long(),
            "position_ids": position_ids,
            "kept": torch.tensor(kept),
        }
        text = self.config.text_config
        empty = torch.zeros(batch, text.num_key_value_heads, 0, text.head_dim)
        past = []
        for layer in cache.layers:
            has_any = layer.is_initialized and layer.get_seq_length() > 0
            past += [layer.keys, layer.values] if has_any else [empty, empty]
        inputs |= zip(cache_names("past_key_values", len(cache.layers)), past, strict=True)
        logits, *present = self.model.language_model.decoder.run(inputs)
        for layer, keys, values in zip(cache.layers, present[0::2], present[1::2], strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
        return logits


class OnnxForConditionalGeneration(GraphForConditionalGeneration):
    """See the base class. Run by ONNX Runtime."""

    config_class = OnnxConfig
    engine = ONNX


class OpenVinoForConditionalGeneration(GraphForConditionalGeneration):
    """See the base class. Run by OpenVINO."""

    config_class = OpenVinoConfig
    engine = OPENVINO


register(OnnxConfig, OnnxForConditionalGeneration)
register(OpenVinoConfig, OpenVinoForConditionalGeneration)
