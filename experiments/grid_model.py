"""What the grids' trainings start from: `python -m experiments.grid_model --output runs/grid/start`.

A tower that sees (in the place of SigLIP2: linear layers on its last block read off each patch what lies there) and a
decoder that reads (in the place of Qwen3: it has seen descriptions of pages, questions and answers as texts alone, in
all languages). They have not met: every training makes a connector of its own. A part that is done is kept.
"""

import argparse
import functools
import math
import random
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import jina_vlm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from jina_vlm_tools.files import TINY
from jina_vlm_tools.synthetic.pages import draw_page
from jina_vlm_tools.training.collator import JinaVLMCollator
from jina_vlm_tools.training.muon import Muon, muon_groups

from .grid_data import DOMAINS, LANGUAGES, SIDE, make_page, texts
from .seeing import IGNORED, TOKEN_CLASSES, token_labels
from .small_model import make_config as make_small_config
from .small_model import make_model


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


def texts_to_read(rng: random.Random, number: int, collator: JinaVLMCollator) -> dict[str, torch.Tensor]:
    """A batch of texts, all of which is to be predicted."""
    languages = [language for group in LANGUAGES.values() for language in group]
    rows = []
    for _ in range(number):
        turns = texts(rng.choice(languages), rng)
        said = [(role, text) for turn in turns for role, text in (("user", turn.question), ("assistant", turn.answer))]
        rows.append({"messages": [{"role": role, "content": text} for role, text in said]})
    batch = collator(rows)
    ends = batch["labels"] == collator.processor.tokenizer.eos_token_id
    words = batch["input_ids"].masked_fill(~batch["attention_mask"].bool(), IGNORED)
    return batch | {"answers": batch["labels"], "labels": torch.where(ends, batch["labels"], words)}


def learn(module: nn.Module, steps: int, rate: float, loss_of, name: str) -> None:
    """Train by Muon, in bfloat16, down a cosine; `loss_of(step)` gives a batch's loss."""
    optimizer = Muon(muon_groups(module, rate, weight_decay=0.02))
    peaks = [group["lr"] for group in optimizer.param_groups]
    started = time.perf_counter()
    for step in range(steps):
        share = min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = share * peak
        with torch.autocast("cpu", torch.bfloat16):
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


def teach_decoder(model, processor, steps: int, batch: int = 16) -> dict[str, float]:
    """Teach the decoder, and return the share of answers' tokens in fresh texts that it predicts."""
    collator, rng = JinaVLMCollator(processor), random.Random("decoder")

    def loss_of(step: int) -> torch.Tensor:
        texts = texts_to_read(rng, batch, collator)
        return model(**{name: texts[name] for name in ("input_ids", "attention_mask", "labels")}).loss

    decoder = nn.ModuleList([model.model.language_model, model.lm_head])
    decoder.lm_head = model.lm_head  # by the name that says it is no hidden matrix
    learn(decoder, steps, 4e-3, loss_of, "decoder")
    fresh = texts_to_read(random.Random("decoder, fresh"), 128, collator)
    with torch.no_grad():
        logits = model(input_ids=fresh["input_ids"], attention_mask=fresh["attention_mask"]).logits
    answers = fresh["answers"][:, 1:]
    return {"tokens of answers": (logits.argmax(-1)[:, :-1] == answers)[answers != IGNORED].float().mean().item()}


TEACH = {"tower": teach_tower, "decoder": teach_decoder}


def save_start(model, start: Path, parts: Iterable[str]) -> None:
    """Write the weights of these parts to files."""
    tower = model.model.vision_model.state_dict()
    others = {name: tensor for name, tensor in model.state_dict().items() if ".vision_model." not in name}
    weights = {"tower": tower, "decoder": {name: others[name] for name in others if ".connector." not in name}}
    for part in parts:
        contiguous = {name: tensor.contiguous() for name, tensor in weights[part].items()}
        save_file(contiguous, start / f"{part}.safetensors")


def load_start(model, start: Path) -> None:
    """Put both parts into a model, whose tower may be shallower; its connector stays as it is."""
    tower, decoder = load_file(start / "tower.safetensors"), load_file(start / "decoder.safetensors")
    vision = model.model.vision_model
    vision.load_state_dict({name: tower[name] for name in vision.state_dict()})
    model.load_state_dict(decoder, strict=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=TEACH, default=list(TEACH))
    parser.add_argument("--steps", type=int, default=1_400, help="for each part (default: %(default)s)")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    processor = make_processor()
    for part in args.parts:
        file = args.output / f"{part}.safetensors"
        if file.exists():
            continue
        torch.manual_seed(0)
        model = make_model(make_config(processor.tokenizer, [DEPTH - 1])).train()
        model.set_attn_implementation("eager")  # with bfloat16 on a CPU: 1.6 times as fast as sdpa in float32
        for name, share in TEACH[part](model, processor, args.steps).items():
            print(f"{part}: {name} {share:.1%}", flush=True)
        save_start(model, args.output, [part])


if __name__ == "__main__":
    main()
