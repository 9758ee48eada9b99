"""What the small retriever is trained on and measured by: queries, relevance, measures, documents to answer from."""

import dataclasses
import functools
import random
import sys
import types

import jina_vlm
import numpy as np
import pytest
import torch
from jina_vlm.modeling_jina_vlm import get_image_token_indices
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import TrainerState

from experiments import searching, train_retrieval
from experiments.adapters import train_only
from experiments.eval_retrieval import evaluate, first_is_relevant, held_out, interval, ndcg, rank_again
from experiments.fact_vectors import (
    AMOUNT,
    PADDING,
    FactVectors,
    Meeting,
    around,
    attributes,
    distance,
    nothing,
    pad,
    shares,
    shown,
)
from experiments.searching import (
    ADAPTER,
    AROUND_FIRST,
    AROUND_IN_SUM,
    MAPPING,
    Asked,
    Learner,
    Pages,
    SeenPages,
    around_terms,
    best_matches,
    different,
    in_sum,
    is_whole,
    map_states,
    sum_terms,
    told,
)
from experiments.seeing import unit
from experiments.strips import attention_in_strips
from experiments.train_retrieval import NamingCollator, PageNamer, StripsFirst, make_model
from experiments.visual_rag import make_documents, make_questions
from experiments.whole_weights import WholeWeights
from jina_vlm_tools.files import TINY
from jina_vlm_tools.retrieval.embedder import JinaVLMEmbedder
from jina_vlm_tools.retrieval.inputs import prepare
from jina_vlm_tools.retrieval.scores import cut, late_scores
from jina_vlm_tools.retrieval.training import SearchCollator, Searches
from jina_vlm_tools.synthetic.page_questions import LANGUAGES, TASKS
from jina_vlm_tools.synthetic.pages import HELD_OUT_WORDS, TRAINING_WORDS, draw_page
from jina_vlm_tools.synthetic.pages_data import task_page
from jina_vlm_tools.synthetic.searches import PHRASES, Fact, Query, facts_of, near_miss, query_about, say
from jina_vlm_tools.synthetic.shapes import HELD_OUT_PAIRS, PLACES, TRAINING_PAIRS


def test_a_query_finds_its_page_and_not_the_one_that_nearly_shows_it():
    """Near misses show another fact in nearly every case; in those they are told apart by it."""
    told = 0
    for index in range(120):
        rng = random.Random(index)
        page, other = (shown["page"] for shown in Searches(1, TASKS, first_seed=index)[0])
        assert page.scene.size == other.scene.size
        query = query_about(page, rng.choice(list(LANGUAGES)), rng)
        assert query.finds(facts_of(page))
        told += not query.finds(facts_of(other))
    assert told > 60


def test_held_out_pages_have_nothing_that_training_draws():
    held = held_out(60, 120)
    words = {word for words in TRAINING_WORDS.values() for word in words}
    kept = {word for words in HELD_OUT_WORDS.values() for word in words}
    for page in held.pages:
        assert all((shape.color, shape.kind) in HELD_OUT_PAIRS for shape in page.scene.shapes)
        assert all(text.text.isdecimal() or text.text in kept - words for text in page.texts)
    assert {query.language for query in held.queries} == set(LANGUAGES)
    assert all(held.relevant[number, number % 60] for number in range(120))
    kinds = {(held.pages[number % 60].kind, query.language) for number, query in enumerate(held.queries)}
    assert len(kinds) == 5 * len(LANGUAGES)  # numbers and words stand on boards alike
    assert {query.language for query in held_out(12, 24, ["shapes"]).queries} == set(LANGUAGES)
    again = held_out(60, 120)
    assert [query.text for query in again.queries] == [query.text for query in held.queries]


def test_training_draws_training_pairs_alone():
    for sample in (Searches(1, ("shapes",), first_seed=seed)[0] for seed in range(20)):
        assert all((shape.color, shape.kind) in TRAINING_PAIRS for shape in sample[0]["page"].scene.shapes)


def test_relevance_of_a_batch_is_that_of_its_facts():
    processor = jina_vlm.JinaVLMProcessor.from_pretrained(TINY, max_tiles=1)
    samples = [Searches(3, ("shapes",), queries=2)[index] for index in range(3)]
    batch = SearchCollator(processor)(samples)
    assert batch["relevant"].shape == (12, 6)
    assert batch["relevant"][torch.arange(12), batch["own"]].all()
    assert sum(len(group["input_ids"]) for group in batch["documents"]) == 6


