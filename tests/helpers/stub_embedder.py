"""An embedder that needs no model: an image is what its middle's color is, a text the color that it names."""

from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageColor
from torch import nn
from torch.nn import functional as F

from jina_vlm_tools.retrieval.embeddings import Embeddings


HIDDEN, WIDTH = 16, 8
TOKENS = 5


class StubEmbedder:
    """
    Args:
        seed: Other seeds are other adapters.
        dies_at: What happens when the embedding of this page, by the order of calls, begins.
    """

    def __init__(self, seed: int = 0, dies_at: int | None = None, die=None):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = nn.ModuleDict({"layer": nn.Linear(4, 4)})
            self.projector = nn.Linear(HIDDEN, WIDTH, bias=False)
            torch.manual_seed(seed)
            self.model["layer"].lora_A = nn.ModuleDict({"retrieval": nn.Linear(4, 2)})
            self.mix = torch.randn(3, HIDDEN)
        self.model.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_size=HIDDEN))
        self.tasks, self.task = ["retrieval"], "retrieval"
        self.settings = {"max_pixels": 90_000, "max_tiles": 12}
        image_processor = SimpleNamespace(max_pixels=90_000, to_dict=lambda: dict(self.settings))
        self.processor = SimpleNamespace(
            image_processor=image_processor, apply_chat_template=lambda chats, **_: {"input_ids": [[1, 2, 3]]}
        )
        self.embedded, self.dies_at, self.die = 0, dies_at, die

    def embed(self, inputs, *, role="document", kind="both", dims=None, pool_factor=1, **_) -> Embeddings:
        colors = []
        for content in inputs:
            if isinstance(content, Image.Image):
                if self.embedded == self.dies_at:
                    self.die()
                if content.getpixel((0, 0)) == (1, 2, 3):
                    raise ValueError("an image that nobody likes")
                self.embedded += content.size != (64, 64)  # the one that is tried first
                colors.append(content.getpixel((content.width // 2, content.height // 2)))
            else:
                colors.append(ImageColor.getrgb(content))
        states = torch.tensor(np.array(colors, np.float32) / 127.5 - 1.02) @ self.mix
        dense = F.normalize(states[:, :dims], dim=-1)
        noise = torch.linspace(0, 0.1, TOKENS)[None, :, None] * torch.arange(HIDDEN)
        multi = F.normalize(self.projector((states[:, None] + noise).detach()), dim=-1).detach()
        multi = list(multi[:, ::pool_factor] if role == "document" else multi)
        return Embeddings(None if kind == "multi" else dense, None if kind == "dense" else multi)
