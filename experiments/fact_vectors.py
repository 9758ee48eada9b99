"""Vectors of what a page can show: where queries and pages meet while they are learned.

A fact is its attributes, those that `seeing` reads off an image's tokens: "a red star on the left" has a color, a kind
of shape and a place, "47 in cell B2" two characters, a column and a row. Each character is one more, wherever it
stands: a query's words know their places, counted from the middle, only at their end. A fact's vector is the sum of
its attributes', and half as long are products of these, as a sum of all that a page shows does not say what belongs
together. It is of length 1. The states of a page's tokens learn to be the vectors of what they show, and queries'
words those of what they ask for: so words can be learned without pages, and pages without words. A page's dense
vector, and a query's, is then the sum of its facts'.

All states are of one length, and most tokens of a page show nothing. So vectors leave the states' last two dimensions
free: there lie states of nothing, those of every second column on the other side. So their mean is nothing, and nearly
so is that of the few in whose place something is shown.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from jina_vlm_tools.synthetic.pages import COLUMNS, Page
from jina_vlm_tools.synthetic.searches import Fact
from jina_vlm_tools.synthetic.shapes import COLORS, KINDS, PLACES

from .seeing import NO_CHARACTER, TOKEN_CLASSES, TOKEN_MIDDLES, spelled


CLASSES = TOKEN_CLASSES | {"character": NO_CHARACTER}
STARTS = dict(zip(CLASSES, torch.tensor([0, *CLASSES.values()]).cumsum(0).tolist(), strict=False))
PADDING = sum(CLASSES.values())  # of facts with fewer attributes than others
TEMPERATURE = 0.05
AMOUNT = 3.0  # tokens of an image that show a fact, in sum
SPREAD = 0.7  # of these around its middle, in tokens: a Gaussian's standard deviation
TOLD, EMPTY = 0.5, 0.05  # shares of a fact from which a token is told what it shows, and to which that it is nothing
EMPTY_TOKENS = 200  # of a step's pages, that are told so
PRODUCTS = 64  # of attributes
TOGETHER = 0.5  # how long these are: words and tokens learn the sum first
FAINT = 0.3  # what multi-vectors have, at first, of the plane of nothing


def attributes(fact: Fact) -> list[int]:
    """The numbers of its attributes, of all `CLASSES` in a row."""
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
    characters = spelled(fact.text) if fact.text else []
    found |= {f"character {index}": number for index, number in enumerate(characters)}
    anywhere = [STARTS["character"] + number for number in characters if number != NO_CHARACTER]
    return [STARTS[name] + number for name, number in found.items()] + anywhere


def shown(page: Page) -> list[tuple[Fact, tuple[float, float]]]:
    """All that a page shows, each thing as a whole, and where: its middle, or a bar's end, as parts of the page."""
    width, height = page.scene.size
    found = []
    for shape in page.scene.shapes:
        row, column = divmod(PLACES.index(shape.place), 3)
        middle = (column + shape.center[0]) / 3, (row + shape.center[1]) / 3
        found.append((Fact("shape", shape.color, shape.kind, place=shape.place), middle))
    for text in page.texts:
        x, y = text.middle[0] / width, text.middle[1] / height
        if text.cell is not None:
            fact = Fact("cell", text=text.text, cell=f"{COLUMNS[text.cell[0]]}{text.cell[1] + 1}")
        else:
            kind = "number" if text.text.isdecimal() else "word"
            fact = Fact(kind, text=text.text, place=text.place or PLACES[3 * int(3 * y) + int(3 * x)])
        found.append((fact, (x, y)))
    for bar in page.bars:
        left, top, right, _ = bar.box
        found.append((Fact("bar", bar.color, height=bar.height), ((left + right) / 2 / width, top / height)))
    return found


def shares(
    middles: list[tuple[float, float]], across: torch.Tensor = TOKEN_MIDDLES, down: torch.Tensor = TOKEN_MIDDLES
) -> torch.Tensor:
    """[tokens, things]: how much of each thing each token has, row by row; all of one thing are `AMOUNT` in sum.
    `across` and `down` are the tokens' middles, from 0 to 1."""
    x, y = torch.tensor(middles).reshape(-1, 2).T
    columns, rows = (
        (-((each[:, None] - at) / (each[1] - each[0]) / SPREAD).square() / 2).exp()
        for each, at in ((across, x), (down, y))
    )
    each = (rows[:, None] * columns[None]).flatten(0, 1)
    return (AMOUNT * each / each.sum(0)).clamp(max=0.98)


