"""The same pages and queries through sentence-transformers: `python -m experiments.train_retrieval_st --output DIR`.

Each row is a query, the page that it finds and one that shows nearly the same. A multi-vector encoder is trained by
the library's own trainer, with the loss that takes large batches apart (GradCache), on new adapters of PEFT. That
library knows no relevance beside the rows: a page that happens to be found by another row's query counts as wrong.
What is written is a retrieval folder, `DIR/retrieval`.
"""

import argparse
import random
from pathlib import Path

import torch
from datasets import Dataset
from jina_vlm import JinaVLMForConditionalGeneration
from sentence_transformers import MultiVectorEncoder, MultiVectorEncoderTrainer, MultiVectorEncoderTrainingArguments
from sentence_transformers.multi_vector_encoder.losses import CachedMultiVectorMultipleNegativesRankingLoss

from jina_vlm_tools.files import TINY
from jina_vlm_tools.retrieval.folder import write_folder
from jina_vlm_tools.retrieval.inputs import PROMPTS
from jina_vlm_tools.retrieval.training import Searches
from jina_vlm_tools.synthetic.pages import draw_page
from jina_vlm_tools.training.lora import add_adapters
from jina_vlm_tools.training.stages import LoraSettings


def rows(samples: int, tasks: tuple[str, ...], first_seed: int) -> Dataset:
    """Of `Searches`, whose pages are looked for by their first query."""
    searches, drawn = Searches(samples, tasks, queries=1, first_seed=first_seed), []
    for index in range(samples):
        page, other = searches[index]
        query = random.Random(index).choice(page["queries"]).text
        drawn.append({"query": query, "document": draw_page(page["page"]), "negative": draw_page(other["page"])})
    return Dataset.from_list(drawn)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TINY))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=320)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--chunk", type=int, default=4, help="pages at a time (default: %(default)s)")
    args = parser.parse_args()
    encoder = MultiVectorEncoder(
        args.model,
        trust_remote_code=True,
        prompts=PROMPTS,
        device="cpu",
        model_kwargs={"dtype": torch.float32},
        processor_kwargs={"tiles_by_sample": True},
    )
    processor = encoder[0].processor
    processor.image_processor.max_tiles = 1
    # By PEFT itself: transformers asks for a newer one than there is.
    model = JinaVLMForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32)
    model = add_adapters(model, LoraSettings(8, 8, parts=["connector", "decoder"]))
    encoder[0].model = model.get_base_model().model
    trainer = MultiVectorEncoderTrainer(
        encoder,
        MultiVectorEncoderTrainingArguments(
            str(args.output / "run"), num_train_epochs=1, per_device_train_batch_size=args.batch_size,
            learning_rate=2e-3, warmup_steps=2, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True,
            prompts={"query": PROMPTS["query"], "document": PROMPTS["document"], "negative": PROMPTS["document"]},
        ),
        rows(args.samples, ("shapes",), 0),
        loss=CachedMultiVectorMultipleNegativesRankingLoss(encoder, mini_batch_size=args.chunk),
    )  # fmt: skip
    trainer.train()
    weight = encoder[1].linear.weight.detach()
    write_folder(args.output / "retrieval", model, weight, processor, base=args.model, replace=True)


if __name__ == "__main__":
    main()
