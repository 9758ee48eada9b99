"""Quantized weights beside whole ones in bfloat16: `python -m benchmarks.quantized`.

The 2.4B widths with random weights, with few blocks (`--layers` of the text model and of the tower), saved once
and loaded by `from_pretrained(quantization_config=...)`. Each method runs in turns with bfloat16, in one process: the
tower on one tile, the text's blocks on a prompt of 512 tokens and on tokens after it, and the head, which stays whole.
What the model takes is carried over from few blocks to all 28, and the head once; bytes of weights likewise.
"""

import gc
import tempfile
import time
from pathlib import Path

import torch
from jina_vlm import JinaVLMForConditionalGeneration
from jina_vlm.compatibility_jina_vlm import CACHE_NAME

from experiments.eval_quantized import METHODS, load
from jina_vlm_tools import markdown

from . import full_model
from .results import arguments, save
from .side_by_side import medians, take_turns


PROMPT = 512
ALL = {"text": 28, "tower": 25}
REFUSED = ("torchao fp8, fp8 activations", "torchao int4, plain", "hqq int4")  # on CPUs: `experiments.eval_quantized`


def make_checkpoint(folder: Path, layers: int) -> None:
    config = full_model.small_tokenizers_config()
    config.text_config.num_hidden_layers = layers
    config.text_config.layer_types = config.text_config.layer_types[:layers]
    config.vision_config.num_hidden_layers = layers
    config.vision_feature_layers = [layers - 1, 0]
    full_model.build(lambda: JinaVLMForConditionalGeneration(config), torch.bfloat16, "cpu").save_pretrained(folder)


@torch.inference_mode()
def see(model) -> None:
    model.model.vision_model(torch.linspace(-1, 1, 3 * 378 * 378, dtype=torch.bfloat16).view(1, 3, 378, 378))


@torch.inference_mode()
def read_prompt(model):
    return model.model.language_model(input_ids=torch.arange(PROMPT)[None], use_cache=True)[CACHE_NAME]


@torch.inference_mode()
def write_tokens(model, cache, tokens: int) -> None:
    for _ in range(tokens):
        model.model.language_model(input_ids=torch.full((1, 1), 1000), use_cache=True, **{CACHE_NAME: cache})
    cache.crop(-tokens)


@torch.inference_mode()
def use_head(model, tokens: int) -> None:
    for _ in range(tokens):
        model.lm_head(torch.ones(1, 1, model.config.text_config.hidden_size, dtype=model.dtype))


def part_bytes(model) -> dict[str, int]:
    """Bytes of the weights of text blocks, of tower blocks, and of the rest; a quantized one is its parts."""
    sizes = {"text": 0, "tower": 0, "rest": 0}
    for name, tensor in model.state_dict().items():
        part = "text" if "language_model.layers" in name else "tower" if "encoder.layers" in name else "rest"
        sizes[part] += inner_bytes(tensor)
    return sizes


def inner_bytes(tensor: torch.Tensor) -> int:
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    return sum(inner_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])


def measure(name: str, folder: Path, whole, layers: int, rounds: int, tokens: int) -> dict:
    started = time.perf_counter()
    models = {"whole": whole, name: load(folder, METHODS[name](), torch.bfloat16)}
    loading = time.perf_counter() - started
    caches = {which: read_prompt(model) for which, model in models.items()}
    seconds = {
        "tower": take_turns({w: lambda m=m: see(m) for w, m in models.items()}, rounds),
        "prefill": take_turns({w: lambda m=m: read_prompt(m) for w, m in models.items()}, rounds),
        "token": take_turns(
            {w: lambda w=w, m=m: write_tokens(m, caches[w], tokens) for w, m in models.items()}, rounds
        ),
        "head": take_turns({"whole": lambda: use_head(whole, tokens)}, rounds),
    }
    seconds = {what: medians(times) for what, times in seconds.items()}
    head, scale = seconds.pop("head")["whole"] / tokens, ALL["text"] / layers
    full = {
        "tower": seconds["tower"],
        "prefill": {w: value * scale + head for w, value in seconds["prefill"].items()},
        "token": {w: value / tokens * scale + head for w, value in seconds["token"].items()},
    }
    sizes = {}
    for which, model in models.items():
        parts = part_bytes(model)
        sizes[which] = parts["rest"] + sum(parts[part] * count / layers for part, count in ALL.items())
    row = {
        "what": name,
        "seconds": full,
        "ratios": {what: times[name] / times["whole"] for what, times in full.items()},
        "bytes": sizes,
        "loading_seconds": loading,
    }
    del models
    gc.collect()
    return row


def table(rows: list[dict]) -> str:
    head = ["Weights", "Tower", "Prefill", "Token", "Weights, GB", "to whole"]
    lines = [["whole, bfloat16", "1", "1", "1", f"{rows[0]['bytes']['whole'] / 1e9:.2f}", "1"]] if rows else []
    for row in rows:
        size = row["bytes"]
        lines.append(
            [
                row["what"],
                *(f"{row['ratios'][what]:.2f}" for what in ("tower", "prefill", "token")),
                f"{size[row['what']] / 1e9:.2f}",
                f"{size[row['what']] / size['whole']:.2f}",
            ]
        )
    return markdown.table(head, lines)


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    runs = [name for name in METHODS if name not in REFUSED]
    parser.add_argument("--methods", nargs="+", default=runs, choices=runs, metavar="METHOD")
    parser.add_argument("--layers", type=int, default=2, help="of text model and tower (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=8, help="decoded in each round (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is written for a while (default: TMPDIR)")
    args = parser.parse_args()
    if args.device != "cpu":
        parser.error("quantized weights are compared on the CPU: leave --device out")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        make_checkpoint(Path(folder), args.layers)
        whole = load(folder, None, torch.bfloat16)
        rows = []
        for name in args.methods:
            rows.append(measure(name, Path(folder), whole, args.layers, args.rounds, args.tokens))
            print(table(rows[-1:]), flush=True)
    print(table(rows))
    save("quantized", rows)


if __name__ == "__main__":
    main()
