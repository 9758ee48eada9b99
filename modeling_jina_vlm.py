# Copyright 2026 The jina-vlm-transformers authors. Licensed under the Apache License, Version 2.0.
"""PyTorch model of jina-vlm (arXiv 2512.04032): SigLIP2 tower, attention-pooling connector, Qwen3 decoder."""

import copy
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, Cache, GenerationConfig, GenerationMixin, PreTrainedModel, __version__
from transformers import initialization as init
from transformers.generation import utils as generation_utils
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.models.siglip.modeling_siglip import SiglipAttention, SiglipEncoderLayer
from transformers.processing_utils import Unpack
from transformers.utils import CONFIG_NAME, TransformersKwargs, can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .compatibility_jina_vlm import CACHE_NAME, accepts_past_key_values
from .configuration_jina_vlm import JinaVLMConfig
from .conversion_jina_vlm import collect_conversion_problems, register_released_layout, released_name


TILES_AT_A_TIME = 4  # in the tower, on a CPU
WEIGHT_FILES = (".safetensors", ".safetensors.index.json")


@dataclass
class JinaVLMModelOutputWithPast(BaseModelOutputWithPast):
    """`image_hidden_states` [image tokens, hidden]: the embeddings that stand for the pictures."""

    image_hidden_states: torch.Tensor | None = None


@dataclass
class JinaVLMCausalLMOutputWithPast(CausalLMOutputWithPast):
    """`image_hidden_states` [image tokens, hidden]: the embeddings that stand for the pictures."""

    image_hidden_states: torch.Tensor | None = None


class JinaVLMPreTrainedModel(PreTrainedModel):
    config: JinaVLMConfig
    config_class = JinaVLMConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
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
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, JinaVLMConnector):
            init.zeros_(module.pad_embed)

    @classmethod
    def is_custom_code(cls) -> bool:
        # The library would leave out, when weights are missing, the initialisation of modules that have no parameters of
        # their own, such as SigLIP's attention. That is for code whose initialisation overwrites what was loaded.
        return False

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *args, ignore_mismatched_sizes=False, output_loading_info=False, **kwargs
    ):
        """
        As [`PreTrainedModel.from_pretrained`], for the released layout too; but a checkpoint that lacks tensors, or whose
        tensors have other shapes, is an error rather than a warning: no weight is left random without a word. Who asks for
        `output_loading_info=True` is told there which tensors are missing, and gets the model.

        Raises:
            ValueError: names each tensor that is missing, has another shape, or holds what this model cannot honour.
        """
        register_released_layout()  # again: another copy of this code may have put its own there
        kwargs.setdefault("use_safetensors", True)  # the library would open pickles where there are none
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = _keep_whole(kwargs["quantization_config"])
        with collect_conversion_problems() as problems:
            try:
                model, info = super().from_pretrained(
                    pretrained_model_name_or_path,
                    *args,
                    # both are reported below, by name
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                    **kwargs,
                )
            except Exception as error:
                if type(error).__name__ == "SafetensorError":  # of a package that this code does not import
                    raise OSError(_name_damaged(pretrained_model_name_or_path, error)) from error
                if not isinstance(error, RuntimeError) or not problems:
                    raise
                info = {"missing_keys": [], "mismatched_keys": []}
                cause = error
            else:
                cause = None
        if not ignore_mismatched_sizes:
            problems += [
                f"{_both_names(name)} has shape {list(given)}, expected {list(expected)}."
                for name, given, expected in sorted(info["mismatched_keys"])
            ]
        if kwargs.get("state_dict") is None and not output_loading_info:
            mismatched = {name for name, _, _ in info["mismatched_keys"]}
            problems += [f"{_both_names(name)} is missing." for name in sorted(set(info["missing_keys"]) - mismatched)]
        if problems:
            if any(kwargs.get(name) is not None for name in ("tp_plan", "tp_size", "distributed_config")):
                problems.append(
                    "The released layout, whose tensors hold several of ours, cannot be loaded in parts by several processes. If "
                    "this is one, load it in one process, `save_pretrained` it, and load what that wrote."
                )
            raise ValueError(f"Cannot load {cls.__name__} from {pretrained_model_name_or_path}:\n" + "\n".join(problems)) from cause
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory, *args, save_original_format: bool = False, **kwargs):
        """As [`PreTrainedModel.save_pretrained`], in this layout: the released one is read, not written.

        Everything is written beside what is there, and put in its place when it is complete. What is interrupted before leaves
        the older checkpoint as it was; what is interrupted while files change places, one that does not load. What was
        interrupted leaves a folder `.saving-...`, which may be removed.
        """
        if save_original_format:
            raise ValueError("jina-vlm saves its own layout only, got `save_original_format=True`. Leave it out.")
        save = super().save_pretrained
        if kwargs.get("push_to_hub") or not kwargs.get("is_main_process", True) or os.path.isfile(save_directory):
            return save(save_directory, *args, save_original_format=False, **kwargs)
        target = Path(save_directory)
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=target) as folder:
            save(folder, *args, save_original_format=False, **kwargs)
            _move_into_place(Path(folder), target)


