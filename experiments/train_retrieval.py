"""Teach `checkpoints/tiny` to find pages: `make train-retrieval`.

Two stages, both on adapters. It has never seen a letter: first the adapters of tower and connector learn what lies
where on a page (`seeing`). The tower stays as it is from then on, so that pages are looked at once (`looking`). Then
those of connector and decoder, and a projector, learn to bring queries and pages together, by the joint loss of
jina-embeddings-v4's paper (`searching`): pages come again and again, with new queries each time. What is written lies
in `writing/tiny-retrieval`.
"""

import argparse
import json
import os
import random
import time
from pathlib import Path

import torch
from accelerate import PartialState
from jina_vlm import JinaVLMForConditionalGeneration, JinaVLMProcessor
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm
from transformers import Trainer, TrainingArguments, set_seed
from transformers.modeling_outputs import BaseModelOutputWithPooling

from jina_vlm_tools.files import TINY
from jina_vlm_tools.retrieval.folder import write_folder
from jina_vlm_tools.retrieval.inputs import prepare
from jina_vlm_tools.retrieval.training import RetrievalTrainer, Retriever, SearchCollator, Searches, Weights
from jina_vlm_tools.synthetic.page_questions import LANGUAGES, TASKS
from jina_vlm_tools.synthetic.pages import draw_page
from jina_vlm_tools.synthetic.questions import EVALUATION_SEEDS
from jina_vlm_tools.synthetic.searches import query_about
from jina_vlm_tools.training.lora import target_modules
from jina_vlm_tools.training.muon import Muon, muon_groups

from .seeing import PageCollator, PageReader, PagesDataset, measure


PARTS = {"seeing": ("vision_model", "connector"), "searching": ("connector", "language_model")}
RANK = {"vision_model": 32, "connector": 32, "language_model": 12}
WIDTH = 64  # of multi-vectors
DIMS = [16, 32, 64, 128]
MAX_TILES = 4
# Small print, on pages of several tiles, costs as much as three of the others.
KINDS = ("shapes", "numbers", "numbers", "words", "words", "tables", "charts", "small print")


def make_model(checkpoint: str):
    """The base in float32 with new adapters, as a `PeftModel`."""
    model = JinaVLMForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    patterns = {rf".*{part}.*": rank for part, rank in RANK.items()}
    config = LoraConfig(
        r=max(RANK.values()), lora_alpha=max(RANK.values()), rank_pattern=patterns, alpha_pattern=patterns,
        target_modules=target_modules(["encoder", "connector", "decoder"]), bias="none",
    )  # fmt: skip
    return get_peft_model(model, config)


def train_only(model: nn.Module, parts: tuple[str, ...]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name and any(f".{part}." in name for part in parts))


def train(trainer_class, module: nn.Module, collator, dataset, output: Path, args: argparse.Namespace) -> Trainer:
    """By Muon, down a cosine; several processes each take their share of a step's samples."""
    on_cpu = not torch.accelerator.is_available()
    processes = PartialState(cpu=on_cpu).num_processes
    trainer = trainer_class(
        module,
        TrainingArguments(
            str(output), num_train_epochs=1, per_device_train_batch_size=args.batch_size // processes,
            lr_scheduler_type="cosine", warmup_steps=30, logging_steps=25, save_strategy="no", use_cpu=on_cpu,
            remove_unused_columns=False, report_to="none", max_grad_norm=1.0, label_names=["labels"], bf16=True,
            train_sampling_strategy="sequential", dataloader_pin_memory=False, seed=args.seed,
            ddp_backend="gloo" if on_cpu and processes > 1 else None,
        ),
        collator,
        dataset,
        optimizers=(Muon(muon_groups(module, args.learning_rate, weight_decay=0.0)), None),
    )  # fmt: skip
    started = time.perf_counter()
    trainer.train()
    if trainer.is_world_process_zero():
        seconds = {"seconds": round(time.perf_counter() - started), "processes": processes}
        (output / "log.json").write_text(json.dumps(trainer.state.log_history + [seconds]))
    return trainer


