"""What pooling saves an image in tokens, operations and cache, counted: `python -m benchmarks.efficiency`.

Nothing is computed: the 2.4B model stands on the meta device, where torch counts the products of matrices, those of
attention included. "Unpooled" is the same model with windows of one patch (`pooling_size=1`), so with four times as
many tokens from the connector on.

The paper's figures differ, for two reasons. The released code pads the 27 patches of a side to 28, so that 729 patches
become 196 tokens, 1 / 3.72 and not 1 / 4; the ends of rows and images, which are not pooled, make it 1 / 3.60. And
attention's products, which grow with the square of the tokens, save more than tokens do. The row "counted plainly"
leaves both out: 729 patches a tile or a quarter of them, 80 tokens of text beside them, which is a guess, and for each
token twice the decoder's weights. It gives the paper's figures.
"""

import argparse

import torch
from jina_vlm import JinaVLMConfig, JinaVLMForConditionalGeneration, JinaVLMImageProcessor
from torch.utils.flop_counter import FlopCounterMode

from jina_vlm_tools import markdown
from jina_vlm_tools.files import ROOT

from .results import save


GRIDS = ((1, 1), (2, 2), (2, 3), (3, 3), (3, 4))
BYTES = 2  # of a number in bfloat16
PLAIN_PROMPT = 80
# Section 4 of the paper, at twelve tiles: how many times less with pooling.
PAPER = {"tokens": 4.0, "prefill": 3.9, "cache": 4.0, "all": 2.3}


def flops(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def meta_model(pooling_size: int) -> JinaVLMForConditionalGeneration:
    config = JinaVLMConfig.from_pretrained(ROOT, pooling_size=pooling_size)
    with torch.device("meta"):
        return JinaVLMForConditionalGeneration(config).bfloat16().eval()


@torch.inference_mode()
def count(model: JinaVLMForConditionalGeneration, rows: int, columns: int) -> dict[str, int]:
    """Of one image of so many tiles: `tokens` and, of these, `image_tokens` (the others end rows, and open and end
    images); operations of `tower`, `connector` and `prefill`; bytes of `cache`. The prompt is the image alone."""
    config = model.config
    grid = JinaVLMImageProcessor(pooling_size=config.pooling_size)
    parts = (grid.get_token_grid(1, 1), grid.get_token_grid(rows, columns))
    image_tokens = sum(height * width for height, width in parts)
    structural = sum(height + 2 for height, _ in parts)
    tokens = image_tokens + structural
    text, tiles = config.text_config, 1 + rows * columns
    with torch.device("meta"):
        pixels = torch.empty(
            tiles, 3, config.vision_config.image_size, config.vision_config.image_size, dtype=torch.bfloat16
        )
        patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
        features = torch.empty(tiles, patches, model.model.connector.pad_embed.shape[1], dtype=torch.bfloat16)
        embeddings = torch.empty(1, tokens, text.hidden_size, dtype=torch.bfloat16)
        last_tile = torch.zeros(tiles, dtype=torch.bool)
    return {
        "tokens": tokens,
        "image_tokens": image_tokens,
        "tower": flops(lambda: model.model.vision_model(pixels)),
        "connector": flops(lambda: model.model.connector(features, last_tile)),
        "prefill": flops(
            lambda: model.lm_head(
                model.model.language_model(inputs_embeds=embeddings, use_cache=True).last_hidden_state[:, -1:]
            )
        ),
        "cache": tokens * text.num_hidden_layers * 2 * text.num_key_value_heads * text.head_dim * BYTES,
    }


def rows() -> list[dict]:
    pooled, unpooled = meta_model(2), meta_model(1)
    result = []
    for grid in GRIDS:
        ours, plain = count(pooled, *grid), count(unpooled, *grid)
        for counted in (ours, plain):
            counted["all"] = counted["tower"] + counted["connector"] + counted["prefill"]
        result.append(
            {
                "tiles": grid[0] * grid[1],
                "pooled": ours,
                "unpooled": plain,
                "times": {
                    name: plain[name] / ours[name] for name in ("tokens", "image_tokens", "prefill", "cache", "all")
                },
            }
        )
    result[-1]["plainly"] = counted_plainly(result[-1], pooled)
    return result


def counted_plainly(row: dict, model: JinaVLMForConditionalGeneration) -> dict[str, float]:
    """How many times less with pooling: [`PLAIN_PROMPT`] tokens of text, a quarter of the patches as tokens, and
    without attention's products."""
    patches = 729 * (1 + row["tiles"])
    weights = sum(
        module.weight.numel() for module in model.model.language_model.modules() if isinstance(module, torch.nn.Linear)
    )
    seen = row["pooled"]["tower"] + row["pooled"]["connector"]
    plain, pooled = (2 * weights * (tokens + PLAIN_PROMPT) for tokens in (patches, patches / 4))
    return {"tokens": 4.0, "prefill": plain / pooled, "cache": 4.0, "all": (seen + plain) / (seen + pooled)}


def table(counted: list[dict]) -> str:
    head = ["Tiles", "Tokens", "Prefill, 10^12 operations", "Cache, MB", "With tower and connector, 10^12 operations"]
    lines = []
    for row in counted:
        ours, plain, times = row["pooled"], row["unpooled"], row["times"]
        lines.append(
            [
                f"{row['tiles']} and thumbnail",
                f"{ours['tokens']:,} / {plain['tokens']:,} = 1 / {times['tokens']:.2f}",
                f"{ours['prefill'] / 1e12:.2f} / {plain['prefill'] / 1e12:.2f} = 1 / {times['prefill']:.2f}",
                f"{ours['cache'] / 1e6:.0f} / {plain['cache'] / 1e6:.0f} = 1 / {times['cache']:.2f}",
                f"{ours['all'] / 1e12:.1f} / {plain['all'] / 1e12:.1f} = 1 / {times['all']:.2f}",
            ]
        )
    for name, times in (("12, counted plainly", counted[-1]["plainly"]), ("12, the paper's", PAPER)):
        lines.append([name, *(f"1 / {times[name]:.1f}" for name in ("tokens", "prefill", "cache", "all"))])
    return markdown.table(head, lines)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    counted = rows()
    print(table(counted))
    save("efficiency", counted)


if __name__ == "__main__":
    main()