class FactVectors(nn.Module):
    """
    Args:
        hidden (`int`): Width of the model's states.
    """

    def __init__(self, hidden: int):
        super().__init__()
        self.table = nn.EmbeddingBag(PADDING + 1, hidden - 2, mode="sum", padding_idx=PADDING)
        nn.init.normal_(self.table.weight, std=hidden**-0.5)
        self.left, self.right = (nn.Linear(hidden - 2, PRODUCTS, bias=False) for _ in range(2))
        self.together = nn.Linear(PRODUCTS, hidden - 2, bias=False)

    def forward(self, numbers: torch.Tensor | list[list[int]]) -> torch.Tensor:
        """[facts, hidden] of length 1, of the attributes of each: lists, or [facts, most] filled up with `PADDING`."""
        numbers = numbers if isinstance(numbers, torch.Tensor) else pad(numbers)
        alone = F.normalize(self.table(numbers), dim=-1)
        together = F.normalize(self.together(self.left(alone) * self.right(alone)), dim=-1)
        return F.pad(F.normalize(alone + TOGETHER * together, dim=-1), (0, 2))

    def sums(self, lists: list[list[list[int]]]) -> torch.Tensor:
        """[lists, hidden], of the attributes of several facts each."""
        each = self([numbers for facts in lists for numbers in facts])
        owners = owners_of(torch.tensor([len(facts) for facts in lists]))
        return each.new_zeros(len(lists), each.shape[1]).index_add(0, owners, each)


class Meeting(nn.Module):
    """What is learned beside the adapters: the projector, which is kept, and the vectors, which are not.

    Args:
        hidden (`int`): Width of the model's states, and of dense vectors.
        width (`int`): Of multi-vectors.
    """

    def __init__(self, hidden: int, width: int):
        super().__init__()
        self.projector = nn.Linear(hidden, width, bias=False)
        nn.init.eye_(self.projector.weight)
        self.projector.weight.data[:, -2:] *= FAINT
        self.vectors = FactVectors(hidden)

    def project(self, states: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.projector(states), dim=-1)

    def near_nothing(self, multi: torch.Tensor) -> torch.Tensor:
        """[...], of multi-vectors [..., width]: how near each is to the nearest one of nothing, from 0 to 1."""
        plane = torch.linalg.qr(self.projector.weight[:, -2:]).Q
        return (multi @ plane).norm(dim=-1)

    def name(
        self,
        states: list[torch.Tensor],
        facts: torch.Tensor,
        of_tokens: torch.Tensor,
        nothing: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """How far image tokens' states are from what they show: three losses, of the tokens that show something or
        nothing, of all, and of the sums of each page's.

        Args:
            states: [tokens, hidden] of each page.
            facts: [things, attributes] of all pages, filled up with `PADDING`.
            of_tokens: [tokens, things] of all pages, see [`shares`].
            nothing: [tokens, 2] of all pages, of length 1: where nothing lies there.
        """
        counts = [len(page) for page in states]
        states = F.normalize(torch.cat(states), dim=-1)
        facts_alone = of_tokens @ self.vectors(facts).detach()
        facts_alone = facts_alone / (facts_alone.norm(dim=-1, keepdim=True) / 0.98).clamp(min=1)
        size = facts_alone.square().sum(-1, keepdim=True)
        targets = torch.cat([facts_alone[:, :-2], (1 - size).sqrt() * nothing], dim=1)
        sums, errors = (
            torch.stack([page.sum(0) for page in each.split(counts)]) for each in (facts_alone, states - facts_alone)
        )
        most, which = of_tokens.max(1)
        told = (most > TOLD).nonzero()[:, 0]
        empty = (most < EMPTY).nonzero()[:, 0]
        empty = empty[torch.randperm(len(empty))[:EMPTY_TOKENS]]
        multi = self.project(states[torch.cat([told, empty])])
        different, same = torch.unique(facts, dim=0, return_inverse=True)
        similar = torch.cat([multi @ self.project(self.vectors(different)).T, self.near_nothing(multi)[:, None]], 1)
        return {
            "tokens": distance(similar, torch.cat([same[which[told]], torch.full_like(empty, len(different))])),
            "states": (states - targets).square().sum(-1).mean() / size.mean(),
            "sums": errors.square().sum(-1).mean() / sums.square().sum(-1).mean(),
        }


def nothing(rows: int, columns: int) -> torch.Tensor:
    """[tokens, 2], row by row: where nothing lies, which is on the other side for every second column. Tiles and what
    is left of them where they overlap have an even number of columns: so it is nothing in sum."""
    return around(torch.arange(columns) / 2).repeat(rows, 1)


def around(turns: torch.Tensor) -> torch.Tensor:
    """[turns, 2], of length 1: what lies so many turns around the plane of nothing."""
    angles = 2 * math.pi * turns
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def distance(similar: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
    """A loss that brings vectors to one target each, and away from the others, of their cosines [vectors, targets]."""
    return F.cross_entropy(similar / TEMPERATURE, which) + (1 - similar.gather(1, which[:, None])).mean()


def owners_of(counts: torch.Tensor) -> torch.Tensor:
    """Which query each vector belongs to, of how many each has."""
    return torch.arange(len(counts)).repeat_interleave(counts)


def pad(numbers: list[list[int]]) -> torch.Tensor:
    """[facts, most attributes], filled up with `PADDING`."""
    most = max(map(len, numbers), default=1)
    return torch.tensor([[*each, *[PADDING] * (most - len(each))] for each in numbers]).reshape(-1, most)
