"""Teach `checkpoints/tiny` to find pages: `make train-retrieval`.

Two stages, both on adapters. It has never seen a letter: first the adapters of tower and connector learn what lies
where on a page (`seeing`). Then those of the decoder, and a projector, learn to bring queries and pages together, by
the joint loss of jina-embeddings-v4's paper (`searching`): pages come again and again, with new queries each time.

This model's image tokens are ten thousand times as large as its words, so that the decoder, which adds to them, leaves
their states as they are: the final norm of what the connector makes, within 1e-3. So pages are looked at once
(`looking`), and `searching` runs the decoder on queries alone. What is written lies in `writing/tiny-retrieval`.
"""

import argparse
import json
import math
import os
import random
import time
from pathlib import Path

import torch
from accelerate import PartialState
from jina_vlm import JinaVLMForConditionalGeneration, JinaVLMProcessor
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import Trainer, TrainingArguments, set_seed

from jina_vlm_tools.files import TINY
from jina_vlm_tools.retrieval.folder import write_folder
from jina_vlm_tools.retrieval.inputs import prepare
from jina_vlm_tools.retrieval.losses import agreement, info_nce, matryoshka
from jina_vlm_tools.retrieval.scores import cut, pool
from jina_vlm_tools.retrieval.training import Searches, Weights
from jina_vlm_tools.synthetic.page_questions import LANGUAGES
from jina_vlm_tools.synthetic.pages import draw_page
from jina_vlm_tools.synthetic.questions import EVALUATION_SEEDS
from jina_vlm_tools.synthetic.searches import facts_of, query_about
from jina_vlm_tools.training.lora import target_modules
from jina_vlm_tools.training.muon import Muon, muon_groups

from .seeing import PageCollator, PageReader, PagesDataset, measure


RANK = {"vision_model": 32, "connector": 32, "language_model": 12}
WIDTH = 64  # of multi-vectors
QUERIES = 3  # about each page of a step
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


def train(
    trainer_class, module: nn.Module, optimizer, collator, dataset, output: Path, args: argparse.Namespace
) -> Trainer:
    """Down a cosine; several processes each take their share of a step's samples."""
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
        optimizers=(optimizer, None),
    )  # fmt: skip
    started = time.perf_counter()
    trainer.train()
    if trainer.is_world_process_zero():
        seconds = {"seconds": round(time.perf_counter() - started), "processes": processes}
        (output / "log.json").write_text(json.dumps(trainer.state.log_history + [seconds]))
    return trainer


