"""The model's parts as graphs of ONNX, drawn by `torch.onnx.export`: tower, connector, embedding, and decoder with its
cache. Matrices are no part of a drawing: a node names each, and `graph_weights.py` puts it there."""

import copy
import logging
import warnings
from dataclasses import dataclass

import onnx_ir as ir
import torch
from jina_vlm import JinaVLMForConditionalGeneration
from jina_vlm.compatibility_jina_vlm import CACHE_NAME
from jina_vlm.tiling_jina_vlm import get_image_token_indices, get_tile_positions, get_token_grid
from torch import nn
from transformers import AttentionInterface, DynamicCache

from .graph_parts import cache_names


OPSET = 18
DOMAIN = "jina_vlm"  # of the nodes that name a matrix
MICROSOFT = "com.microsoft"  # of ONNX Runtime's own operators
PRODUCT, ROWS = "Product", "Rows"
TILES, BATCH, LENGTH, HELD = 2, 2, 3, 5  # of what is drawn with; 1 would stay 1 in the graph


class _Product(nn.Module):
    """In the place of a linear layer: [..., in] -> [..., out]"""

    def __init__(self, name: str, linear: nn.Linear):
        super().__init__()
        self.name, self.out_features = name, linear.out_features
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().float())

    def forward(self, states):
        shape = (*states.shape[:-1], self.out_features)
        product = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{PRODUCT}", (states,), {"matrix": self.name}, dtype=states.dtype, shape=shape, version=1
        )
        return product if self.bias is None else product + self.bias


class _Rows(nn.Module):
    """In the place of an embedding: [...] -> [..., width]"""

    def __init__(self, name: str, embedding: nn.Embedding):
        super().__init__()
        self.name, self.width = name, embedding.embedding_dim

    def forward(self, ids):
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{ROWS}",
            (ids,),
            {"matrix": self.name},
            dtype=torch.float32,
            shape=(*ids.shape, self.width),
            version=1,
        )


def _fused_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """ONNX Runtime's own attention, which never holds all scores at once: [batch, heads, places, head size], as the
    library's attention functions."""
    heads = query.shape[1]
    rows = [states.transpose(1, 2).flatten(2) for states in (query, key, value)]
    attributes = {"num_heads": heads, "scale": scaling}
    states = torch.onnx.ops.symbolic(
        f"{MICROSOFT}::MultiHeadAttention", rows, attributes, dtype=query.dtype, shape=rows[0].shape, version=1
    )
    return states.unflatten(2, (heads, -1)), None


FUSED_ATTENTION = "jina_vlm_onnx_runtime"
AttentionInterface.register(FUSED_ATTENTION, _fused_attention)


class Tower(nn.Module):
    """`pixel_values` [tiles, 3, 378, 378] -> `features` [tiles, patches, features]"""

    def __init__(self, model: JinaVLMForConditionalGeneration):
        super().__init__()
        self.vision_model = model.model.vision_model

    def forward(self, pixel_values):
        return self.vision_model._encode(pixel_values)

    def arguments(self) -> tuple[dict, dict]:
        vision = self.vision_model.config.vision_config
        shape = (TILES, vision.num_channels, vision.image_size, vision.image_size)
        return {"pixel_values": torch.zeros(shape)}, {"pixel_values": {0: "tiles"}}

    def names(self) -> tuple[list[str], list[str]]:
        return ["pixel_values"], ["features"]


