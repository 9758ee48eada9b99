"""Ask the small checkpoint the same questions by torch and by llama.cpp: `python -m experiments.eval_engines`.

The questions of `experiments.eval_tiny`, one by one. Tower and connector run once for each, in float32, so that what
differs is the text model alone: torch's in float32, and llama.cpp's with each type of weights.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from jina_vlm import JinaVLMForConditionalGeneration, JinaVLMProcessor
from tqdm import tqdm

from jina_vlm_tools import markdown
from jina_vlm_tools.engines.convert import convert_for_llama_cpp
from jina_vlm_tools.engines.llama_cpp import LlamaCppForConditionalGeneration
from jina_vlm_tools.files import TINY

from .answers import answer, divergence, prepare
from .eval_tiny import choose


TYPES = ("F32", "BF16", "Q8_0", "Q4_K_M")


def load_models(checkpoint: str, types: list[str], folder: Path) -> dict:
    models = {"torch": JinaVLMForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()}
    for kind in types:
        (folder / kind).mkdir()
        convert_for_llama_cpp(checkpoint, folder / kind, kind)
        models[kind] = LlamaCppForConditionalGeneration.from_pretrained(folder / kind, dtype=torch.float32).eval()
    return models


@torch.inference_mode()
def ask(models: dict, processor, sample) -> dict[str, tuple]:
    """What each model answers."""
    inputs = prepare(processor, sample)
    features = models["torch"].get_image_features(inputs.pop("pixel_values"), inputs.pop("tile_positions"))
    inputs["mm_encoder_outputs"] = {"image": features}
    return {name: answer(model, processor, sample, inputs) for name, model in models.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", default=str(TINY))
    parser.add_argument("--samples", type=int, default=960, help="questions (default: %(default)s)")
    parser.add_argument("--types", nargs="+", default=TYPES, help="of weights (default: %(default)s)")
    args = parser.parse_args()
    processor, started = JinaVLMProcessor.from_pretrained(args.checkpoint), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        models = load_models(args.checkpoint, args.types, Path(folder))
        results = [ask(models, processor, sample) for sample in tqdm(choose(args.samples))]
    suppressed = models["torch"].config.structural_token_ids
    lines = []
    for name in models:
        pairs = [(result["torch"], result[name]) for result in results]
        kl = [divergence(expected[2], given[2], suppressed) for expected, given in pairs]
        lines.append(
            [
                "torch, float32" if name == "torch" else f"llama.cpp, {name}",
                f"{100 * sum(given[1] for _, given in pairs) / len(pairs):.1f}",
                f"{sum(expected[0] == given[0] for expected, given in pairs)} of {len(pairs)}",
                f"{sum(kl) / len(kl):.1e}",
            ]
        )
    print(markdown.table(["Text model", "Right, %", "The same tokens as torch", "KL of the first token"], lines))
    print(f"\n{len(results)} questions in {time.perf_counter() - started:.0f} s.")


if __name__ == "__main__":
    main()
