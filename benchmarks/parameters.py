"""Count a configuration's parameters, part by part: `python -m benchmarks.parameters [folder with a config.json]`.

Nothing is allocated: the model is made on the meta device.
"""

import argparse

import torch
from jina_vlm import JinaVLMConfig, JinaVLMForConditionalGeneration

from jina_vlm_tools import markdown
from jina_vlm_tools.files import ROOT


def count(config: JinaVLMConfig) -> dict[str, int]:
    """Parameters by part. A head that shares the embedding's weights counts nothing."""
    with torch.device("meta"):
        model = JinaVLMForConditionalGeneration(config)
    text = model.model.language_model
    embedding = text.get_input_embeddings()
    number = {
        "Vision tower": model.model.vision_model,
        "Connector": model.model.connector,
        "Text model, without embedding": text,
        "Embedding": embedding,
    }
    parts = {part: sum(parameter.numel() for parameter in module.parameters()) for part, module in number.items()}
    parts["Text model, without embedding"] -= parts["Embedding"]
    parts["`lm_head`"] = 0 if config.tie_word_embeddings else model.lm_head.weight.numel()
    parts["Total"] = sum(parameter.numel() for parameter in model.parameters())
    return parts


def table(parts: dict[str, int]) -> str:
    """As a markdown table."""
    return markdown.table(["Part", "Parameters"], [[part, f"{number:,}"] for part, number in parts.items()])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default=ROOT, help="its config (default: the release's)")
    print(table(count(JinaVLMConfig.from_pretrained(parser.parse_args().checkpoint))))
