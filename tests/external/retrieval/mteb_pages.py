"""A task of mteb whose data is made here."""

from cases import cases, of_role
from datasets import Dataset
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata


PAGES = [
    name for name in of_role("document") if set(cases()[name][1]) == {"image"} and len(cases()[name][1]["image"]) == 1
]
RELEVANT = dict(zip(of_role("query"), PAGES, strict=True))


class Pages(AbsTaskRetrieval):
    """Texts that look for images."""

    metadata = TaskMetadata(
        name="DrawnPages",
        description="Drawn shapes, by what is said of them.",
        dataset={"path": "drawn/pages", "revision": "0"},
        type="DocumentUnderstanding",
        category="t2i",
        modalities=["text", "image"],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="ndcg_at_5",
    )

    def load_data(self, **kwargs) -> None:
        queries = of_role("query")
        self.dataset = {
            "default": {
                "test": {
                    "queries": Dataset.from_dict(
                        {"id": queries, "text": [cases()[name][1]["text"] for name in queries]}
                    ),
                    "corpus": Dataset.from_dict(
                        {"id": PAGES, "image": [cases()[name][1]["image"][0] for name in PAGES]}
                    ),
                    "relevant_docs": {query: {page: 1} for query, page in RELEVANT.items()},
                    "top_ranked": None,
                }
            }
        }
        self.data_loaded = True
