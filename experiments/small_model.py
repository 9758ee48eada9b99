"""A small jina-vlm of random weights, to train from scratch: `python -m experiments.small_model --output runs/new`.

It has the released model's geometry (tiles, patches, windows, structural tokens) and small widths, multiples of 64.
What teaches it: `experiments.seeing`, then the stages `recipes/small_stage1.yaml` and `small_stage2.yaml`.
"""

import argparse
from pathlib import Path

import jina_vlm
import torch

from jina_vlm_tools.files import TEMPLATE

from .tokenizer import ADDITIONAL_ROWS, BASE_SIZE, STRUCTURAL_TOKENS, train_tokenizer


EMBEDDING_SIZE = 0.5  # root mean square


def make_processor() -> jina_vlm.JinaVLMProcessor:
    template = TEMPLATE.read_text(encoding="utf-8")
    return jina_vlm.JinaVLMProcessor(jina_vlm.JinaVLMImageProcessor(), train_tokenizer(), chat_template=template)


def make_config(tokenizer) -> jina_vlm.JinaVLMConfig:
    structural = tokenizer.convert_tokens_to_ids(list(STRUCTURAL_TOKENS))
    end_of_text = tokenizer.eos_token_id
    return jina_vlm.JinaVLMConfig(
        vision_config={
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "image_size": 378,
            "patch_size": 14,
            "vision_use_head": False,
        },
        text_config={
            "vocab_size": BASE_SIZE + ADDITIONAL_ROWS,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "max_position_embeddings": tokenizer.model_max_length,
            "initializer_range": 0.05,
            "bos_token_id": end_of_text,
            "eos_token_id": end_of_text,
            "pad_token_id": end_of_text,
        },
        vision_feature_layers=[3, 1],
        connector_num_attention_heads=2,
        connector_head_dim=64,
        connector_intermediate_size=256,
        image_token_id=structural[STRUCTURAL_TOKENS.index("<im_patch>")],
        structural_token_ids=structural,
    )


def make_model(config: jina_vlm.JinaVLMConfig) -> jina_vlm.JinaVLMForConditionalGeneration:
    model = jina_vlm.JinaVLMForConditionalGeneration(config)
    vision = config.vision_config
    with torch.no_grad():
        positions = model.model.vision_model.tower.embeddings.position_embedding.weight
        positions.copy_(sine_cosine_positions(vision.image_size // vision.patch_size, vision.hidden_size))
        # Words as large as what layers add to them: smaller ones would drown in it. Image tokens add no `<im_patch>`.
        model.get_input_embeddings().weight.normal_(std=EMBEDDING_SIZE)
        model.get_input_embeddings().weight[config.image_token_id] = 0
    return model


def sine_cosine_positions(side: int, width: int) -> torch.Tensor:
    """[side * side, width]: a quarter of the width each for sine and cosine of the row, and of the column, at
    wavelengths from 2 pi to 2 pi * 100 patches. With these as initial values places can be read off by a linear layer
    from the start."""
    frequencies = 100 ** -torch.linspace(0, 1, width // 4)
    angles = torch.arange(side)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=-1)
    rows, columns = waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    processor = make_processor()
    model = make_model(make_config(processor.tokenizer))
    model.save_pretrained(args.output)
    processor.save_pretrained(args.output)
    print(f"{model.num_parameters():,} parameters in {args.output}.")


if __name__ == "__main__":
    main()
