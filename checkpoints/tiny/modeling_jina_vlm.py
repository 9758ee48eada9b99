# Copyright 2026 The jina-vlm-transformers authors. Licensed under the Apache License, Version 2.0.
"""PyTorch model of jina-vlm (arXiv 2512.04032): SigLIP2 tower, attention-pooling connector, Qwen3 decoder."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, Cache, GenerationConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.models.siglip.modeling_siglip import SiglipAttention, SiglipEncoderLayer
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .checkpoint_jina_vlm import CheckpointMixin
from .compatibility_jina_vlm import CACHE_NAME, accepts_past_key_values, cache_argument, put_into_package
from .configuration_jina_vlm import JinaVLMConfig
from .conversion_jina_vlm import register_released_layout
from .generation_jina_vlm import JinaVLMGenerationMixin
from .samples_jina_vlm import to_tiles
from .tiling_jina_vlm import find_distinct_tiles, get_image_lengths, get_image_token_indices, get_tokens_per_side


TILES_AT_A_TIME = 4  # in the tower, on a CPU, for its caches


class _WithImages(ModelOutput):
    """What outputs of a model with images have in common."""

    image_outputs: BaseModelOutputWithPooling | None

    @property
    def image_hidden_states(self) -> torch.Tensor | None:
        """The embeddings that stand for the images: [image tokens, hidden]."""
        return self.image_outputs and torch.cat(tuple(self.image_outputs.pooler_output))

    def to_tuple(self) -> tuple:
        return tuple(value.to_tuple() if value is self.image_outputs else value for value in super().to_tuple())


@dataclass
class JinaVLMModelOutputWithPast(_WithImages, BaseModelOutputWithPast):
    """`image_outputs`: the result of [`~JinaVLMModel.get_image_features`]; None without images."""

    image_outputs: BaseModelOutputWithPooling | None = None


@dataclass
class JinaVLMCausalLMOutputWithPast(_WithImages, CausalLMOutputWithPast):
    """`image_outputs`: the result of [`~JinaVLMModel.get_image_features`]; None without images."""

    image_outputs: BaseModelOutputWithPooling | None = None


class JinaVLMPreTrainedModel(CheckpointMixin, PreTrainedModel):
    config: JinaVLMConfig
    config_class = JinaVLMConfig
    base_model_prefix = "model"
    input_modalities: tuple[str, ...] = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["SiglipEncoderLayer", "SiglipVisionEmbeddings", "JinaVLMConnector", "Qwen3DecoderLayer"]
    _skip_keys_device_placement = [CACHE_NAME]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _auto_class = "AutoModel"  # saving a model saves this code beside it

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, JinaVLMConnector):
            init.zeros_(module.pad_embed)

    @classmethod
    def is_custom_code(cls) -> bool:
        # For custom code the library skips the initialization of modules without parameters of their own, such as
        # SigLIP's attention, as theirs may overwrite what was loaded. Ours does not.
        return False


class PatchEmbedding(nn.Conv2d):
    """The tower's patch embedding as one matrix product over flattened patches, as in the release: a convolution sums
    in another order, which moves logits by more than the golden data allow."""

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        rows, columns = self.kernel_size
        patches = (
            pixel_values.unflatten(2, (-1, rows)).unflatten(4, (-1, columns)).permute(0, 2, 4, 1, 3, 5).flatten(3)
        )
        return F.linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class JinaVLMVisionModel(JinaVLMPreTrainedModel):
    """
    The tower (section 3.2): the library's SigLIP without final norm and head. It returns the outputs of a few of its
    blocks, concatenated.
    """

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _can_record_outputs = {"hidden_states": SiglipEncoderLayer, "attentions": SiglipAttention}
    # The library's SigLIP has no plan for tensor parallelism.
    _tp_plan = {
        **{f"tower.encoder.layers.*.self_attn.{name}_proj": "colwise" for name in "qkv"},
        "tower.encoder.layers.*.self_attn.out_proj": "rowwise",
        "tower.encoder.layers.*.mlp.fc1": "colwise",
        "tower.encoder.layers.*.mlp.fc2": "rowwise",
    }

    def __init__(self, config: JinaVLMConfig):
        super().__init__(config)
        self.tower = AutoModel.from_config(config.vision_config)
        vision, side = config.vision_config, config.vision_config.patch_size
        self.tower.embeddings.patch_embedding = PatchEmbedding(vision.num_channels, vision.hidden_size, side, side)
        self.tower.post_layernorm = nn.Identity()
        # A checkpoint may hold the whole tower.
        used = "|".join(map(str, range(vision.num_hidden_layers)))
        self._keys_to_ignore_on_load_unexpected = [
            rf"vision_model\.tower\.encoder\.layers\.(?!({used})\.)",
            r"vision_model\.tower\.(post_layernorm|head)\.",
        ]
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.tower.embeddings.patch_embedding

    @capture_outputs
    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> BaseModelOutputWithPooling:
        """
        Args:
            pixel_values (`torch.Tensor` [tiles, 3, 378, 378]): In [-1, 1].

        Returns:
            `last_hidden_state` [tiles, patches, width * number of feature layers], zero for black tiles.

        Raises:
            ValueError: the tiles are of another size.
        """
        vision = self.config.vision_config
        tile = (vision.num_channels, vision.image_size, vision.image_size)
        if pixel_values.shape[1:] != tile:
            raise ValueError(
                f"Expected `pixel_values` [tiles, {', '.join(map(str, tile))}], got {list(pixel_values.shape)}. Pass "
                "them as this model's processor made them."
            )
        has_values = not pixel_values.is_meta and not torch.compiler.is_compiling()
        if torch.is_grad_enabled() or not has_values or self._captures(kwargs):
            return BaseModelOutputWithPooling(last_hidden_state=self._encode(pixel_values, **kwargs))
        distinct, places = find_distinct_tiles(pixel_values)
        if len(distinct) < len(places):
            pixel_values = pixel_values[distinct]
        parts = -(-len(distinct) // TILES_AT_A_TIME) if self.device.type == "cpu" else 1
        features = torch.cat([self._encode(tiles, **kwargs) for tiles in pixel_values.tensor_split(parts)])
        if len(distinct) < len(places):
            features = features[places]
        return BaseModelOutputWithPooling(last_hidden_state=features)

    def _captures(self, kwargs: dict) -> bool:
        """Whether outputs of blocks are asked for, which are those of all tiles."""
        names = ("output_hidden_states", "output_attentions")
        return any(kwargs.get(name, getattr(self.config, name, False)) for name in names)

    def _encode(self, pixel_values: torch.Tensor, **kwargs) -> torch.Tensor:
        hidden_states = self.tower.embeddings(pixel_values)
        kept = {}
        for index, layer in enumerate(self.tower.encoder.layers):
            hidden_states = layer(hidden_states, attention_mask=None, **kwargs)
            if index in self.config.vision_feature_layers:
                kept[index] = hidden_states
        features = torch.cat([kept[index] for index in self.config.vision_feature_layers], dim=-1)
        # By the pixels as given: a cast to the model's type could make dark ones black.
        black = (pixel_values == -1).flatten(1).all(dim=1).to(features.device)
        return features.masked_fill(black[:, None, None], 0)


class JinaVLMConnector(nn.Module):
    """
    From the tower to the text model (section 3.3): attention pools each window of 2 x 2 patches to one token, with
    their mean as the query, and a SwiGLU projects it to the text model's width.
    """

    def __init__(self, config: JinaVLMConfig):
        super().__init__()
        hidden_size, intermediate_size = config.vision_config.hidden_size, config.connector_intermediate_size
        features = hidden_size * len(config.vision_feature_layers)
        width = config.connector_num_attention_heads * config.connector_head_dim
        self.head_dim = config.connector_head_dim
        self.window = config.pooling_size
        self.pad_embed = nn.Parameter(torch.zeros(2, features))
        self.q_proj = nn.Linear(features, width)
        self.k_proj = nn.Linear(features, width)
        self.v_proj = nn.Linear(features, width)
        self.out_proj = nn.Linear(width, hidden_size)
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.text_config.hidden_size, bias=False)

    def forward(self, features: torch.Tensor, is_last_tile: torch.Tensor) -> torch.Tensor:
        """
        Args:
            features (`torch.Tensor` [tiles, patches, features]): Of square tiles, row by row.
            is_last_tile (`torch.Tensor` [tiles], bool): Whether a tile is its image's last.

        Returns:
            `torch.Tensor` [tiles, tokens, hidden], row by row.
        """
        # Row 1 means "partly padded". In training it was added to each image's last tile.
        features = features + is_last_tile[:, None, None].to(features.dtype) * self.pad_embed[1]
        windows = self._windows(features)
        queries = self._heads(self.q_proj(windows.mean(dim=2, keepdim=True)))
        keys, values = self._heads(self.k_proj(windows)), self._heads(self.v_proj(windows))
        # Tiles are the batch: a batch of windows could exceed the 65,535 blocks of a GPU's grid.
        pooled = F.scaled_dot_product_attention(queries, keys, values)
        hidden_states = self.out_proj(pooled.unflatten(1, (windows.shape[1], -1)).flatten(2))
        gate, values = F.silu(self.gate_proj(hidden_states)), self.up_proj(hidden_states)
        if hidden_states.dtype != torch.float16:
            return self.down_proj(gate * values)
        # Features may exceed float16's range. The text model reads them through norms, so they may be scaled down: by
        # a constant first, the same for every rank, then each by its largest value.
        features = self.down_proj((gate.float() * values.float() / 1024).half()).float() * 1024
        return (features / (features.abs().amax(dim=-1, keepdim=True) / 2**15).clamp(min=1)).half()

    def _windows(self, features: torch.Tensor) -> torch.Tensor:
        """[tiles, side * side, features] -> [tiles, windows, patches of a window, features], padded with zeros."""
        side = round(features.shape[1] ** 0.5)
        missing = -side % self.window
        grid = F.pad(features.unflatten(1, (side, side)), (0, 0, 0, missing, 0, missing))
        grid = grid.unflatten(2, (-1, self.window)).unflatten(1, (-1, self.window))
        return grid.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def _heads(self, states: torch.Tensor) -> torch.Tensor:
        """[tiles, windows, patches, heads * head_dim] -> [tiles, windows * heads, patches, head_dim]"""
        return states.unflatten(-1, (-1, self.head_dim)).transpose(2, 3).flatten(1, 2)


class JinaVLMModel(JinaVLMPreTrainedModel):
    """Tower, connector and text model, without a language-model head."""

    _tp_plan = {
        **{f"connector.{name}_proj": "colwise" for name in ("q", "k", "v", "gate", "up")},
        "connector.out_proj": "rowwise",
        "connector.down_proj": "rowwise",
    }

    def __init__(self, config: JinaVLMConfig):
        super().__init__(config)
        self.vision_model = JinaVLMVisionModel(config)
        self.connector = JinaVLMConnector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        # `<|endoftext|>` pads batches, and opens and ends texts: it begins and learns as other tokens do.
        text, dtype = config.text_config, self.get_input_embeddings().weight.dtype
        self.set_input_embeddings(nn.Embedding(text.vocab_size, text.hidden_size, dtype=dtype))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def _apply(self, fn, recurse=True):
        """Keep the rotary embedding's frequencies in float32 in `.half()` and the like, as loading does: rounded, they
        would turn the angle at position 4,000 by several turns."""
        rotary = self.language_model.rotary_emb
        frequencies = dict(rotary.named_buffers())
        super()._apply(fn, recurse)
        for name, before in frequencies.items():
            after = getattr(rotary, name)
            if after.dtype.itemsize < before.dtype.itemsize:
                setattr(rotary, name, before.to(after.device))
        return self

    def _adjust_missing_and_unexpected_keys(self, loading_info):
        super()._adjust_missing_and_unexpected_keys(loading_info)
        # By `_keys_to_ignore_on_load_unexpected` vLLM, which adds its own head, would ignore it.
        loading_info.unexpected_keys.discard("lm_head.weight")

    def get_image_lengths(self, tile_positions: torch.Tensor) -> list[int]:
        """Count the `<im_patch>` tokens of each image. Raise ValueError if these are not the tiles of whole images."""
        return get_image_lengths(tile_positions, *self._tokens_and_overlap)

    def place_tiles(
        self, pixel_values: torch.Tensor, input_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
        """
        Read off [samples, length] whole prompts where their tiles, [tiles, 3, 378, 378] or [samples, most tiles, 3,
        378, 378], belong.

        Returns:
            `pixel_values` [tiles, 3, 378, 378] and `tile_positions` [tiles, 4]; None twice if rows have no tiles.

        Raises:
            ValueError: the prompts show other tiles than are given.
        """
        start, end, _, line, *_ = self.config.structural_token_ids
        token_ids = (start, end, self.config.image_token_id, line)
        tiles, positions = to_tiles(pixel_values, input_ids, token_ids, *self._tokens_and_overlap)
        return (tiles, positions) if len(tiles) else (None, None)

    @property
    def _tokens_and_overlap(self) -> tuple[int, int]:
        vision, pooling_size = self.config.vision_config, self.config.pooling_size
        tokens_per_side = get_tokens_per_side(vision.image_size, vision.patch_size, pooling_size)
        return tokens_per_side, self.config.overlap_margin // pooling_size

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        tile_positions: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """
        Args:
            pixel_values (`torch.Tensor` [tiles, 3, 378, 378]): In [-1, 1].
            tile_positions (`torch.Tensor` [tiles, 4], int64): (row, column, rows, columns) of each tile.

        Returns:
            The tower's output, with `pooler_output`: for each image, in prompt order, the final embeddings [tokens,
            hidden] of its `<im_patch>` tokens.

        Raises:
            ValueError: the two do not belong together.
        """
        if tile_positions is None:
            raise ValueError("Got `pixel_values` without `tile_positions`. Pass both, as the processor made them.")
        # `len` would fix the number of tiles in a graph.
        shape = pixel_values.shape
        if len(shape) != 4 or shape[0] == 0 or tile_positions.shape != (shape[0], 4):
            raise ValueError(
                "Expected `pixel_values` [tiles, 3, height, width] and `tile_positions` [tiles, 4], got "
                f"{list(shape)} and {list(tile_positions.shape)}. Pass both as the processor made them, those of "
                "several samples concatenated along the tiles; or neither, where there are no images."
            )
        lengths = None if torch.compiler.is_compiling() else self.get_image_lengths(tile_positions)
        order = get_image_token_indices(tile_positions, *self._tokens_and_overlap)
        outputs = self.vision_model(pixel_values, return_dict=True, **kwargs)
        is_last_tile = (tile_positions[:, :2] == tile_positions[:, 2:] - 1).all(dim=1)
        features = self.connector(outputs.last_hidden_state, is_last_tile.to(outputs.last_hidden_state.device))
        features = features.flatten(0, 1)[order[: None if lengths is None else sum(lengths)].to(features.device)]
        # Added here, because engines replace the token's embedding. Once for each place, as in a text: NEFTune's hook
        # on the embedding measures its noise by the length.
        places = torch.full((1, features.shape[0]), self.config.image_token_id, device=features.device)
        features = features + self.get_input_embeddings()(places)[0].to(features)
        # A graph's shapes cannot depend on values: all images are one there, with the dropped tokens at the end.
        outputs.pooler_output = [features] if lengths is None else list(features.split(lengths))
        return outputs

    def get_placeholder_mask(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor, image_features: torch.Tensor
    ) -> torch.Tensor:
        """Find where image features go: [batch, length, 1] bool.

        Raises:
            ValueError: there are more or fewer places than features.
        """
        if input_ids is None:
            patch_token = torch.full((1, 1), self.config.image_token_id, device=inputs_embeds.device)
            mask = (inputs_embeds == self.get_input_embeddings()(patch_token).to(inputs_embeds)).all(dim=-1)
        else:
            mask = input_ids == self.config.image_token_id
        if not torch.compiler.is_compiling() and (places := int(mask.sum())) != len(image_features):
            raise ValueError(
                f"The text has {places} places (`<im_patch>`) for image features, but the images make "
                f"{len(image_features)}. Pass text and images as the processor put them together."
            )
        return mask.unsqueeze(-1)

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
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> JinaVLMModelOutputWithPast:
        """
        Args:
            input_ids (`torch.Tensor` [batch, length], *optional*): Token ids; or pass `inputs_embeds` [batch, length,
                hidden].
            pixel_values (`torch.Tensor` [tiles, 3, 378, 378], *optional*): The tiles of all images, in prompt order;
                or, without `tile_positions`, [batch, most tiles, 3, 378, 378], those of each sample.
            tile_positions (`torch.Tensor` [tiles, 4], *optional*): The place of each tile in its image. If left out,
                it is read off `input_ids`.
            mm_encoder_outputs (`dict`, *optional*): Under `"image"`, the result of `get_image_features`, instead of
                these two.

        Raises:
            ValueError: arguments exclude or lack each other, or places and images do not match.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Expected either `input_ids` or `inputs_embeds`.")
        image_outputs = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None:
            if image_outputs is not None:
                raise ValueError("Expected either `pixel_values` or `mm_encoder_outputs['image']`, got both.")
            if tile_positions is None and input_ids is not None:
                pixel_values, tile_positions = self.place_tiles(pixel_values, input_ids)
        if pixel_values is not None:
            image_outputs = self.get_image_features(pixel_values, tile_positions, return_dict=True)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        if image_outputs is not None:
            image_features = torch.cat(tuple(image_outputs.pooler_output)).to(inputs_embeds)
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, image_features)
            inputs_embeds = inputs_embeds.masked_scatter(mask.to(inputs_embeds.device), image_features)

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **cache_argument(cache),
            **kwargs,
        )
        return JinaVLMModelOutputWithPast(**outputs, image_outputs=image_outputs)


