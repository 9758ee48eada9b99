"""Choices of the training for retrieval, on small pages: `python -m experiments.retrieval_ablations runs/retrieval`.

Each variant is trained with three seeds from the same adapters of tower and connector (stage `naming` of
`train_retrieval`), as long as the base and on the same pages in the same order, and compared with the base seed by
seed. Intervals are of 95 %, by Student's t over the paired seeds: how far another seed might lie. Pages are of one
tile and of all kinds but small print. A training that is done leaves a file, and is not done again.
"""

import argparse
import csv
import json
import math
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from jina_vlm import JinaVLMProcessor
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import set_seed

from jina_vlm_tools import markdown
from jina_vlm_tools.files import TINY
from jina_vlm_tools.retrieval.embeddings import Embeddings, join
from jina_vlm_tools.retrieval.inputs import prepare
from jina_vlm_tools.retrieval.scores import cut
from jina_vlm_tools.retrieval.training import RetrievalTrainer, Retriever, SearchCollator, Searches, Weights
from jina_vlm_tools.synthetic.pages import draw_page

from .adapters import train_only
from .eval_retrieval import Held, held_out, ndcg
from .grid import STUDENT
from .searching import ADAPTER, DIMS, WIDTH
from .train_retrieval import make_model, train


TASKS = ("shapes", "numbers", "words", "tables", "charts")
RESULTS = Path(__file__).parent / "results" / "retrieval_ablations.csv"


class LastToken(Retriever):
    """Dense vectors are the last token's states, as v5's of Jina."""

    def pool(self, states: torch.Tensor, inputs: dict) -> torch.Tensor:
        last = inputs["attention_mask"].sum(1) - 1
        return states[torch.arange(len(states)), last]


class ImageAlone(Retriever):
    """Of an image, its own tokens alone, not those of the prompt around it, as v4's dense vectors."""

    def mask(self, inputs: dict) -> torch.Tensor:
        if "pixel_values" not in inputs:
            return super().mask(inputs)
        return inputs["input_ids"] == self.model.config.image_token_id


@dataclass(frozen=True)
class Variant:
    """What differs from the base."""

    retriever: type[Retriever] = Retriever
    agreement: float = Weights.agreement
    dims: tuple[int, ...] = tuple(DIMS)
    is_causal: bool = True
    whole_decoder: bool = False  # rather than adapters


VARIANTS = {
    "base: mean of all tokens, adapters": Variant(),
    "last token": Variant(retriever=LastToken),
    "image's tokens alone": Variant(retriever=ImageAlone),
    "without KL": Variant(agreement=0.0),
    "without Matryoshka": Variant(dims=(DIMS[-1],)),
    "attention in both directions": Variant(is_causal=False),
    "all weights of the decoder": Variant(whole_decoder=True),
}
MEASURED = (f"dense {DIMS[-1]}", "dense 32", "late")


def make_retriever(variant: Variant, start: Path) -> Retriever:
    model = make_model(str(TINY))
    set_peft_model_state_dict(model, load_file(start))
    train_only(model, ("connector", "language_model"))
    base = model.get_base_model()
    if variant.whole_decoder:
        for name, parameter in base.named_parameters():
            if "language_model" in name and "embed_tokens" not in name:
                parameter.requires_grad_("lora_" not in name)
    if not variant.is_causal:
        base.config.get_text_config().is_causal = False
        for layer in base.model.language_model.layers:
            layer.self_attn.is_causal = False
    projector = nn.Linear(base.config.get_text_config().hidden_size, WIDTH, bias=False)
    nn.init.orthogonal_(projector.weight)
    return variant.retriever(base, projector, list(variant.dims), Weights(agreement=variant.agreement))


@torch.inference_mode()
def embed(retriever: Retriever, processor, contents: list, role: str, batch: int = 16) -> Embeddings:
    parts = []
    for start in range(0, len(contents), batch):
        inputs = dict(prepare(processor, contents[start : start + batch], role))
        dense, tokens = retriever.embed(inputs)
        kept = retriever.mask(inputs).bool()
        parts.append(Embeddings(cut(dense), [one[mask] for one, mask in zip(tokens, kept, strict=True)]))
    return join(parts)


