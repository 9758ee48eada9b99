"""Queries and pages learn to meet: the stages of `train_retrieval` that need no tower.

`meeting`: facts' vectors learn to find pages that are made of them. `naming`: pages, as the tower sees them, learn to
be found by these vectors, by a new connector and the projector, and the vectors learn what can be told apart there.
`telling`: the decoder's adapter learns to bring queries there; facts' vectors stand for most pages, of which it reads
only the words around an image, which learn to be nothing.
"""

import argparse
import functools
import json
import math
import random
import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jina_vlm import JinaVLMProcessor
from peft import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling

from jina_vlm_tools.retrieval.inputs import to_chat
from jina_vlm_tools.retrieval.losses import info_nce, matryoshka
from jina_vlm_tools.retrieval.scores import cut, pool
from jina_vlm_tools.retrieval.training import Searches
from jina_vlm_tools.synthetic.page_questions import LANGUAGES
from jina_vlm_tools.synthetic.pages import Page
from jina_vlm_tools.synthetic.searches import PHRASES, Fact, Query, facts_of, query_about, relevance, say
from jina_vlm_tools.training.muon import OTHERS, Muon

from .adapters import train_only
from .eval_retrieval import held_out, ndcg
from .fact_vectors import (
    TEMPERATURE,
    FactVectors,
    Meeting,
    around,
    attributes,
    distance,
    nothing,
    owners_of,
    pad,
    shares,
    shown,
)
from .precision import reduced_precision
from .whole_weights import WholeWeights


WIDTH = 128  # of multi-vectors
DIMS = [16, 32, 64, 128]  # to which dense vectors are cut
# Of pages that are seen, 32 numbers lose most, and count more often than others.
NAMED_DIMS = [16, *3 * [32], 64, 128]
TOLD_DIMS = [16, *8 * [32], 64, 128]
QUERIES = 3  # about each page of a step
PAGE_EVERY = 2  # steps of telling: its words take as long as all queries of a step
SHORT = 0.01  # of the median: image tokens less long than that are changed by the decoder
AROUND_FIRST = 300  # pages of telling, in which each token around an image learns where to be
IN_SUM = 0.3  # of the loss: how long what shows nothing is in sum
AROUND_IN_SUM = 0.01  # of the loss: the square of how long what is around an image is; its length would outweigh all
SUMS = 0.3  # of the loss: how far queries' states are in sum from their facts'
SAID = 1.5  # tokens of a query that say a fact, in sum
SEEN = 1000  # pages among which queries find one that was looked at
READ_TOGETHER = 48  # queries
CUT_BY = 40  # steps' pages, from which the connector's adapters are made: by those of one, up to 2 points are lost


@dataclass(frozen=True)
class Settings:
    """Of a stage: its steps, pairs of pages of each, and what is learned at which rate."""

    steps: int
    pairs: int
    rate: float
    parts: tuple[str, ...]


MEETING_FACTS = Settings(500, 48, 1.8e-2, ())
NAMING = Settings(1500, 12, 2e-2, ())
MAPPING = Settings(60, 80, 3e-3, ())
TELLING = Settings(1500, 24, 2e-2, ("language_model",))
SHARP = 0.01  # temperature of scores that are means over a query's words, of which few say anything
ADAPTER, MEETING = "adapter.safetensors", "meeting.safetensors"
DENSE = 0.03  # temperature of single vectors


class Seen(nn.Module):
    """In the tower's place: gives back what it saw."""

    def forward(self, features: torch.Tensor, **_) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=features.squeeze(1))


