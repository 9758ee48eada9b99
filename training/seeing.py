"""First stage of `train_tiny`: tower and connector learn to see before the text model learns to talk.

A throw-away linear layer reads off each image token which colour and kind of shape is there, if any, and in which of the
nine places the token lies: 196 answers a picture instead of a few words. From answers alone this model did not get beyond
guessing in 7,000 pictures (two runs).
"""

import random

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from .shapes import COLOURS, KINDS, PLACES, TRAINING_PAIRS, Scene, draw_scene, make_scene


IGNORED = -100  # by the loss


class ScenesDataset(Dataset):
    """Scene i is drawn from seed `first_seed` + i: three to nine shapes of training pairs, half of them in colours that have
    no name: else what is told of a shape's kind is its colour too, and pairs that were never seen are misjudged."""

    def __init__(self, length: int, first_seed: int):
        self.length, self.first_seed = length, first_seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Scene:
        rng = random.Random(self.first_seed + index)
        return make_scene(rng, TRAINING_PAIRS, number=rng.randint(3, len(PLACES)), nameless=0.5)


class SceneCollator:
    """Scenes to a batch: `pixel_values` [scenes, 3, 378, 378], without the thumbnails, which are the same as the tiles; and
    `labels` [scenes, tokens, 3], see `token_labels`."""

    def __init__(self, image_processor):
        self.image_processor = image_processor

    def __call__(self, scenes: list[Scene]) -> dict[str, torch.Tensor]:
        pixels = self.image_processor([draw_scene(scene) for scene in scenes], return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels[1::2], "labels": torch.stack([token_labels(scene) for scene in scenes])}


def token_labels(scene: Scene, patches: int = 27) -> torch.Tensor:
    """[tokens, 3] int64: colour and kind at each token of the stretched picture, row by row, 0 where there is nothing, else
    1 + index, or -100 for colours without a name; and the place. A shape reaches as far as the circle around it."""
    width, height = scene.size
    centres = ((2 * torch.arange((patches + 1) // 2) + 1) / patches).clamp(max=0.999)  # of windows of two patches
    x, y = centres[None, :] * width, centres[:, None] * height
    places = (3 * centres[:, None]).long() * 3 + (3 * centres[None, :]).long()
    labels = torch.stack([torch.zeros_like(places), torch.zeros_like(places), places], dim=-1)
    for shape in scene.shapes:
        row, column = divmod(PLACES.index(shape.place), 3)
        distance = torch.hypot(x - (column + shape.centre[0]) * width / 3, y - (row + shape.centre[1]) * height / 3)
        inside = distance <= shape.radius * min(width, height) / 3
        labels[inside, 0] = 1 + list(COLOURS).index(shape.colour) if shape.colour else IGNORED
        labels[inside, 1] = 1 + KINDS.index(shape.kind)
    return labels.flatten(0, 1)


class TokenReader(nn.Module):
    """The seeing half of a jina-vlm, with a linear layer that reads `token_labels` off each token."""

    def __init__(self, model):
        super().__init__()
        self.vision_model, self.connector = model.model.vision_model, model.model.connector
        self.sizes = [1 + len(COLOURS), 1 + len(KINDS), len(PLACES)]
        self.head = nn.Linear(model.config.text_config.hidden_size, sum(self.sizes))

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.vision_model(pixel_values).last_hidden_state
        # As thumbnail or as tile, which the connector marks: half of them each
        is_tile = torch.arange(len(features), device=features.device) % 2 == 1
        tokens = self.connector(features, is_tile)
        tokens = tokens / tokens.pow(2).mean(dim=-1, keepdim=True).sqrt().add(1e-6)  # as the text model's norms do
        logits = self.head(tokens).split(self.sizes, dim=-1)
        losses = [F.cross_entropy(part.flatten(0, 1), labels[..., i].flatten()) for i, part in enumerate(logits)]
        return {"loss": sum(losses), "colours": logits[0], "kinds": logits[1]}
