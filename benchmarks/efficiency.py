"""What pooling saves an image in tokens, operations and cache, counted: `python -m benchmarks.efficiency`.

Nothing is computed: the 2.4B model stands on the meta device, where torch counts the products of matrices, those of
attention included. "Unpooled" is the same model with windows of one patch (`pooling_size=1`), so with four times as
many tokens from the connector on.

The paper's table 1 counts otherwise, at twelve tiles. **Tokens**: all of each tile, 729 or a quarter of them, 182,
though tiles overlap. The model drops what two tiles see twice, pads the 27 patches of a side to 28 before it pools
(196 tokens a tile), and ends rows and images with tokens of their own, which are not pooled: so fewer tokens, and 1 /
3.60 rather than 1 / 4. **Prefill**: the paper's figures are those of twice the decoder's weights for each token,
without attention's products, which grow with the square of the tokens and save more than tokens do. That it comes near
ours without pooling is chance: it has half as many tokens again, and no attention. **Cache**: the paper's is that of
16 heads of keys and of values, in GB of 1.024 x 10^9 bytes; the model has 8 of each, half as much.

The rows "by the paper's rules" are our count by these. The text beside the image is not stated: 80 tokens are a guess,
which gives the paper's ratios.
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
PROMPT = 80  # tokens of text in the paper's count: a guess
PATCHES = 729  # of a tile
# Table 1 of the paper, of twelve tiles and thumbnail. Of all operations, the tower's too, it has the ratio alone.
PAPER = {
    "pooled": {"tokens": 2_366, "prefill": 6.9e12, "cache": 0.53e9},
    "unpooled": {"tokens": 9_477, "prefill": 27.2e12, "cache": 2.12e9},
    "times": {"tokens": 4.0, "prefill": 3.9, "cache": 4.0, "all": 2.3},
}
PAPER_HEADS, PAPER_GB = 16, 1.024e9  # of its cache: heads of keys, and of values; bytes


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
    result[-1]["by_papers_rules"] = by_papers_rules(result[-1], pooled)
    return result


def by_papers_rules(row: dict, model: JinaVLMForConditionalGeneration) -> dict[str, dict[str, float]]:
    """`tokens`, `prefill`, `cache` (of the model's heads), `papers_cache` (of the paper's heads, in its GB) and `all`
    operations, counted as the paper does: `pooled`, `unpooled`, and how many `times` less with pooling."""
    text = model.config.text_config
    weights = sum(
        module.weight.numel() for module in model.model.language_model.modules() if isinstance(module, torch.nn.Linear)
    )
    seen = row["pooled"]["tower"] + row["pooled"]["connector"]
    counted = {}
    for kind, of_tile in (("pooled", PATCHES // 4), ("unpooled", PATCHES)):
        tokens = of_tile * (1 + row["tiles"])
        prefill = 2 * weights * (tokens + PROMPT)
        of_head = tokens * text.num_hidden_layers * 2 * text.head_dim * BYTES
        counted[kind] = {
            "tokens": tokens,
            "prefill": prefill,
            "cache": of_head * text.num_key_value_heads,
            "papers_cache": of_head * PAPER_HEADS / PAPER_GB * 1e9,
            "all": seen + prefill,
        }
    times = {name: counted["unpooled"][name] / counted["pooled"][name] for name in counted["pooled"]}
    return {**counted, "times": times}


def table(counted: list[dict]) -> str:
    """Two tables: of each number of tiles; and of twelve tiles beside the paper's figures."""
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
    return markdown.table(head, lines) + "\n\n" + beside_the_paper(counted[-1])


def beside_the_paper(row: dict) -> str:
    def line(name: str, counted: dict, cache: str = "cache") -> list[str]:
        pooled, unpooled, times = counted["pooled"], counted["unpooled"], counted["times"]
        together = f"{unpooled['all'] / 1e12:.1f} / {pooled['all'] / 1e12:.1f}" if "all" in pooled else "not stated"
        return [
            name,
            f"{unpooled['tokens']:,} / {pooled['tokens']:,} = {times['tokens']:.1f}",
            f"{unpooled['prefill'] / 1e12:.1f} / {pooled['prefill'] / 1e12:.1f} = {times['prefill']:.1f}",
            f"{unpooled[cache] / 1e9:.2f} / {pooled[cache] / 1e9:.2f} = {times[cache]:.1f}",
            f"{together} = {times['all']:.1f}",
        ]

    rules = row["by_papers_rules"]
    lines = [
        line("The paper's", PAPER),
        line("By the paper's rules, cache of 16 heads", rules, "papers_cache"),
        line("By the paper's rules, cache of the model's 8 heads", rules),
        line("The model's, counted", row),
    ]
    head = ["12 tiles and thumbnail, without / with pooling", "Tokens", "Prefill, 10^12 operations", "Cache, GB"]
    return markdown.table([*head, "With tower and connector, 10^12 operations"], lines)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    counted = rows()
    print(table(counted))
    save("efficiency", counted)


if __name__ == "__main__":
    main()
