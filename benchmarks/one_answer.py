"""What an answer is made of, by any engine: an image seen, and tokens written."""

import torch
from jina_vlm.compatibility_jina_vlm import CACHE_NAME


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
