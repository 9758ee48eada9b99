"""Vectors of what a page can show: where queries and pages meet while they are learned.

A fact is its attributes, those that `seeing` reads off an image's tokens: "a red star on the left" has a color, a kind
of shape and a place, "47 in cell B2" two characters, a column and a row. Its vector is the sum of theirs. A page's
tokens learn to be like the vectors of what they show, and queries to be like those of what they ask for: so words can
be learned without pages, and pages without words. What a query asks for as a whole has a dense vector likewise.
"""

import torch
from torch import nn
from torch.nn import functional as F

from jina_vlm_tools.synthetic.pages import CHARACTERS, COLUMNS, LONGEST
from jina_vlm_tools.synthetic.searches import Fact
from jina_vlm_tools.synthetic.shapes import COLORS, KINDS, PLACES

from .seeing import TOKEN_CLASSES, WORD_END


STARTS = dict(zip(TOKEN_CLASSES, torch.tensor([0, *TOKEN_CLASSES.values()]).cumsum(0).tolist(), strict=False))
SAYING = [index for index, name in enumerate(TOKEN_CLASSES) if name != "place"]  # every token has a place
TEMPERATURE = 0.05
MOST_TOKENS = 1500  # of a step's pages, that are told what they show
EMPTY = 200  # tokens, most of which show nothing
NOTHING = STARTS["kind"]  # class 0 of `kind`: no fact has it


def attributes(fact: Fact) -> list[int]:
    """The numbers of its attributes, of all classes of `TOKEN_CLASSES` in a row."""
    found = {}
    if fact.place:
        found["place"] = PLACES.index(fact.place)
    if fact.color:
        found["color"] = 1 + list(COLORS).index(fact.color)
    if fact.shape:
        found["kind"] = 1 + KINDS.index(fact.shape)
    if fact.height:
        found["height"] = fact.height
    if fact.cell:
        found["column"], found["row"] = 1 + COLUMNS.index(fact.cell[0]), int(fact.cell[1:])
    if fact.text:
        spelled = [1 + CHARACTERS.index(character) for character in fact.text] + [WORD_END]
        found |= {f"character {index}": number for index, number in enumerate(spelled[:LONGEST])}
    return [STARTS[name] + number for name, number in found.items()]


class FactVectors(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.table = nn.EmbeddingBag(sum(TOKEN_CLASSES.values()), width, mode="sum")
        nn.init.normal_(self.table.weight, std=width**-0.5)

    def forward(self, numbers: list[list[int]]) -> torch.Tensor:
        """[facts, width] of length 1, of the attributes of each."""
        return F.normalize(self.table(*flatten(numbers)), dim=-1)

    def of_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """[rows, width] of length 1, of rows of `token_labels`: what each token shows, as facts have it. Places are
        not told of bars and cells, nor a word's end twice."""
        of = {name: labels[:, index] for index, name in enumerate(TOKEN_CLASSES)}
        shown = {name: each > 0 for name, each in of.items()}
        for index in range(1, LONGEST):
            shown[f"character {index}"] &= of[f"character {index - 1}"] != WORD_END
        is_something = torch.stack([each for name, each in shown.items() if name != "place"]).any(0)
        shown["place"] = is_something & ~(shown["height"] | shown["column"])
        shown["kind"] |= ~is_something
        is_shown = torch.stack(list(shown.values()), 1)
        numbers = labels + torch.tensor(list(STARTS.values()))
        return F.normalize(self.table(numbers[is_shown], is_shown.sum(1).cumsum(0) - is_shown.sum(1)), dim=-1)


class DenseVectors(nn.Module):
    """Of several facts as one: the sum over them of what a hidden layer makes of each one's attributes."""

    def __init__(self, width: int):
        super().__init__()
        self.table = nn.EmbeddingBag(sum(TOKEN_CLASSES.values()), 2 * width, mode="sum")
        self.out = nn.Linear(2 * width, width)

    def forward(self, queries: list[list[list[int]]]) -> torch.Tensor:
        """[queries, width], of the attributes of each one's facts; not normalized."""
        facts = [numbers for query in queries for numbers in query]
        counts = torch.tensor([len(query) for query in queries])
        each = self.out(F.gelu(self.table(*flatten(facts))))
        return each.new_zeros(len(queries), each.shape[1]).index_add(0, owners_of(counts), each)


class Meeting(nn.Module):
    """What is learned beside the adapters: the projector, which is kept, and the vectors, which are not.

    Args:
        hidden (`int`): Width of the model's states, and of dense vectors.
        width (`int`): Of multi-vectors.
    """

    def __init__(self, hidden: int, width: int):
        super().__init__()
        self.projector = nn.Linear(hidden, width, bias=False)
        nn.init.orthogonal_(self.projector.weight)
        self.vectors, self.dense = FactVectors(width), DenseVectors(hidden)

    def project(self, states: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.projector(states), dim=-1)

    def name(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """How far image tokens [tokens, width] are from the vectors of what they show, and near others': a loss.
        `labels` [tokens, questions] are `token_labels`."""
        kept = torch.cat([(labels[:, SAYING] > 0).any(1).nonzero()[:, 0], torch.randint(len(labels), (EMPTY,))])
        kept = kept[torch.randperm(len(kept))[:MOST_TOKENS]]
        different, which = labels[kept].unique(dim=0, return_inverse=True)
        return distance(tokens[kept], self.vectors.of_labels(different), which)


def distance(vectors: torch.Tensor, targets: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
    """A loss that brings vectors to one of `targets` each, and away from the others. All are of length 1."""
    similar = vectors @ targets.T
    return F.cross_entropy(similar / TEMPERATURE, which) + (1 - similar.gather(1, which[:, None])).mean()


def owners_of(counts: torch.Tensor) -> torch.Tensor:
    """Which query each vector belongs to, of how many each has."""
    return torch.arange(len(counts)).repeat_interleave(counts)


def flatten(lists: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """As `EmbeddingBag` takes them: all numbers, and where each list starts."""
    counts = torch.tensor([len(each) for each in lists])
    return torch.tensor([number for each in lists for number in each]), counts.cumsum(0) - counts