def evaluate(retriever: Retriever, processor, held: Held) -> dict[str, float]:
    """nDCG@5 of each way of searching, in per cent."""
    queries = embed(retriever, processor, [query.text for query in held.queries], "query")
    pages = embed(retriever, processor, [draw_page(page) for page in held.pages], "document")
    scores = {f"dense {dim}": cut(queries.dense, dim) @ cut(pages.dense, dim).T for dim in (DIMS[-1], 32)}
    scores["late"] = queries.score(pages)
    return {name: 100 * ndcg(one.numpy(), held.relevant).mean() for name, one in scores.items()}


def run(name: str, seed: int, output: Path, start: Path, samples: int) -> dict:
    """One training and its measures."""
    file = output / f"{list(VARIANTS).index(name)}_{seed}.json"
    if file.exists():
        return json.loads(file.read_text())
    torch.set_num_threads(1)
    set_seed(seed)
    processor = JinaVLMProcessor.from_pretrained(TINY, max_tiles=1)
    retriever = make_retriever(VARIANTS[name], start)
    dataset = Searches(samples, TASKS, first_seed=1_000_000 * (seed + 1))
    trained = [parameter for parameter in retriever.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, 3e-3, betas=(0.9, 0.98), weight_decay=0.0)
    began = time.process_time()
    (output / file.stem).mkdir(exist_ok=True)
    train(RetrievalTrainer, retriever, optimizer, SearchCollator(processor), dataset, output / file.stem, 4, seed)
    seconds = time.process_time() - began
    result = evaluate(retriever.eval(), processor, held_out(100, 300, TASKS)) | {"cpu_seconds": round(seconds)}
    file.write_text(json.dumps(result))
    return result


def changes(base: list[dict], results: list[dict]) -> dict[str, tuple[float, float, float]]:
    """Of each measure: the mean, its change, and half of that change's interval."""
    found = {}
    for name in MEASURED:
        differences = [one[name] - other[name] for one, other in zip(results, base, strict=True)]
        half = STUDENT[len(differences) - 1] * statistics.stdev(differences) / math.sqrt(len(differences))
        found[name] = (statistics.mean(one[name] for one in results), statistics.mean(differences), half)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("start", type=Path, help="the output of `train_retrieval`")
    parser.add_argument("--output", type=Path, default=Path("runs/retrieval_ablations"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=600, help="of a training (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    start = args.start / "naming" / ADAPTER
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        running = {
            (name, seed): pool.submit(run, name, seed, args.output, start, args.samples)
            for seed in args.seeds
            for name in VARIANTS
        }
        results = {key: future.result() for key, future in running.items()}
    by_name = {name: [results[name, seed] for seed in args.seeds] for name in VARIANTS}
    base = by_name[next(iter(VARIANTS))]
    rows, lines = [], []
    for name, ones in by_name.items():
        cells = []
        for measure, (mean, change, half) in changes(base, ones).items():
            rows.append(
                [name, measure, f"{mean:.2f}", f"{change:.2f}", f"{change - half:.2f}", f"{change + half:.2f}"]
            )
            said = f"{mean:.1f}"
            if ones is not base:
                said += f"; {change:+.1f} ({change - half:+.1f} to {change + half:+.1f})"
            cells.append(said)
        lines.append([name, *cells, str(round(statistics.mean(one["cpu_seconds"] for one in ones)))])
    with open(RESULTS, "w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened, lineterminator="\n")
        writer.writerows([["variant", "search", "ndcg@5", "change", "low", "high"], *rows])
    print(markdown.table(["Variant", *(f"{name}, nDCG@5" for name in MEASURED), "CPU s a training"], lines))


if __name__ == "__main__":
    main()
