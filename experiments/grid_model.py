"""What the grids' trainings start from: `python -m experiments.grid_model --output runs/grid/start`.

A tower that sees, in the place of SigLIP2: linear layers on its last block read off each patch what lies there. And a
decoder that reads, in the place of Qwen3: first descriptions of pages, questions and answers, as texts alone, in all
languages; then mosaics, of which no grid asks, through a connector that is thrown away. A new connector is introduced
to both by mosaics, too. Else a model as small as this takes longer to find out that it can look things up in an image
than a whole training of a grid. A part that is done is kept.
"""

import argparse
import functools
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path

import jina_vlm
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from jina_vlm_tools.files import TINY
from jina_vlm_tools.synthetic.page_questions import COLORS_IN, PLACES_IN, TEMPLATES, there
from jina_vlm_tools.synthetic.pages import draw_page
from jina_vlm_tools.synthetic.shapes import COLORS, PLACES
from jina_vlm_tools.training.collator import JinaVLMCollator
from jina_vlm_tools.training.muon import Muon, muon_groups

from .grid_data import DOMAINS, LANGUAGES, MOST, SIDE, empty, make_page, texts
from .precision import ATTENTION, reduced_precision
from .seeing import IGNORED, TOKEN_CLASSES, match_sizes, token_labels
from .small_model import make_config as make_small_config
from .small_model import make_model


STEPS = {"tower": 1400, "reader": 700, "decoder": 600}
PATCH = 14
MARGIN = 2  # patches that tiles would share; pages are of one tile
DEPTH = 5  # blocks of the tower
FEATURE_LAYERS = (3, 1)  # of these; the released model's are 24 and 18 of 27
WARMUP = 50  # steps


@functools.cache
def make_processor(pooling_size: int = 2) -> jina_vlm.JinaVLMProcessor:
    """That of `checkpoints/tiny`, with tiles of `SIDE` pixels."""
    processor = jina_vlm.JinaVLMProcessor.from_pretrained(TINY)
    processor.image_processor = jina_vlm.JinaVLMImageProcessor(
        tile_size=SIDE, patch_size=PATCH, overlap_margin=MARGIN, pooling_size=pooling_size
    )
    return processor


def make_config(
    tokenizer, feature_layers: Sequence[int] | None = None, pooling_size: int = 2
) -> jina_vlm.JinaVLMConfig:
    """The small model's config with small tiles, and a tower as deep as these layers need."""
    values, layers = make_small_config(tokenizer).to_dict(), list(feature_layers or FEATURE_LAYERS)
    values["vision_config"] |= {"image_size": SIDE, "patch_size": PATCH, "num_hidden_layers": max(layers) + 1}
    values |= {"vision_feature_layers": layers, "overlap_margin": MARGIN, "pooling_size": pooling_size}
    return jina_vlm.JinaVLMConfig(**values)


