# Copyright 2026 The jina-vlm-transformers authors. Licensed under the Apache License, Version 2.0.
"""What `generate` needs to know about images: which a cache holds, whose each is, and which tokens are no answer."""

import copy
from typing import Any

import torch
from transformers import Cache, GenerationConfig, GenerationMixin

from .compatibility_jina_vlm import CACHE_NAME, CHUNKS_CAN_HAVE_IMAGES, accepts_past_key_values


IMAGE_ARGUMENTS = ("pixel_values", "tile_positions", "mm_encoder_outputs")


class JinaVLMGenerationMixin(GenerationMixin):
    """Generation for a model whose base has `get_image_features`, `get_image_lengths` and `place_tiles`."""

    @accepts_past_key_values
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Generate as [`GenerationMixin.generate`] does, without structural tokens.

        A conversation that continues from its `cache` may bring all its images, or only the new ones.
        `use_model_defaults=True`, as on the release's card, is taken: transformers 5 does so always.

        Raises:
            ValueError: a prompt shows images that are not given; an assistant model or prompt lookup is to continue
                from a `cache`; `prefill_chunk_size` comes with images before transformers 5.23; or
                `use_model_defaults` is False.
        """
        if kwargs.pop("use_model_defaults", None) is False:
            raise ValueError(
                "`use_model_defaults` is False, but transformers 5 always takes the model's own defaults for what a "
                "`generation_config` leaves open. Leave it out, and set in `generation_config` what should differ."
            )
        input_ids = kwargs.get("input_ids") if inputs is None else inputs
        self._refuse_what_would_lose_images(generation_config, cache, kwargs)
        images = {name: kwargs.pop(name) for name in IMAGE_ARGUMENTS if kwargs.get(name) is not None}
        if kwargs.get("inputs_embeds") is None:
            self._refuse_missing_images(images, input_ids, cache, kwargs.get("attention_mask"))
        if "pixel_values" in images and "tile_positions" not in images and input_ids is not None:
            tiles, positions = self.base_model.place_tiles(images.pop("pixel_values"), input_ids)
            if tiles is not None:
                images |= {"pixel_values": tiles, "tile_positions": positions}
        kwargs |= self._images_to_come(images, input_ids, cache, kwargs.get("attention_mask"))
        if generation_config is None:
            kwargs["suppress_tokens"] = self._with_structural_tokens(kwargs.get("suppress_tokens"))
        else:
            given = kwargs.pop("suppress_tokens", None)
            generation_config = copy.deepcopy(generation_config)
            generation_config.suppress_tokens = self._with_structural_tokens(
                generation_config.suppress_tokens if given is None else given
            )
        if cache is not None:
            kwargs[CACHE_NAME] = cache
        return super().generate(inputs, generation_config, *args, **kwargs)

    def init_continuous_batching(
        self, generation_config: GenerationConfig | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Start continuous batching as the library does, without structural tokens."""
        generation_config = copy.deepcopy(self.generation_config if generation_config is None else generation_config)
        generation_config.suppress_tokens = self._with_structural_tokens(generation_config.suppress_tokens)
        return super().init_continuous_batching(generation_config, *args, **kwargs)

    def generate_batch(self, inputs: list[list[int]], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """
        Generate by continuous batching as the library does. Of a prompt it takes the tokens alone.

        Raises:
            ValueError: a prompt has places for image features.
        """
        if any(self.config.image_token_id in prompt for prompt in inputs):
            raise ValueError(
                "A prompt shows an image, which continuous batching would lose: `generate_batch` and "
                "`cache_implementation='paged'` take text alone. Call `generate`, with another cache."
            )
        return super().generate_batch(inputs, *args, **kwargs)

    def _with_structural_tokens(self, suppressed: list[int] | None) -> list[int]:
        if suppressed is None:
            suppressed = self.generation_config.suppress_tokens or []
        return sorted({*suppressed, *self.config.structural_token_ids})

    def _refuse_what_would_lose_images(
        self, generation_config: GenerationConfig | None, cache: Cache | None, kwargs: dict
    ) -> None:
        def setting(name: str) -> Any:
            for value in (kwargs.get(name), getattr(generation_config, name, None)):
                if value is not None:
                    return value
            return getattr(self.generation_config, name, None)

        is_assisted = kwargs.get("assistant_model") is not None or setting("prompt_lookup_num_tokens") is not None
        if is_assisted and cache is not None and cache.get_seq_length() > 0:
            raise ValueError(
                f"Got a `cache` of {cache.get_seq_length()} tokens with an `assistant_model` or "
                "`prompt_lookup_num_tokens`: the library would put the whole prompt into it again. Leave out the "
                "cache, or decode without the two."
            )
        has_images = any(kwargs.get(name) is not None for name in IMAGE_ARGUMENTS)
        if has_images and setting("prefill_chunk_size") and not CHUNKS_CAN_HAVE_IMAGES:
            raise ValueError(
                "`prefill_chunk_size` with images needs transformers 5.23 or newer, which shares them among the "
                "chunks. Leave it out, or run `pip install -U transformers`."
            )

    def _refuse_missing_images(
        self, images: dict, input_ids: torch.Tensor | None, cache: Cache | None, attention_mask: torch.Tensor | None
    ) -> None:
        """The model would take the places of images that are left out for words."""
        is_given = "pixel_values" in images or (images.get("mm_encoder_outputs") or {}).get("image") is not None
        if is_given or input_ids is None:
            return
        past_length = 0 if cache is None else cache.get_seq_length()
        new = input_ids[:, past_length if _holds_past(input_ids, attention_mask) else 0 :]
        if places := int((new == self.config.image_token_id).sum()):
            raise ValueError(
                f"The prompts have {places} places for image features, but no images are given. Pass `pixel_values` "
                "beside `input_ids`, as the processor returns them."
            )

    def _images_to_come(
        self, images: dict, input_ids: torch.Tensor | None, cache: Cache | None, attention_mask: torch.Tensor | None
    ) -> dict:
        """Keep of the image arguments what the cache lacks."""
        encoded = images.get("mm_encoder_outputs") or {}
        features = encoded.get("image")
        if features is not None:  # the library changes it
            features = copy.copy(features)
            images = {**images, "mm_encoder_outputs": {**encoded, "image": features}}
        past_length = 0 if cache is None else cache.get_seq_length()
        positions = images.get("tile_positions")
        if not past_length or not _holds_past(input_ids, attention_mask) or (features is None and positions is None):
            return images
        if features is None:
            lengths = self.base_model.get_image_lengths(positions)
        else:
            lengths = [len(image) for image in features.pooler_output]
        is_new = _find_new_images(input_ids == self.config.image_token_id, past_length, lengths)
        if not any(is_new):
            return {}
        if features is None:
            kept = torch.tensor(is_new, device=positions.device)[(positions[:, 0] < 0).cumsum(0) - 1]
            return {name: images[name][kept.to(images[name].device)] for name in images}
        features.pooler_output = [image for image, new in zip(features.pooler_output, is_new, strict=True) if new]
        return images

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """Repeat each sample's images beside it. The library would count those that a cache holds too."""
        encoded = model_kwargs.get("mm_encoder_outputs") or {}
        features = encoded.get("image")
        has_ids = input_ids is not None and input_ids.numel()
        if expand_size == 1 or features is None or not has_ids:
            return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)
        is_place = input_ids == self.config.image_token_id
        if is_place.sum() != sum(map(len, features.pooler_output)):  # the cache holds the others
            is_place = is_place[:, model_kwargs[CACHE_NAME].get_seq_length() :]
        images, repeated = iter(features.pooler_output), []
        for places in is_place.sum(dim=1).tolist():
            sample = []
            while places > 0:
                sample.append(next(images))
                places -= len(sample[-1])
            repeated += sample * expand_size
        features.pooler_output = repeated  # of the copy that `generate` made
        model_kwargs["mm_encoder_outputs"] = {**encoded, "image": None}
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        model_kwargs["mm_encoder_outputs"]["image"] = features
        return input_ids, model_kwargs


def _holds_past(input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None) -> bool:
    """The library's own rule for whether the inputs repeat what is in the cache."""
    return input_ids is not None and (attention_mask is None or attention_mask.shape[1] == input_ids.shape[1])


def _find_new_images(is_place: torch.Tensor, past_length: int, lengths: list[int]) -> list[bool]:
    """
    Args:
        is_place (`torch.Tensor` [batch, length], bool): Where image features go.
        past_length (`int`): The number of tokens that the cache holds, the same for each sample.
        lengths (`list[int]`): The number of features of each image that is given.

    Returns:
        For each image, whether the cache lacks it. If there are fewer features than places, all are new.
    """
    if sum(lengths) != is_place.sum():
        return [True] * len(lengths)
    is_new, images = [], iter(lengths)
    cached = is_place[:, :past_length].sum(dim=1).tolist()
    for places, held in zip(is_place.sum(dim=1).tolist(), cached, strict=True):
        while places > 0:
            length = next(images)
            is_new.append(held < length)
            places, held = places - length, held - length
    return is_new