class JinaVLMForConditionalGeneration(JinaVLMPreTrainedModel, JinaVLMGenerationMixin):
    """jina-vlm with its language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: JinaVLMConfig):
        super().__init__(config)
        self.model = JinaVLMModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()
        # For engines that read the saved file; `generate` adds them anyway.
        self.generation_config.suppress_tokens = self._with_structural_tokens(None)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        loaded = super().from_pretrained(*args, output_loading_info=output_loading_info, **kwargs)
        model = loaded[0] if output_loading_info else loaded
        if model.generation_config._from_model_config:
            # The library made it from the raw `config.json`; a released one holds an old version's defaults.
            model.generation_config = GenerationConfig.from_model_config(model.config)
            model.generation_config._from_model_config = False
        # A checkpoint's own generation config may lack them.
        model.generation_config.suppress_tokens = model._with_structural_tokens(None)
        return loaded

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        tile_positions: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """See [`JinaVLMModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, tile_positions, **kwargs)

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
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> JinaVLMCausalLMOutputWithPast:
        """
        Compute logits, and the loss if `labels` are given. Other arguments are those of [`JinaVLMModel.forward`].

        Args:
            labels (`torch.Tensor` [batch, length], *optional*): Token ids to predict. -100, structural tokens and
                padding by `attention_mask` do not count, and are taken out of `num_items_in_batch`: by the share that
                they have of this batch, since the others that are accumulated with it are not known here.
            logits_to_keep (`int` or `torch.Tensor`, *optional*): Compute the logits of as many last positions (0 for
                all), or of these positions.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            tile_positions=tile_positions,
            mm_encoder_outputs=mm_encoder_outputs,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            if (shifted := kwargs.get("shift_labels")) is not None:  # the loss is of these, if given
                mask = attention_mask
                if mask is not None:  # The last position keeps its own: the sequence's next part is not known.
                    mask = torch.cat([mask[:, 1:], mask[:, -1:]], 1)
                kwargs["shift_labels"] = self._targets(shifted, mask)
            targets = self._targets(labels, attention_mask)
            if (items := kwargs.get("num_items_in_batch")) is not None:
                # The Trainer has counted the labels that are given, also those that do not count here.
                given, kept = (labels[:, 1:], targets[:, 1:]) if shifted is None else (shifted, kwargs["shift_labels"])
                share = (kept != -100).sum().clamp(min=1) / (given != -100).sum().clamp(min=1)
                kwargs["num_items_in_batch"] = items * share
            loss = self.loss_function(logits=logits, labels=targets, vocab_size=logits.shape[-1], **kwargs)
        return JinaVLMCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_outputs=outputs.image_outputs,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )

    def _targets(self, labels: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        ignored = torch.isin(labels, torch.tensor(self.config.structural_token_ids, device=labels.device))
        if attention_mask is not None and attention_mask.shape == labels.shape:
            ignored = ignored | (attention_mask == 0).to(labels.device)
        return labels.masked_fill(ignored, -100)


register_released_layout()

__all__ = [
    "JinaVLMConnector",
    "JinaVLMForConditionalGeneration",
    "JinaVLMModel",
    "JinaVLMPreTrainedModel",
    "JinaVLMVisionModel",
]

put_into_package(__name__)