class TowerReader(nn.Module):
    """A tower with a linear layer that reads the labels off the patches of its last block."""

    def __init__(self, vision_model: nn.Module):
        super().__init__()
        self.vision_model = vision_model
        width = vision_model.config.vision_config.hidden_size
        self.head = nn.Linear(width, sum(TOKEN_CLASSES.values()))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        features = self.vision_model(pixel_values).last_hidden_state
        return self.head(F.layer_norm(features, features.shape[-1:]))

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The mean over questions, where there is something and where there is nothing alike."""
        losses = []
        for index, scores in enumerate(logits.split(list(TOKEN_CLASSES.values()), dim=-1)):
            target = labels[..., index]
            for where in (target > 0, target == 0):
                if where.any():
                    losses.append(F.cross_entropy(scores[where], target[where]))
        return torch.stack(losses).sum()


def middles() -> torch.Tensor:
    """Of patches, as parts of a page's side."""
    return (torch.arange(SIDE // PATCH) + 0.5) / (SIDE // PATCH)


def pages_to_see(rng: random.Random, number: int, image_processor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels [pages, 3, side, side] and labels [pages, patches, questions]."""
    pages = [make_page(rng.choice(list(DOMAINS)), rng, crowded=True) for _ in range(number)]
    pixels = image_processor([draw_page(page) for page in pages], return_tensors="pt")["pixel_values"]
    # Of one tile: it is the thumbnail once more.
    return pixels[1::2], torch.stack([token_labels(page, middles()) for page in pages])


def texts_to_read(
    rng: random.Random, number: int, collator: JinaVLMCollator, answers: bool = False
) -> dict[str, torch.Tensor]:
    """A batch of texts, all of which is to be predicted, or only `answers`."""
    languages = [language for group in LANGUAGES.values() for language in group]
    rows = []
    for _ in range(number):
        turns = texts(rng.choice(languages), rng)
        said = [(role, text) for turn in turns for role, text in (("user", turn.question), ("assistant", turn.answer))]
        rows.append({"messages": [{"role": role, "content": text} for role, text in said]})
    batch = collator(rows)
    if answers:
        return batch
    ends = batch["labels"] == collator.processor.tokenizer.eos_token_id
    words = batch["input_ids"].masked_fill(~batch["attention_mask"].bool(), IGNORED)
    return batch | {"labels": torch.where(ends, batch["labels"], words)}


def fresh_texts(collator: JinaVLMCollator) -> dict[str, torch.Tensor]:
    """What a reader is asked when it has been taught."""
    return texts_to_read(random.Random("decoder, fresh"), 128, collator, answers=True)


ABOUT_MOSAICS = {"en": "What colour is {}?", "de": "Welche Farbe ist {}?", "es": "¿Qué color hay {}?"}


def mosaic(rng: random.Random) -> dict[str, list[dict]]:
    """A chat, in any language, about a page of plain rectangles, two to nine of them, one in a cell: often all colors,
    and some one by one."""
    language = rng.choice(list(ABOUT_MOSAICS))
    filled = rng.randint(2, len(PLACES))
    places = sorted(rng.sample(range(len(PLACES)), filled))
    image = Image.new("RGB", (SIDE, SIDE), empty(rng).background)
    canvas, cell, colors = ImageDraw.Draw(image), SIDE // 3, []
    for place in places:
        (row, column), color = divmod(place, 3), rng.choice(list(COLORS))
        left, top, right, bottom = (rng.randint(2, 12) for _ in range(4))
        box = (column * cell + left, row * cell + top, (column + 1) * cell - 1 - right, (row + 1) * cell - 1 - bottom)
        canvas.rectangle(box, fill=tuple(max(0, min(255, value + rng.randint(-10, 10))) for value in COLORS[color]))
        colors.append((PLACES[place], COLORS_IN[language][color]))
    turns = []
    if rng.random() < 0.5:
        everything = "; ".join(f"{PLACES_IN[language][place]}: {color}" for place, color in colors)
        turns.append((TEMPLATES[language]["everything"], f"{everything}."))
    for place, color in rng.sample(colors, min(MOST, filled)):
        turns.append((ABOUT_MOSAICS[language].format(there(language, place)), color))
    messages = []
    for question, answer in turns:
        messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    messages[0]["content"].insert(0, {"type": "image", "image": image})
    return {"messages": messages}


def learn(module: nn.Module, steps: int, rate: float, loss_of, name: str) -> None:
    """Train by Muon, down a cosine; `loss_of(step)` gives a batch's loss."""
    optimizer = Muon(muon_groups(module, rate, weight_decay=0.02))
    peaks = [group["lr"] for group in optimizer.param_groups]
    started = time.perf_counter()
    for step in range(steps):
        share = min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = share * peak
        with reduced_precision():
            loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"{name}: step {step}, loss {loss.item():.3f}, {time.perf_counter() - started:.0f} s", flush=True)


def teach_tower(model, processor, steps: int, batch: int = 32) -> dict[str, float]:
    """Teach the tower, and return the share of fresh patches that are read rightly, per question."""
    reader = TowerReader(model.model.vision_model)
    rng = random.Random("tower")

    def loss_of(step: int) -> torch.Tensor:
        pixels, labels = pages_to_see(rng, batch, processor.image_processor)
        return reader.loss(reader(pixels), labels)

    learn(reader, steps, 4e-3, loss_of, "tower")
    pixels, labels = pages_to_see(random.Random("tower, fresh"), 128, processor.image_processor)
    with torch.no_grad():
        scores = reader(pixels).split(list(TOKEN_CLASSES.values()), dim=-1)
    found = {}
    for index, name in enumerate(TOKEN_CLASSES):
        where = labels[..., index] > 0
        if where.any():
            found[name] = (scores[index].argmax(-1) == labels[..., index])[where].float().mean().item()
    return found


def teach_reader(model, processor, steps: int, batch: int = 16) -> dict[str, float]:
    """Teach the decoder to read: texts as a whole, which teach it words, then, for as long, twice as many at a time
    and nothing but their answers, of which it has to look up each. Return the share of answers' tokens in fresh texts
    that it predicts."""
    collator, rng = JinaVLMCollator(processor), random.Random("decoder")
    decoder = nn.ModuleList([model.model.language_model, model.lm_head])
    learn(decoder, steps, 4e-3, lambda step: model(**texts_to_read(rng, batch, collator)).loss, "words")
    learn(
        decoder,
        steps,
        4e-3,
        lambda step: model(**texts_to_read(rng, 2 * batch, collator, answers=True)).loss,
        "answers",
    )
    return {"tokens of answers in texts": _right(model, fresh_texts(collator))}


def teach_to_look(model, processor, steps: int, batch: int = 16) -> dict[str, float]:
    """Teach a decoder that reads to look at mosaics too, in three batches of four, through this model's connector."""
    collator, rng = JinaVLMCollator(processor), random.Random("mosaics")
    model.model.vision_model.requires_grad_(False)
    shown = mosaics_to_see()
    scale_connector(model, shown)
    match_sizes(model, shown)

    def mosaics(number: int) -> dict[str, torch.Tensor]:
        return collator([mosaic(rng) for _ in range(number)])

    def loss_of(step: int) -> torch.Tensor:
        if step % 4 < 3:
            return model(**mosaics(batch)).loss
        return model(**texts_to_read(rng, batch, collator, answers=True)).loss

    learned = nn.ModuleDict({"connector": model.model.connector, "decoder": model.model.language_model})
    learned["lm_head"] = model.lm_head
    learn(learned, steps, 4e-3, loss_of, "mosaics")
    return {
        "tokens of answers about mosaics": _right(model, mosaics(128)),
        "tokens of answers in texts": _right(model, fresh_texts(collator)),
    }


def mosaics_to_see() -> torch.Tensor:
    """Pixels of mosaics [32, 3, side, side], by which a new connector's layers are scaled."""
    rng = random.Random("mosaics, seen")
    images = [mosaic(rng)["messages"][0]["content"][0]["image"] for _ in range(32)]
    return make_processor().image_processor(images, return_tensors="pt")["pixel_values"][1::2]


def _right(model, batch: dict[str, torch.Tensor]) -> float:
    """The share of the labels that are predicted."""
    labels = batch["labels"][:, 1:]
    with torch.no_grad():
        found = model(**{name: batch[name] for name in batch if name != "labels"}).logits.argmax(-1)[:, :-1]
    return (found == labels)[labels != IGNORED].float().mean().item()


@torch.no_grad()
def scale_connector(model, pixel_values: torch.Tensor) -> None:
    """Let the new connector's layers keep the size of what they are given, and see what differs between patches, not
    what all have in common: the library's weights of 0.02 are made for widths of a thousand."""
    connector = model.model.connector
    for layer in connector.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.normal_(std=layer.in_features**-0.5)
    features = model.model.vision_model(pixel_values).last_hidden_state.flatten(0, 1)
    mean = features.mean(dim=0)
    for layer in (connector.q_proj, connector.k_proj, connector.v_proj):
        if isinstance(layer, nn.Linear):
            layer.weight.div_((layer.weight @ (features - mean).T).std())
            layer.bias.copy_(-layer.weight @ mean)


PARTS = ("tower", "reader", "decoder")


def load_start(model, start: Path, decoder: str = "decoder") -> None:
    """Put tower and decoder into a model, whose tower may be shallower; its connector stays as it is."""
    tower, vision = load_file(start / "tower.safetensors"), model.model.vision_model
    vision.load_state_dict({name: tower[name] for name in vision.state_dict()})
    model.load_state_dict(load_file(start / f"{decoder}.safetensors"), strict=False)


def save_part(model, part: str, start: Path) -> None:
    """Write the weights of the tower, or else of the decoder, to a file."""
    if part == "tower":
        weights = model.model.vision_model.state_dict()
    else:
        kept = ("model.language_model.", "lm_head.")
        weights = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(kept)}
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, start / f"{part}.safetensors")


def teach(part: str, start: Path, steps: int) -> dict[str, float]:
    """Teach a part, write it, and return how well it does."""
    torch.manual_seed(PARTS.index(part))
    processor = make_processor()
    model = make_model(make_config(processor.tokenizer, None if part == "decoder" else [DEPTH - 1])).train()
    model.set_attn_implementation(ATTENTION)
    if part == "decoder":
        load_start(model, start, "reader")
    found = {"tower": teach_tower, "reader": teach_reader, "decoder": teach_to_look}[part](model, processor, steps)
    save_part(model, part, start)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="the last needs the others")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for part in args.parts:
        if (args.output / f"{part}.safetensors").exists():
            continue
        for name, share in teach(part, args.output, STEPS[part]).items():
            print(f"{part}: {name} {share:.1%}", flush=True)


if __name__ == "__main__":
    main()
