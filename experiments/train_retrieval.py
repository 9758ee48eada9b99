"""Teach `checkpoints/tiny` to find pages: `make train-retrieval`.

All learn by adapters, and its own weights stay. Facts have vectors, which learn first to find pages made of them
(`meeting`). It has never seen a letter: so adapters of tower and connector learn what lies where on a page, and to
bring its tokens to the vectors of that (`seeing`). Then pages are looked at once (`looking`), and learn to be found by
what they show, by a connector that starts anew and becomes adapters (`naming`). Queries learn to say what they ask for
(`telling`). What is written lies in `writing/tiny-retrieval`.

This model's image tokens are ten thousand times as large as its words, so that the decoder, which adds to them, leaves
them as they are: their states are the final norm of what the connector makes, within 1e-3. So `naming` runs no
decoder, and `telling` runs it on a page every second step, for the words around an image, and for the few image tokens
that are too short to be left as they are.
"""

import argparse
import functools
import itertools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import PartialState
from jina_vlm import JinaVLMForConditionalGeneration, JinaVLMProcessor
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from jina_vlm_tools.files import TINY
from jina_vlm_tools.retrieval.folder import write_folder
from jina_vlm_tools.retrieval.inputs import prepare
from jina_vlm_tools.retrieval.training import Searches
from jina_vlm_tools.synthetic.pages import Page, draw_page
from jina_vlm_tools.synthetic.questions import EVALUATION_SEEDS
from jina_vlm_tools.training.lora import target_modules
from jina_vlm_tools.training.muon import Muon, muon_groups
from jina_vlm_tools.training.train import joined_processes

from .adapters import train_only
from .fact_vectors import PADDING, Meeting, attributes, nothing, pad, shares, shown
from .precision import ATTENTION, IN_BF16, reduced_precision
from .searching import ADAPTER, MEETING, WIDTH, meet_facts, name_pages, tell_queries
from .seeing import SIDE, TOKEN_MIDDLES, PageCollator, PageReader, PagesDataset, measure, unit
from .strips import cut_into_strips


RANK = {  # of adapters
    "vision_model.*": 28,
    r"connector\.[qk]_proj": 12, r"connector\.v_proj": 64, r"connector\.out_proj": 48,
    r"connector\.(gate|up)_proj": 44, r"connector\.down_proj": 72,
    "language_model.*": 56,
}  # fmt: skip
# What adapters of tower and decoder are kept in: twice the rank in as many bytes finds far more than rounding loses.
KEPT_IN = torch.float8_e4m3fn
# Of the pages that it learns to see from: tables and charts as often as searches have them.
SHARES = {"shapes": 15, "board": 18, "lines": 41, "table": 12, "chart": 14}
SEEN_AT_ONCE = 4  # pages
SAVE_EVERY = 250  # steps of `seeing`
IN_STRIPS = 0.7  # of the pages, see `strips`
IN_A_FILE = 100  # pairs that were looked at
# Of the loss: each of `Meeting.name`'s is as much as so many of the reader's questions.
NAMED = {"tokens": 3.0, "states": 1.0, "sums": 1.0}
MAX_TILES = 4


def make_model(checkpoint: str):
    """The base in float32 with new adapters, as a `PeftModel`."""
    model = JinaVLMForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    patterns = {rf".*{layers}": rank for layers, rank in RANK.items()}
    config = LoraConfig(
        r=max(RANK.values()), lora_alpha=max(RANK.values()), rank_pattern=patterns, alpha_pattern=patterns,
        target_modules=target_modules(["encoder", "connector", "decoder"]), bias="none",
    )  # fmt: skip
    return get_peft_model(model, config)


class NamingCollator(PageCollator):
    """As [`PageCollator`], with what each page shows: `facts` [pages, most, attributes], filled up with `PADDING`, and
    `shares` [pages, tokens, most], see `fact_vectors.shares`."""

    def __call__(self, pages: list[Page]) -> dict[str, torch.Tensor]:
        found = [shown(page) for page in pages]
        most = max(map(len, found))
        facts = pad([attributes(fact) for things in found for fact, _ in things])
        counts = [len(things) for things in found]
        return {
            **super().__call__(pages),
            "facts": torch.stack(
                [F.pad(each, (0, 0, 0, most - len(each)), value=PADDING) for each in facts.split(counts)]
            ),
            "shares": torch.stack(
                [F.pad(shares([middle for _, middle in things]), (0, most - len(things))) for things in found]
            ),
        }


