"""Train an adapter and a projector for retrieval: `python -m experiments.train_retrieval --output runs/retrieval`."""

import argparse
import json
from pathlib import Path

import torch
from jina_vlm import JinaVLMForConditionalGeneration, JinaVLMProcessor
from transformers import TrainingArguments, set_seed

from jina_vlm_tools.files import TINY
from jina_vlm_tools.retrieval.training import RetrievalTrainer, Retriever, SearchCollator, Searches, Weights
from jina_vlm_tools.synthetic.page_questions import TASKS
from jina_vlm_tools.training.lora import add_adapters
from jina_vlm_tools.training.stages import LoraSettings

from .eval_retrieval import evaluate, interval


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(TINY))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rank", type=int, default=8, help="0: all weights")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--temperature", type=float, default=0.03)
    parser.add_argument("--parts", nargs="+", default=["encoder", "connector", "decoder"])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--pages", type=int, default=120)
    parser.add_argument("--width", type=int, default=64)
    args = parser.parse_args()
    set_seed(0)
    model = JinaVLMForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32)
    processor = JinaVLMProcessor.from_pretrained(args.model)
    processor.image_processor.max_tiles = 4
    if args.rank:
        model = add_adapters(model, LoraSettings(args.rank, 2 * args.rank, parts=args.parts))
    else:
        for name, parameter in model.named_parameters():
            if "vision_model" in name and "encoder" not in args.parts:
                parameter.requires_grad_(False)
    hidden = model.config.get_text_config().hidden_size
    dims = [dim for dim in (16, 32, 64, 128, hidden) if dim <= hidden]
    retriever = Retriever(model, args.width, dims, Weights(temperature=args.temperature))
    print(f"{sum(p.numel() for p in retriever.parameters() if p.requires_grad):,} trained")
    trainer = RetrievalTrainer(
        retriever,
        TrainingArguments(
            str(args.output), max_steps=args.steps, per_device_train_batch_size=args.batch_size, learning_rate=args.lr,
            lr_scheduler_type="cosine", warmup_steps=20, logging_steps=10, save_strategy="no", use_cpu=True,
            remove_unused_columns=False, report_to="none", max_grad_norm=1.0, label_names=[],
        ),
        SearchCollator(processor),
        Searches(args.steps * args.batch_size, tuple(args.tasks)),
    )  # fmt: skip
    trainer.train()
    retriever.eval()
    results = evaluate(retriever.embed, processor, args.pages, 2 * args.pages, dims, tuple(args.tasks))
    for name, measured in results.items():
        print(name, {key: interval(values) for key, values in measured.items()}, flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "log.json").write_text(json.dumps(trainer.state.log_history))


if __name__ == "__main__":
    main()
