"""Put a SigLIP2 tower and a Qwen3 decoder together into a jina-vlm that is ready for stage one:

    python -m jina_vlm_tools.training.backbones --tower google/siglip2-so400m-patch14-384 --decoder
    Qwen/Qwen3-1.7B-Base --output bundle

Both may be folders or repositories of the Hub. The tower loses its head and the blocks behind the deepest one that is
used; the vocabulary grows by 128 rows for images, each the mean of the old ones; the connector is new. That nothing
else changes is checked, on random images and tokens, before anything is written. Weights are written in float32.
"""

import argparse
import sys
from pathlib import Path

import jina_vlm
import torch
from jina_vlm.conversion_jina_vlm import STRUCTURAL_TOKENS
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3ForCausalLM,
    SiglipVisionModel,
    set_seed,
)

from jina_vlm_tools.files import TEMPLATE


ADDITIONAL_ROWS = 128
END_OF_TEXT = "<|endoftext|>"  # which the chat template writes
FROM_THE_END = (3, 9)  # the blocks whose outputs the connector sees, counted from the last: 24 and 18 of 27
TOLERANCE = 1e-4  # of the largest value, in float32


class BackboneError(ValueError):
    """The two do not make a jina-vlm."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tower", required=True, help="SigLIP or SigLIP2, as a folder or a repository of the Hub")
    parser.add_argument("--decoder", required=True, help="Qwen3, as a folder or a repository of the Hub")
    parser.add_argument("--output", type=Path, required=True, help="folder of the new checkpoint")
    parser.add_argument(
        "--feature-layers",
        type=int,
        nargs="+",
        metavar="BLOCK",
        help=(
            "the tower's blocks, from 0, that the connector sees, deepest first (default: "
            "the third and the ninth from the last)"
        ),
    )
    parser.add_argument("--seed", type=int, default=0, help="of the connector's weights")
    return parser.parse_args()


def make_config(tower: str, decoder: str, feature_layers: list[int] | None = None) -> jina_vlm.JinaVLMConfig:
    """
    Raises:
        BackboneError: the two are of other kinds, or their numbers do not agree.
    """
    vision, text = _config(tower), _config(decoder)
    vision = getattr(vision, "vision_config", vision)
    if vision.model_type != "siglip_vision_model":
        raise BackboneError(f"--tower {tower}: expected a SigLIP of fixed size, got {vision.model_type!r}.")
    if text.model_type != "qwen3":
        raise BackboneError(f"--decoder {decoder}: expected a Qwen3, got {text.model_type!r}.")
    number = vision.num_hidden_layers
    layers = feature_layers or [number - back for back in FROM_THE_END]
    if min(layers) < 0 or max(layers) >= number or max(layers) != layers[0] or len(set(layers)) < len(layers):
        raise BackboneError(
            f"--feature-layers {layers}: expected blocks from 0 to {number - 1} of {tower}, the deepest first, "
            "none twice."
        )
    patches = vision.image_size // vision.patch_size
    processor = jina_vlm.JinaVLMImageProcessor
    if patches <= 2 * processor.overlap_margin:
        raise BackboneError(
            f"--tower {tower}: `image_size` {vision.image_size} and `patch_size` {vision.patch_size} make {patches} "
            "patches a side; "
            f"more than {2 * processor.overlap_margin} are needed, "
            f"since tiles overlap by {processor.overlap_margin} at each side."
        )
    if vision.hidden_size % vision.num_attention_heads:
        raise BackboneError(
            f"--tower {tower}: `hidden_size` {vision.hidden_size} is no multiple of its {vision.num_attention_heads} "
            "heads."
        )
    rows = text.vocab_size
    return jina_vlm.JinaVLMConfig(
        # 384 pixels in patches of 14 use 378 of them
        vision_config={
            **vision.to_dict(),
            "image_size": patches * vision.patch_size,
            "num_hidden_layers": layers[0] + 1,
            "vision_use_head": False,
        },
        text_config={**text.to_dict(), "vocab_size": rows + ADDITIONAL_ROWS, "tie_word_embeddings": False},
        vision_feature_layers=layers,
        connector_num_attention_heads=vision.num_attention_heads,
        connector_head_dim=vision.hidden_size // vision.num_attention_heads,
        connector_intermediate_size=text.intermediate_size,
        structural_token_ids=[rows + index for index in range(len(STRUCTURAL_TOKENS))],
        image_token_id=rows + STRUCTURAL_TOKENS.index("<im_patch>"),
    )


def _config(name: str):
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise BackboneError(f"{name}: its config cannot be read: {error}") from error


def make_processor(decoder: str, config: jina_vlm.JinaVLMConfig) -> jina_vlm.JinaVLMProcessor:
    """The decoder's tokenizer, filled up to its rows, with the structural tokens behind.

    Raises:
        BackboneError: the tokenizer does not fit.
    """
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    rows = config.structural_token_ids[0]
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or END_OF_TEXT not in tokenizer.get_vocab():
        raise BackboneError(
            f"--decoder {decoder}: its tokenizer lacks {END_OF_TEXT}, which opens and ends every chat."
        )
    if len(tokenizer) > rows:
        raise BackboneError(
            f"--decoder {decoder}: its tokenizer has {len(tokenizer):,} tokens, its embedding {rows:,} rows."
        )
    tokenizer.add_tokens([f"|<EXTRA_TOKENS_{index}>|" for index in range(rows - len(tokenizer))], special_tokens=True)
    tokenizer.add_tokens(list(STRUCTURAL_TOKENS), special_tokens=True)
    if (found := tokenizer.convert_tokens_to_ids(list(STRUCTURAL_TOKENS))) != config.structural_token_ids:
        raise BackboneError(
            f"--decoder {decoder}: its tokenizer puts {', '.join(STRUCTURAL_TOKENS)} at {found}, "
            f"expected {config.structural_token_ids}."
        )
    tokenizer.bos_token = tokenizer.eos_token = tokenizer.pad_token = END_OF_TEXT
    tokenizer.add_bos_token = True
    tokenizer.padding_side = "left"
    tokenizer.model_max_length = config.text_config.max_position_embeddings
    end = tokenizer.eos_token_id
    for part in (config, config.text_config):
        part.bos_token_id = part.eos_token_id = part.pad_token_id = end
    image_processor = jina_vlm.JinaVLMImageProcessor(
        tile_size=config.vision_config.image_size, patch_size=config.vision_config.patch_size
    )
    template = TEMPLATE.read_text(encoding="utf-8")
    return jina_vlm.JinaVLMProcessor(image_processor, tokenizer, chat_template=template)


@torch.no_grad()
def make_model(config: jina_vlm.JinaVLMConfig, tower: str, decoder: str) -> jina_vlm.JinaVLMForConditionalGeneration:
    """The model in float32, checked.

    Raises:
        BackboneError: weights are missing, or an output has changed.
    """
    model = jina_vlm.JinaVLMForConditionalGeneration(config).eval()
    theirs = _load(SiglipVisionModel, tower)
    _copy(theirs.state_dict(), model.model.vision_model.tower, tower)
    _check_tower(theirs, model.model.vision_model, tower)
    del theirs
    theirs = _load(Qwen3ForCausalLM, decoder)
    weights = theirs.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        old = weights[name]
        weights[name] = torch.cat([old, old.mean(dim=0, keepdim=True).expand(ADDITIONAL_ROWS, -1)])
    _copy(
        {name.removeprefix("model."): tensor for name, tensor in weights.items() if name.startswith("model.")},
        model.model.language_model,
        decoder,
    )
    model.lm_head.weight.copy_(weights["lm_head.weight"])
    _check_decoder(theirs, model, decoder)
    return model


def _load(model_class, name: str):
    model, info = model_class.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    if missing := sorted(info["missing_keys"]):
        raise BackboneError(f"{name} lacks the weights {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}.")
    return model.eval()


def _copy(weights: dict[str, torch.Tensor], target: torch.nn.Module, name: str) -> None:
    weights = {key.removeprefix("vision_model."): tensor for key, tensor in weights.items()}
    for key, tensor in target.state_dict().items():
        if key not in weights:
            raise BackboneError(f"{name} lacks the weight {key}.")
        if weights[key].shape != tensor.shape:
            raise BackboneError(
                f"{name}: `{key}` has shape {list(weights[key].shape)}, expected {list(tensor.shape)}."
            )
        tensor.copy_(weights[key])


def _check_tower(theirs, ours, name: str) -> None:
    config = ours.config.vision_config
    pixels = torch.rand(1, config.num_channels, config.image_size, config.image_size) * 2 - 1
    outputs = theirs(pixels, output_hidden_states=True).hidden_states  # the first is the embedding's
    _compare(
        torch.cat([outputs[layer + 1] for layer in ours.config.vision_feature_layers], dim=-1),
        ours(pixels).last_hidden_state,
        name,
    )


def _check_decoder(theirs, model, name: str) -> None:
    ids = torch.randint(theirs.config.vocab_size, (1, 64))
    _compare(theirs(ids).logits, model(ids).logits[..., : theirs.config.vocab_size], name)


def _compare(expected: torch.Tensor, found: torch.Tensor, name: str) -> None:
    furthest = (found - expected).abs().max().item() / expected.abs().max().item()
    if not furthest <= TOLERANCE:
        raise BackboneError(f"{name}: its outputs have changed, by {furthest:.1e} of the largest value.")
    print(f"{name}: outputs unchanged, within {furthest:.1e} of the largest value.")


def main() -> None:
    args = parse_args()
    if args.output.exists() and any(args.output.iterdir()):
        sys.exit(f"--output {args.output}: this folder is not empty.")
    set_seed(args.seed)
    try:
        config = make_config(args.tower, args.decoder, args.feature_layers)
        processor = make_processor(args.decoder, config)
        model = make_model(config, args.tower, args.decoder)
    except BackboneError as error:
        sys.exit(str(error))
    model.save_pretrained(args.output)
    processor.save_pretrained(args.output)
    print(
        f"Saved to {args.output}: {model.num_parameters():,} parameters. "
        "Stage one comes next: jina_vlm_tools/training/recipes/stage1.yaml."
    )


if __name__ == "__main__":
    main()