class PageNamer(PageReader):
    """Tells tokens what they show by the vectors of facts. As only those at the middle of a thing show it, labels are
    read off the tower's features."""

    def __init__(self, model, meeting: Meeting):
        super().__init__(model)
        self.head = nn.Linear(self.patch_head.in_features, self.head.out_features)
        self.norm, self.meeting = model.model.language_model.norm, meeting
        self.nothing = nothing(len(TOKEN_MIDDLES), len(TOKEN_MIDDLES))

    def forward(self, pixel_values, patch_labels, labels, facts, shares):
        outputs = super().forward(pixel_values, patch_labels, labels)
        with torch.autocast(pixel_values.device.type, enabled=False):
            states = self.norm(outputs["states"].float())
            named = self.meeting.name(
                list(states), facts.flatten(0, 1), torch.block_diag(*shares), self.nothing.repeat(len(states), 1)
            )
            outputs["loss"] = outputs["loss"] + sum(NAMED[name] * each for name, each in named.items())
        return outputs

    def asked(self, features: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        grid = unit(features).unflatten(1, (SIDE, SIDE)).movedim(-1, 1)
        return F.avg_pool2d(grid, 2, ceil_mode=True).flatten(2).mT


class StripsFirst(TrainerCallback):
    """A tower's attention is to strips, then to whole tiles."""

    def __init__(self, vision_model: nn.Module):
        self.vision_model = vision_model

    def on_train_begin(self, args, state, control, **_):
        cut_into_strips(self.vision_model)
        self.in_strips = True

    def on_step_begin(self, args, state, control, **_):
        # Of all steps from there: the first of a resumed training may be any.
        if self.in_strips and state.global_step >= int(IN_STRIPS * state.max_steps):
            self.vision_model.set_attn_implementation(ATTENTION)
            self.in_strips = False


def train(
    trainer_class,
    module: nn.Module,
    optimizer,
    collator,
    dataset,
    output: Path,
    batch_size: int,
    seed: int,
    callbacks: tuple[TrainerCallback, ...] = (),
    **arguments,
) -> Trainer:
    """Down a cosine; several processes each take their share of a step's samples. `arguments` are the Trainer's."""
    on_cpu = not torch.accelerator.is_available()
    processes = PartialState(cpu=on_cpu).num_processes
    trainer = trainer_class(
        module,
        TrainingArguments(
            str(output), num_train_epochs=1, per_device_train_batch_size=batch_size // processes,
            lr_scheduler_type="cosine", warmup_steps=30, logging_steps=25, use_cpu=on_cpu,
            remove_unused_columns=False, report_to="none", max_grad_norm=1.0, label_names=["labels"], bf16=IN_BF16,
            train_sampling_strategy="sequential", dataloader_pin_memory=False, seed=seed,
            ddp_backend="gloo" if on_cpu and processes > 1 else None, **{"save_strategy": "no"} | arguments,
        ),
        collator,
        dataset,
        optimizers=(optimizer, None),
        callbacks=list(callbacks),
    )  # fmt: skip
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    if trainer.is_world_process_zero():
        seconds = {"seconds": round(time.perf_counter() - started), "processes": processes}
        (output / "log.json").write_text(json.dumps(trainer.state.log_history + [seconds]))
    return trainer


def see(args: argparse.Namespace, output: Path) -> None:
    model = make_model(args.model)
    train_only(model, ("vision_model", "connector"))
    base = model.get_base_model()
    base.set_attn_implementation(ATTENTION)
    meeting = Meeting(base.config.get_text_config().hidden_size, WIDTH)
    meeting.load_state_dict(load_file(args.output / "meeting" / MEETING))
    meeting.requires_grad_(False)
    reader = PageNamer(base, meeting)
    collator = NamingCollator(JinaVLMProcessor.from_pretrained(args.model).image_processor)
    dataset = PagesDataset(args.pages, EVALUATION_SEEDS // 2, SHARES)
    for part in (reader.vision_model, reader.connector):
        part.compile()
    optimizer = Muon(muon_groups(reader, 4e-3, weight_decay=0.0))
    strips = StripsFirst(reader.vision_model)
    trainer = train(
        Trainer, reader, optimizer, collator, dataset, output, SEEN_AT_ONCE, args.seed, (strips,),
        save_strategy="steps", save_steps=SAVE_EVERY, save_total_limit=1,
        resume_from_checkpoint=get_last_checkpoint(str(output)) if args.resume else None,
    )  # fmt: skip
    if not trainer.is_world_process_zero():
        return
    adapters = get_peft_model_state_dict(model).items()
    save_file({name: each.to(KEPT_IN) for name, each in adapters if ".vision_model." in name}, output / ADAPTER)
    fresh = PagesDataset(64, EVALUATION_SEEDS, SHARES)
    for name, share in measure(reader, collator, [fresh[index] for index in range(len(fresh))]).items():
        print(f"{name}: {share:.1%}", flush=True)


def seen(args: argparse.Namespace, stage: str | None = "seeing"):
    """The model after a stage, or at the start, and its processor."""
    model = make_model(args.model)
    if stage:
        set_peft_model_state_dict(model, load_file(args.output / stage / ADAPTER))
    return model, JinaVLMProcessor.from_pretrained(args.model, max_tiles=MAX_TILES)


@torch.inference_mode()
def look(args: argparse.Namespace, output: Path) -> None:
    """Write what the tower sees of pages."""
    state = PartialState(cpu=not torch.accelerator.is_available())
    model, processor = seen(args)
    tower = model.get_base_model().model.vision_model
    if state.is_main_process:
        for file in output.glob("pages-*.safetensors"):  # of an earlier run, by another tower
            file.unlink()
    state.wait_for_everyone()
    searches = Searches(args.searches)
    mine = range(state.process_index, len(searches), state.num_processes)
    left = iter(tqdm(mine, unit="pair"))
    for first in range(0, len(mine), IN_A_FILE):
        tensors = {}
        for index in itertools.islice(left, IN_A_FILE):
            for half, page in enumerate(searches.pages(index)):
                looked = look_at(tower, processor, page)
                tensors |= {f"{index}.{half}.{name}": tensor for name, tensor in looked.items()}
        save_file(tensors, output / f"pages-{mine[first]}.safetensors")


def look_at(tower: nn.Module, processor: JinaVLMProcessor, page: Page) -> dict[str, torch.Tensor]:
    """What the tower sees of a page's different tiles, which of these each tile is, where it lies, and the prompt."""
    inputs = prepare(processor, [draw_page(page)], "document")
    # A page of one tile is its thumbnail once more.
    different, which = inputs["pixel_values"].unique_consecutive(dim=0, return_inverse=True)
    with reduced_precision():
        features = tower(different).last_hidden_state
    return {
        "features": features.to(torch.bfloat16),
        "which": which,
        "positions": inputs["tile_positions"],
        "prompt": inputs["input_ids"][0],
    }


def meet(stage: Callable, before: str | None, args: argparse.Namespace, output: Path) -> None:
    """One of the stages of `searching`, after the stage `before`."""
    stage(args, output, *seen(args, before))


def write(args: argparse.Namespace, output: Path) -> None:
    """The retrieval folder; the connector's adapters in bfloat16, as rounding these further loses 0.6 points."""
    trained, model = args.output / "telling", make_model(args.model)
    set_peft_model_state_dict(model, load_file(trained / ADAPTER))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(torch.bfloat16 if ".connector." in name else KEPT_IN)
    weight = load_file(trained / MEETING)["projector.weight"].to(torch.bfloat16)
    processor = JinaVLMProcessor.from_pretrained(args.model, max_tiles=MAX_TILES)
    base = os.path.relpath(args.model)
    write_folder(output / "tiny-retrieval", model, weight, processor, base=base, replace=True)


STAGES = {
    "meeting": functools.partial(meet, meet_facts, None),
    "seeing": see,
    "looking": look,
    "naming": functools.partial(meet, name_pages, "seeing"),
    "telling": functools.partial(meet, tell_queries, "naming"),
    "writing": write,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--model", default=str(TINY))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--pages", type=int, default=45_000, help="to see (default: %(default)s)")
    parser.add_argument(
        "--searches", type=int, default=9000, help="pages, and as many like them (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on with `seeing` from its last checkpoint")
    args = parser.parse_args()
    if args.resume and args.stage != "seeing":
        parser.error(f"--resume is for `seeing` alone, not for `{args.stage}`, which is over in minutes: leave it out")
    set_seed(args.seed)
    output = args.output / args.stage
    output.mkdir(parents=True, exist_ok=True)
    with joined_processes():
        STAGES[args.stage](args, output)


if __name__ == "__main__":
    main()