class Connector(nn.Module):
    """`features` [tiles, patches, features], `is_last_tile` [tiles] bool -> `tokens` [tiles, tokens, hidden]"""

    def __init__(self, model: JinaVLMForConditionalGeneration):
        super().__init__()
        self.connector, vision = model.model.connector, model.config.vision_config
        self.shape = (TILES, (vision.image_size // vision.patch_size) ** 2, self.connector.q_proj.in_features)

    def forward(self, features, is_last_tile):
        return self.connector(features, is_last_tile)

    def arguments(self) -> tuple[dict, dict]:
        inputs = {"features": torch.zeros(self.shape), "is_last_tile": torch.tensor([False, True])}
        return inputs, {name: {0: "tiles"} for name in inputs}

    def names(self) -> tuple[list[str], list[str]]:
        return ["features", "is_last_tile"], ["tokens"]


class Embedding(nn.Module):
    """`input_ids` [batch, length] -> `inputs_embeds` [batch, length, hidden]"""

    def __init__(self, model: JinaVLMForConditionalGeneration):
        super().__init__()
        self.embed_tokens = model.get_input_embeddings()

    def forward(self, input_ids):
        return self.embed_tokens(input_ids)

    def arguments(self) -> tuple[dict, dict]:
        ids = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
        return {"input_ids": ids}, {"input_ids": {0: "batch_size", 1: "sequence_length"}}

    def names(self) -> tuple[list[str], list[str]]:
        return ["input_ids"], ["inputs_embeds"]


class Decoder(nn.Module):
    """
    `inputs_embeds` [batch, length, hidden], `attention_mask` [batch, past + length], `position_ids` [batch, length],
    `kept` [kept], and of each layer `past_key_values.N.key` and `.value` [batch, heads, past, head size] -> `logits`
    [batch, kept, vocabulary] of these places, and `present.N.key` and `.value`
    """

    def __init__(self, model: JinaVLMForConditionalGeneration):
        super().__init__()
        self.language_model, self.lm_head = model.model.language_model, model.lm_head
        self.config = model.config.text_config

    def forward(self, inputs_embeds, attention_mask, position_ids, kept, past):
        cache = DynamicCache()
        for layer in range(self.config.num_hidden_layers):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        held = past[0].shape[2]
        places = torch.arange(held + inputs_embeds.shape[1])
        is_seen = (places <= places[held:, None])[None, None] & (attention_mask != 0)[:, None, None]
        # A finite number: places of padding see nothing, which would make them no numbers.
        mask = torch.zeros(1).masked_fill(~is_seen, torch.finfo(torch.float32).min)
        hidden_states = self.language_model(
            inputs_embeds=inputs_embeds, attention_mask=mask, position_ids=position_ids, **{CACHE_NAME: cache}
        ).last_hidden_state
        present = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        return self.lm_head(hidden_states.index_select(1, kept)), *present

    def arguments(self) -> tuple[dict, dict]:
        config, layers = self.config, range(2 * self.config.num_hidden_layers)
        inputs = {
            "inputs_embeds": torch.zeros(BATCH, LENGTH, config.hidden_size),
            "attention_mask": torch.ones(BATCH, HELD + LENGTH, dtype=torch.int64),
            "position_ids": torch.zeros(BATCH, LENGTH, dtype=torch.int64),
            "kept": torch.arange(LENGTH - 1),
            "past": [torch.zeros(BATCH, config.num_key_value_heads, HELD, config.head_dim) for _ in layers],
        }
        axes = {
            "inputs_embeds": {0: "batch_size", 1: "sequence_length"},
            "attention_mask": {0: "batch_size", 1: "total_sequence_length"},
            "position_ids": {0: "batch_size", 1: "sequence_length"},
            "kept": {0: "kept"},
            "past": [{0: "batch_size", 2: "past_sequence_length"} for _ in layers],
        }
        return inputs, axes

    def names(self) -> tuple[list[str], list[str]]:
        layers = self.config.num_hidden_layers
        inputs = ["inputs_embeds", "attention_mask", "position_ids", "kept", *cache_names("past_key_values", layers)]
        return inputs, ["logits", *cache_names("present", layers)]


class Encoder(nn.Module):
    """
    Tower and connector: `pixel_values` [tiles, 3, 378, 378], `tile_positions` [tiles, 4] -> `image_features` [tokens,
    hidden], the final embeddings of the images' tokens in prompt order
    """

    def __init__(self, model: JinaVLMForConditionalGeneration):
        super().__init__()
        self.vision_model, self.connector = model.model.vision_model, model.model.connector
        self.row = nn.Parameter(model.get_input_embeddings().weight[model.config.image_token_id].detach().float())
        self.tokens_and_overlap = model.model._tokens_and_overlap

    def forward(self, pixel_values, tile_positions):
        is_last_tile = (tile_positions[:, :2] == tile_positions[:, 2:] - 1).all(dim=1)
        tokens = self.connector(self.vision_model._encode(pixel_values), is_last_tile).flatten(0, 1)
        row, _, rows, columns = tile_positions.unbind(1)
        # Of each image by its thumbnail: its own tokens, and those of the grid.
        height, width = get_token_grid(rows, columns, *self.tokens_and_overlap)
        lengths = torch.where(row < 0, self.tokens_and_overlap[0] ** 2 + height * width, 0)
        order = get_image_token_indices(tile_positions, *self.tokens_and_overlap)
        order = order[torch.arange(tokens.shape[0]) < lengths.sum()]
        return tokens.index_select(0, order) + self.row

    def arguments(self) -> tuple[dict, dict]:
        vision, positions = self.vision_model.config.vision_config, get_tile_positions(1, 2)
        shape = (len(positions), vision.num_channels, vision.image_size, vision.image_size)
        inputs = {"pixel_values": torch.zeros(shape), "tile_positions": torch.tensor(positions)}
        return inputs, {name: {0: "tiles"} for name in inputs}

    def names(self) -> tuple[list[str], list[str]]:
        return ["pixel_values", "tile_positions"], ["image_features"]


class DecoderOfLastPlaces(Decoder):
    """As [`Decoder`], with `num_logits_to_keep`, a number, in the place of `kept`: logits of the last places, for 0 of
    all."""

    def forward(self, inputs_embeds, attention_mask, position_ids, num_logits_to_keep, past):
        places = torch.arange(inputs_embeds.shape[1])
        kept = places[(places >= inputs_embeds.shape[1] - num_logits_to_keep) | (num_logits_to_keep == 0)]
        return super().forward(inputs_embeds, attention_mask, position_ids, kept, past)

    def arguments(self) -> tuple[dict, dict]:
        inputs, axes = super().arguments()
        for given, number in ((inputs, torch.tensor(1)), (axes, None)):
            past = given.pop("past")
            del given["kept"]
            given |= {"num_logits_to_keep": number, "past": past}
        return inputs, axes

    def names(self) -> tuple[list[str], list[str]]:
        inputs, outputs = super().names()
        inputs[inputs.index("kept")] = "num_logits_to_keep"
        return inputs, outputs


PARTS = {"tower": Tower, "connector": Connector, "embedding": Embedding, "decoder": Decoder}
# As transformers.js divides a model, by its names
BROWSER_PARTS = {"vision_encoder": Encoder, "embed_tokens": Embedding, "decoder_model_merged": DecoderOfLastPlaces}


@dataclass(frozen=True)
class Drawing:
    """A graph whose nodes name matrices, and these: [out, in] of products, [rows, width] of rows; as the checkpoint
    has them."""

    graph: ir.Model
    matrices: dict[str, torch.Tensor]


def draw(model: JinaVLMForConditionalGeneration, part: str, *, fuses_attention: bool = False) -> Drawing:
    """
    Draw one of `PARTS` or `BROWSER_PARTS`, which computes in float32 whatever the model's type is.

    Args:
        fuses_attention: Whether the tower's attention is one operator, which ONNX Runtime alone has.
    """
    whole = {**PARTS, **BROWSER_PARTS}[part](model)
    stands, matrices = {}, {}
    for name, module in whole.named_modules():
        # Positions in the tower are an embedding too, of which all rows are taken.
        is_rows = isinstance(module, nn.Embedding) and module is model.get_input_embeddings()
        if is_rows or isinstance(module, nn.Linear):
            stands[id(module)] = (_Rows if is_rows else _Product)(name, module)
            matrices[name] = module.weight.detach()
    inputs, axes = whole.arguments()
    drawn = copy.deepcopy(whole, stands).float().eval()
    if fuses_attention:
        drawn.vision_model.tower.set_attn_implementation(FUSED_ATTENTION)
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            drawn, (), kwargs=inputs, dynamic_shapes=axes, dynamo=True, opset_version=OPSET, verbose=False
        )
    graph = program.model.graph
    for values, names in zip((graph.inputs, graph.outputs), whole.names(), strict=True):
        for value, name in zip(values, names, strict=True):
            value.name = name
    for each in (program.model, graph, *graph, *graph.inputs):
        each.metadata_props.clear()  # where on this machine the code is that a node comes from
    return Drawing(program.model, matrices)


class _quiet(warnings.catch_warnings):
    """Without the exporter's words on packages that are not installed and on axes that are equal by themselves."""

    def __enter__(self):
        super().__enter__()
        warnings.simplefilter("ignore")
        self.log = logging.getLogger("torch.onnx")
        self.level = self.log.level
        self.log.setLevel(logging.ERROR)

    def __exit__(self, *error):
        self.log.setLevel(self.level)
        super().__exit__(*error)