def test_best_matches_of_pages_one_by_one_are_late_interaction():
    torch.manual_seed(0)
    tokens, pages = torch.randn(3, 5, 8), [torch.randn(length, 8) for length in (4, 7)]
    mask = torch.tensor([[1] * 5, [1] * 2 + [0] * 3, [1] * 4 + [0]])
    padded = torch.nn.utils.rnn.pad_sequence(pages, batch_first=True)
    expected = late_scores(tokens, mask, padded, torch.tensor([[1] * 4 + [0] * 3, [1] * 7]))
    owners = torch.arange(3).repeat_interleave(mask.sum(1))
    assert torch.allclose(best_matches(tokens[mask.bool()], owners, pages), expected, atol=1e-6)
    everywhere = torch.full((int(mask.sum()),), 100.0)
    assert (best_matches(tokens[mask.bool()], owners, pages, everywhere) == 100).all()


@pytest.mark.parametrize("task", TASKS)
def test_what_a_page_shows_is_its_facts_and_where_they_are(task):
    for index in range(6):
        page = Searches(1, (task,), first_seed=index)[0][0]["page"]
        found = shown(page)
        assert {fact for fact, _ in found} == {fact for fact in facts_of(page) if is_whole(fact)}
        for fact, (x, y) in found:
            assert 0 <= x <= 1 and 0 <= y <= 1
            assert not fact.place or fact.place == PLACES[3 * int(3 * y) + int(3 * x)]


def test_each_character_is_an_attribute_where_it_stands_and_anywhere():
    of_47, of_74, of_44 = (attributes(Fact("number", text=text)) for text in ("47", "74", "44"))
    assert set(of_47[:-2]) - set(of_74) == set(of_47[2:4]) and sorted(of_47[-2:]) == sorted(of_74[-2:])
    assert of_44[-2:] == [of_47[-2]] * 2
    assert max(attributes(Fact("word", text="ZZZZZZ"))) < PADDING
    vectors = FactVectors(16)
    with torch.no_grad():
        assert (vectors([of_47]) - vectors([of_74])).norm() > 0.01


def test_each_thing_has_as_many_tokens_in_sum_around_its_middle():
    across, down = (torch.arange(20) + 0.5) / 20, (torch.arange(10) + 0.5) / 10
    each = shares([(0.525, 0.45), (0.28, 0.71), (0.9, 0.1)], across, down)
    assert each.shape == (200, 3)
    assert torch.allclose(each.sum(0), torch.tensor([AMOUNT] * 3), atol=0.2)
    assert each.argmax(0)[:2].tolist() == [4 * 20 + 10, 7 * 20 + 5]


def test_states_of_what_is_shown_have_no_distance_and_their_mean_is_the_facts():
    """Nothing goes once around, from left to right."""
    torch.manual_seed(0)
    meeting, rng = Meeting(32, 32), random.Random(0)
    pages = [shown(task_page(task, rng, TRAINING_PAIRS)) for task in ("shapes", "tables")]
    facts = pad([attributes(fact) for page in pages for fact, _ in page])
    parts = torch.block_diag(*(shares([middle for _, middle in page]) for page in pages))
    nothing = around((torch.arange(14) + 0.5) / 14).repeat(28, 1)
    states = (parts @ meeting.vectors(facts))[:, :-2]
    states = states / (states.norm(dim=-1, keepdim=True) / 0.98).clamp(min=1)
    states = torch.cat([states, (1 - states.square().sum(-1, keepdim=True)).sqrt() * nothing], 1)
    losses = meeting.name(list((5 * states).split(196)), facts, parts, nothing)
    assert losses["states"] < 1e-6 and losses["sums"] < 0.2  # what shows something is missing in the round
    assert losses["tokens"] < 0.5
    turned = meeting.name(list(states.flip(0).split(196)), facts, parts, nothing)
    assert all(turned[name] > 2 * losses[name] + 0.5 for name in losses)
    dense = torch.stack([page.mean(0) for page in states.split(196)])
    expected = meeting.vectors.sums([[attributes(fact) for fact, _ in page] for page in pages])
    assert (cut(dense) * cut(expected)).sum(-1).min() > 0.9


