"""Ask the small checkpoint the same questions with quantized weights: `python -m experiments.eval_quantized`.

The questions of `experiments.eval_tiny`, one by one, by each method of transformers whose package is installed. All
compute in float32, so that what differs is the weights (and activations, where a method rounds them), but for rows
that say bfloat16. Each is given as an object and as a dictionary, saved, and loaded again.
`tests/external/quantization/requirements.txt` has the packages.
"""

import argparse
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from jina_vlm import JinaVLMForConditionalGeneration, JinaVLMProcessor
from tqdm import tqdm
from transformers import BitsAndBytesConfig, HqqConfig, QuantoConfig, TorchAoConfig

from jina_vlm_tools import markdown
from jina_vlm_tools.files import TINY

from .answers import answer, divergence, prepare
from .eval_retrieval import interval
from .eval_tiny import choose


GROUP = 32  # weights with a scale of their own, where a method has groups
COMPARED = 8  # questions whose logits are compared with those of what was saved


def torchao(name: str, **settings) -> Callable[[], TorchAoConfig]:
    def make() -> TorchAoConfig:
        from torchao import quantization

        return TorchAoConfig(getattr(quantization, name)(**settings))

    return make


def torchao_in_groups(name: str) -> Callable[[], TorchAoConfig]:
    """Of the text model alone: rows of 4,304, which the released tower has, cannot be cut into groups."""

    def make() -> TorchAoConfig:
        from torchao import quantization
        from torchao.quantization.granularity import PerGroup

        groups = PerGroup(GROUP)
        settings = {"granularity": groups} if name == "IntxWeightOnlyConfig" else {"weight_granularity": groups}
        config = getattr(quantization, name)(weight_dtype=torch.int4, **settings)
        return TorchAoConfig(config, modules_to_not_convert=["model.vision_model"])

    return make


def torchao_for_cpus() -> TorchAoConfig:
    """4 bits in the order that torch's kernels for CPUs read, which are fast with bfloat16 alone."""
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

    return TorchAoConfig(PrototypeInt4WeightOnlyConfig(group_size=GROUP))


METHODS: dict[str, Callable[[], object]] = {
    "torchao int8": torchao("Int8WeightOnlyConfig"),
    "torchao int8, int8 activations": torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao int4, text": torchao_in_groups("IntxWeightOnlyConfig"),
    "torchao int4, int8 activations, text": torchao_in_groups("Int8DynamicActivationIntxWeightConfig"),
    "torchao fp8": torchao("Float8WeightOnlyConfig"),
    "torchao fp8, fp8 activations": torchao("Float8DynamicActivationFloat8WeightConfig"),
    "torchao int4 for CPUs, bfloat16": torchao_for_cpus,
    "torchao int4, plain": torchao("Int4WeightOnlyConfig", group_size=GROUP),
    "bitsandbytes int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes nf4, text": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["model.vision_model"]
    ),
    "quanto int8": lambda: QuantoConfig(weights="int8"),
    "quanto fp8": lambda: QuantoConfig(weights="float8"),
    "hqq int4": lambda: HqqConfig(nbits=4, group_size=64),
}


def load(checkpoint: str | Path, quantization=None, dtype: torch.dtype = torch.float32):
    settings = {} if quantization is None else {"quantization_config": quantization}
    return JinaVLMForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype, **settings).eval()


def cast(inputs: dict, model) -> dict:
    """With tiles of the model's dtype."""
    return inputs | {"pixel_values": inputs["pixel_values"].to(model.dtype)}


def attempt(function: Callable[[], str]) -> str:
    """What it returns, or the first line of the error that it raises: an error is a result here."""
    try:
        return function()
    except Exception as error:  # noqa: BLE001  whatever the packages raise
        return f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0][:120]}"


def compare_logits(one, other, questions: list) -> str:
    """Whether two models give the same bits."""
    with torch.inference_mode():
        furthest = 0.0
        for inputs, _ in questions:
            inputs = cast(inputs, one)
            furthest = max(furthest, float((one(**inputs).logits - other(**inputs).logits).abs().max()))
    return "exactly" if furthest == 0 else f"differs by {furthest:.1g}"


def save_and_reload(model, questions: list, folder: Path) -> str:
    """Whether what is saved loads to the same bits."""
    model.save_pretrained(folder)
    return compare_logits(model, load(folder, dtype=model.dtype), questions)


def evaluate(name: str, checkpoint: str, questions: list, expected: list | None, processor) -> tuple[list, list]:
    """A line of the table, and what [`answer`] gives for each question."""
    make = METHODS.get(name)
    started = time.perf_counter()
    try:
        config = make() if make else None
        model = load(checkpoint, config, torch.bfloat16 if "bfloat16" in name else torch.float32)
        results = [
            answer(model, processor, sample, cast(inputs, model))
            for inputs, sample in tqdm(questions, desc=name, mininterval=5)
        ]
    except Exception as error:  # noqa: BLE001  whatever the packages raise
        first = (str(error).strip() or "?").splitlines()
        return [name, f"{type(error).__name__}: {' '.join(first[:2])[:160]}", "", "", "", ""], []
    expected = expected or results
    suppressed = model.config.structural_token_ids
    kl = [divergence(one[2], other[2], suppressed) for one, other in zip(expected, results, strict=True)]
    line = [
        name,
        interval(np.array([right for _, right, _ in results])),
        f"{100 * sum(one[0] == other[0] for one, other in zip(expected, results, strict=True)) / len(results):.1f}",
        f"{sum(kl) / len(kl):.0e}",
        "",
        "",
    ]
    if make:
        few = questions[:COMPARED]
        line[4] = attempt(lambda: compare_logits(model, load(checkpoint, config.to_dict(), model.dtype), few))
        with tempfile.TemporaryDirectory() as folder:
            line[5] = attempt(lambda: save_and_reload(model, few, Path(folder)))
    print(" | ".join(line), f"({time.perf_counter() - started:.0f} s)", flush=True)
    return line, results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", default=str(TINY))
    parser.add_argument("--samples", type=int, default=240, help="questions (default: %(default)s)")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    processor = JinaVLMProcessor.from_pretrained(args.checkpoint)
    questions = [(prepare(processor, sample), sample) for sample in choose(args.samples)]
    lines, expected = [], None
    for name in ("whole, float32", "whole, bfloat16", *args.methods):
        line, results = evaluate(name, args.checkpoint, questions, expected, processor)
        expected = expected or results
        lines.append(line)
    head = [
        "Weights",
        "Right, %",
        "The same tokens, %",
        "KL of the first token",
        "As a dictionary",
        "Saved and loaded",
    ]
    print(markdown.table(head, lines))


if __name__ == "__main__":
    main()
