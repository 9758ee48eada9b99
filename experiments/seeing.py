"""Teach a small tower and connector to see.

    python -m experiments.seeing --model checkpoints/tiny --output runs/seeing

A real run starts from SigLIP2, which sees already. The small model has nothing of the kind, and from answers alone it
did not get beyond guessing in 7,000 images (two runs). So throw-away linear layers read off each patch which character
is printed there, and off each image token what color and kind of shape lies there, in which of nine places, in which
cell of a table, how high the bar is, and the whole number or word that it belongs to: hundreds of answers an image in
place of a few words.
"""

import argparse
import random
from pathlib import Path

import jina_vlm
import torch
from accelerate import PartialState
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from jina_vlm_tools.synthetic.pages import (
    CHARACTERS,
    COLUMNS,
    HIGHEST,
    LONGEST,
    Page,
    characters,
    draw_page,
    make_board,
    make_chart,
    make_lines,
    make_table,
)
from jina_vlm_tools.synthetic.questions import EVALUATION_SEEDS
from jina_vlm_tools.synthetic.shapes import COLORS, KINDS, PLACES, TRAINING_PAIRS, Scene, make_scene
from jina_vlm_tools.training.muon import Muon, muon_groups
from jina_vlm_tools.training.train import joined_processes

from .precision import ATTENTION, IN_BF16


IGNORED = -100  # by the loss
SIDE = 27  # patches of a tile; tokens are made of two by two, the last row and column of one by two
NO_CHARACTER = len(CHARACTERS) + 1
# How many answers each question about a token has, "nothing" included.
TOKEN_CLASSES = {
    "color": 1 + len(COLORS),
    "kind": 1 + len(KINDS),
    "place": len(PLACES),
    "height": 1 + HIGHEST,
    "column": 1 + len(COLUMNS),
    "row": 5,
} | {f"character {index}": 1 + NO_CHARACTER for index in range(LONGEST)}


SHARES = {"shapes": 25, "board": 20, "lines": 40, "table": 8, "chart": 7}


class PagesDataset(Dataset):
    """Page i is drawn from seed `first_seed` + i: shapes, half of them in colors that have no name (else what is told
    of a shape's kind is its color too, and pairs that were never seen are misjudged), boards, lines of text, tables
    and charts, as often as `shares` has it."""

    def __init__(self, length: int, first_seed: int, shares: dict[str, int] = SHARES):
        self.length, self.first_seed, self.shares = length, first_seed, shares

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Page:
        rng = random.Random(self.first_seed + index)
        kind = rng.choices(list(self.shares), list(self.shares.values()))[0]
        if kind == "shapes":
            return Page("shapes", make_scene(rng, TRAINING_PAIRS, number=rng.randint(3, len(PLACES)), nameless=0.5))
        if kind == "board":
            return make_board(rng, TRAINING_PAIRS, filled=rng.randint(5, len(PLACES)))
        return {"lines": make_lines, "table": make_table, "chart": make_chart}[kind](rng)


class PageCollator:
    """Pages to a batch: `pixel_values` [pages, 3, 378, 378], each page as one tile; `patch_labels` [pages, patches],
    see `patch_labels`; and `labels` [pages, tokens, questions], see `token_labels`."""

    def __init__(self, image_processor):
        self.image_processor = image_processor

    def __call__(self, pages: list[Page]) -> dict[str, torch.Tensor]:
        # Of one tile: it is the thumbnail once more.
        pixels = self.image_processor([draw_page(page) for page in pages], max_tiles=1, return_tensors="pt")[
            "pixel_values"
        ]
        return {
            "pixel_values": pixels[1::2],
            "patch_labels": torch.stack([patch_labels(page) for page in pages]),
            "labels": torch.stack([token_labels(page) for page in pages]),
        }


def _inside(
    box: tuple[float, float, float, float], x: torch.Tensor, y: torch.Tensor, margin=(0.0, 0.0)
) -> torch.Tensor:
    left, top, right, bottom = box
    return (x >= left - margin[0]) & (x <= right + margin[0]) & (y >= top - margin[1]) & (y <= bottom + margin[1])


def patch_labels(page: Page) -> torch.Tensor:
    """[patches] int64, row by row: 1 + the number of the character that the patch's middle lies on, else 0."""
    middles = (torch.arange(SIDE) + 0.5) / SIDE
    x, y = middles[None, :] * page.scene.size[0], middles[:, None] * page.scene.size[1]
    labels = torch.zeros(SIDE, SIDE, dtype=torch.long)
    for character, box in characters(page):
        labels[_inside(box, x, y)] = 1 + CHARACTERS.index(character)
    return labels.flatten()