def test_what_is_near_nothing_needs_no_direction():
    torch.manual_seed(0)
    meeting = Meeting(16, 8)
    meeting.projector.weight.data += 0.1 * torch.randn(8, 16)
    round_about = torch.nn.functional.pad(torch.nn.functional.normalize(torch.randn(50, 2), dim=-1), (14, 0))
    assert torch.allclose(meeting.near_nothing(meeting.project(round_about)), torch.ones(50), atol=1e-5)
    facts = meeting.project(meeting.vectors([[1], [2, 40]]))
    many = meeting.project(
        torch.nn.functional.pad(
            torch.stack([torch.arange(0, 6.3, 1e-3).cos(), torch.arange(0, 6.3, 1e-3).sin()], 1), (14, 0)
        )
    )
    assert torch.allclose(meeting.near_nothing(facts), (facts @ many.T).amax(1), atol=1e-4)


def test_a_page_of_one_tile_is_named_by_its_own_things():
    """Of pages that show more than others too, none is told another's."""
    processor = jina_vlm.JinaVLMProcessor.from_pretrained(TINY, max_tiles=1)
    collator, rng = NamingCollator(processor.image_processor), random.Random(1)
    pages = [task_page(task, rng, TRAINING_PAIRS) for task in ("tables", "charts")]
    batch = collator(pages)
    model = make_model(str(TINY)).get_base_model()
    namer = PageNamer(model, Meeting(model.config.get_text_config().hidden_size, 128)).eval()
    with torch.no_grad():
        both = namer(**batch)["loss"]
        assert batch["facts"].shape[:2] == (2, batch["shares"].shape[2])
        alone = [namer.meeting.vectors(pad([attributes(fact) for fact, _ in shown(page)])) for page in pages]
        for page, vectors in enumerate(alone):
            of_batch = namer.meeting.vectors(batch["facts"][page])
            assert torch.allclose(of_batch[: len(vectors)], vectors, atol=1e-6) and not of_batch[len(vectors) :].any()
            assert torch.allclose(
                batch["shares"][page] @ of_batch,
                shares([middle for _, middle in shown(pages[page])]) @ vectors,
                atol=1e-6,
            )
        features = torch.randn(1, 27 * 27, namer.head.in_features)
        asked, patches = namer.asked(features, None), unit(features)
    assert both.isfinite() and asked.shape == (1, 196, namer.head.in_features)
    assert torch.allclose(
        asked[0, 15], patches[0, [2 * 27 + 2, 2 * 27 + 3, 3 * 27 + 2, 3 * 27 + 3]].mean(0), atol=1e-6
    )
    assert torch.allclose(asked[0, -1], patches[0, -1], atol=1e-6)


def test_attention_in_strips_is_attention_to_what_lies_in_the_strip():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 2, 27 * 27, 8)
    rows = torch.arange(27 * 27) // 27
    for shift in (0, 4):
        strips = (rows - shift) % 27 // 9
        module = types.SimpleNamespace(shift=shift)
        found, _ = attention_in_strips(module, query, key, value, None, scaling=8**-0.5)
        together = strips[:, None] == strips
        expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, together)
        assert torch.allclose(found, expected.transpose(1, 2), atol=1e-5)


def test_a_tower_attends_to_strips_first_and_then_to_all():
    tower = make_model(str(TINY)).get_base_model().model.vision_model
    image = draw_page(Searches(1, ("tables",), first_seed=0)[0][0]["page"])
    pixels = jina_vlm.JinaVLMImageProcessor()(image, max_tiles=1, return_tensors="pt")["pixel_values"][:1]
    callback, whole = StripsFirst(tower), tower(pixels).last_hidden_state
    callback.on_train_begin(None, None, None)
    callback.on_step_begin(None, TrainerState(global_step=3, max_steps=10), None)
    assert not torch.allclose(tower(pixels).last_hidden_state, whole, atol=1e-2)
    last = int(10 * train_retrieval.IN_STRIPS)
    callback.on_step_begin(None, TrainerState(global_step=last, max_steps=10), None)
    assert torch.allclose(tower(pixels).last_hidden_state, whole, atol=1e-4)
    callback.on_train_begin(None, None, None)  # again, after all steps in strips
    callback.on_step_begin(None, TrainerState(global_step=last + 1, max_steps=10), None)
    assert torch.allclose(tower(pixels).last_hidden_state, whole, atol=1e-4)


def test_facts_vectors_leave_the_last_two_dimensions_to_nothing():
    vectors = FactVectors(8)
    facts = [[1, 40], [2], [3, 70, 80]]
    each = vectors(facts)
    assert torch.allclose(each.norm(dim=-1), torch.ones(3)) and not each[:, -2:].any()
    assert torch.allclose(vectors.sums([facts, facts[1:2]]), torch.stack([each.sum(0), each[1]]), atol=1e-6)


