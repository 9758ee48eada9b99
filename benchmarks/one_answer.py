"""What an answer is made of, by any engine: an image seen, and tokens written."""

from collections.abc import Callable

import torch
from jina_vlm.compatibility_jina_vlm import CACHE_NAME

from .side_by_side import medians, ratio, take_turns


@torch.inference_mode()
def see(model) -> None:
    """An image of one tile, which is its own thumbnail, through tower and connector."""
    pixels = torch.linspace(-1, 1, 3 * 378 * 378).view(1, 3, 378, 378).repeat(2, 1, 1, 1)
    model.get_image_features(pixels.to(model.dtype), torch.tensor([[-1, -1, 1, 1], [0, 0, 1, 1]]))


@torch.inference_mode()
def write_tokens(model, cache, tokens: int) -> None:
    """So many, one after the other; the cache is left as it was."""
    for _ in range(tokens):
        model(input_ids=torch.full((1, 1), 1000), use_cache=True, **{CACHE_NAME: cache})
    cache.crop(-tokens)


def first_token(seconds: dict[str, dict[str, float]], name: str) -> float:
    """Seconds from an image to the first token, of what [`compare`] gives."""
    return seconds["tower"][name] + seconds["prompt"][name]


def compare(models: dict, read_prompt: Callable, rounds: int, tokens: int) -> dict[str, dict]:
    """
    Time what an answer is made of by two models in turns, the first of which is torch's.

    Args:
        models: By name.
        read_prompt: What reads a prompt by a model, and returns the cache.
        tokens: Written in each round.

    Returns:
        `seconds` of tower, prompt and token of each model, medians; `ratios` of the second to the first.
    """
    caches = {name: read_prompt(model) for name, model in models.items()}
    runs = {
        "tower": {name: lambda m=model: see(m) for name, model in models.items()},
        "prompt": {name: lambda m=model: read_prompt(m) for name, model in models.items()},
        "token": {name: lambda n=name, m=model: write_tokens(m, caches[n], tokens) for name, model in models.items()},
    }
    times = {what: take_turns(cases, rounds) for what, cases in runs.items()}
    seconds = {what: medians(each) for what, each in times.items()}
    seconds["token"] = {name: value / tokens for name, value in seconds["token"].items()}
    torch_name, other = models
    return {"seconds": seconds, "ratios": {what: ratio(each, other, torch_name) for what, each in times.items()}}
