"""Tower and connector beside the library's SigLIP and pooling written plainly: `python -m benchmarks.tower`.

The 2.4B model's sizes, random weights, bfloat16. The library's tower has the same 25 blocks and takes all tiles in one batch. The limit is
its matrix products alone, at the same sizes, one after the other. Memory is what rises above the inputs and weights.
"""

import argparse

import torch
from jina_vlm import JinaVLMConfig
from jina_vlm.modeling_jina_vlm import JinaVLMConnector, JinaVLMVisionModel
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedConfig

from .full_model import build
from .results import ROOT, markdown, save
from .side_by_side import Peak, medians, ratio, take_turns


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
        self.gate_up, self.down = nn.Linear(width, 2 * inner, bias=False), nn.Linear(inner, config.text_config.hidden_size, bias=False)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        states = self.tower(pixel_values, output_hidden_states=True).hidden_states
        features = torch.cat([states[layer + 1] for layer in self.layers], dim=-1).unflatten(1, (27, 27))
        features = F.pad(features, (0, 0, 0, 1, 0, 1)).unflatten(2, (14, 2)).unflatten(1, (14, 2)).transpose(2, 3).reshape(-1, 4, features.shape[-1])
        query = self.query(features.mean(1, keepdim=True)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = self.key_value(features).unflatten(-1, (2 * self.heads, -1)).transpose(1, 2).chunk(2, dim=1)
        weights = (query @ key.transpose(2, 3) * self.head_dim**-0.5).softmax(-1)
        pooled = self.out((weights @ value).transpose(1, 2).flatten(2)).view(len(pixel_values), 196, -1)
        gate, up = self.gate_up(pooled).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


def products(config: PreTrainedConfig, tiles: int, dtype: torch.dtype, device: str):
    """Calls all matrix products of the tower, at their sizes, with one weight for each shape."""
    width, inner, tokens = config.hidden_size, config.intermediate_size, tiles * 729
    shapes = [(3 * 14 * 14, width)] + config.num_hidden_layers * [*(4 * [(width, width)]), (width, inner), (inner, width)]
    weights = {shape: torch.randn(shape[1], shape[0], dtype=dtype, device=device) for shape in set(shapes)}
    inputs = {size: torch.randn(tokens, size, dtype=dtype, device=device) for size in {shape[0] for shape in shapes}}

    def call() -> None:
        for shape in shapes:
            F.linear(inputs[shape[0]], weights[shape])

    return call


@torch.inference_mode()
def measure(tiles: int, rounds: int, ours: nn.Module, plain: nn.Module, config: JinaVLMConfig, device: str) -> dict:
    pixels = torch.rand(tiles, 3, 378, 378, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16) * 2 - 1
    seconds = take_turns(
        {
            "ours": lambda: ours(pixels),
            "library": lambda: plain(pixels),
            "products": products(config.vision_config, tiles, torch.bfloat16, device),
        },
        rounds,
        device,
    )
    row = {
        "tiles": tiles,
        "seconds": medians(seconds),
        "to_library": ratio(seconds, "ours", "library"),
        "to_products": ratio(seconds, "ours", "products"),
    }
    for name, model in (("ours", ours), ("library", plain)):
        if device == "cpu":
            with Peak() as peak:
                model(pixels)
            row[f"memory_{name}"] = peak.bytes
        else:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            model(pixels)
            row[f"memory_{name}"] = torch.cuda.max_memory_allocated() - before
    return row


def table(rows: list[dict]) -> str:
    head = ["Tiles", "Library's SigLIP and plain pooling, s", "Ours, s", "Ratio", "To the tower's matrix products alone", "Memory, MB", "Library's, MB"]
    return markdown(
        head,
        [
            [
                str(row["tiles"]),
                f"{row['seconds']['library']:.2f}",
                f"{row['seconds']['ours']:.2f}",
                f"**{row['to_library']:.2f}**",
                f"{row['to_products']:.2f}",
                f"{row['memory_ours'] / 1e6:.0f}",
                f"{row['memory_library'] / 1e6:.0f}",
            ]
            for row in rows
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    config = JinaVLMConfig.from_pretrained(ROOT)
    ours, plain = (build(lambda kind=kind: kind(config), torch.bfloat16, args.device) for kind in (SeeingHalf, Plain))
    rows = [measure(tiles, args.rounds, ours, plain, config, args.device) for tiles in TILES]
    print(table(rows))
    save("tower", rows, args.device)


if __name__ == "__main__":
    main()