class Pages:
    """Pages in pairs that show nearly the same, and what the tower saw of them, which is read when it is asked for."""

    def __init__(self, looked: Path, number: int, rng: random.Random):
        drawn = Searches(number)
        self.pairs = [drawn.pages(index) for index in range(number)]
        files = [safe_open(file, "pt") for file in sorted(looked.glob("pages-*.safetensors"))]
        self.files = {name: file for file in files for name in file.offset_keys()}
        self.rng, self.left, self.by_length = rng, [], {}
        for name, file in self.files.items():
            if name.endswith(".prompt"):
                [length] = file.get_slice(name).get_shape()
                self.by_length.setdefault(length, []).append(name.removesuffix(".prompt"))

    def next(self, pairs: int) -> tuple[list[Page], torch.Tensor, list[torch.Tensor]]:
        """Pages in a random order, each once before any again: with their tiles' features and positions."""
        return self.at(self.draw(pairs))

    def draw(self, pairs: int) -> list[int]:
        """Pairs in a random order, each once before any again."""
        if len(self.left) < pairs:
            self.left = self.rng.sample(range(len(self.pairs)), len(self.pairs))
        return [self.left.pop() for _ in range(pairs)]

    def at(self, drawn: list[int]) -> tuple[list[Page], torch.Tensor, list[torch.Tensor]]:
        """Both pages of each pair, with their tiles' features and positions."""
        seen = [self._tiles(f"{index}.{half}") for index in drawn for half in range(2)]
        return self.pages(drawn), torch.cat([features for features, _ in seen]), [positions for _, positions in seen]

    def pages(self, drawn: list[int]) -> list[Page]:
        return [page for index in drawn for page in self.pairs[index]]

    def of_each_length(self, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One page, of each length of a prompt in turn: its tiles' features, positions and prompt."""
        lengths = sorted(self.by_length)
        place = self.rng.choice(self.by_length[lengths[number % len(lengths)]])
        return *self._tiles(place), self._tensor(f"{place}.prompt")

    def size(self) -> torch.Tensor:
        """How large features are: the root mean square of one page's."""
        return self._tiles("0.0")[0].square().mean().sqrt()

    def _tiles(self, place: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Features and positions of a page's tiles."""
        features, which, positions = (self._tensor(f"{place}.{name}") for name in ("features", "which", "positions"))
        return features[which].float(), positions

    def _tensor(self, name: str) -> torch.Tensor:
        return self.files[name].get_tensor(name)


@dataclass
class Asked:
    """Queries about pages, and pages' facts: which page each query is about [queries], and which it finds [queries,
    pages]."""

    queries: list[Query]
    shown: list[frozenset[Fact]]
    own: torch.Tensor
    relevant: torch.Tensor

    @functools.cached_property
    def sought(self) -> list[list[list[int]]]:
        """Of each query, its facts' attributes."""
        return [[attributes(fact) for fact in query.facts] for query in self.queries]

    @functools.cached_property
    def things(self) -> list[list[list[int]]]:
        """Of each page, the attributes of all that it shows, each thing as a whole."""
        return [[attributes(fact) for fact in facts if is_whole(fact)] for facts in self.shown]

    @classmethod
    def about(cls, pages: list[Page], rng: random.Random) -> "Asked":
        """`QUERIES` about each page."""
        return cls._of(pages, [[_ask(page, rng) for _ in range(QUERIES)] for page in pages])

    @classmethod
    def of_facts(cls, pages: list[Page], rng: random.Random) -> "Asked":
        """Of each page one for each of its facts, which has no words, and `QUERIES` about it."""

        def all_about(page: Page) -> list[Query]:
            alone = [Query(frozenset({fact}), "", "") for fact in sorted(facts_of(page), key=repr)]
            return alone + [_ask(page, rng) for _ in range(QUERIES)]

        return cls._of(pages, [all_about(page) for page in pages])

    @classmethod
    def _of(cls, pages: list[Page], queries: list[list[Query]]) -> "Asked":
        shown, flat = [facts_of(page) for page in pages], [query for each in queries for query in each]
        own = owners_of(torch.tensor([len(each) for each in queries]))
        return cls(flat, shown, own, torch.tensor(relevance(flat, shown)))


def _ask(page: Page, rng: random.Random) -> Query:
    return query_about(page, rng.choice(list(LANGUAGES)), rng)


def best_matches(
    tokens: torch.Tensor, owners: torch.Tensor, pages: list[torch.Tensor], least: torch.Tensor | None = None
) -> torch.Tensor:
    """Late interaction [queries, pages]: for each query the mean, over its vectors, of the best match among a page's.

    Args:
        tokens: [vectors, width], of all queries.
        owners: [vectors] int64, which query each belongs to, in order.
        pages: Vectors [*, width] of each.
        least: [vectors], what each one matches on any page.
    """
    best = torch.stack([(tokens @ page.T).max(1).values for page in pages], 1)
    if least is not None:
        best = torch.maximum(best, least[:, None])
    counts = owners.bincount()
    return torch.zeros(len(counts), len(pages)).index_add(0, owners, best) / counts[:, None]


class Learner:
    """What learns: a model with adapters, and what they meet in."""

    def __init__(self, model, processor: JinaVLMProcessor, output: Path, seed: int = 0):
        self.model, self.processor, self.output = model, processor, output
        self.rng = random.Random(seed)
        self.base = model.get_base_model().model
        self.adapters = get_peft_model_state_dict(model)  # with the tower's, which is left out from here on
        self.base.vision_model = Seen()
        self.meeting = Meeting(model.config.get_text_config().hidden_size, WIDTH)
        template = processor.apply_chat_template(to_chat("WORDS", "query"), tokenize=False)
        self.before, self.after = template.split("WORDS")

    def load(self, folder: Path) -> None:
        self.meeting.load_state_dict(load_file(folder / MEETING))

    def save(self) -> None:
        save_file({**self.adapters, **get_peft_model_state_dict(self.model)}, self.output / ADAPTER)
        save_file(self.meeting.state_dict(), self.output / MEETING)

    def connect(self, features: torch.Tensor, positions: list[torch.Tensor]) -> list[torch.Tensor]:
        """[tokens, hidden] of each page's image, as the decoder is given them."""
        with reduced_precision():
            return self.base.get_image_features(features[:, None], torch.cat(positions)).pooler_output

    def look(self, images: list[torch.Tensor]) -> list[torch.Tensor]:
        """Last states [tokens, hidden] of each page's image tokens, which this decoder leaves as they are."""
        return [self.base.language_model.norm(image.float()) for image in images]

    def shares(self, middles: list[tuple[float, float]], positions: torch.Tensor) -> torch.Tensor:
        """`fact_vectors.shares` of a page's image tokens: of its thumbnail, then of its tiles."""
        rows, columns = self.grid(positions)
        middles_of_tokens = [(torch.arange(size) + 0.5) / size for size in (columns, rows)]
        return torch.cat([shares(middles), shares(middles, *middles_of_tokens)])

    def nothing(self, positions: torch.Tensor) -> torch.Tensor:
        """[tokens, 2]: `fact_vectors.nothing` of a page's image tokens."""
        thumbnail = self.processor.image_processor.get_token_grid(1, 1)
        return torch.cat([nothing(*thumbnail), nothing(*self.grid(positions))])

    def grid(self, positions: torch.Tensor) -> tuple[int, int]:
        """Rows and columns of tokens of all of an image's tiles."""
        return self.processor.image_processor.get_token_grid(*positions[0, 2:].tolist())

    def read_page(self, image: torch.Tensor, prompt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Last states [tokens, hidden] of a page, and which of its tokens are the image's [tokens]."""
        seen = BaseModelOutputWithPooling(pooler_output=[image])
        with reduced_precision():
            read = self.base(input_ids=prompt[None], mm_encoder_outputs={"image": seen}, use_cache=False)
        return read.last_hidden_state[0].float(), prompt == self.model.config.image_token_id

    def read(self, queries: list[Query]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Last states [queries, length, hidden], mask [queries, length], places in the text [queries, length, 2].
        Queries of about one length are read together: else three tokens of five would be padding."""
        inputs = self.processor.tokenizer(
            [self.before + query.text + self.after for query in queries], add_special_tokens=False, padding=True,
            padding_side="right", return_tensors="pt", return_offsets_mapping=True,
        )  # fmt: skip
        places = inputs.pop("offset_mapping") - len(self.before)
        ids, mask, states = inputs["input_ids"], inputs["attention_mask"], []
        lengths = mask.sum(1)
        order = lengths.argsort()
        with reduced_precision():
            for which in order.split(READ_TOGETHER):
                length = int(lengths[which[-1]])
                read = self.base(input_ids=ids[which, :length], attention_mask=mask[which, :length], use_cache=False)
                states.append(F.pad(read.last_hidden_state.float(), (0, 0, 0, ids.shape[1] - length)))
        return torch.cat(states)[order.argsort()], mask.bool(), places

    def learn(self, settings: Settings, terms_of: Callable[[int], dict[str, torch.Tensor]]) -> None:
        """So many steps, down a cosine: adapters of the settings' parts, and what has whole weights, by Muon; vectors
        and projector by AdamW."""
        train_only(self.model, settings.parts)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for layer in self.base.language_model.layers:
            layer.compile(dynamic=True)
        steps, rate = settings.steps, settings.rate
        met = [parameter for parameter in self.meeting.parameters() if parameter.requires_grad]
        by_muon = {"params": trained, "rate": rate, "matrices": True}
        by_adamw = {"params": met, "rate": OTHERS * rate, "matrices": False}
        optimizer = Muon([{**group, "lr": 0.0, "weight_decay": 0.0} for group in (by_muon, by_adamw)])
        log, started = [], time.perf_counter()
        for step in range(steps):
            share = min(1, (step + 1) / 30) * 0.5 * (1 + math.cos(math.pi * step / steps))
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * share
            terms = terms_of(step)
            optimizer.zero_grad()
            sum(terms.values()).backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            log.append({"step": step, **{name: round(term.item(), 4) for name, term in terms.items()}})
            if step % 25 == 24:
                print(json.dumps(log[-1] | {"seconds": round(time.perf_counter() - started)}), flush=True)
        (self.output / "log.json").write_text(json.dumps(log))


class SeenPages:
    """Single vectors of all pages that were looked at, [pairs, 2, hidden], and what each shows."""

    @torch.no_grad()
    def __init__(self, learner: Learner, looked: Pages):
        self.rng = learner.rng
        vectors = []
        for index in range(len(looked.pairs)):
            _, features, positions = looked.at([index])
            images = learner.look(learner.connect(features, positions))
            vectors.append(torch.stack([image.mean(0) for image in images]))
        self.vectors = torch.stack(vectors)
        self.shown = [[facts_of(page) for page in pair] for pair in looked.pairs]

    def among(self, drawn: list[int]) -> tuple[torch.Tensor, list[frozenset[Fact]]]:
        """Vectors [pages, hidden] of these pairs' pages, and of others up to `SEEN`; and what they show."""
        others = sorted({*range(len(self.shown))} - {*drawn})
        number = max(0, min(len(others), SEEN // 2 - len(drawn)))
        which = [*drawn, *self.rng.sample(others, number)]
        return self.vectors[which].flatten(0, 1), [shown for index in which for shown in self.shown[index]]


def naming_terms(
    learner: Learner, pages: list[Page], positions: list[torch.Tensor], images: list[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Pages are found by the vectors of facts, of each alone and of several; each token is told what it shows.

    Args:
        images: States [tokens, hidden] of each page's image tokens.
    """
    meeting = learner.meeting
    asked = Asked.of_facts(pages, learner.rng)
    sought = asked.sought
    named = meeting.project(meeting.vectors([numbers for facts in sought for numbers in facts]))
    owners = owners_of(torch.tensor([len(facts) for facts in sought]))
    tokens, dense = [meeting.project(image) for image in images], torch.stack([image.mean(0) for image in images])
    found = [shown(page) for page in pages]
    parts = [learner.shares([middle for _, middle in each], at) for each, at in zip(found, positions, strict=True)]
    facts = pad([attributes(fact) for each in found for fact, _ in each])
    empty = torch.cat([learner.nothing(at) for at in positions])
    return {
        "facts": info_nce(best_matches(named, owners, tokens), asked.own, asked.relevant, TEMPERATURE),
        "dense facts": matryoshka(meeting.vectors.sums(sought), dense, asked.own, asked.relevant, NAMED_DIMS, DENSE),
        "nothing": IN_SUM * in_sum(images)[1],
        **meeting.name(images, facts, torch.block_diag(*parts), empty),
    }


def in_sum(all_states: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """How long states [tokens, hidden] are in sum, in tokens: outside of the plane of nothing, and there."""
    sums = torch.stack([F.normalize(states, dim=-1).sum(0) for states in all_states])
    return sums[:, :-2].norm(dim=-1).mean(), sums[:, -2:].norm(dim=-1).mean()


def around_terms(learner: Learner, looked: Pages, number: int) -> dict[str, torch.Tensor]:
    """What is around an image shows nothing, and is nothing in sum, however much there is: from token to token it goes
    around the plane of nothing. A decoder can learn that, as it turns by as much as the second pair of rotary
    embeddings. By the first, a radian a token, all ends of rows of 24 tokens would lie on one side.

    Image tokens that are too short for the decoder to leave them as they are learn to come out as they were."""
    features, positions, prompt = looked.of_each_length(number)
    with torch.no_grad():
        image = learner.connect(features, [positions])[0]
    read, of_image = learner.read_page(image, prompt)
    turn = learner.base.language_model.rotary_emb.inv_freq[1]
    places = (~of_image).nonzero()[:, 0]
    turned = F.pad(around(places * turn / (2 * math.pi)), (read.shape[1] - 2, 0))
    lengths = image.norm(dim=-1)
    short = lengths < SHORT * lengths.median()
    words = read[~of_image]
    states, targets = torch.cat([words, read[of_image][short]]), torch.cat([turned, *learner.look([image[short]])])
    return {
        "around": (F.normalize(states, dim=-1) - F.normalize(targets, dim=-1)).square().sum(-1).mean(),
        "nothing around": (number >= AROUND_FIRST) * AROUND_IN_SUM * sum(each.square() for each in in_sum([words])),
    }


def told(asked: Asked, places: torch.Tensor) -> Iterator[tuple[int, int, Fact]]:
    """What tokens of queries say: (query, token, fact), the first token after each fact's phrase. At its last one, a
    decoder cannot know that: "a red star" may go on "on the left", and any number by one more digit."""
    for number, query in enumerate(asked.queries):
        joint = PHRASES[query.language]["and"]
        for fact in query.facts:
            phrase = say(fact, query.language)
            end = f"{query.text}{joint}".index(phrase + joint) + len(phrase)
            after = [token for token, (begin, _) in enumerate(places[number].tolist()) if begin >= end]
            yield number, after[0], fact


def word_terms(learner: Learner, asked: Asked, states, mask, places) -> dict[str, torch.Tensor]:
    """Queries' words are near what they say, or near nothing, and find pages that are made of facts' vectors."""
    meeting, words = learner.meeting, learner.meeting.project(states)
    things = asked.things
    flat = meeting.project(meeting.vectors([numbers for page in things for numbers in page]))
    virtual = list(flat.split([len(page) for page in things]))
    near_nothing = meeting.near_nothing(words)
    found = best_matches(words[mask], owners_of(mask.sum(1)), virtual, near_nothing[mask])
    known = list(told(asked, places))
    at = [query for query, _, _ in known], [token for _, token, _ in known]
    others = mask.index_put([torch.tensor(each) for each in at], torch.tensor(False))
    said, which = different([fact for _, _, fact in known])
    return {
        "told": info_nce(found, asked.own, asked.relevant, SHARP),
        "words": distance(words[at] @ meeting.project(meeting.vectors([*map(attributes, said)])).T, which),
        "others": (1 - near_nothing[others]).mean(),
    }


def sum_terms(
    learner: Learner, asked: Asked, states, mask, seen: tuple[torch.Tensor, list[frozenset[Fact]]]
) -> dict[str, torch.Tensor]:
    """Queries' words are in sum what they ask for, and find pages by that: the first half of those asked about among
    pages that were looked at, the others, which are not drawn, among each other by the vectors of their facts.

    Args:
        seen: Vectors [pages, hidden] of pages that were looked at, the first half of those asked about first, and what
            each shows.
    """
    vectors, (documents, shown) = learner.meeting.vectors, seen
    sought, own = different([query.facts for query in asked.queries])
    dense, targets = pool(states, mask), vectors.sums([[*map(attributes, facts)] for facts in sought])
    wanted = SAID * targets[own]
    said = (F.normalize(states, dim=-1) * mask[..., None]).sum(1)
    half = len(asked.shown) // 2
    first = asked.own < half
    in_seen = torch.tensor(
        relevance([query for query, among in zip(asked.queries, first, strict=True) if among], shown)
    )
    return {
        "nothing": IN_SUM * said[:, -2:].norm(dim=-1).mean(),
        "sums": SUMS * (said - wanted).square().sum(-1).mean() / wanted.square().sum(-1).mean(),
        "dense seen": 0.5 * matryoshka(dense[first], documents, asked.own[first], in_seen, TOLD_DIMS, DENSE),
        "dense told": 0.5
        * matryoshka(
            dense[~first], vectors.sums(asked.things[half:]), asked.own[~first] - half, asked.relevant[~first, half:],
            TOLD_DIMS, DENSE,
        ),
        "dense words": torch.stack([distance(cut(dense, dim) @ cut(targets, dim).T, own) for dim in TOLD_DIMS]).mean(),
    }  # fmt: skip


def different(items: list[Hashable]) -> tuple[list[Hashable], torch.Tensor]:
    """Each item once, and which of them each one is."""
    numbers = {}
    which = torch.tensor([numbers.setdefault(item, len(numbers)) for item in items])
    return list(numbers), which


def is_whole(fact: Fact) -> bool:
    """Whether it says all that a page shows of something."""
    return bool(fact.place) or fact.kind in ("cell", "bar")


def meet_facts(args: argparse.Namespace, output: Path, model, processor) -> None:
    learner = Learner(model, processor, output, args.seed)
    vectors = learner.meeting.vectors

    def terms(step: int) -> dict[str, torch.Tensor]:
        asked = Asked.about(draw_pages(MEETING_FACTS.pairs, step, args.searches), learner.rng)
        found = [vectors(page) for page in asked.things]
        named = vectors([numbers for facts in asked.sought for numbers in facts])
        owners = owners_of(torch.tensor([len(facts) for facts in asked.sought]))
        return {
            "facts": info_nce(best_matches(named, owners, found), asked.own, asked.relevant, TEMPERATURE),
            "dense facts": found_by_sums(vectors, asked, DIMS, TEMPERATURE),
        }

    learner.learn(MEETING_FACTS, terms)
    learner.save()
    held = held_out(500, 1000)
    sought = [[attributes(fact) for fact in query.facts] for query in held.queries]
    pages = [[attributes(fact) for fact, _ in shown(page)] for page in held.pages]
    with torch.no_grad():
        scores = cut(vectors.sums(sought)) @ cut(vectors.sums(pages)).T
    print(f"Fresh pages and queries made of their facts: nDCG@5 {ndcg(scores.numpy(), held.relevant).mean():.1%}")


def found_by_sums(vectors: FactVectors, asked: Asked, dims: list[int], temperature: float) -> torch.Tensor:
    """A loss: sums of facts find the pages that are made of them."""
    sought, pages = vectors.sums(asked.sought), vectors.sums(asked.things)
    return matryoshka(sought, pages, asked.own, asked.relevant, dims, temperature)


def draw_pages(pairs: int, step: int, first_seed: int) -> list[Page]:
    """A step's pages, which no other step has."""
    drawn = Searches(pairs, first_seed=first_seed + step * pairs)
    return [page for index in range(len(drawn)) for page in drawn.pages(index)]


def name_pages(args: argparse.Namespace, output: Path, model, processor) -> None:
    """The connector starts anew and learns by its whole weights, of which adapters are made at the end. Facts' vectors
    go on to find pages that are made of them. At last, pages' states are mapped to where these find most."""
    learner = Learner(model, processor, output, args.seed)
    learner.load(args.output / "meeting")
    looked = Pages(args.output / "looking", args.searches, learner.rng)
    connector, size = learner.base.connector, looked.size()
    anew = WholeWeights(connector)
    for projection in (connector.q_proj, connector.k_proj, connector.v_proj):
        projection.weight.data /= size  # orthogonal weights keep sizes: the others are given what is about 1

    def terms(step: int) -> dict[str, torch.Tensor]:
        pages, features, positions = looked.next(NAMING.pairs)
        named = naming_terms(learner, pages, positions, learner.look(learner.connect(features, positions)))
        asked = Asked.about(draw_pages(MEETING_FACTS.pairs, step, args.searches), learner.rng)
        return named | {"dense drawn": found_by_sums(learner.meeting.vectors, asked, NAMED_DIMS, DENSE)}

    learner.learn(NAMING, terms)
    map_states(learner, looked)

    def use(drawn: list[int]) -> None:
        learner.connect(*looked.at(drawn)[1:])

    anew.to_adapters([functools.partial(use, looked.draw(NAMING.pairs)) for _ in range(CUT_BY)])
    learner.save()


def map_states(learner: Learner, looked: Pages) -> None:
    """Multiply pages' states, but for the plane of nothing, by a matrix with which facts' vectors find more of them
    among `SEEN` pages: as many as a step of `naming` has are too few to tell pages apart by. It is part of the
    connector's last layer from then on, before the norm."""
    seen, vectors, norm = SeenPages(learner, looked), learner.meeting.vectors, learner.base.language_model.norm.weight
    mapping = nn.Parameter(torch.eye(len(norm) - 2))
    optimizer = torch.optim.Adam([mapping], MAPPING.rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, MAPPING.steps)
    for _ in range(MAPPING.steps):
        drawn = looked.draw(MAPPING.pairs)
        asked = Asked.about(looked.pages(drawn), learner.rng)
        pages, shown = seen.among(drawn)
        mapped = torch.cat([pages[:, :-2] @ mapping.T, pages[:, -2:]], 1)
        relevant = torch.tensor(relevance(asked.queries, shown))
        loss = matryoshka(vectors.sums(asked.sought).detach(), mapped, asked.own, relevant, NAMED_DIMS, DENSE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    whole = torch.block_diag(mapping.detach(), torch.eye(2))
    last = learner.base.connector.down_proj.weight
    last.data = (whole * norm / norm[:, None]) @ last.data


def tell_queries(args: argparse.Namespace, output: Path, model, processor) -> None:
    model.get_base_model().set_attn_implementation("eager")  # of texts this short: two thirds of sdpa's time
    learner = Learner(model, processor, output, args.seed)
    learner.load(args.output / "naming")
    learner.meeting.requires_grad_(False)
    looked = Pages(args.output / "looking", args.searches, learner.rng)
    seen, half = SeenPages(learner, looked), TELLING.pairs // 2

    def terms(step: int) -> dict[str, torch.Tensor]:
        drawn = looked.draw(half)
        pages = looked.pages(drawn) + draw_pages(half, step, args.searches)
        asked = Asked.about(pages, learner.rng)
        states, mask, places = learner.read(asked.queries)
        found = word_terms(learner, asked, states, mask, places) | sum_terms(
            learner, asked, states, mask, seen.among(drawn)
        )
        return found if step % PAGE_EVERY else found | around_terms(learner, looked, step // PAGE_EVERY)

    learner.learn(TELLING, terms)
    learner.save()