def _move_into_place(made: Path, target: Path) -> None:
    """The files of a new checkpoint take the places of an older one's. Its config goes first and the new one comes last:
    without a config nothing loads, so that old and new weights are never taken together."""
    names = sorted((path.name for path in made.iterdir()), key=lambda name: name == CONFIG_NAME)
    if CONFIG_NAME in names:
        (target / CONFIG_NAME).unlink(missing_ok=True)
    if any(name.endswith(WEIGHT_FILES) for name in names):
        for path in target.iterdir():
            if path.name.startswith("model") and path.name.endswith(WEIGHT_FILES) and path.name not in names:
                path.unlink()  # another number of shards
    for name in names:
        os.replace(made / name, target / name)


def _name_damaged(checkpoint, error: Exception) -> str:
    damaged = [path.name for path in sorted(Path(checkpoint).glob("*.safetensors")) if not _is_whole(path)] if checkpoint else []
    what = ", ".join(damaged) or "a file of its weights"
    return f"Cannot load {checkpoint}: {what}: damaged or incomplete ({error}). Copy or download it again."


def _is_whole(path: Path) -> bool:
    """Whether a safetensors file has the length that its header says."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(min(length, path.stat().st_size)))
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return False
    return path.stat().st_size == 8 + length + max(ends, default=0)


def _both_names(name: str) -> str:
    released = released_name(name)
    return f"`{name}`" if released == name else f"`{name}` (released: `{released}`)"


def _keep_whole(quantization_config):
    """A copy of a quantisation config that leaves connector and head as they are: a hundredth of the weights, which all of
    a picture's information goes through; and the head's, as the library does unless modules are named."""
    quantization_config = copy.deepcopy(quantization_config)
    for name in ("modules_to_not_convert", "llm_int8_skip_modules", "skip_modules"):
        if hasattr(quantization_config, name):
            skipped = getattr(quantization_config, name) or []
            # by full names: of the model with the head, and of the one without
            whole = ["model.connector", "connector", "lm_head"]
            setattr(quantization_config, name, list(dict.fromkeys([*skipped, *whole])))
    return quantization_config


class PatchEmbedding(nn.Conv2d):
    """The tower's patch embedding, as one matrix product over flattened patches. It is what the release computes: a
    convolution's order of summation moves logits by more than the golden data allow."""

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        rows, columns = self.kernel_size
        patches = pixel_values.unflatten(2, (-1, rows)).unflatten(4, (-1, columns)).permute(0, 2, 4, 1, 3, 5).flatten(3)
        return F.linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class JinaVLMVisionModel(JinaVLMPreTrainedModel):
    """
    The tower (section 3.2): the library's SigLIP without final norm and head. Its output is the concatenation of the
    outputs of a few of its blocks.
    """

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _can_record_outputs = {"hidden_states": SiglipEncoderLayer, "attentions": SiglipAttention}
    # The library's SigLIP has no plan.
    _tp_plan = {
        **{f"tower.encoder.layers.*.self_attn.{name}_proj": "colwise" for name in "qkv"},
        "tower.encoder.layers.*.self_attn.out_proj": "rowwise",
        "tower.encoder.layers.*.mlp.fc1": "colwise",
        "tower.encoder.layers.*.mlp.fc2": "rowwise",
    }

    def __init__(self, config: JinaVLMConfig):
        super().__init__(config)
        self.tower = AutoModel.from_config(config.vision_config)
        embeddings = self.tower.embeddings
        embeddings.patch_embedding = PatchEmbedding(
            config.vision_config.num_channels, config.vision_config.hidden_size, embeddings.patch_size, embeddings.patch_size
        )
        self.tower.post_layernorm = nn.Identity()
        # A checkpoint may hold the whole tower.
        used = "|".join(map(str, range(config.vision_config.num_hidden_layers)))
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
            `last_hidden_state` [tiles, patches, width * number of feature layers], zero for pure black tiles.
        """
        features = [self._encode(tiles, **kwargs) for tiles in self._in_parts(pixel_values, kwargs)]
        return BaseModelOutputWithPooling(last_hidden_state=torch.cat(features) if len(features) > 1 else features[0])

    def _in_parts(self, pixel_values: torch.Tensor, kwargs: dict) -> tuple[torch.Tensor, ...]:
        """A CPU is fastest with what its caches hold; elsewhere, for gradients, graphs and captured outputs, all tiles at once."""
        captures = any(kwargs.get(name, getattr(self.config, name, False)) for name in ("output_hidden_states", "output_attentions"))
        on_cpu = self.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        parts = -(-len(pixel_values) // TILES_AT_A_TIME) if on_cpu and not captures else 1
        return pixel_values.tensor_split(max(1, parts))

    def _encode(self, pixel_values: torch.Tensor, **kwargs) -> torch.Tensor:
        hidden_states = self.tower.embeddings(pixel_values)
        kept = {}
        for index, layer in enumerate(self.tower.encoder.layers):
            hidden_states = layer(hidden_states, attention_mask=None, **kwargs)
            if index in self.config.vision_feature_layers:
                kept[index] = hidden_states
        features = torch.cat([kept[index] for index in self.config.vision_feature_layers], dim=-1)
        # Asked of the pixels as given: a cast to the model's type could make dark ones black.
        black = (pixel_values == -1).flatten(1).all(dim=1).to(features.device)
        return features.masked_fill(black[:, None, None], 0)


class JinaVLMConnector(nn.Module):
    """
    From the tower to the text model (section 3.3): windows of 2 x 2 patches are pooled by attention, with their mean as
    the query; a SwiGLU leads to the text model's width. Four times fewer tokens.
    """

    def __init__(self, config: JinaVLMConfig):
        super().__init__()
        features = config.vision_config.hidden_size * len(config.vision_feature_layers)
        width = config.connector_num_attention_heads * config.connector_head_dim
        self.head_dim = config.connector_head_dim
        self.window = config.pooling_size
        self.pad_embed = nn.Parameter(torch.zeros(2, features))
        self.q_proj = nn.Linear(features, width)
        self.k_proj = nn.Linear(features, width)
        self.v_proj = nn.Linear(features, width)
        self.out_proj = nn.Linear(width, config.vision_config.hidden_size)
        self.gate_proj = nn.Linear(config.vision_config.hidden_size, config.connector_intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.vision_config.hidden_size, config.connector_intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.connector_intermediate_size, config.text_config.hidden_size, bias=False)

    def forward(self, features: torch.Tensor, is_last_tile: torch.Tensor) -> torch.Tensor:
        """
        Args:
            features (`torch.Tensor` [tiles, patches, features]): Of square tiles, row by row.
            is_last_tile (`torch.Tensor` [tiles], bool): Whether a tile is its picture's last.

        Returns:
            `torch.Tensor` [tiles, tokens, hidden], row by row.
        """
        # Row 1 means "partly padded". That it goes to each picture's last tile is what the weights were trained with.
        features = features + is_last_tile[:, None, None].to(features.dtype) * self.pad_embed[1]
        windows = self._windows(features)
        queries = self._heads(self.q_proj(windows.mean(dim=2, keepdim=True)))
        keys, values = self._heads(self.k_proj(windows)), self._heads(self.v_proj(windows))
        # Windows and heads share a dimension, tiles are the batch: a batch of windows would pass the 65,535 blocks that
        # a GPU's grid may have in its last dimensions.
        pooled = F.scaled_dot_product_attention(queries, keys, values)
        pooled = pooled.unflatten(1, (windows.shape[1], -1)).flatten(2)
        hidden_states = self.out_proj(pooled)
        gate, values = F.silu(self.gate_proj(hidden_states)), self.up_proj(hidden_states)
        if hidden_states.dtype != torch.float16:
            return self.down_proj(gate * values)
        # A model trained in bfloat16 may make features past float16's end, 65,504. The text model reads them through norms,
        # which their length does not pass: what is too long is shortened. By a constant first, the same for every rank.
        features = self.down_proj((gate.float() * values.float() / 1024).half()).float() * 1024
        return (features / (features.abs().amax(dim=-1, keepdim=True) / 2**15).clamp(min=1)).half()

    def _windows(self, features: torch.Tensor) -> torch.Tensor:
        """[tiles, side * side, features] -> [tiles, windows, patches of a window, features], zeros where the last row
        and column have no neighbour."""
        side = round(features.shape[1] ** 0.5)
        missing = -side % self.window
        grid = F.pad(features.unflatten(1, (side, side)), (0, 0, 0, missing, 0, missing))
        grid = grid.unflatten(2, (-1, self.window)).unflatten(1, (-1, self.window))
        return grid.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def _heads(self, states: torch.Tensor) -> torch.Tensor:
        """[tiles, windows, patches, heads * head_dim] -> [tiles, windows * heads, patches, head_dim]"""
        return states.unflatten(-1, (-1, self.head_dim)).transpose(2, 3).flatten(1, 2)


class JinaVLMModel(JinaVLMPreTrainedModel):
    """Tower, connector and text model, without a language modelling head."""

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
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.language_model.set_input_embeddings(value)

    def _apply(self, fn, recurse=True):
        """What `.to()`, `.half()` and their like go through. They would round the frequencies of the rotary embedding too,
        which loading leaves in float32: at position 4,000 an angle would be off by several turns."""
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
        # Not among `_keys_to_ignore_on_load_unexpected`: vLLM, which puts a head of its own on this model, would ignore it.
        loading_info.unexpected_keys.discard("lm_head.weight")

    def get_token_order(self, tile_positions: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
        """
        Which of the connector's tokens are used, and where.

        Args:
            tile_positions (`torch.Tensor` [tiles, 4]): (row, column, rows, columns), see [`JinaVLMImageProcessor`].

        Returns:
            The indices, into [tiles * tokens of a tile], of the tokens of all pictures in prompt order; and the number of
            tokens of each picture. A thumbnail's are all used; of a tile those that its neighbours show too are dropped at
            each inner side, and what is left is read row by row across all tiles.

        Raises:
            ValueError: the tiles are not those of whole pictures, in order.
        """
        side = -(-self.config.vision_config.image_size // self.config.vision_config.patch_size // self.config.pooling_size)
        dropped = self.config.overlap_margin // self.config.pooling_size
        positions = tile_positions.tolist()
        order, lengths = [], []
        start = 0
        while start < len(positions):
            _, _, rows, columns = positions[start]
            expected = [[-1, -1, rows, columns]]
            expected += [[row, column, rows, columns] for row in range(rows) for column in range(columns)]
            given = positions[start : start + len(expected)]
            if rows < 1 or columns < 1 or given != expected:
                raise ValueError(
                    f"`tile_positions` from tile {start} on is {given}, expected {expected}: a picture's thumbnail, then its "
                    "rows x columns tiles. Pass both image tensors as the processor made them, or slice them by whole pictures."
                )
            tokens = torch.arange(start * side**2, (start + len(expected)) * side**2).view(-1, side, side)
            grid = torch.cat(
                [
                    torch.cat(
                        [
                            tile[
                                dropped * (row > 0) : side - dropped * (row < rows - 1),
                                dropped * (column > 0) : side - dropped * (column < columns - 1),
                            ]
                            for column, tile in enumerate(tokens[1 + row * columns :][:columns])
                        ],
                        dim=1,
                    )
                    for row in range(rows)
                ]
            )
            order += [tokens[0].flatten(), grid.flatten()]
            lengths.append(side**2 + grid.numel())
            start += len(expected)
        return torch.cat(order).to(tile_positions.device), lengths

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, tile_positions: torch.Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """
        Args:
            pixel_values (`torch.Tensor` [tiles, 3, 378, 378]): In [-1, 1].
            tile_positions (`torch.Tensor` [tiles, 4], int64): (row, column, rows, columns) of each tile.

        Returns:
            `pooler_output`: for each picture, in prompt order, the [tokens, hidden] final embeddings of its `<im_patch>`
            tokens; and what the tower returned.

        Raises:
            ValueError: the two do not belong together.
        """
        if tile_positions is None:
            raise ValueError("Got `pixel_values` without `tile_positions`. Pass both, as the processor made them.")
        if len(pixel_values) != len(tile_positions):
            raise ValueError(
                f"Got {len(pixel_values)} tiles in `pixel_values` but {len(tile_positions)} in `tile_positions`. Pass both, as the processor made them."
            )
        order, lengths = self.get_token_order(tile_positions)
        outputs = self.vision_model(pixel_values, return_dict=True, **kwargs)
        is_last_tile = (tile_positions[:, :2] == tile_positions[:, 2:] - 1).all(dim=1)
        features = self.connector(outputs.last_hidden_state, is_last_tile.to(outputs.last_hidden_state.device))
        features = features.flatten(0, 1)[order.to(features.device)]
        # Features are added to the embedding of their token. Here, because engines put them in its place.
        patch_token = torch.full((1,), self.config.image_token_id, device=features.device)
        features = features + self.get_input_embeddings()(patch_token).to(features)
        outputs.pooler_output = list(features.split(lengths))
        return outputs

    def get_placeholder_mask(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor, image_features: torch.Tensor
    ) -> torch.Tensor:
        """Where the embeddings of pictures go, [batch, length, 1] bool.

        Raises:
            ValueError: there are more or fewer places than features.
        """
        if input_ids is None:
            patch_token = torch.full((1,), self.config.image_token_id, device=inputs_embeds.device)
            mask = (inputs_embeds == self.get_input_embeddings()(patch_token).to(inputs_embeds)).all(dim=-1)
        else:
            mask = input_ids == self.config.image_token_id
        if (places := int(mask.sum())) != len(image_features):
            raise ValueError(
                f"The text has {places} places (`<im_patch>`) for image features, but the pictures make {len(image_features)}. Pass text and pictures as the processor put them together."
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
            input_ids (`torch.Tensor` [batch, length], *optional*): Token ids; or `inputs_embeds` [batch, length, hidden].
            pixel_values (`torch.Tensor` [tiles, 3, 378, 378], *optional*): The tiles of all pictures, in prompt order.
            tile_positions (`torch.Tensor` [tiles, 4], *optional*): Where each tile belongs.
            mm_encoder_outputs (`dict`, *optional*): Under `"image"` what `get_image_features` returned, in the place of
                the two before.

        Raises:
            ValueError: arguments that exclude or need each other, or places and pictures that do not match.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Expected either `input_ids` or `inputs_embeds`.")
        image_outputs = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None:
            if image_outputs is not None:
                raise ValueError("Expected either `pixel_values` or `mm_encoder_outputs['image']`, got both.")
            image_outputs = self.get_image_features(pixel_values, tile_positions, return_dict=True)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        image_features = None
        if image_outputs is not None:
            image_features = torch.cat(tuple(image_outputs.pooler_output)).to(inputs_embeds)
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, image_features)
            inputs_embeds = inputs_embeds.masked_scatter(mask.to(inputs_embeds.device), image_features)

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{CACHE_NAME: cache},
            **kwargs,
        )
        return JinaVLMModelOutputWithPast(**outputs, image_hidden_states=image_features)


class JinaVLMForConditionalGeneration(JinaVLMPreTrainedModel, GenerationMixin):
    """jina-vlm with its language modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: JinaVLMConfig):
        super().__init__(config)
        self.model = JinaVLMModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()
        self._suppress_structural_tokens()

    @classmethod
    def from_pretrained(cls, *args, output_loading_info=False, **kwargs):
        loaded = super().from_pretrained(*args, output_loading_info=output_loading_info, **kwargs)
        model = loaded[0] if output_loading_info else loaded
        if model.generation_config._from_model_config:
            # Made by the library from the raw `config.json`; a released one is full of an old version's defaults.
            model.generation_config = GenerationConfig.from_model_config(model.config)
            model.generation_config._from_model_config = False
        model._suppress_structural_tokens()  # a checkpoint's own generation config may not name them
        return loaded

    def _suppress_structural_tokens(self):
        """They stand for pictures: none is ever an answer. `forward` leaves their logits alone."""
        self.generation_config.suppress_tokens = self._with_structural_tokens(self.generation_config.suppress_tokens)

    def _with_structural_tokens(self, suppressed: list[int] | None) -> list[int]:
        return sorted({*(suppressed or []), *self.config.structural_token_ids})

    def _prepare_generation_config(self, *args, **kwargs):
        generation_config, model_kwargs = super()._prepare_generation_config(*args, **kwargs)
        # a caller's own `suppress_tokens` took the place of ours
        generation_config.suppress_tokens = self._with_structural_tokens(generation_config.suppress_tokens)
        has_pictures = any(model_kwargs.get(name) is not None for name in ("pixel_values", "mm_encoder_outputs"))
        if has_pictures and generation_config.prefill_chunk_size and not hasattr(generation_utils, "_slice_mm_encoder_output"):
            raise ValueError(
                "`prefill_chunk_size` with pictures needs a transformers that gives each chunk its own pictures, as 5.23 does; "
                f"this is {__version__}. Leave it out, or update."
            )
        return generation_config, model_kwargs

    def get_image_features(
        self, pixel_values: torch.Tensor, tile_positions: torch.Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
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
        As [`JinaVLMModel.forward`], and:

        Args:
            labels (`torch.Tensor` [batch, length], *optional*): Token ids to predict, -100 where none is asked for. Nor is
                any asked for where they are structural tokens, or where `attention_mask` marks padding.
            logits_to_keep (`int` or `torch.Tensor`, *optional*): Compute only the last so many logits (0: all), or those
                at these positions.
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
            targets = self._targets(labels, attention_mask)
            loss = self.loss_function(logits=logits, labels=targets, vocab_size=logits.shape[-1], **kwargs)
        return JinaVLMCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )

    def _prepare_model_inputs(self, inputs, bos_token_id, model_kwargs):
        inputs, name, model_kwargs = super()._prepare_model_inputs(inputs, bos_token_id, model_kwargs)
        cache, mask = model_kwargs.get(CACHE_NAME), model_kwargs.get("attention_mask")
        # The library's own rule of when the inputs hold what is in the cache.
        has_past = name == "input_ids" and cache is not None and (mask is None or mask.shape[1] == inputs.shape[1])
        if has_past and model_kwargs.get("tile_positions") is not None:
            kept = self._tiles_to_come(inputs, int(cache.get_seq_length()), model_kwargs["tile_positions"])
            pictures = {key: model_kwargs.pop(key)[kept] for key in ("pixel_values", "tile_positions")}
            model_kwargs |= pictures if any(kept) else {}
        return inputs, name, model_kwargs

    def _tiles_to_come(self, input_ids: torch.Tensor, past_length: int, tile_positions: torch.Tensor) -> list[bool]:
        """Which tiles are of pictures that are not in the cache. A conversation that goes on from its cache may bring all
        its pictures, or the new ones alone."""
        is_patch = input_ids == self.config.image_token_id
        lengths = self.model.get_token_order(tile_positions)[1]
        if sum(lengths) != is_patch.sum():
            return [True] * len(tile_positions)
        kept, lengths = [], iter(lengths)
        for places, cached in zip(is_patch.sum(dim=1).tolist(), is_patch[:, :past_length].sum(dim=1).tolist(), strict=True):
            while places > 0:
                length = next(lengths)
                rows, columns = tile_positions[len(kept), 2:].tolist()
                kept += [cached < length] * (1 + rows * columns)
                places, cached = places - length, cached - length
        return kept

    def _targets(self, labels: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        ignored = torch.isin(labels, torch.tensor(self.config.structural_token_ids, device=labels.device))
        if attention_mask is not None and attention_mask.shape == labels.shape:
            ignored = ignored | (attention_mask == 0).to(labels.device)
        return labels.masked_fill(ignored, -100)

    def prepare_inputs_for_generation(
        self, input_ids, inputs_embeds=None, is_first_iteration=False, **kwargs
    ):  # by name: `generate` asks for `inputs_embeds` in the signature
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if not is_first_iteration and kwargs.get("use_cache", True):
            for name in ("pixel_values", "tile_positions", "mm_encoder_outputs"):
                inputs.pop(name, None)  # the cache holds the pictures
        return inputs

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        # Before 5.19 the library would encode pictures anew without a cache, and repeat every tensor along its first
        # dimension for beams, which would tear pictures apart. Newer versions have taken the pixels out before this.
        if model_kwargs.get("pixel_values") is not None:
            outputs = self.get_image_features(
                model_kwargs.pop("pixel_values"), model_kwargs.pop("tile_positions", None), return_dict=True
            )
            if expand_size > 1:
                outputs.pooler_output = self._repeat_by_sample(outputs.pooler_output, input_ids, expand_size)
            model_kwargs["mm_encoder_outputs"] = {"image": outputs}
        return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)

    def _repeat_by_sample(self, features: list[torch.Tensor], input_ids: torch.Tensor, times: int) -> list[torch.Tensor]:
        """The pictures' embeddings, those of each sample repeated together."""
        if input_ids is None or not input_ids.numel():
            raise ValueError("Beams or several returns of `inputs_embeds` with pictures need transformers 5.19.")
        features, repeated = list(features), []
        for tokens in (input_ids == self.config.image_token_id).sum(dim=1).tolist():
            sample = []
            while tokens > 0 and features:
                sample.append(features.pop(0))
                tokens -= len(sample[-1])
            repeated += sample * times
        return repeated + features


register_released_layout()

__all__ = [
    "JinaVLMConnector",
    "JinaVLMForConditionalGeneration",
    "JinaVLMModel",
    "JinaVLMPreTrainedModel",
    "JinaVLMVisionModel",
]