def see(args: argparse.Namespace, output: Path) -> None:
    model = make_model(args.model)
    train_only(model, PARTS["seeing"])
    reader = PageReader(model.get_base_model())
    collator = PageCollator(JinaVLMProcessor.from_pretrained(args.model).image_processor)
    dataset = PagesDataset(args.pages, first_seed=EVALUATION_SEEDS // 2)
    trainer = train(Trainer, reader, collator, dataset, output, args)
    if not trainer.is_world_process_zero():
        return
    fresh = PagesDataset(64, first_seed=EVALUATION_SEEDS)
    for name, share in measure(reader, collator, [fresh[index] for index in range(len(fresh))]).items():
        print(f"{name}: {share:.1%}", flush=True)
    save_file(get_peft_model_state_dict(model), output / "adapter.safetensors")


def seen(args: argparse.Namespace):
    """The model after `seeing`, and its processor."""
    model = make_model(args.model)
    set_peft_model_state_dict(model, load_file(args.output / "seeing" / "adapter.safetensors"))
    return model, JinaVLMProcessor.from_pretrained(args.model, max_tiles=MAX_TILES)


@torch.inference_mode()
def look(args: argparse.Namespace, output: Path) -> None:
    """Write what the tower makes of the pages, and their tokens."""
    state = PartialState(cpu=not torch.accelerator.is_available())
    model, processor = seen(args)
    searches, tensors = Searches(args.searches, args.kinds or KINDS, queries=0), {}
    for index in tqdm(range(state.process_index, len(searches), state.num_processes), unit="pair"):
        for half, page in enumerate(searches[index]):
            inputs = dict(prepare(processor, [draw_page(page["page"])], "document"))
            features = model.get_base_model().model.vision_model(inputs["pixel_values"]).last_hidden_state
            tensors[f"{index}.{half}.features"] = features.to(torch.bfloat16).clone()
            tensors[f"{index}.{half}.positions"] = inputs["tile_positions"]
            tensors[f"{index}.{half}.ids"] = inputs["input_ids"][0].to(torch.int16)
    save_file(tensors, output / f"pages-{state.process_index}.safetensors")


class SeenSearches(Searches):
    """Pages that come again after so many samples, with other queries."""

    def __init__(self, length: int, pages: int, kinds):
        super().__init__(length, kinds)
        self.pages = pages

    def __getitem__(self, index: int) -> list[dict]:
        if not 0 <= index < self.length:
            raise IndexError(index)
        epoch, number = divmod(index, self.pages)
        order = random.Random(f"order {epoch}").sample(range(self.pages), self.pages)
        pair, rng = Searches(self.pages, self.tasks, queries=0)[order[number]], random.Random(f"queries {index}")
        for half, shown in enumerate(pair):
            shown["place"] = f"{order[number]}.{half}"
            shown["queries"] = [
                query_about(shown["page"], rng.choice(list(LANGUAGES)), rng) for _ in range(self.queries)
            ]
        return pair


class SeenCollator(SearchCollator):
    """Pages as `look` wrote them."""

    def __init__(self, processor, folder: Path):
        super().__init__(processor)
        files = [safe_open(file, "pt") for file in sorted(folder.glob("pages-*.safetensors"))]
        self.files = {name: file for file in files for name in file.keys()}  # noqa: SIM118  no dictionary

    def read(self, page: dict, what: str) -> torch.Tensor:
        name = f"{page['place']}.{what}"
        return self.files[name].get_tensor(name)

    def prepare_pages(self, pages: list[dict]) -> dict[str, torch.Tensor]:
        ids = [self.read(page, "ids").long() for page in pages]
        features = torch.cat([self.read(page, "features").float() for page in pages])
        positions = torch.cat([self.read(page, "positions") for page in pages])
        padding = self.processor.tokenizer.pad_token_id
        padded = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=padding)
        lengths = torch.tensor([len(one) for one in ids])
        mask = (torch.arange(padded.shape[1]) < lengths[:, None]).long()
        tiles = {"pixel_values": features[:, None], "tile_positions": positions}  # see `Seen`
        return {"input_ids": padded, "attention_mask": mask, **tiles}


class Seen(nn.Module):
    """In the place of the tower: is given what it made of tiles, [tiles, 1, patches, features]."""

    def forward(self, pixel_values: torch.Tensor, **_) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(last_hidden_state=pixel_values[:, 0])


def search(args: argparse.Namespace, output: Path) -> None:
    model, processor = seen(args)
    if args.go_on:
        set_peft_model_state_dict(model, load_file(output / "adapter.safetensors"))
    train_only(model, PARTS["searching"])
    projector = nn.Linear(model.config.get_text_config().hidden_size, WIDTH, bias=False)
    nn.init.orthogonal_(projector.weight)
    if args.go_on:
        projector.load_state_dict(load_file(output / "projector.safetensors"))
    tower, model.get_base_model().model.vision_model = model.get_base_model().model.vision_model, Seen()
    retriever = Retriever(model.get_base_model(), projector, DIMS, Weights(temperature=args.temperature))
    dataset = SeenSearches(args.samples, args.searches, args.kinds or KINDS)
    collator = SeenCollator(processor, args.output / "looking")
    trainer = train(RetrievalTrainer, retriever, collator, dataset, output, args)
    model.get_base_model().model.vision_model = tower
    if trainer.is_world_process_zero():
        save_file(get_peft_model_state_dict(model), output / "adapter.safetensors")
        save_file({"weight": projector.weight.detach().clone()}, output / "projector.safetensors")


def write(args: argparse.Namespace, output: Path) -> None:
    """The retrieval folder, in bfloat16."""
    trained, model = args.output / "searching", make_model(args.model)
    set_peft_model_state_dict(model, load_file(trained / "adapter.safetensors"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    weight = load_file(trained / "projector.safetensors")["weight"]
    processor = JinaVLMProcessor.from_pretrained(args.model, max_tiles=MAX_TILES)
    base = os.path.relpath(args.model)
    write_folder(output / "tiny-retrieval", model, weight, processor, base=base, replace=True)


STAGES = {"seeing": see, "looking": look, "searching": search, "writing": write}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--model", default=str(TINY))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--pages", type=int, default=24_000, help="to see (default: %(default)s)")
    parser.add_argument(
        "--searches", type=int, default=700, help="pages, and as many like them (default: %(default)s)"
    )
    parser.add_argument("--samples", type=int, default=8_000, help="of these, again and again (default: %(default)s)")
    parser.add_argument("--go-on", action="store_true", help="from what `searching` wrote before")
    parser.add_argument("--kinds", nargs="+", choices=TASKS, help="of pages (default: all)")
    parser.add_argument("--batch-size", type=int, default=8, help="of all processes (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--temperature", type=float, default=0.03)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    set_seed(args.seed)
    output = args.output / args.stage
    output.mkdir(parents=True, exist_ok=True)
    STAGES[args.stage](args, output)


if __name__ == "__main__":
    main()