@pytest.mark.parametrize("shape", [(14, 14), (14, 24), (24, 14), (34, 24)])
def test_nothing_is_nothing_in_sum(shape):
    each = nothing(*shape)
    assert torch.allclose(each.norm(dim=-1), torch.ones(len(each))) and each.sum(0).abs().max() < 1e-4
    beside = shares([(0.3, 0.6)], *((torch.arange(size) + 0.5) / size for size in reversed(shape)))[:, 0]
    assert (beside @ each).norm() < 0.15 * beside.sum()


def test_what_is_nothing_in_a_tile_is_the_same_nothing_among_all_tiles(learner):
    """A connector sees tiles alone: tokens that are left of one lie on the side where they lie in it."""
    image = Image.new("RGB", (378, 644))
    inputs = prepare(learner.processor, [image], "document", max_tiles=4)
    positions, tiles = inputs["tile_positions"], len(inputs["tile_positions"])
    assert tiles > 2
    order = get_image_token_indices(positions, *learner.base._tokens_and_overlap)
    order = order[: sum(learner.base.get_image_lengths(positions))]
    assert torch.allclose(learner.nothing(positions), nothing(14, 14).repeat(tiles, 1)[order], atol=1e-5)


def test_facts_of_the_same_attributes_differ_by_what_belongs_together():
    """A red bar of height 3 beside a blue one of 7, and the other way round, are the same attributes in sum."""
    red, blue, three, seven = 10, 11, 40, 44
    vectors = FactVectors(32)
    both = vectors.sums([[[red, three], [blue, seven]], [[red, seven], [blue, three]]])
    assert (both[0] - both[1]).norm() > 0.2 * both[0].norm()


def test_adapters_that_learn_are_added_to_their_weights_and_make_the_same():
    torch.manual_seed(0)
    model = make_model(str(TINY))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    ids = torch.arange(5, 25)[None]
    expected = model.get_base_model().model(input_ids=ids).last_hidden_state
    expected.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if ".language_model." in name}
    model.zero_grad(set_to_none=True)
    train_only(model, ("language_model",))
    states = model.get_base_model().model(input_ids=ids).last_hidden_state
    states.square().sum().backward()
    assert torch.allclose(states, expected, atol=1e-5)
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name in gradients if "lora_" in name}
    for name, parameter in model.named_parameters():
        if name in trained:
            assert torch.allclose(parameter.grad, gradients[name], rtol=1e-3, atol=1e-4 * gradients[name].abs().max())


def test_whole_weights_become_adapters_on_the_base_as_it_was():
    """Nothing is lost where a layer is given less than its adapter's rank, whatever it would make of the rest."""
    torch.manual_seed(0)
    connector = make_model(str(TINY)).get_base_model().model.connector
    base = {name: weight.clone() for name, weight in connector.state_dict().items() if "lora_" not in name}
    features, is_last = torch.randn(1, 27 * 27, 3) @ torch.randn(3, 256), torch.tensor([False])
    before = connector(features, is_last)
    anew = WholeWeights(connector)
    learned = connector(features, is_last)
    assert not torch.allclose(learned, before, atol=1e-2 * before.abs().max().item())
    anew.to_adapters([lambda: connector(features, is_last)])
    state = connector.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in base.items())
    assert (connector(features, is_last) - learned).norm() < 0.02 * learned.norm()


