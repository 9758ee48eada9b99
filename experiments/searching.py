"""Queries and pages learn to meet: the last three stages of `train_retrieval`.

`naming`: pages, as the tower sees them, are found by the vectors of their facts, which the adapter of the connector,
the projector and the vectors learn from. `telling`: the decoder's adapter learns to bring queries there; it needs no
pages, whose facts' vectors stand for them. `searching`: both learn from each other, by the joint loss.
"""

import argparse
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
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling

from jina_vlm_tools.retrieval.inputs import to_chat
from jina_vlm_tools.retrieval.losses import agreement, info_nce, matryoshka
from jina_vlm_tools.retrieval.scores import cut, pool
from jina_vlm_tools.retrieval.training import Searches
from jina_vlm_tools.synthetic.page_questions import LANGUAGES
from jina_vlm_tools.synthetic.pages import Page
from jina_vlm_tools.synthetic.searches import Fact, Query, facts_of, query_about, relevance, say

from .fact_vectors import NOTHING, TEMPERATURE, Meeting, attributes, distance, owners_of
from .seeing import token_labels


WIDTH = 128  # of multi-vectors
DIMS = [16, 32, 64, 128]
QUERIES = 3  # about each page of a step


@dataclass(frozen=True)
class Settings:
    """Of a stage: its steps, pairs of pages of each, and what is learned at which rate."""

    steps: int
    pairs: int
    rate: float
    parts: tuple[str, ...]


NAMING = Settings(1000, 12, 2e-3, ("connector",))
TELLING = Settings(1000, 24, 4e-3, ("language_model",))
SEARCHING = Settings(400, 12, 1e-3, ("connector", "language_model"))
SHARP = 0.01  # temperature of scores that are means over a query's words, of which few say anything
ADAPTER, MEETING = "adapter.safetensors", "meeting.safetensors"
DENSE = 0.03  # temperature of single vectors


class Seen(nn.Module):
    """In the tower's place: gives back what it saw."""

    def forward(self, features: torch.Tensor, **_) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=features.squeeze(1))


