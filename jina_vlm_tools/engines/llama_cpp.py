"""jina-vlm with its text model run by llama.cpp, from a GGUF file: tower and connector by torch, or as graphs.

It is a model of the library like any other, whose cache is llama.cpp's. So `generate` with all its options,
conversations, batch jobs and the server run on it unchanged. A prompt's words go to llama.cpp as tokens; what lies
between `<im_start>` and `<im_end>`, as embeddings. `gguf_folder.py` makes its checkpoints.
"""

from typing import Any, Literal

import numpy as np
import torch
from huggingface_hub.dataclasses import strict
from jina_vlm import JinaVLMConfig, JinaVLMConnector, JinaVLMForConditionalGeneration, JinaVLMModel, JinaVLMVisionModel
from jina_vlm.modeling_jina_vlm import JinaVLMPreTrainedModel
from torch import nn
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin
from transformers.utils.hub import cached_file

from jina_vlm_tools.extras import running

from . import FOLDERS, LLAMA_CPP, TORCH
from .graph_parts import GraphTower, load_graphs, make_connector
from .model import EngineForConditionalGeneration, count_padding, find, register


@strict
class LlamaCppConfig(JinaVLMConfig):
    """As [`JinaVLMConfig`]. `text_file`: the text model's file, beside `config.json`. `vision_engine`: what runs
    tower and connector."""

    model_type = FOLDERS[LLAMA_CPP].model_type
    text_file: str = "text-BF16.gguf"
    vision_engine: Literal["torch", "onnx", "openvino"] = TORCH


class _Layer(CacheLayerMixin):
    """What the library asks of a cache's layers, for all of llama.cpp's at once. Samples are padded on the left, which
    llama.cpp never sees: `padding` counts it, by sample."""

    is_croppable = True
    supports_early_init = False

    def __init__(self, text: Any):
        super().__init__()
        self.text, self.sequences = text, None
        self.padding: list[int] = []
        self.length = 0

    def begin(self, padding: list[int]) -> None:
        from .llama_text import Sequences

        self.padding, self.sequences = padding, Sequences(self.text, len(padding))
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # the name before transformers 5.24

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(f"Expected how many tokens to remove as a negative number, got {tokens_to_remove}.")
        self.length += tokens_to_remove
        for sequence, padding in enumerate(self.padding):
            self.sequences.forget(sequence, max(self.length - padding, 0))

    def reset(self) -> None:
        self.sequences, self.padding, self.length, self.is_initialized = None, [], 0, False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise NotImplementedError("llama.cpp makes keys and values itself.")

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        raise NotImplementedError("llama.cpp makes keys and values itself.")

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        raise NotImplementedError("Beam search is not supported with llama.cpp. Leave `num_beams` out, or use torch.")


class LlamaCppCache(Cache):
    """What llama.cpp has read, of [`LlamaCppForConditionalGeneration.new_cache`]."""

    def __init__(self, text: Any):
        super().__init__(layers=[_Layer(text)])


class _StructuralEmbedding(nn.Module):
    """The embedding of the structural tokens alone, which images are marked with."""

    def __init__(self, config: LlamaCppConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(len(config.structural_token_ids), config.text_config.hidden_size))
        self.token_ids = list(config.structural_token_ids)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        is_token = ids[..., None] == torch.tensor(self.token_ids, device=ids.device)
        return self.weight[is_token.int().argmax(dim=-1)]


class _TextStub(nn.Module):
    """In the place of the text model, what of it stays in torch."""

    def __init__(self, config: LlamaCppConfig):
        super().__init__()
        self.embed_tokens = _StructuralEmbedding(config)