def test_adapters_make_up_for_what_those_before_them_lose():
    """The first layer's is of rank 1; by that of the second, of all ranks, nothing is lost."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(*(torch.nn.Linear(8, 8, bias=False) for _ in range(2)))
    adapted = get_peft_model(
        layers, LoraConfig(target_modules=["0", "1"], r=8, rank_pattern={"0": 1}, lora_alpha=8, alpha_pattern={"0": 1})
    )
    states = torch.randn(100, 8)
    anew = WholeWeights(adapted)
    first, learned = layers[0](states), layers(states)
    anew.to_adapters([lambda: layers(states)])
    assert (layers[0](states) - first).norm() > 0.5 * first.norm()
    assert (layers(states) - learned).norm() < 0.02 * learned.norm()


def test_pages_states_are_mapped_to_where_facts_find_them(learner, monkeypatch):
    """Pages that are their facts' sums, with all dimensions mixed a little; the plane of nothing stays."""
    torch.manual_seed(0)
    drawn, rng = Searches(60), random.Random(0)
    pairs = [drawn.pages(index) for index in range(60)]
    things = [[attributes(fact) for fact, _ in shown(page)] for pair in pairs for page in pair]
    confused = torch.block_diag(torch.eye(126) + 0.12 * torch.randn(126, 126), torch.eye(2))
    with torch.no_grad():
        sums = learner.meeting.vectors.sums(things)
    vectors = (sums @ confused.T).unflatten(0, (60, 2))
    facts = [[facts_of(page) for page in pair] for pair in pairs]

    class Seen:
        def __init__(self, *_):
            pass

        def among(self, drawn):
            return vectors[drawn].flatten(0, 1), [each for index in drawn for each in facts[index]]

    def draw(number):
        return rng.sample(range(60), number)

    monkeypatch.setattr(searching, "SeenPages", Seen)
    monkeypatch.setattr(searching, "MAPPING", dataclasses.replace(MAPPING, pairs=30))
    looked = types.SimpleNamespace(draw=draw, pages=lambda drawn: [page for index in drawn for page in pairs[index]])
    norm, last = learner.base.language_model.norm.weight, learner.base.connector.down_proj.weight
    before = last.detach().clone()
    map_states(learner, looked)
    mapping = (last @ torch.linalg.pinv(before)).detach() * norm[:, None] / norm
    last.data = before
    assert torch.allclose(mapping[-2:], torch.eye(128)[-2:], atol=1e-4)
    alike = [F.cosine_similarity(each, sums).mean() for each in (sums @ confused.T, sums @ (mapping @ confused).T)]
    assert alike[1] > alike[0] + 0.03


def test_vectors_at_their_targets_have_next_to_no_distance():
    targets = torch.eye(4)
    which = torch.tensor([2, 0, 2])
    assert distance(targets[which], which) < 1e-6
    assert distance(targets[which], which.roll(1)) > 1


def test_each_fact_of_a_page_is_asked_for_alone_too():
    pages = [Searches(1, (task,), first_seed=3)[0][0]["page"] for task in TASKS]
    asked = Asked.of_facts(pages, random.Random(0))
    for index, page in enumerate(pages):
        own = [query.facts for query, number in zip(asked.queries, asked.own, strict=True) if number == index]
        assert {frozenset({fact}) for fact in facts_of(page)} <= {*own} and all(each <= facts_of(page) for each in own)
    for query, found in zip(asked.queries, asked.relevant.tolist(), strict=True):
        assert found == [query.finds(facts_of(page)) for page in pages]


def test_different_items_are_numbered():
    items, which = different(["b", "a", "b"])
    assert items == ["b", "a"] and which.tolist() == [0, 1, 0]


@pytest.fixture(scope="module")
def learner(tmp_path_factory):
    processor = jina_vlm.JinaVLMProcessor.from_pretrained(TINY, max_tiles=1)
    return Learner(make_model(str(TINY)), processor, tmp_path_factory.mktemp("learner"))


def test_queries_are_read_as_they_are_embedded(learner, monkeypatch):
    """In their order, though the shortest are read first."""
    monkeypatch.setattr(searching, "READ_TOGETHER", 2)
    texts = ["a red star on the left and the word KATZE", "eine Zahl", "el número 7"]
    states, mask, places = learner.read([Query(frozenset(), "en", text) for text in texts])
    inputs = dict(prepare(learner.processor, texts, "query"))
    with torch.no_grad():
        expected = learner.base(**inputs, use_cache=False).last_hidden_state
    assert mask.equal(inputs["attention_mask"].bool())
    assert (states - expected)[mask].abs().max() < 0.05 * expected.abs().max()  # bfloat16
    words = [texts[0][max(0, begin) : end] for begin, end in places[0].tolist() if end > 0]
    assert "".join(words) == texts[0]


def test_pages_are_read_as_they_are_embedded(learner):
    """Image tokens, and those around them, of pages of one length and another."""
    images = [draw_page(Searches(1, ("shapes",), first_seed=seed)[0][0]["page"]) for seed in range(3)]
    images[1] = images[1].resize((800, 400))
    tower = make_model(str(TINY)).get_base_model().model
    each = [dict(prepare(learner.processor, [image], "document", max_tiles=4)) for image in images]
    assert [len(inputs["pixel_values"]) > 2 for inputs in each] == [False, True, False]
    positions, prompts = ([inputs[name] for inputs in each] for name in ("tile_positions", "input_ids"))
    prompts = [prompt[0] for prompt in prompts]
    with torch.no_grad():
        features = torch.cat([tower.vision_model(inputs["pixel_values"]).last_hidden_state for inputs in each])
        connected = learner.connect(features, positions)
        looked = learner.look(connected)
        assert len(looked) == 3
        for index, inputs in enumerate(each):
            expected = tower(**inputs, use_cache=False).last_hidden_state[0]
            read, of_image = learner.read_page(connected[index], prompts[index])
            assert of_image.equal(prompts[index] == learner.model.config.image_token_id)
            for states, same in ((read, expected), (looked[index], expected[of_image])):
                assert states.shape == same.shape
                assert (states - same).abs().max() < 0.05 * expected.abs().max()  # bfloat16