class Pages:
    """Pages in pairs that show nearly the same, and what the tower saw of them."""

    def __init__(self, looked: Path, number: int, rng: random.Random):
        drawn = Searches(number)
        self.pairs = [drawn.pages(index) for index in range(number)]
        self.seen = {}
        for file in sorted(looked.glob("pages-*.safetensors")):
            self.seen |= load_file(file)
        self.rng, self.left = rng, []

    def next(self, pairs: int) -> tuple[list[Page], torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        """Pages in a random order, each once before any again: with their tiles' features, positions and prompts."""
        if len(self.left) < pairs:
            self.left = self.rng.sample(range(len(self.pairs)), len(self.pairs))
        places = [(index, half) for index in [self.left.pop() for _ in range(pairs)] for half in range(2)]
        pages = [self.pairs[index][half] for index, half in places]
        features, positions, prompts = (
            [self.seen[f"{index}.{half}.{name}"] for index, half in places]
            for name in ("features", "positions", "prompt")
        )
        return pages, torch.cat(features).float(), positions, prompts


@dataclass
class Asked:
    """Queries about pages, and pages' facts: which page each query is about [queries], and which it finds [queries,
    pages]."""

    queries: list[Query]
    shown: list[frozenset[Fact]]
    own: torch.Tensor
    relevant: torch.Tensor

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


def best_matches(tokens: torch.Tensor, owners: torch.Tensor, pages: list[torch.Tensor]) -> torch.Tensor:
    """Late interaction [queries, pages]: for each query the mean, over its vectors, of the best match among a page's.

    Args:
        tokens: [vectors, width], of all queries.
        owners: [vectors] int64, which query each belongs to, in order.
        pages: Vectors [*, width] of each.
    """
    best = torch.stack([(tokens @ page.T).max(1).values for page in pages], 1)
    counts = owners.bincount()
    return torch.zeros(len(counts), len(pages)).index_add(0, owners, best) / counts[:, None]


def train_only(model: nn.Module, parts: tuple[str, ...]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name and any(f".{part}." in name for part in parts))


class Learner:
    """What learns: a model with adapters, and what they meet in."""

    def __init__(self, model, processor: JinaVLMProcessor, settings: Settings, output: Path, seed: int = 0):
        self.model, self.processor, self.settings, self.output = model, processor, settings, output
        self.rng = random.Random(seed)
        self.base = model.get_base_model().model
        self.adapters = get_peft_model_state_dict(model)  # with the tower's, which is left out from here on
        self.base.vision_model = Seen()
        self.meeting = Meeting(model.config.get_text_config().hidden_size, WIDTH)
        self.thumbnail = processor.image_processor.tokens_per_side**2  # tokens of it, which come first
        template = processor.apply_chat_template(to_chat("WORDS", "query"), tokenize=False)
        self.before, self.after = template.split("WORDS")
        train_only(model, settings.parts)
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def load(self, folder: Path) -> None:
        self.meeting.load_state_dict(load_file(folder / MEETING))

    def save(self) -> None:
        save_file({**self.adapters, **get_peft_model_state_dict(self.model)}, self.output / ADAPTER)
        save_file(self.meeting.state_dict(), self.output / MEETING)

    def look(self, features: torch.Tensor, positions: list[torch.Tensor]) -> list[torch.Tensor]:
        """Last states [tokens, hidden] of each page's image tokens, which this decoder leaves as they are."""
        with torch.autocast("cpu", torch.bfloat16):
            images = self.base.get_image_features(features[:, None], torch.cat(positions)).pooler_output
        return [self.base.language_model.norm(image.float()) for image in images]

    def read_pages(
        self, features: torch.Tensor, positions: list[torch.Tensor], prompts: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """As [`look`], of all tokens. Pages of one length are read together: padding would double the time."""
        states: list = [None] * len(prompts)
        with torch.autocast("cpu", torch.bfloat16):
            images = self.base.get_image_features(features[:, None], torch.cat(positions)).pooler_output
            for length in sorted({len(prompt) for prompt in prompts}):
                which = [index for index, prompt in enumerate(prompts) if len(prompt) == length]
                seen = BaseModelOutputWithPooling(pooler_output=[images[index] for index in which])
                ids = torch.stack([prompts[index] for index in which])
                read = self.base(input_ids=ids, mm_encoder_outputs={"image": seen}, use_cache=False)
                for index, of_page in zip(which, read.last_hidden_state.float(), strict=True):
                    states[index] = of_page
        return states

    def read(self, queries: list[Query]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Last states [queries, length, hidden], mask [queries, length], places in the text [queries, length, 2]."""
        inputs = self.processor.tokenizer(
            [self.before + query.text + self.after for query in queries], add_special_tokens=False, padding=True,
            padding_side="right", return_tensors="pt", return_offsets_mapping=True,
        )  # fmt: skip
        places = inputs.pop("offset_mapping") - len(self.before)
        with torch.autocast("cpu", torch.bfloat16):
            states = self.base(**inputs, use_cache=False).last_hidden_state.float()
        return states, inputs["attention_mask"].bool(), places

    def learn(self, terms_of: Callable[[int], dict[str, torch.Tensor]]) -> None:
        """So many steps of AdamW, down a cosine."""
        steps, rate = self.settings.steps, self.settings.rate
        met = [parameter for parameter in self.meeting.parameters() if parameter.requires_grad]
        groups = [{"params": self.trained, "rate": rate}, {"params": met, "rate": 3 * rate}]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
        log, started = [], time.perf_counter()
        for step in range(steps):
            share = min(1, (step + 1) / 30) * 0.5 * (1 + math.cos(math.pi * step / steps))
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * share
            terms = terms_of(step)
            optimizer.zero_grad()
            sum(terms.values()).backward()
            nn.utils.clip_grad_norm_(self.trained, 1.0)
            optimizer.step()
            log.append({"step": step, **{name: round(term.item(), 4) for name, term in terms.items()}})
            if step % 25 == 24:
                print(json.dumps(log[-1] | {"seconds": round(time.perf_counter() - started)}), flush=True)
        (self.output / "log.json").write_text(json.dumps(log))
        self.save()


def naming_terms(learner: Learner, pages: list[Page], positions, states, dense) -> dict[str, torch.Tensor]:
    """Pages are found by the vectors of facts, of each alone and of several; each token is told what it shows.
    `states` are those of each page's image tokens, `dense` [pages, hidden] are pages' dense vectors."""
    meeting = learner.meeting
    asked = Asked.of_facts(pages, learner.rng)
    sought = [[attributes(fact) for fact in query.facts] for query in asked.queries]
    named = meeting.vectors([numbers for facts in sought for numbers in facts])
    owners = owners_of(torch.tensor([len(facts) for facts in sought]))
    tokens = [meeting.project(state) for state in states]
    labels = torch.cat([tile_labels(page, place, learner) for page, place in zip(pages, positions, strict=True)])
    return {
        "facts": info_nce(best_matches(named, owners, tokens), asked.own, asked.relevant, TEMPERATURE),
        "tokens": meeting.name(torch.cat([page[learner.thumbnail :] for page in tokens]), labels),
        "dense facts": matryoshka(meeting.dense(sought), dense, asked.own, asked.relevant, DIMS, DENSE),
    }


def tile_labels(page: Page, positions: torch.Tensor, learner: Learner) -> torch.Tensor:
    """[tokens of its tiles, questions], see `token_labels`."""
    rows, columns = learner.processor.image_processor.get_token_grid(*positions[0, 2:].tolist())
    return token_labels(page, *((torch.arange(size) + 0.5) / size for size in (columns, rows)))


def told(asked: Asked, places: torch.Tensor) -> Iterator[tuple[int, int, list[int]]]:
    """What tokens of queries say: (query, token, attributes). The last of a fact's phrase all of it, one within its
    text the characters up to there."""
    for number, query in enumerate(asked.queries):
        spans = places[number].tolist()
        for fact in query.facts:
            phrase = say(fact, query.language)
            start = query.text.find(phrase)
            inside = [
                (token, end)
                for token, (begin, end) in enumerate(spans)
                if start < end <= start + len(phrase) and end > begin
            ]
            yield number, inside[-1][0], attributes(fact)
            if fact.text:
                # A cell's comes first, in "42 in cell B2"; others are the phrase's only capitals or digits.
                written = start + phrase.index(fact.text)
                spelled = attributes(Fact(fact.kind, text=fact.text))
                for token, end in inside[:-1]:
                    if 0 < (known := end - written) <= len(fact.text):
                        yield number, token, spelled[:known]


def telling_terms(learner: Learner, asked: Asked, states, mask, places) -> dict[str, torch.Tensor]:
    """Queries' words are near what they say, or near nothing; pages that are not drawn are found by them: the vectors
    of their facts stand for them."""
    meeting, words = learner.meeting, learner.meeting.project(states)
    nothing = meeting.vectors([[NOTHING]])
    whole = [[attributes(fact) for fact in facts if is_whole(fact)] for facts in asked.shown]
    flat = meeting.vectors([numbers for page in whole for numbers in [[NOTHING], *page]])
    virtual = list(flat.split([1 + len(page) for page in whole]))
    known = list(told(asked, places))
    at = [query for query, _, _ in known], [token for _, token, _ in known]
    others = mask.index_put([torch.tensor(each) for each in at], torch.tensor(False))
    said, which = different([tuple(numbers) for _, _, numbers in known])
    sought, own = different([query.facts for query in asked.queries])
    dense, targets = pool(states, mask), meeting.dense([[attributes(fact) for fact in facts] for facts in sought])
    return {
        "told": info_nce(best_matches(words[mask], owners_of(mask.sum(1)), virtual), asked.own, asked.relevant, SHARP),
        "words": distance(words[at], meeting.vectors([list(each) for each in said]), which),
        "others": (1 - words[others] @ nothing.T).mean(),
        "dense words": torch.stack([distance(cut(dense, dim), cut(targets, dim), own) for dim in DIMS]).mean(),
    }


def different(items: list[Hashable]) -> tuple[list[Hashable], torch.Tensor]:
    """Each item once, and which of them each one is."""
    numbers = {}
    which = torch.tensor([numbers.setdefault(item, len(numbers)) for item in items])
    return list(numbers), which


def is_whole(fact: Fact) -> bool:
    """Whether it says all that a page shows of something."""
    return bool(fact.place) or fact.kind in ("cell", "bar")


def name_pages(args: argparse.Namespace, output: Path, model, processor) -> None:
    learner = Learner(model, processor, NAMING, output, args.seed)
    learner.load(args.output / "seeing")
    looked = Pages(args.output / "looking", args.searches, learner.rng)

    def terms(step: int) -> dict[str, torch.Tensor]:
        pages, features, positions, _ = looked.next(NAMING.pairs)
        states = learner.look(features, positions)
        return naming_terms(learner, pages, positions, states, torch.stack([state.mean(0) for state in states]))

    learner.learn(terms)


def tell_queries(args: argparse.Namespace, output: Path, model, processor) -> None:
    model.get_base_model().set_attn_implementation("eager")  # of texts this short: two thirds of sdpa's time
    learner = Learner(model, processor, TELLING, output, args.seed)
    learner.load(args.output / "naming")
    learner.meeting.requires_grad_(False)

    def terms(step: int) -> dict[str, torch.Tensor]:
        drawn = Searches(TELLING.pairs, first_seed=args.searches + step * TELLING.pairs)
        asked = Asked.about([page for index in range(len(drawn)) for page in drawn.pages(index)], learner.rng)
        return telling_terms(learner, asked, *learner.read(asked.queries))

    learner.learn(terms)


def search_pages(args: argparse.Namespace, output: Path, model, processor) -> None:
    learner = Learner(model, processor, SEARCHING, output, args.seed)
    learner.load(args.output / "telling")
    looked = Pages(args.output / "looking", args.searches, learner.rng)

    def terms(step: int) -> dict[str, torch.Tensor]:
        pages, features, positions, prompts = looked.next(SEARCHING.pairs)
        asked = Asked.about(pages, learner.rng)
        shown = learner.read_pages(features, positions, prompts)
        states, mask, places = learner.read(asked.queries)
        tokens = [learner.meeting.project(page) for page in shown]
        late = best_matches(learner.meeting.project(states[mask]), owners_of(mask.sum(1)), tokens)
        dense, of_pages = pool(states, mask), torch.stack([page.mean(0) for page in shown])
        image = model.config.image_token_id
        of_images = [page[prompt == image] for page, prompt in zip(shown, prompts, strict=True)]
        return {
            "late": info_nce(late, asked.own, asked.relevant, SHARP),
            "dense": matryoshka(dense, of_pages, asked.own, asked.relevant, DIMS, DENSE),
            "agreement": 0.5 * agreement(cut(dense) @ cut(of_pages).T, late, DENSE),
            **naming_terms(learner, pages, positions, of_images, of_pages),
            **telling_terms(learner, asked, states, mask, places),
        }

    learner.learn(terms)