class LlamaCppModel(JinaVLMModel):
    """Tower and connector."""

    config_class = LlamaCppConfig

    def __init__(self, config: LlamaCppConfig):
        super(JinaVLMModel, self).__init__(config)
        if config.vision_engine == TORCH:
            self.vision_model, self.connector = JinaVLMVisionModel(config), JinaVLMConnector(config)
        else:
            self.vision_model, self.connector = GraphTower(config), make_connector(config)
        self.language_model = _TextStub(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.embed_tokens = value

    _apply = JinaVLMPreTrainedModel._apply  # the base class minds a rotary embedding

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("The text model is llama.cpp's, which gives logits alone: call the model with head.")


class LlamaCppForConditionalGeneration(EngineForConditionalGeneration):
    """
    jina-vlm, for inference: see the module.

    Its weights are the embeddings of the structural tokens, and tower and connector unless these are graphs; `device`
    and `dtype` are theirs. Engines take as many threads as torch.
    """

    config_class = LlamaCppConfig
    engine = LLAMA_CPP

    def __init__(self, config: LlamaCppConfig):
        super(JinaVLMForConditionalGeneration, self).__init__(config)
        self.model = LlamaCppModel(config)
        self.text: Any = None
        self.post_init()
        self.generation_config.suppress_tokens = self._with_structural_tokens(None)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, *args: Any, use_gpu: bool | None = None, **kwargs: Any
    ) -> Any:
        """
        Load a checkpoint that `jina-vlm convert --to gguf` made.

        Args:
            use_gpu: Whether llama.cpp may use a GPU; if left out, where it was built for one.

        Raises:
            OSError: an engine is not installed, or a file is missing or damaged.
            ValueError: as by the base class; or `quantization_config` is given: the GGUF file is quantized; or the
                engine of tower and connector does not compute in `dtype`.
        """
        with cls.importing(kwargs):
            from .llama_text import TextModel
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        found, engine = find(kwargs), model.config.vision_engine
        if engine != TORCH:
            with running(FOLDERS[engine].extra, f"Its tower, which is {engine}'s,"):
                parts = {"tower": model.model.vision_model.tower, "connector": model.model.connector}
                load_graphs(parts, engine, kwargs.get("dtype"), pretrained_model_name_or_path, found)
        path = cached_file(pretrained_model_name_or_path, model.config.text_file, **found)
        model.text, config = TextModel(path, use_gpu), model.config.text_config
        sizes, expected = (model.text.vocabulary_size, model.text.width), (config.vocab_size, config.hidden_size)
        if sizes != expected:
            raise ValueError(
                f"{path} has {sizes[0]} tokens and the width {sizes[1]}, expected {expected[0]} and {expected[1]}: it "
                "is of another checkpoint than its config.json."
            )
        return loaded

    def get_output_embeddings(self) -> None:
        """None: the head is llama.cpp's."""

    def new_cache(self) -> LlamaCppCache:
        """
        Make an empty cache, for `generate` and `forward`.

        Raises:
            ValueError: the model was not loaded by `from_pretrained`.
        """
        if self.text is None:
            raise ValueError("This model has no text model: load it by `from_pretrained`.")
        return LlamaCppCache(self.text)

    def check_cache(self, cache: Cache) -> None:
        if not isinstance(cache, LlamaCppCache):
            raise ValueError(f"Expected a cache of `new_cache()`, got {type(cache).__name__}. Leave it out for one.")

    def read(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: Cache,
        image_outputs: Any,
        kept: list[int],
    ) -> torch.Tensor:
        """As the base class; logits of padding are zeros."""
        from .llama_text import Place

        layer, (batch, length) = cache.layers[0], input_ids.shape
        padding = count_padding(attention_mask, batch, layer.length + length)
        if layer.sequences is None:
            layer.begin(padding)
        elif padding != layer.padding:
            raise ValueError(
                f"The samples begin with {padding} tokens of padding, and those of the cache with {layer.padding}. "
                "Pass `attention_mask` as it was when the cache was begun, with a 1 for each new token."
            )
        if position_ids is not None:
            given = position_ids.cpu().expand(batch, length)
            counted = torch.arange(layer.length, layer.length + length) - torch.tensor(padding)[:, None]
            if (is_wrong := (given != counted) & (counted >= 0)).any():
                raise ValueError(
                    f"`position_ids` has {given[is_wrong][0]} where {counted[is_wrong][0]} was expected: llama.cpp "
                    "counts on from each sample's first token. Leave it out."
                )
        embeddings = self._embed_images(input_ids, image_outputs)
        places, are_padding = [], []
        for row, ids in enumerate(input_ids.tolist()):
            for column, token in enumerate(ids):
                position = layer.length + column - padding[row]
                if column in kept:
                    are_padding.append(position < 0)
                if position >= 0:
                    places.append(Place(row, position, embeddings.get((row, column), token), column in kept))
        read = torch.from_numpy(layer.sequences.read(places))
        layer.length += length
        logits = read
        if any(are_padding):
            logits = read.new_zeros(len(are_padding), read.shape[1])
            logits[~torch.tensor(are_padding)] = read
        return logits.unflatten(0, (batch, -1))

    def _embed_images(self, input_ids: torch.Tensor, image_outputs: Any) -> dict[tuple[int, int], np.ndarray]:
        """By row and column, the embeddings of all places that belong to images."""
        is_structural = torch.isin(input_ids, torch.tensor(self.config.structural_token_ids, device=input_ids.device))
        embeddings = self.get_input_embeddings()(input_ids[is_structural]).float()
        is_place = input_ids[is_structural] == self.config.image_token_id
        features = None if image_outputs is None else torch.cat(tuple(image_outputs.pooler_output)).float()
        if features is not None:
            if int(is_place.sum()) != len(features):
                raise ValueError(
                    f"The text has {int(is_place.sum())} places (`<im_patch>`) for image features, but the images "
                    f"make {len(features)}. Pass text and images as the processor put them together."
                )
            embeddings[is_place] = features.to(embeddings.device)
        indices = is_structural.nonzero().tolist()
        return dict(zip(map(tuple, indices), embeddings.cpu().numpy(), strict=True))


register(LlamaCppConfig, LlamaCppForConditionalGeneration)
