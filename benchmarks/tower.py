"""Tower and connector beside the library's SigLIP and pooling written plainly: `python -m benchmarks.tower`.

The 2.4B model's sizes, random weights, bfloat16. The library's tower has the same 25 blocks and takes all tiles in one
batch. The limit is the matrix products and the attention of its blocks alone, one after the other, at the same sizes:
those of one block, times 25. Memory is what rises above inputs and weights, in a process of its own each.
"""

import torch
from jina_vlm import JinaVLMConfig
from jina_vlm.modeling_jina_vlm import JinaVLMConnector, JinaVLMVisionModel
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedConfig

from jina_vlm_tools import markdown
from jina_vlm_tools.files import ROOT

from .full_model import build
from .results import arguments, save
from .side_by_side import Peak, in_fresh_process, medians, ratio, take_turns, together


TILES = (1, 5, 13)


class SeeingHalf(nn.Module):
    """Tower and connector, one after the other, as the model calls them."""

    def __init__(self, config: JinaVLMConfig):
        super().__init__()
        self.vision_model, self.connector = JinaVLMVisionModel(config), JinaVLMConnector(config)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        features = self.vision_model(pixel_values).last_hidden_state
        return self.connector(features, torch.zeros(len(features), dtype=torch.bool, device=features.device))


class Plain(nn.Module):
    """The library's tower, and attention pooling in a few plain lines, with weights of its own."""

    def __init__(self, config: JinaVLMConfig):
        super().__init__()
        self.tower = AutoModel.from_config(config.vision_config)
        self.layers = config.vision_feature_layers
        self.heads, self.head_dim = config.connector_num_attention_heads, config.connector_head_dim
        width, inner = config.vision_config.hidden_size, config.connector_intermediate_size
        pooled = self.heads * self.head_dim
        self.query, self.key_value = nn.Linear(2 * width, pooled), nn.Linear(2 * width, 2 * pooled)
        self.out = nn.Linear(pooled, width)
        self.gate_up, self.down = (
            nn.Linear(width, 2 * inner, bias=False),
            nn.Linear(inner, config.text_config.hidden_size, bias=False),
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        states = self.tower(pixel_values, output_hidden_states=True).hidden_states
        features = torch.cat([states[layer + 1] for layer in self.layers], dim=-1).unflatten(1, (27, 27))
        features = (
            F.pad(features, (0, 0, 0, 1, 0, 1))
            .unflatten(2, (14, 2))
            .unflatten(1, (14, 2))
            .transpose(2, 3)
            .reshape(-1, 4, features.shape[-1])
        )
        query = self.query(features.mean(1, keepdim=True)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = self.key_value(features).unflatten(-1, (2 * self.heads, -1)).transpose(1, 2).chunk(2, dim=1)
        weights = (query @ key.transpose(2, 3) * self.head_dim**-0.5).softmax(-1)
        pooled = self.out((weights @ value).transpose(1, 2).flatten(2)).view(len(pixel_values), 196, -1)
        gate, up = self.gate_up(pooled).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


def make(kind: type[nn.Module], device: str) -> nn.Module:
    config = JinaVLMConfig.from_pretrained(ROOT)
    return build(lambda: kind(config), torch.bfloat16, device)


def make_tiles(tiles: int, device: str) -> torch.Tensor:
    return (
        torch.rand(tiles, 3, 378, 378, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16) * 2 - 1
    )


def one_block(config: PreTrainedConfig, tiles: int, device: str) -> dict:
    """Calls of the matrix products of a block of the tower, and of its attention."""
    width, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    shapes = [*(4 * [(width, width)]), (width, inner), (inner, width)]
    kind = {"dtype": torch.bfloat16, "device": device}
    weights = [torch.randn(outputs, inputs, **kind) for inputs, outputs in shapes]
    inputs = {size: torch.randn(tiles * 729, size, **kind) for size in (width, inner)}
    states = torch.randn(3, tiles, 729, heads, width // heads, **kind).transpose(2, 3)

    def products() -> None:
        for weight in weights:
            F.linear(inputs[weight.shape[1]], weight)

    return {"products": products, "attention": lambda: F.scaled_dot_product_attention(*states)}


@torch.inference_mode()
def measure(tiles: int, rounds: int, ours: nn.Module, plain: nn.Module, config: JinaVLMConfig, device: str) -> dict:
    pixels = make_tiles(tiles, device)
    alone = one_block(config.vision_config, tiles, device)
    seconds = take_turns({"ours": lambda: ours(pixels), "library": lambda: plain(pixels), **alone}, rounds, device)
    blocks = config.vision_config.num_hidden_layers
    for part in alone:
        seconds[part] = [blocks * value for value in seconds[part]]
    seconds["limit"] = together(seconds, alone)
    return {
        "tiles": tiles,
        "seconds": medians(seconds),
        "to_library": ratio(seconds, "ours", "library"),
        "limit_to_library": ratio(seconds, "limit", "library"),
    }


@torch.inference_mode()
def memory(kind: type[nn.Module], tiles: int, device: str) -> int:
    """Bytes that one call needs at most beside weights and pixels."""
    model, pixels = make(kind, device), make_tiles(tiles, device)
    if device == "cpu":
        with Peak() as peak:
            model(pixels)
        return peak.bytes
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model(pixels)
    return torch.cuda.max_memory_allocated() - before


def table(rows: list[dict]) -> str:
    head = [
        "Tiles",
        "Library's SigLIP and plain pooling, s",
        "Ours, s",
        "Ratio",
        "Matrix products alone, s",
        "Attention alone, s",
        "The limit's ratio",
        "Memory, MB",
        "Library's, MB",
    ]
    return markdown.table(
        head,
        [
            [
                str(row["tiles"]),
                *(f"{row['seconds'][name]:.3g}" for name in ("library", "ours")),
                f"**{row['to_library']:.2f}**",
                *(f"{row['seconds'][name]:.3g}" for name in ("products", "attention")),
                f"{row['limit_to_library']:.2f}",
                *(f"{row['memory'][kind] / 1e6:.0f}" for kind in ("ours", "library")),
            ]
            for row in rows
        ],
    )


def main() -> None:
    args = arguments(__doc__, rounds=3).parse_args()
    kinds = {"ours": SeeingHalf, "library": Plain}
    risen = {
        tiles: {name: in_fresh_process(memory, kind, tiles, args.device) for name, kind in kinds.items()}
        for tiles in TILES
    }
    ours, plain = (make(kind, args.device) for kind in kinds.values())
    config = JinaVLMConfig.from_pretrained(ROOT)
    rows = [
        {**measure(tiles, args.rounds, ours, plain, config, args.device), "memory": risen[tiles]} for tiles in TILES
    ]
    print(table(rows))
    save("tower", rows, args.device)


if __name__ == "__main__":
    main()
