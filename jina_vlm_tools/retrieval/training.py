"""Training of adapters and projector for retrieval, on drawn pages, by the library's Trainer."""

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import Trainer

from jina_vlm_tools.synthetic.page_questions import LANGUAGES, TASKS
from jina_vlm_tools.synthetic.pages import TRAINING_WORDS, draw_page
from jina_vlm_tools.synthetic.pages_data import task_page
from jina_vlm_tools.synthetic.searches import facts_of, near_miss, query_about
from jina_vlm_tools.synthetic.shapes import TRAINING_PAIRS

from .inputs import prepare
from .losses import agreement, info_nce, matryoshka
from .scores import cut, late_scores, pool


@dataclass(frozen=True)
class Weights:
    """Of the joint loss's terms, and its temperature."""

    dense: float = 1.0
    late: float = 1.0
    agreement: float = 0.5
    temperature: float = 0.03


class Retriever(nn.Module):
    """A model and its projector, with the joint loss of queries and documents.

    Args:
        model: With adapters, or whole.
        width (`int`): Of multi-vectors.
        dims (`list[int]`): To which dense vectors may be cut.
    """

    def __init__(self, model: nn.Module, width: int, dims: list[int], weights: Weights):
        super().__init__()
        hidden = model.config.get_text_config().hidden_size
        self.model, self.dims, self.weights = model, dims, weights
        self.projector = nn.Linear(hidden, width, bias=False)

    @property
    def base(self) -> nn.Module:
        """The decoder's states come out of it."""
        model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        return model.model

    def embed(self, inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """Dense [batch, hidden] and multi-vectors [batch, length, width], of length 1."""
        states = self.base(**inputs, use_cache=False).last_hidden_state
        return pool(states, inputs["attention_mask"]), F.normalize(self.projector(states.float()), dim=-1)

    def forward(self, queries: dict, documents: dict, relevant: torch.Tensor) -> dict[str, torch.Tensor]:
        (query, query_tokens), (document, document_tokens) = self.embed(queries), self.embed(documents)
        late = late_scores(query_tokens, queries["attention_mask"], document_tokens, documents["attention_mask"])
        temperature, weights = self.weights.temperature, self.weights
        terms = {
            "dense": matryoshka(query, document, relevant, self.dims, temperature),
            "late": info_nce(late, relevant, temperature),
            "agreement": agreement(cut(query) @ cut(document).T, late, temperature),
        }
        return {"loss": sum(getattr(weights, name) * term for name, term in terms.items()), **terms}


class Searches(Dataset):
    """By seed: a page, one that shows nearly the same, and a query that finds the first alone."""

    def __init__(self, length: int, tasks: tuple[str, ...] = TASKS):
        self.length, self.tasks = length, tasks

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, seed: int) -> dict[str, Any]:
        rng = random.Random(f"search {seed}")
        language = rng.choice(list(LANGUAGES))
        page = task_page(rng.choice(self.tasks), rng, TRAINING_PAIRS, TRAINING_WORDS[language])
        return {"page": page, "other": near_miss(page, rng), "query": query_about(page, language, rng)}


class SearchCollator:
    """Queries, and all pages of a batch as documents."""

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        pages = [sample["page"] for sample in samples] + [sample["other"] for sample in samples]
        facts = [facts_of(page) for page in pages]
        relevant = torch.tensor([[sample["query"].finds(shown) for shown in facts] for sample in samples])
        return {
            "queries": dict(prepare(self.processor, [sample["query"].text for sample in samples], "query")),
            "documents": dict(prepare(self.processor, [draw_page(page) for page in pages], "document")),
            "relevant": relevant,
        }


class RetrievalTrainer(Trainer):
    """Logs the loss's terms."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        self.terms = {name: term.item() for name, term in outputs.items() if name != "loss"}
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(
            logs | ({f"loss_{name}": term for name, term in self.terms.items()} if "loss" in logs else {}), start_time
        )
