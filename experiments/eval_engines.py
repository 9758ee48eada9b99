"""Ask the small checkpoint the same questions by torch and by other engines: `python -m experiments.eval_engines`.

The questions of `experiments.eval_tiny`, one by one. For llama.cpp tower and connector are torch's in float32, so that
what differs is the text model alone; ONNX Runtime and OpenVINO run the whole model. `--show 10` prints the answers to
the first ten, too.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from jina_vlm import JinaVLMForConditionalGeneration, JinaVLMProcessor
from tqdm import tqdm
from transformers import AutoModelForImageTextToText

from jina_vlm_tools import markdown
from jina_vlm_tools.engines import FOLDERS, LLAMA_CPP, ONNX, OPENVINO, TORCH
from jina_vlm_tools.engines.quantization import GRAPH_QUANTIZATIONS
from jina_vlm_tools.extras import needing
from jina_vlm_tools.files import TINY

from .answers import answer, divergence, prepare
from .eval_tiny import choose


WHOLE = "float32"
KINDS = {
    LLAMA_CPP: ("F32", "BF16", "Q8_0", "Q4_K_M"),
    ONNX: (WHOLE, *GRAPH_QUANTIZATIONS),
    OPENVINO: (WHOLE, *GRAPH_QUANTIZATIONS),
}


def convert(checkpoint: str, engine: str, kind: str, folder: Path) -> None:
    folder.mkdir()
    with needing(FOLDERS[engine].extra, f"{engine}, unless --engines leaves it out,"):
        if engine == LLAMA_CPP:
            from jina_vlm_tools.engines.gguf_folder import convert_for_llama_cpp

            convert_for_llama_cpp(checkpoint, folder, kind)
        else:
            from jina_vlm_tools.engines.graph_folder import convert_for_graphs

            convert_for_graphs(checkpoint, folder, engine, None if kind == WHOLE else kind)


def load_models(checkpoint: str, engines: list[str], folder: Path) -> dict:
    """By engine and kind of weights."""
    whole = JinaVLMForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    models = {(TORCH, WHOLE): whole}
    for engine in engines:
        for kind in KINDS[engine]:
            made = folder / f"{engine}-{kind}"
            convert(checkpoint, engine, kind, made)
            models[engine, kind] = AutoModelForImageTextToText.from_pretrained(made, dtype=torch.float32).eval()
    return models


@torch.inference_mode()
def ask(models: dict, processor, sample) -> dict[tuple, tuple]:
    """What each model answers."""
    inputs = prepare(processor, sample)
    tiles = {name: inputs.pop(name) for name in ("pixel_values", "tile_positions")}
    features = {"mm_encoder_outputs": {"image": models[TORCH, WHOLE].get_image_features(**tiles)}}
    return {
        (engine, kind): answer(
            model, processor, sample, {**inputs, **(features if engine in (TORCH, LLAMA_CPP) else tiles)}
        )
        for (engine, kind), model in models.items()
    }


def show(processor, samples: list, results: list[dict]) -> str:
    """Questions, right answers, and what each engine and kind of weights says."""
    head = ["Question", "Right", *(f"{engine}, {kind}" for engine, kind in results[0])]
    lines = [
        [
            sample.turn.question,
            sample.turn.answer,
            *(processor.decode(tokens, skip_special_tokens=True).strip() for tokens, *_ in result.values()),
        ]
        for sample, result in zip(samples, results, strict=False)
    ]
    return markdown.table(head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", default=str(TINY))
    parser.add_argument("--samples", type=int, default=960, help="questions (default: %(default)s)")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="answers to the first N questions, too")
    parser.add_argument("--engines", nargs="+", default=list(KINDS), choices=KINDS, help="(default: all)")
    args = parser.parse_args()
    processor, started = JinaVLMProcessor.from_pretrained(args.checkpoint), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        models = load_models(args.checkpoint, args.engines, Path(folder))
        samples = list(choose(args.samples))
        results = [ask(models, processor, sample) for sample in tqdm(samples)]
    suppressed = models[TORCH, WHOLE].config.structural_token_ids
    lines = []
    for engine, kind in models:
        pairs = [(result[TORCH, WHOLE], result[engine, kind]) for result in results]
        kl = [divergence(expected[2], given[2], suppressed) for expected, given in pairs]
        lines.append(
            [
                f"{engine}, {kind}",
                f"{100 * sum(given[1] for _, given in pairs) / len(pairs):.1f}",
                f"{sum(expected[0] == given[0] for expected, given in pairs)} of {len(pairs)}",
                f"{sum(kl) / len(kl):.1e}",
            ]
        )
    print(
        markdown.table(["Engine and weights", "Right, %", "The same tokens as torch", "KL of the first token"], lines)
    )
    if args.show:
        print(f"\n{show(processor, samples[: args.show], results)}")
    print(f"\n{len(results)} questions in {time.perf_counter() - started:.0f} s.")


if __name__ == "__main__":
    main()
