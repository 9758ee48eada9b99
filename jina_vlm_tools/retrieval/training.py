"""Training of an adapter and a projector for retrieval, on drawn pages, by the library's Trainer."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import Trainer

from jina_vlm_tools.synthetic.page_questions import LANGUAGES, TASKS
from jina_vlm_tools.synthetic.pages import Page, draw_page
from jina_vlm_tools.synthetic.pages_data import task_page
from jina_vlm_tools.synthetic.searches import facts_of, near_miss, query_about, relevance
from jina_vlm_tools.synthetic.shapes import TRAINING_PAIRS

from .inputs import prepare
from .losses import agreement, cosent, info_nce, matryoshka
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
        model ([`JinaVLMForConditionalGeneration`]): With adapters, or whole.
        projector (`nn.Linear`): To multi-vectors.
        dims (`list[int]`): To which dense vectors may be cut.
        weights (`Weights`): Of the loss's terms.
        sees (`bool`): Whether the tower is trained. Else it sees each distinct tile once, without gradients.
    """

    def __init__(self, model: nn.Module, projector: nn.Linear, dims: list[int], weights: Weights, sees: bool = False):
        super().__init__()
        self.model, self.projector, self.dims, self.weights = model, projector, dims, weights
        if not sees:
            tower = model.model.vision_model
            tower.forward = torch.no_grad()(tower.forward)

    def activation_checkpointing_enable(self, **kwargs) -> None:
        self.model.activation_checkpointing_enable(**kwargs)

    gradient_checkpointing_enable = activation_checkpointing_enable  # until 5.23

    def state_dict(self, *args, **kwargs) -> dict[str, torch.Tensor]:
        """What is trained: a checkpoint of a run has no base in it."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return {name: tensor for name, tensor in super().state_dict(*args, **kwargs).items() if name in trained}

    def load_state_dict(self, state_dict: dict[str, torch.Tensor], *args, **kwargs):
        """Load what [`state_dict`] gave. The base stays."""
        return super().load_state_dict({**super().state_dict(), **state_dict}, *args, **kwargs)

    def mask(self, inputs: dict) -> torch.Tensor:
        """Which tokens count [batch, length]: all real ones."""
        return inputs["attention_mask"]

    def pool(self, states: torch.Tensor, inputs: dict) -> torch.Tensor:
        """Dense vectors [batch, hidden], not normalized."""
        return pool(states, self.mask(inputs))

    def embed(self, inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """Dense [batch, hidden], not normalized, and multi-vectors [batch, length, width] of length 1."""
        states = self.model.model(**inputs, use_cache=False).last_hidden_state.float()
        return self.pool(states, inputs), F.normalize(self.projector(states), dim=-1)

    def forward(
        self, queries: dict, documents: list[dict], own: torch.Tensor, relevant: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            queries (`dict`): Model inputs.
            documents (`list[dict]`): Model inputs of several batches, each as long as its longest.
            own (`torch.Tensor` [queries], int64), relevant (`torch.Tensor` [queries, documents], bool): See
                [`losses.info_nce`].
        """
        query, query_tokens = self.embed(queries)
        embedded = [self.embed(group) for group in documents]
        document = torch.cat([dense for dense, _ in embedded])
        late = torch.cat(
            [
                late_scores(query_tokens, self.mask(queries), tokens, self.mask(group))
                for (_, tokens), group in zip(embedded, documents, strict=True)
            ],
            dim=1,
        )
        temperature, weights = self.weights.temperature, self.weights
        terms = {
            "dense": matryoshka(query, document, own, relevant, self.dims, temperature),
            "late": info_nce(late, own, relevant, temperature),
            "agreement": agreement(cut(query) @ cut(document).T, late, temperature),
        }
        return {"loss": sum(getattr(weights, name) * term for name, term in terms.items()), **terms}


class Matcher(Retriever):
    """A model with a loss that orders pairs by how alike they are, of dense vectors of each width (CoSENT)."""

    def forward(self, queries: dict, documents: list[dict], truth: torch.Tensor, **_) -> dict[str, torch.Tensor]:
        """
        Args:
            queries (`dict`), documents (`list[dict]`): Model inputs, pair by pair.
            truth (`torch.Tensor` [pairs]): How alike they are.
        """
        query, document = self.embed(queries)[0], torch.cat([self.embed(group)[0] for group in documents])
        losses = [cosent((cut(query, dim) * cut(document, dim)).sum(-1), truth) for dim in self.dims]
        return {"loss": torch.stack(losses).mean()}


class Searches(Dataset):
    """A page, one that shows nearly the same, and queries about each.

    Args:
        tasks: Kinds of pages, of `page_questions.TASKS`, each as often as it stands there.
        queries (`int`): About each page.
        first_seed (`int`): Of the first sample.
    """

    def __init__(self, length: int, tasks: Sequence[str] = TASKS, queries: int = 3, first_seed: int = 0):
        self.length, self.tasks, self.queries, self.first_seed = length, tasks, queries, first_seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        if not 0 <= index < self.length:
            raise IndexError(index)
        rng, pages = self._draw(index)
        return [
            {
                "page": page,
                "queries": [query_about(page, rng.choice(list(LANGUAGES)), rng) for _ in range(self.queries)],
            }
            for page in pages
        ]

    def pages(self, index: int) -> tuple[Page, Page]:
        """A sample's pages, without queries."""
        return self._draw(index)[1]

    def _draw(self, index: int) -> tuple[random.Random, tuple[Page, Page]]:
        rng = random.Random(f"search {self.first_seed + index}")
        page = task_page(rng.choice(self.tasks), rng, TRAINING_PAIRS)
        return rng, (page, near_miss(page, rng))


class SearchCollator:
    """Queries, and the pages of a batch as documents, in two groups by their length, for the less padding."""

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, samples: list[list[dict[str, Any]]]) -> dict[str, Any]:
        shown = [page for sample in samples for page in sample]
        shown.sort(key=self._tokens)
        half = next((k for k, page in enumerate(shown) if self._tokens(page) > self._tokens(shown[0])), len(shown))
        groups = [group for group in (shown[:half], shown[half:]) if group]
        queries = [(number, query) for number, page in enumerate(shown) for query in page["queries"]]
        facts = [facts_of(page["page"]) for page in shown]
        return {
            "queries": dict(prepare(self.processor, [query.text for _, query in queries], "query")),
            "documents": [self.prepare_pages(group) for group in groups],
            "own": torch.tensor([number for number, _ in queries]),
            "relevant": torch.tensor(relevance([query for _, query in queries], facts)),
        }

    def prepare_pages(self, pages: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Model inputs of pages."""
        return dict(prepare(self.processor, [draw_page(page["page"]) for page in pages], "document"))

    def _tokens(self, page: dict[str, Any]) -> int:
        width, height = page["page"].scene.size
        return self.processor._get_num_multimodal_tokens([(height, width)]).num_image_tokens[0]


class RetrievalTrainer(Trainer):
    """Logs the loss's terms."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        self.terms = {name: term.item() for name, term in outputs.items() if name != "loss"}
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        terms = {f"loss_{name}": term for name, term in self.terms.items()} if "loss" in logs else {}
        super().log(logs | terms, start_time)
