"""A vector for each fact that a page can show: where queries and pages meet while they are learned.

A fact is its attributes, those that `seeing` reads off an image's tokens: "a red star on the left" has a color, a kind
of shape and a place, "47 in cell B2" two characters, a column and a row. Its vector is the sum of theirs. A page's
tokens learn to be like the vectors of what they show, and queries to be like those of what they ask for: so words can
be learned without pages, and pages without words.
"""

import torch
from torch import nn
from torch.nn import functional as F

from jina_vlm_tools.synthetic.pages import CHARACTERS, COLUMNS, LONGEST
from jina_vlm_tools.synthetic.searches import Fact
from jina_vlm_tools.synthetic.shapes import COLORS, KINDS, PLACES

from .seeing import TOKEN_CLASSES, WORD_END


STARTS = dict(zip(TOKEN_CLASSES, torch.tensor([0, *TOKEN_CLASSES.values()]).cumsum(0).tolist(), strict=False))
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
        flat = torch.tensor([number for each in numbers for number in each])
        starts = torch.tensor([0, *(len(each) for each in numbers[:-1])]).cumsum(0)
        return F.normalize(self.table(flat, starts), dim=-1)

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