def test_what_is_around_an_image_goes_around_with_rotary_embeddings_to_nothing_in_sum(learner, monkeypatch, tmp_path):
    """Pages of each length of a prompt have their turn."""
    prompts = [torch.full((length,), learner.model.config.image_token_id) for length in (40, 60, 90)]
    for prompt in prompts:
        prompt[:20], prompt[-8::5] = 1, 2
    seen = {}
    for index, prompt in enumerate(prompts):
        seen |= {f"{index}.0.features": torch.zeros(1, 4), f"{index}.0.which": torch.zeros(1, dtype=torch.int64)}
        seen |= {f"{index}.0.positions": torch.zeros(1, 4), f"{index}.0.prompt": prompt}
    save_file(seen, tmp_path / "pages-0.safetensors")
    looked = Pages(tmp_path, len(prompts), random.Random(0))
    assert [len(looked.of_each_length(step)[2]) for step in range(4)] == [40, 60, 90, 40]

    def read(turn, image, prompt):
        places = torch.arange(len(prompt))
        turned = torch.stack([(turn * places).cos(), (turn * places).sin()], 1)
        return F.pad(turned, (learner.meeting.projector.in_features - 2, 0)), prompt > 2

    monkeypatch.setattr(learner, "connect", lambda features, positions: [torch.ones(18, 128)])
    first, later = {}, {}
    for turn in (10 ** (-6 / 32), 0.0):  # of 32 pairs, down to a millionth; on one side
        monkeypatch.setattr(learner, "read_page", functools.partial(read, turn))
        first[turn], later[turn] = (around_terms(learner, looked, step) for step in (0, AROUND_FIRST))
        assert not first[turn]["nothing around"]
    turned, on_one_side = later.values()
    assert turned["around"] < 1e-9 and on_one_side["around"] > 1
    assert on_one_side["nothing around"] > 5 * turned["nothing around"] > 0
    assert on_one_side["nothing around"].item() == pytest.approx(AROUND_IN_SUM * 22**2)  # tokens of the shortest


@pytest.mark.parametrize("length, kept, changed", [(1e-4, True, 0), (1e-4, False, 2), (1.0, False, 0)])
def test_image_tokens_too_short_for_the_decoder_learn_to_come_out_as_they_were(
    learner, monkeypatch, length, kept, changed
):
    """Others are not asked for it. Beside them, one word, which is where it should be."""
    image, image_token = torch.randn(9, 128), learner.model.config.image_token_id
    image[4] *= length
    word, states = F.pad(torch.tensor([[1.0, 0.0]]), (126, 0)), learner.look([image])[0].detach()
    if not kept:
        states[4] *= -1
    looked = types.SimpleNamespace(
        of_each_length=lambda number: (torch.zeros(1), torch.zeros(1, 4), torch.tensor([1, *[image_token] * 9]))
    )
    monkeypatch.setattr(learner, "connect", lambda features, positions: [image])
    monkeypatch.setattr(learner, "read_page", lambda image, prompt: (torch.cat([word, states]), prompt == image_token))
    assert around_terms(learner, looked, 0)["around"].item() == pytest.approx(changed, abs=1e-6)


def test_what_is_nothing_in_sum_has_no_length():
    facts, plane = in_sum([torch.tensor([[0.0, 0, 3], [0, 0, -5]]), torch.tensor([[2.0, 0, 0], [0, 1, 0]])])
    assert torch.allclose(torch.stack([facts, plane]), torch.tensor([0.5, 0.5]))


