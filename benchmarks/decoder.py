"""Prefill and decoding beside the text model alone: `python -m benchmarks.decoder`.

The 2.4B model with random weights in bfloat16. The text model is the library's Qwen3 with the very same weights, given
as many tokens. Prefill starts from the images' embeddings (the tower's time is `benchmarks.tower`'s). Decoding is one
token after a cache of so many, which is filled with noise. The limit of decoding: all weights that a token needs read
once, by products of each matrix with one vector, and the cache copied once (the library's cache grows by copying).
"""

import torch
from jina_vlm import JinaVLMProcessor
from jina_vlm.compatibility_jina_vlm import CACHE_NAME
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from jina_vlm_tools import markdown
from jina_vlm_tools.files import TINY

from . import full_model
from .results import arguments, save
from .side_by_side import medians, ratio, take_turns


LENGTHS = (2048, 8192, 32768)


def prompt(model, images: int, rows: int, columns: int, text_tokens: int) -> tuple[torch.Tensor, dict]:
    """Ids of so many images and some text, and the images' embeddings as `get_image_features` returns them."""
    processor, config = JinaVLMProcessor.from_pretrained(TINY), model.config
    text = processor.replace_image_token({"tile_positions": torch.tensor([[-1, -1, rows, columns]])}, 0)
    image_ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    count = image_ids.count(config.image_token_id)
    features = [
        torch.randn(count, config.text_config.hidden_size).to(model.device, model.dtype) for _ in range(images)
    ]
    ids = images * image_ids + list(range(1000, 1000 + text_tokens))
    return torch.tensor([ids], device=model.device), {"image": BaseModelOutputWithPooling(pooler_output=features)}


@torch.inference_mode()
def prefill(model, text, name: str, rounds: int, device: str, **images) -> dict:
    ids, features = prompt(model, **images)
    plain_ids = torch.full_like(ids, 1000)
    seconds = take_turns(
        {
            "ours": lambda: model(input_ids=ids, mm_encoder_outputs=features, use_cache=True, logits_to_keep=1),
            "text": lambda: text(input_ids=plain_ids, use_cache=True, logits_to_keep=1),
        },
        rounds,
        device,
    )
    return {
        "what": name,
        "tokens": ids.shape[1],
        "seconds": medians(seconds),
        "to_text": ratio(seconds, "ours", "text"),
    }


def noise_cache(config, length: int, device: str, dtype: torch.dtype) -> DynamicCache:
    cache = DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        noise = torch.randn(2, 1, config.num_key_value_heads, 64, config.head_dim, dtype=dtype, device=device)
        keys, values = (part.repeat(1, 1, -(-length // 64), 1)[:, :, :length].contiguous() for part in noise)
        cache.update(keys, values, layer)
    return cache


def weights_read_once(model):
    """Calls the product of each matrix of the decoder and its head with one vector."""
    matrices = [
        module.weight
        for module in (*model.model.language_model.modules(), model.lm_head)
        if isinstance(module, torch.nn.Linear)
    ]
    vectors = {
        size: torch.randn(1, size, dtype=model.dtype, device=model.device)
        for size in {matrix.shape[1] for matrix in matrices}
    }

    def call() -> None:
        for matrix in matrices:
            F.linear(vectors[matrix.shape[1]], matrix)

    return call


@torch.inference_mode()
def decode(model, text, length: int, tokens: int, rounds: int, device: str) -> dict:
    cache = noise_cache(model.config.text_config, length, device, model.dtype)
    one = torch.full((1, 1), 1000, device=device)
    read = weights_read_once(model)

    def steps(decoder):
        for _ in range(tokens):
            decoder(input_ids=one, **{CACHE_NAME: cache}, use_cache=True)
        cache.crop(-tokens)

    def limit():
        for _ in range(tokens):
            read()
            for layer in cache.layers:
                layer.keys.clone(), layer.values.clone()

    seconds = take_turns({"ours": lambda: steps(model), "text": lambda: steps(text), "limit": limit}, rounds, device)
    per_token = {name: value / tokens for name, value in medians(seconds).items()}
    return {
        "what": f"a token after {length:,}",
        "tokens": length,
        "seconds": per_token,
        "to_text": ratio(seconds, "ours", "text"),
        "to_limit": ratio(seconds, "ours", "limit"),
    }


def table(rows: list[dict]) -> str:
    head = ["What", "Tokens", "The text model alone, s", "Ours, s", "Ratio", "To weights and cache read once"]
    return markdown.table(
        head,
        [
            [
                row["what"],
                f"{row['tokens']:,}",
                f"{row['seconds']['text']:.3f}",
                f"{row['seconds']['ours']:.3f}",
                f"**{row['to_text']:.2f}**",
                f"{row['to_limit']:.2f}" if "to_limit" in row else "",
            ]
            for row in rows
        ],
    )


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--tokens", type=int, default=2, help="decoded in each round (default: %(default)s)")
    parser.add_argument("--full", action="store_true", help="prefill of eight images too")
    args = parser.parse_args()
    model = full_model.jina_vlm(device=args.device)
    text = full_model.text_model(model)
    rows = [
        prefill(
            model,
            text,
            "prefill, one image of 12 tiles",
            args.rounds,
            args.device,
            images=1,
            rows=3,
            columns=4,
            text_tokens=3,
        )
    ]
    if args.full:
        rows.append(
            prefill(
                model,
                text,
                "prefill, eight images of 4 tiles",
                args.rounds,
                args.device,
                images=8,
                rows=2,
                columns=2,
                text_tokens=32,
            )
        )
    rows += [decode(model, text, length, args.tokens, args.rounds, args.device) for length in LENGTHS]
    print(table(rows))
    save("decoder", rows, args.device)


if __name__ == "__main__":
    main()
