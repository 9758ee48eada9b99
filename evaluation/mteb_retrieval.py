"""Measure a retrieval folder by mteb: `python -m evaluation.mteb_retrieval checkpoints/tiny-retrieval`.

Without `--benchmark`: on the drawn pages of `experiments.eval_retrieval`, as a task of mteb's own kind. With it: on
any benchmark of mteb, such as "ViDoRe(v1)", "ViDoRe(v2)", "ViDoRe(v3)" or "JinaVDR", whose data come from the Hub.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import mteb
from datasets import Dataset, Features, Image, Value
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import MultiVectorWrapper, SentenceTransformerEncoderWrapper
from sentence_transformers import MultiVectorEncoder, SentenceTransformer

from experiments.eval_retrieval import held_out
from jina_vlm_tools.synthetic.pages import draw_page


class DrawnPages(AbsTaskRetrieval):
    """Pages of every kind, with shapes and words that training never draws, searched in six languages."""

    metadata = TaskMetadata(
        name="DrawnPagesRetrieval",
        description="Find drawn pages by what they show.",
        reference=None,
        dataset={"path": "drawn", "revision": "1"},
        type="DocumentUnderstanding",
        category="t2i",
        modalities=["text", "image"],
        eval_splits=["test"],
        eval_langs=["eng-Latn", "deu-Latn", "spa-Latn", "fra-Latn", "ita-Latn", "por-Latn"],
        main_score="ndcg_at_5",
    )
    pages, asked = 500, 1_000

    def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
        if self.data_loaded:
            return
        held = held_out(self.pages, self.asked)
        documents = {"id": [f"page {number}" for number in range(self.pages)], "image": map(draw_page, held.pages)}
        queries = {
            "id": [f"query {number}" for number in range(self.asked)],
            "text": [one.text for one in held.queries],
        }
        shown = Features({"id": Value("string"), "image": Image()})
        relevant = {
            f"query {query}": {f"page {page}": 1 for page in row.nonzero()[0]}
            for query, row in enumerate(held.relevant)
        }
        test = {
            "corpus": Dataset.from_dict({name: list(values) for name, values in documents.items()}, features=shown),
            "queries": Dataset.from_dict(queries),
            "relevant_docs": relevant,
            "top_ranked": None,
        }
        self.dataset = {"default": {"test": test}}
        self.data_loaded = True


def load(folder: str, way: str):
    """The folder as mteb takes it: dense or multi-vectors, in float32, of texts and images."""
    kind = MultiVectorEncoder if way == "late" else SentenceTransformer
    model = kind(folder, trust_remote_code=True, model_kwargs={"dtype": "float32"})
    wrapped = MultiVectorWrapper(model) if way == "late" else SentenceTransformerEncoderWrapper(model)
    # mteb takes models for text's alone, unless they say otherwise.
    wrapped.mteb_model_meta.modalities = ["text", "image"]
    return wrapped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a retrieval folder")
    parser.add_argument("--way", choices=("dense", "late"), default="late", help="of searching (default: %(default)s)")
    parser.add_argument("--benchmark", help="of mteb, in the place of drawn pages")
    parser.add_argument("--json", type=Path, help="write each task's scores here")
    args = parser.parse_args()
    tasks = mteb.get_benchmark(args.benchmark).tasks if args.benchmark else [DrawnPages()]
    results = mteb.evaluate(load(args.model, args.way), tasks, cache=None, encode_kwargs={"batch_size": 16})
    scores = {result.task_name: result.get_score() for result in results.task_results}
    for name, score in scores.items():
        print(f"{name}: {100 * score:.1f}")
    if args.json:
        args.json.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
