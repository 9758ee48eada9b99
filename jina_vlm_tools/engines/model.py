"""What models whose text another engine runs have in common: what they take, and what they refuse."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jina_vlm import JinaVLMConfig, JinaVLMForConditionalGeneration, JinaVLMProcessor
from jina_vlm.compatibility_jina_vlm import CACHE_NAME, accepts_past_key_values
from jina_vlm.modeling_jina_vlm import JinaVLMCausalLMOutputWithPast
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    Cache,
    GenerationConfig,
)
from transformers.utils import can_return_tuple

from jina_vlm_tools.extras import running

from . import FOLDERS


class EngineForConditionalGeneration(JinaVLMForConditionalGeneration):
    """
    jina-vlm on an engine beside torch, for inference. A subclass says which by `engine`, makes caches of its own by
    `new_cache`, knows them by `check_cache`, and computes logits in `read`.
    """

    engine: str

    @classmethod
    @contextmanager
    def importing(cls, kwargs: dict) -> Iterator[None]:
        """
        Where the engine is imported, for `from_pretrained` with these arguments.

        Raises:
            OSError: it is not installed.
            ValueError: `quantization_config` is given: the folder's weights are quantized already.
        """
        if kwargs.get("quantization_config") is not None:
            raise ValueError(
                "The text model was quantized when it was converted: leave `quantization_config` out, and convert "
                "with another --quantize."
            )
        with running(FOLDERS[cls.engine].extra, f"A checkpoint for {cls.engine}"):
            yield

    def new_cache(self) -> Cache:
        """Make an empty cache, for `generate` and `forward`."""
        raise NotImplementedError

    def check_cache(self, cache: Cache) -> None:
        """
        Raises:
            ValueError: it is none of `new_cache`.
        """
        raise NotImplementedError

    def read(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: Cache,
        image_outputs: Any,
        kept: list[int],
    ) -> torch.Tensor:
        """Read tokens [batch, length] into the cache. Returns logits [batch, kept, vocabulary]; columns ascend."""
        raise NotImplementedError

    @accepts_past_key_values
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        cache: Cache | None = None,
        **kwargs: Any,
    ):
        """As the base class, with a cache of `new_cache`, unless `use_cache` says that there is none."""
        use_cache = kwargs.pop("use_cache", None)
        if use_cache is None:
            use_cache = (generation_config or self.generation_config).use_cache is not False
        kwargs["use_cache"] = bool(use_cache)  # the library takes other false values for one here, for the other there
        if cache is None and use_cache:
            cache = self.new_cache()
        return super().generate(inputs, generation_config, *args, cache=cache, **kwargs)

    @torch.no_grad()
    @accepts_past_key_values
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        tile_positions: torch.Tensor | None = None,
        mm_encoder_outputs: dict | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> JinaVLMCausalLMOutputWithPast:
        """
        Compute logits. Arguments are those of the base class; samples are padded on the left.

        Raises:
            ValueError: arguments exclude or lack each other, places and images do not match, or something is asked for
                that engines do not do: losses, embeddings of texts, hidden states, another cache, other padding.
        """
        if input_ids is None or inputs_embeds is not None:
            raise ValueError(f"Expected `input_ids`: with {self.engine} texts are tokens, not `inputs_embeds`.")
        if labels is not None:
            raise ValueError(f"{self.engine} does not train: leave `labels` out, or load the checkpoint with torch.")
        if asked := [name for name in ("output_hidden_states", "output_attentions") if kwargs.get(name)]:
            raise ValueError(
                f"{self.engine} gives logits alone: leave `{asked[0]}` out, or load the checkpoint with torch."
            )
        cache = self.new_cache() if cache is None else cache
        self.check_cache(cache)
        image_outputs = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None:
            if image_outputs is not None:
                raise ValueError("Expected either `pixel_values` or `mm_encoder_outputs['image']`, got both.")
            if tile_positions is None:
                pixel_values, tile_positions = self.model.place_tiles(pixel_values, input_ids)
        if pixel_values is not None:
            image_outputs = self.get_image_features(pixel_values, tile_positions, return_dict=True)

        length = input_ids.shape[1]
        columns = range(length)[-logits_to_keep:] if isinstance(logits_to_keep, int) else logits_to_keep.tolist()
        columns = [column % length for column in columns]
        kept = sorted(set(columns))
        logits = self.read(input_ids, attention_mask, position_ids, cache, image_outputs, kept).to(input_ids.device)
        if columns != kept:
            logits = logits[:, [kept.index(column) for column in columns]]
        return JinaVLMCausalLMOutputWithPast(
            logits=logits, image_outputs=image_outputs, **{CACHE_NAME: None if use_cache is False else cache}
        )


def find(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those arguments of `from_pretrained` that say where a checkpoint's files are."""
    names = ("revision", "cache_dir", "token", "subfolder", "local_files_only", "force_download")
    return {name: kwargs[name] for name in names if kwargs.get(name) is not None}


def count_padding(attention_mask: torch.Tensor | None, batch: int, length: int) -> list[int]:
    """
    Count the tokens that each sample begins with and that are not part of it.

    Args:
        length: Of the samples, with what the cache holds of them.

    Raises:
        ValueError: the mask is of another size, or padding is elsewhere.
    """
    if attention_mask is None:
        return [0] * batch
    if attention_mask.shape != (batch, length):
        raise ValueError(f"Expected `attention_mask` [{batch}, {length}], got {list(attention_mask.shape)}.")
    mask = attention_mask.bool()
    if (mask[:, :-1] & ~mask[:, 1:]).any() or not mask[:, -1].all():
        raise ValueError("Expected samples that are padded on the left. Set `processor.tokenizer.padding_side`.")
    return (~mask).sum(dim=1).tolist()


def register(config_class: type[JinaVLMConfig], model_class: type[EngineForConditionalGeneration]) -> None:
    """Let the library's Auto classes load checkpoints of an engine."""
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        auto_class.register(config_class, model_class, exist_ok=True)
    AutoProcessor.register(config_class, JinaVLMProcessor, exist_ok=True)
