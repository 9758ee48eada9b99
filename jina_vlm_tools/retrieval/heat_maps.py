"""Where on an image the words of a query have their matches."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from .inputs import to_chat


if TYPE_CHECKING:
    from .embedder import JinaVLMEmbedder


WARM = (226, 60, 40)
STRONGEST = 0.75  # opacity of the best match


@dataclass(frozen=True)
class HeatMap:
    """
    Args:
        image (`Image.Image`): RGB, upright.
        words (`list[str]`): Of the query.
        rise (`torch.Tensor` [words, rows, columns]): By how much the best cosine of a word's tokens with each token of
            the image's tiles, which are one grid, is above their best with the prompt around the image; at least 0.
    """

    image: Image.Image
    words: list[str]
    rise: torch.Tensor

    def draw(self, words: Sequence[int] | None = None) -> Image.Image:
        """The image, with color where these words, by their numbers, match best; all where none are named. What
        matches as the image does on the whole has no color, and words that match little better than the prompt around
        the image have little, alone too.

        Raises:
            ValueError: there is no such word.
        """
        numbers = list(range(len(self.words))) if words is None else list(words)
        if wrong := [number for number in numbers if not 0 <= number < len(self.words)]:
            raise ValueError(f"`words` are numbers from 0 to {len(self.words) - 1}, got {wrong}.")
        rise = self.rise - self.rise.flatten(1).median(1).values[:, None, None]
        heat = (rise[numbers].amax(0) / rise.amax().clamp(min=1e-6)).clamp(0, 1).numpy()
        size = self.image.size
        opacity = Image.fromarray(np.uint8(255 * STRONGEST * heat)).resize(size, Image.BICUBIC)
        return Image.composite(Image.new("RGB", size, WARM), self.image, opacity)


def match(embedder: JinaVLMEmbedder, query: str, image: Any, task: str | None, max_tiles: int | None) -> HeatMap:
    """See [`JinaVLMEmbedder.heat_map`]."""
    image_processor = embedder.processor.image_processor
    opened = Image.fromarray(
        image_processor.process_image(image_processor.fetch_images(image)).permute(1, 2, 0).numpy()
    )
    settings = {} if max_tiles is None else {"max_tiles": max_tiles}
    asked = embedder.embed([query], task=task, role="query", kind="multi").multi[0]
    shown = embedder.embed([opened], task=task, kind="multi", **settings).multi[0]
    return compare(embedder, query, opened, asked, shown, **settings)


def compare(
    embedder: JinaVLMEmbedder, query: str, image: Image.Image, asked: torch.Tensor, shown: torch.Tensor, **settings
) -> HeatMap:
    """
    As [`JinaVLMEmbedder.heat_map`], of vectors that are there already.

    Args:
        image: RGB, upright.
        asked, shown: [tokens, width] of the query and of the image, none of them pooled.
        settings: Arguments of the image processor that the image was embedded with.
    """
    processor = embedder.processor
    words, tokens_of = _words(processor, query)
    ids = processor.apply_chat_template(
        [to_chat(image, "document")], tokenize=True, return_dict=True, return_tensors="pt", **settings
    )["input_ids"][0]
    rows, columns = processor.image_processor.get_token_grid(
        *processor.image_processor.get_tiling(image.height, image.width, **settings)[1]
    )
    is_image = ids == embedder.model.config.image_token_id
    matches = asked @ shown.T
    on_image, around = matches[:, is_image], matches[:, ~is_image]
    # Late interaction counts a token's best match alone, and words like "the" have it outside the image, or nearly so.
    maps = on_image[:, -rows * columns :] - around.amax(1, keepdim=True)  # after the thumbnail's
    rise = torch.stack([maps[tokens].amax(0) for tokens in tokens_of]).clamp(min=0)
    return HeatMap(image, words, rise.unflatten(1, (rows, columns)))


def _words(processor, query: str) -> tuple[list[str], list[list[int]]]:
    """Words of a query as the template writes it, which breaks up typed control tokens, and the numbers of each one's
    tokens in the whole prompt. The last one has what follows too: only there has a decoder read all of the query."""
    chat = to_chat(query, "query")
    encoded = processor.apply_chat_template(
        [chat], tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"return_offsets_mapping": True}
    )
    start = processor.apply_chat_template(to_chat("x", "query"), tokenize=False).rindex("x")
    text = processor.apply_chat_template(chat, tokenize=False)
    spans = [word.span() for word in re.compile(r"\S+").finditer(text, start)]
    words, tokens_of = [], []
    for begin, end in spans:
        reach = len(text) if (begin, end) == spans[-1] else end
        offsets = enumerate(encoded["offset_mapping"][0])
        tokens = [number for number, (first, last) in offsets if max(first, begin) < min(last, reach)]
        if tokens:
            words.append(text[begin:end])
            tokens_of.append(tokens)
    return words, tokens_of