def see(args: argparse.Namespace, output: Path) -> None:
    model = make_model(args.model)
    train_only(model, ("vision_model", "connector"))
    reader = PageReader(model.get_base_model())
    collator = PageCollator(JinaVLMProcessor.from_pretrained(args.model).image_processor)
    dataset = PagesDataset(args.pages, first_seed=EVALUATION_SEEDS // 2)
    optimizer = Muon(muon_groups(reader, args.rate, weight_decay=0.0))
    trainer = train(Trainer, reader, optimizer, collator, dataset, output, args)
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
    """Write the last states of the pages' image tokens."""
    state = PartialState(cpu=not torch.accelerator.is_available())
    model, processor = seen(args)
    base = model.get_base_model().model
    searches, tensors = Searches(args.searches, KINDS, queries=0), {}
    for index in tqdm(range(state.process_index, len(searches), state.num_processes), unit="pair"):
        for half, page in enumerate(searches[index]):
            tiles = processor.image_processor(draw_page(page["page"]), return_tensors="pt")
            (features,) = base.get_image_features(**tiles).pooler_output
            tensors[f"{index}.{half}"] = base.language_model.norm(features).to(torch.bfloat16).clone()
    save_file(tensors, output / f"pages-{state.process_index}.safetensors")


def best_matches(tokens: torch.Tensor, mask: torch.Tensor, pages: list[torch.Tensor]) -> torch.Tensor:
    """Late interaction [queries, pages] of tokens of queries [queries, length, width] and of pages, one by one."""
    kept, lengths = tokens[mask.bool()], mask.sum(1)
    best = torch.stack([(kept @ page.T).max(1).values for page in pages], 1)
    queries = torch.arange(len(tokens)).repeat_interleave(lengths)
    return torch.zeros(len(tokens), len(pages)).index_add(0, queries, best) / lengths[:, None]


def search(args: argparse.Namespace, output: Path) -> None:
    torch.manual_seed(args.seed)
    model, processor = seen(args)
    base = model.get_base_model().model
    searches = Searches(args.searches, KINDS, queries=0)
    pairs = [searches[index] for index in range(len(searches))]
    states = {}
    for file in sorted((args.output / "looking").glob("pages-*.safetensors")):
        states |= load_file(file)
    train_only(model, ("language_model",))
    projector = nn.Linear(model.config.get_text_config().hidden_size, WIDTH, bias=False)
    nn.init.orthogonal_(projector.weight)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad] + [projector.weight]
    optimizer = torch.optim.AdamW(trained, args.rate, betas=(0.9, 0.98), weight_decay=0.0)
    thumbnail = processor.image_processor.tokens_per_side**2  # tokens that show the page a second time, smaller
    rng, left, log, weights = random.Random(args.seed), [], [], Weights()
    started = time.perf_counter()
    for step in range(args.steps):
        share = min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = args.rate * share
        if len(left) < args.batch_size:
            left = rng.sample(range(len(pairs)), len(pairs))
        chosen = [left.pop() for _ in range(args.batch_size)]
        places = [(index, half) for index in chosen for half in range(2)]
        shown = [pairs[index][half]["page"] for index, half in places]
        queries = [
            (number, query_about(page, rng.choice(list(LANGUAGES)), rng))
            for number, page in enumerate(shown)
            for _ in range(QUERIES)
        ]
        facts = [facts_of(page) for page in shown]
        relevant = torch.tensor([[query.finds(one) for one in facts] for _, query in queries])
        own = torch.tensor([number for number, _ in queries])
        pages = [states[f"{index}.{half}"].float() for index, half in places]
        inputs = dict(prepare(processor, [query.text for _, query in queries], "query"))
        tokens = base(**inputs, use_cache=False).last_hidden_state.float()
        late = best_matches(
            F.normalize(projector(tokens), dim=-1),
            inputs["attention_mask"],
            [F.normalize(projector(page[thumbnail:]), dim=-1) for page in pages],
        )
        dense, of_pages = pool(tokens, inputs["attention_mask"]), torch.stack([page.mean(0) for page in pages])
        terms = {
            "late": info_nce(late, own, relevant, weights.temperature),
            "dense": matryoshka(dense, of_pages, own, relevant, DIMS, weights.temperature),
            "agreement": agreement(cut(dense) @ cut(of_pages).T, late, weights.temperature),
        }
        loss = sum(getattr(weights, name) * term for name, term in terms.items())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        log.append({"step": step, "loss": loss.item(), **{name: term.item() for name, term in terms.items()}})
        if step % 25 == 24:
            print(json.dumps(log[-1] | {"seconds": round(time.perf_counter() - started)}), flush=True)
    save_file(get_peft_model_state_dict(model), output / "adapter.safetensors")
    save_file({"weight": projector.weight.detach().clone()}, output / "projector.safetensors")
    (output / "log.json").write_text(json.dumps(log))


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
    parser.add_argument("--steps", type=int, default=1200, help="of searching (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, help="of all processes (default: 8 pages seen, 16 pairs searched)")
    parser.add_argument("--rate", type=float, help="of learning (default: 4e-3 of Muon, 3e-3 of AdamW)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    set_seed(args.seed)
    args.batch_size = args.batch_size or {"seeing": 8}.get(args.stage, 16)
    args.rate = args.rate or {"seeing": 4e-3}.get(args.stage, 3e-3)
    output = args.output / args.stage
    output.mkdir(parents=True, exist_ok=True)
    STAGES[args.stage](args, output)


if __name__ == "__main__":
    main()