TOKEN_MIDDLES = ((2 * torch.arange((SIDE + 1) // 2) + 1) / SIDE).clamp(max=0.999)  # as parts of a tile's side


def spelled(text: str) -> list[int]:
    """The numbers of a text's characters, around its middle, which is where tokens know it from: [`LONGEST`], with
    `NO_CHARACTER` on both sides."""
    before = (LONGEST - len(text) + 1) // 2
    numbers = [1 + CHARACTERS.index(character) for character in text]
    return [NO_CHARACTER] * before + numbers + [NO_CHARACTER] * (LONGEST - len(text) - before)


def token_labels(page: Page, across: torch.Tensor = TOKEN_MIDDLES, down: torch.Tensor | None = None) -> torch.Tensor:
    """[tokens, questions] int64, row by row, in the order of `TOKEN_CLASSES`: 0 where there is nothing, else 1 + the
    index; -100 where nobody could say. A shape reaches as far as the circle around it; a number or word half a token
    further than its letters. `across` and `down` are the tokens' middles, from 0 to 1, by default the same."""
    down = across if down is None else down
    size = page.scene.size
    x, y = across[None, :] * size[0], down[:, None] * size[1]
    columns = {name: index for index, name in enumerate(TOKEN_CLASSES)}
    labels = torch.zeros(len(down), len(across), len(columns), dtype=torch.long)
    labels[..., columns["place"]] = (3 * down[:, None]).long() * 3 + (3 * across[None, :]).long()
    labels[..., columns["character 0"] + 1 :] = IGNORED
    _label_shapes(labels, page.scene, x, y, columns)
    for bar in page.bars:
        inside = _inside(bar.box, x, y)
        labels[..., columns["color"]][inside] = 1 + list(COLORS).index(bar.color)
        labels[..., columns["height"]][inside] = bar.height
    token = size[0] * (across[1] - across[0]).item() / 2, size[1] * (down[1] - down[0]).item() / 2  # half of one
    for text in (*page.texts, *page.labels):
        inside = _inside(text.box, x, y, token)
        labels[inside, columns["character 0"] :] = torch.tensor(spelled(text.text))
        if text.cell:
            labels[inside, columns["column"]], labels[inside, columns["row"]] = 1 + text.cell[0], 1 + text.cell[1]
    return labels.flatten(0, 1)


def _label_shapes(
    labels: torch.Tensor, scene: Scene, x: torch.Tensor, y: torch.Tensor, columns: dict[str, int]
) -> None:
    width, height = scene.size
    for shape in scene.shapes:
        row, column = divmod(PLACES.index(shape.place), 3)
        distance = torch.hypot(x - (column + shape.center[0]) * width / 3, y - (row + shape.center[1]) * height / 3)
        inside = distance <= shape.radius * min(width, height) / 3
        labels[inside, columns["color"]] = 1 + list(COLORS).index(shape.color) if shape.color else IGNORED
        labels[inside, columns["kind"]] = 1 + KINDS.index(shape.kind)


class PageReader(nn.Module):
    """The seeing half of a jina-vlm, with linear layers that read the labels off its patches and tokens."""

    def __init__(self, model):
        super().__init__()
        self.vision_model, self.connector = model.model.vision_model, model.model.connector
        features = len(model.config.vision_feature_layers) * model.config.vision_config.hidden_size
        self.patch_head = nn.Linear(features, 1 + len(CHARACTERS))
        self.head = nn.Linear(model.config.text_config.hidden_size, sum(TOKEN_CLASSES.values()))

    def forward(
        self, pixel_values: torch.Tensor, patch_labels: torch.Tensor, labels: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        features = self.vision_model(pixel_values).last_hidden_state
        # As thumbnail or as tile, which the connector marks: half of them each
        is_tile = torch.arange(len(features), device=features.device) % 2 == 1
        characters = self.patch_head(unit(features))
        states = self.connector(features, is_tile)
        tokens = self.head(self.asked(features, states)).split(list(TOKEN_CLASSES.values()), dim=-1)
        is_text = patch_labels > 0
        # Most patches are empty: both kinds count alike.
        losses = [F.cross_entropy(characters[where], patch_labels[where]) for where in (is_text, ~is_text)]
        for index, logits in enumerate(tokens):
            losses.append(F.cross_entropy(logits.flatten(0, 1), labels[..., index].flatten()))
        loss = torch.stack(losses).nan_to_num().sum()
        return {"loss": loss, "characters": characters, "tokens": tokens, "states": states}

    def asked(self, features: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """What tokens' labels are read off, of the tower's features and the connector's states."""
        return unit(states)


def unit(features: torch.Tensor) -> torch.Tensor:
    """Of root mean square 1, as the text model's norms make them."""
    return features / features.pow(2).mean(dim=-1, keepdim=True).sqrt().add(1e-6)


@torch.no_grad()
def match_sizes(model, pixel_values: torch.Tensor) -> None:
    """Scale the connector's last layer so that image tokens are as large as words: the reader ignores their size."""
    tokens = model.model.connector(
        model.model.vision_model(pixel_values).last_hidden_state, torch.ones(len(pixel_values), dtype=torch.bool)
    )
    words = model.get_input_embeddings().weight
    model.model.connector.down_proj.weight.mul_(words.pow(2).mean().sqrt() / tokens.pow(2).mean().sqrt())


@torch.inference_mode()
def measure(reader: PageReader, collator: PageCollator, pages: list[Page], batch_size: int = 16) -> dict[str, float]:
    """Share of right answers where there is something, per question. "words": whole numbers and words."""
    right, total = {}, {}

    def count(name: str, hits: torch.Tensor, where: torch.Tensor) -> None:
        right[name] = right.get(name, 0) + int((hits & where).sum())
        total[name] = total.get(name, 0) + int(where.sum())

    reader.eval()
    for start in range(0, len(pages), batch_size):
        batch = collator(pages[start : start + batch_size])
        outputs = reader(**batch)
        count("characters", outputs["characters"].argmax(-1) == batch["patch_labels"], batch["patch_labels"] > 0)
        labels, whole = batch["labels"], None
        for index, (name, logits) in enumerate(zip(TOKEN_CLASSES, outputs["tokens"], strict=True)):
            hits = logits.argmax(-1) == labels[..., index]
            if name.startswith("character"):
                whole = hits if whole is None else whole & hits
            else:
                count(name, hits, labels[..., index] > 0)
        count("words", whole, labels[..., list(TOKEN_CLASSES).index("character 0")] > 0)
    return {name: right[name] / max(1, total[name]) for name in total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="folder of a small jina-vlm")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--pages", type=int, default=36_000, help="to learn from (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=4, help="pages a step and process (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=4e-3, help="of matrices (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    args = parser.parse_args()

    with joined_processes() as state:
        learn(args, state)


def learn(args: argparse.Namespace, state: PartialState) -> None:
    on_cpu = not torch.accelerator.is_available()
    set_seed(args.seed)
    model = jina_vlm.JinaVLMForConditionalGeneration.from_pretrained(
        args.model,
        dtype=torch.float32,
        attn_implementation=ATTENTION,
    )
    processor = jina_vlm.JinaVLMProcessor.from_pretrained(args.model)
    reader, collator = PageReader(model), PageCollator(processor.image_processor)
    run = args.output / "run"
    training_args = TrainingArguments(
        output_dir=str(run),
        per_device_train_batch_size=args.batch_size,
        num_train_epochs=1,
        lr_scheduler_type="cosine",
        warmup_steps=50,
        max_grad_norm=1.0,
        logging_steps=25,
        save_steps=250,
        save_total_limit=1,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=False,
        report_to="none",
        bf16=IN_BF16,
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and state.num_processes > 1 else None,
        seed=args.seed,
    )
    optimizer = Muon(muon_groups(reader, args.learning_rate, weight_decay=0.02))
    dataset = PagesDataset(args.pages, first_seed=EVALUATION_SEEDS // 2)
    trainer = Trainer(reader, training_args, collator, dataset, optimizers=(optimizer, None))
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(run)) if args.resume and run.is_dir() else None)
    if not trainer.is_world_process_zero():
        return
    fresh = PagesDataset(64, first_seed=EVALUATION_SEEDS)
    match_sizes(model, collator([fresh[index] for index in range(16)])["pixel_values"])
    model.save_pretrained(args.output)
    processor.save_pretrained(args.output)
    for name, share in measure(reader, collator, [fresh[index] for index in range(len(fresh))]).items():
        print(f"{name}: {share:.1%}")


if __name__ == "__main__":
    main()
