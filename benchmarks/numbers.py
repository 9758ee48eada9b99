"""bfloat16 and float16 against float32: how far logits move as tokens grow, and whether all are finite.

On `checkpoints/tiny`, whose positions are extended for it, with text from a seed and, in front of it, images that are
black, white, of one color, of noise, and of colored shapes.

    python -m benchmarks.numbers [--tokens 1024 4096 32768]
"""

import argparse
import random
import time

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig

from jina_vlm_tools.files import TINY
from jina_vlm_tools.synthetic.shapes import TRAINING_PAIRS, draw_scene, make_scene


POSITIONS = 40_960  # the released model's
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIDE = 378


def sample_images() -> dict[str, Image.Image]:
    """Extreme images, and an ordinary one, each of one tile."""
    noise = np.random.default_rng(0).integers(0, 2, (SIDE, SIDE, 3), np.uint8) * 255
    colors = {"black": 0, "white": 255, "gray": 127, "nearly black": 1}
    flat = {name: Image.fromarray(np.full((SIDE, SIDE, 3), value, np.uint8)) for name, value in colors.items()}
    return flat | {"noise": Image.fromarray(noise), "shapes": draw_scene(make_scene(random.Random(0), TRAINING_PAIRS))}


def load(dtype: torch.dtype, **kwargs):
    """The small model with the released model's positions."""
    import jina_vlm

    config = AutoConfig.from_pretrained(TINY)
    config.text_config.max_position_embeddings = POSITIONS
    return jina_vlm.JinaVLMForConditionalGeneration.from_pretrained(TINY, config=config, dtype=dtype, **kwargs).eval()


def inputs(processor, images: list[Image.Image], tokens: int) -> dict[str, torch.Tensor]:
    """Model inputs of these images and random text, in all so many tokens."""
    made = processor(text=processor.image_token * len(images), images=images, return_tensors="pt")
    missing = tokens - made["input_ids"].shape[1]
    text = torch.randint(0, 800, (1, missing), generator=torch.Generator().manual_seed(tokens))
    ids = torch.cat([made["input_ids"], text], dim=1)
    return {**made, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.inference_mode()
def last_logits(model, given: dict[str, torch.Tensor], kept: int = 512) -> torch.Tensor:
    """[tokens, vocabulary] of the last `kept` tokens, float32."""
    return model(**given, logits_to_keep=kept, use_cache=False).logits[0].float()


def compare(logits: torch.Tensor, exact: torch.Tensor) -> tuple[bool, float, float]:
    """Whether all are finite; their distance from the exact ones, relative to the norm; the share of equal choices."""
    difference = (logits - exact).norm() / exact.norm()
    return (
        bool(logits.isfinite().all()),
        float(difference),
        float((logits.argmax(-1) == exact.argmax(-1)).float().mean()),
    )


def main() -> None:
    import jina_vlm

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1024, 4096, 32768], help="lengths (default: 1024 4096 32768)"
    )
    args = parser.parse_args()
    processor = jina_vlm.JinaVLMProcessor.from_pretrained(TINY)
    processor.tokenizer.model_max_length = POSITIONS
    models = {dtype: load(dtype) for dtype in DTYPES}
    models |= {
        f"float32, then {name}": load(torch.float32).to(dtype)
        for name, dtype in (("bfloat16", DTYPES[1]), ("float16", DTYPES[2]))
    }
    # one extreme image each, and all of them before the longest text
    cases = [([name], args.tokens[0]) for name in sample_images()] + [
        (list(sample_images()), tokens) for tokens in args.tokens[1:]
    ]
    print(
        "| Images | Tokens | Numbers | Finite | Distance | Same choice | Seconds |\n"
        "| --- | ---: | --- | --- | ---: | ---: | ---: |"
    )
    for names, tokens in cases:
        given = inputs(processor, [sample_images()[name] for name in names], tokens)
        exact = None
        for kind, model in models.items():
            start = time.process_time()
            logits = last_logits(model, given)
            seconds = time.process_time() - start
            exact = logits if exact is None else exact
            finite, distance, same = compare(logits, exact)
            shown = ", ".join(names) if len(names) == 1 else f"all {len(names)}"
            name = str(kind).removeprefix("torch.")
            print(
                f"| {shown} | {tokens:,} | {name} | {'yes' if finite else 'NO'} | {distance:.2%} | {same:.1%} | "
                f"{seconds:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