def test_queries_that_are_their_facts_in_sum_have_no_distance_and_find_their_pages(learner):
    """Two tokens each, of length 1, that are as long in sum as facts should be."""
    pages = [page for index in range(4) for page in Searches(4, ("shapes",), first_seed=7).pages(index)]
    asked = Asked.about(pages, random.Random(0))
    vectors = learner.meeting.vectors
    with torch.no_grad():
        wanted = vectors.sums(asked.sought)
        documents = vectors.sums(asked.things)
    aside = torch.zeros_like(wanted)
    aside[:, :-2] = torch.randn(aside[:, :-2].shape, generator=torch.Generator().manual_seed(0))
    along = F.normalize(wanted, dim=1)
    aside = F.normalize(aside - (aside * along).sum(1, keepdim=True) * along, dim=1)
    half = searching.SAID * wanted / 2
    aside = aside * (1 - half.square().sum(1, keepdim=True)).clamp(min=0).sqrt()
    states, mask = torch.stack([half + aside, half - aside], 1), torch.ones(len(half), 2, dtype=torch.bool)
    one_fact = torch.tensor([len(query.facts) == 1 for query in asked.queries])
    assert torch.allclose(states[one_fact].norm(dim=-1), torch.tensor(1.0), atol=1e-5)
    seen = documents[:4], asked.shown[:4]
    right = sum_terms(learner, asked, states, mask, seen)
    wrong = sum_terms(learner, asked, states.roll(1, 0), mask, seen)
    assert right["nothing"] < 1e-6
    for name in ("sums", "dense seen", "dense told", "dense words"):
        assert right[name] < 0.7 * wrong[name]
    plane = F.pad(torch.ones(len(half), 2, 1), (states.shape[2] - 1, 0))
    assert sum_terms(learner, asked, states + plane, mask, seen)["nothing"] > 0.5 * searching.IN_SUM


def test_pages_that_were_seen_are_found_among_others(learner, monkeypatch, tmp_path):
    monkeypatch.setattr(searching, "SEEN", 6)
    drawn = Searches(5)
    tensors, expected = {}, {}
    for index in range(len(drawn)):
        for half, page in enumerate(drawn.pages(index)):
            inputs = prepare(learner.processor, [draw_page(page)], "document")
            features = torch.randn(1, 27 * 27, 256, generator=torch.Generator().manual_seed(2 * index + half))
            which = torch.zeros(len(inputs["pixel_values"]), dtype=torch.int64)
            tensors |= {f"{index}.{half}.features": features, f"{index}.{half}.which": which}
            tensors |= {f"{index}.{half}.positions": inputs["tile_positions"]}
            tensors |= {f"{index}.{half}.prompt": inputs["input_ids"][0]}
            with torch.no_grad():
                image = learner.look(learner.connect(features[which], [inputs["tile_positions"]]))[0]
            expected[facts_of(page)] = image.mean(0)
    save_file(tensors, tmp_path / "pages-0.safetensors")
    looked = Pages(tmp_path, len(drawn), random.Random(0))
    seen = SeenPages(learner, looked)
    vectors, shown = seen.among([3, 1])
    assert len(vectors) == len(shown) == len({*shown}) == 6
    assert shown[:4] == [facts_of(page) for page in looked.pages([3, 1])]
    assert shown[:2] == [facts_of(page) for page in drawn.pages(3)]
    for vector, facts in zip(vectors, shown, strict=True):
        assert torch.allclose(vector, expected[facts], rtol=1e-3, atol=1e-3)


def test_the_token_after_each_phrase_is_told_what_it_says(learner):
    """Where a decoder knows that the phrase has ended, which its last token may not be the end of."""
    rng = random.Random(0)
    pages = [Searches(1, (task,), first_seed=seed)[0][0]["page"] for task in TASKS for seed in range(4)]
    asked = Asked.about(pages, rng)
    numbers = frozenset({Fact("number", text="47"), Fact("number", text="4")})
    longer_first = Query(numbers, "en", "the number 47 and the number 4")
    asked = dataclasses.replace(asked, queries=[*asked.queries, longer_first])
    _, mask, places = learner.read(asked.queries)
    found = list(told(asked, places))
    for number, token, fact in found:
        query, begin = asked.queries[number], places[number, token, 0].item()
        phrase = say(fact, query.language)
        assert fact in query.facts and mask[number, token] and places[number, token - 1, 1] == begin
        assert query.text[:begin].endswith(phrase)
        assert query.text[begin:] == "" or query.text[begin:].startswith(PHRASES[query.language]["and"])
    assert len({(number, fact) for number, _, fact in found}) == sum(len(query.facts) for query in asked.queries)


def test_measures_by_hand():
    scores = np.array([[0.9, 0.8, 0.1, 0.2], [0.1, 0.2, 0.3, 0.4]])
    relevant = np.array([[False, True, False, True], [True, False, False, False]])
    assert first_is_relevant(scores, relevant).tolist() == [0, 0]
    best = 1 + 1 / np.log2(3)
    assert ndcg(scores, relevant, 2).tolist() == pytest.approx([(1 / np.log2(3)) / best, 0])
    assert ndcg(scores, relevant, 4).tolist() == pytest.approx(
        [(1 / np.log2(3) + 1 / np.log2(4)) / best, 1 / np.log2(5)]
    )
    assert rank_again(scores, -scores, 2).argsort(axis=1)[:, ::-1].tolist() == [[1, 0, 3, 2], [2, 3, 1, 0]]
    assert interval(np.ones(10)) == "100.0 (100.0 to 100.0)"


def test_questions_about_documents_are_about_pages_that_one_search_finds():
    rng = random.Random(0)
    pages = [page for document in make_documents(6, rng) for page in document]
    assert len(pages) == 30 and sum(page.kind == "shapes" for page in pages) == 12
    for index, _, turn in make_questions(pages, 16, rng):
        assert pages[index].kind == "shapes" and turn.answer


def test_a_near_miss_keeps_what_it_must():
    for seed in range(30):
        rng = random.Random(seed)
        page = Searches(1, ("charts",), first_seed=seed)[0][0]["page"]
        other = near_miss(page, rng)
        assert sorted(bar.color for bar in other.bars) == sorted(bar.color for bar in page.bars)
        assert [bar.height for bar in other.bars] == [bar.height for bar in page.bars]


def test_a_killed_seeing_is_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)
    monkeypatch.setattr(searching, "MEETING_FACTS", dataclasses.replace(searching.MEETING_FACTS, steps=1, pairs=2))
    steps, forward = [], PageNamer.forward

    @functools.wraps(forward)  # the Trainer asks for its arguments
    def killed(reader, *args, **kwargs):
        if reader.training:
            steps.append(None)
            if len(steps) == 4:
                raise KeyboardInterrupt
        return forward(reader, *args, **kwargs)

    monkeypatch.setattr(PageNamer, "forward", killed)
    monkeypatch.setattr(train_retrieval, "SAVE_EVERY", 2)

    def run(*arguments):
        arguments = ["train_retrieval", *arguments, "--output", str(tmp_path), "--pages", "20"]
        monkeypatch.setattr(sys, "argv", arguments)
        train_retrieval.main()

    run("meeting")
    with pytest.raises(SystemExit):
        run("looking", "--resume")
    with pytest.raises(KeyboardInterrupt):
        run("seeing")
    run("seeing", "--resume")
    assert len(steps) == 4 + 3  # of five steps, two were saved
    assert (tmp_path / "seeing" / "adapter.safetensors").is_file()


def test_all_stages_as_commands(tmp_path, monkeypatch, capsys):
    """A few steps each: what comes out is a retrieval folder."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)  # for speed alone, after minutes
    for name in ("MEETING_FACTS", "NAMING", "MAPPING", "TELLING"):
        monkeypatch.setattr(searching, name, dataclasses.replace(getattr(searching, name), steps=2, pairs=2))
    monkeypatch.setattr(train_retrieval, "IN_A_FILE", 3)
    (tmp_path / "looking").mkdir()
    save_file({"9.0.prompt": torch.zeros(1)}, tmp_path / "looking" / "pages-9.safetensors")  # of an earlier run
    for stage in train_retrieval.STAGES:
        arguments = [stage, "--output", str(tmp_path), "--pages", "16", "--searches", "4"]
        monkeypatch.setattr(sys, "argv", ["train_retrieval", *arguments])
        train_retrieval.main()
    assert "nDCG@5" in capsys.readouterr().out
    assert {file.name for file in (tmp_path / "looking").iterdir()} == {"pages-0.safetensors", "pages-3.safetensors"}
    folder = tmp_path / "writing" / "tiny-retrieval"
    assert sum(file.stat().st_size for file in folder.rglob("*.safetensors")) < 1_000_000
    seen, written = load_file(tmp_path / "seeing" / ADAPTER), load_file(folder / "adapter_model.safetensors")
    assert seen and all(written[name].float().equal(tensor.float()) for name, tensor in seen.items())
    embedder = JinaVLMEmbedder.from_pretrained(folder)
    held = held_out(6, 6)
    measured, _ = evaluate(embedder, held)
    assert 0 <= measured["late"]["nDCG@5"].mean() <= 1
