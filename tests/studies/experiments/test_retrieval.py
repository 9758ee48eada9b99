"""What the small retriever is trained on and measured by: queries, relevance, measures, documents to answer from."""

import random

import jina_vlm
import numpy as np
import pytest
import torch

from experiments.eval_retrieval import first_is_relevant, held_out, interval, ndcg, rank_again
from experiments.fact_vectors import NOTHING, DenseVectors, FactVectors, attributes, distance
from experiments.searching import TELLING, Asked, Learner, best_matches, different, is_whole, told
from experiments.seeing import token_labels
from experiments.train_retrieval import make_model
from experiments.visual_rag import make_documents, make_questions
from jina_vlm_tools.files import TINY
from jina_vlm_tools.retrieval.inputs import prepare
from jina_vlm_tools.retrieval.scores import late_scores
from jina_vlm_tools.retrieval.training import SearchCollator, Searches
from jina_vlm_tools.synthetic.page_questions import LANGUAGES, TASKS
from jina_vlm_tools.synthetic.pages import HELD_OUT_WORDS, TRAINING_WORDS, draw_page
from jina_vlm_tools.synthetic.searches import Query, facts_of, near_miss, query_about, say
from jina_vlm_tools.synthetic.shapes import HELD_OUT_PAIRS, TRAINING_PAIRS


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


@pytest.mark.parametrize("task", TASKS)
def test_tokens_have_the_vectors_of_what_they_show(task):
    """Of all that a page shows as a whole, and of nothing, some token has the vector; and no token has any other."""
    torch.manual_seed(0)
    vectors, middles = FactVectors(16), (torch.arange(28) + 0.5) / 28
    for index in range(6):
        page = Searches(1, (task,), first_seed=index)[0][0]["page"]
        facts = [fact for fact in facts_of(page) if is_whole(fact)]
        assert facts
        of_tokens = vectors.of_labels(token_labels(page, middles))
        similar = of_tokens @ vectors([[NOTHING], *(attributes(fact) for fact in facts)]).T
        assert (similar.amax(0) > 0.9999).all()
        if not page.labels:  # which nobody asks for
            assert (similar.amax(1) > 0.9999).float().mean() > 0.9  # the rest lie in a place's neighbor


def test_a_dense_vector_is_a_sum_over_facts():
    torch.manual_seed(0)
    vectors, facts = DenseVectors(8), [[1, 40], [2], [3, 70, 80]]
    alone = vectors([[fact] for fact in facts])
    assert torch.allclose(vectors([facts, facts[1:2]]), torch.stack([alone.sum(0), alone[1]]), atol=1e-6)


def test_vectors_at_their_targets_have_next_to_no_distance():
    targets = torch.eye(4)
    which = torch.tensor([2, 0, 2])
    assert distance(targets[which], targets, which) < 1e-6
    assert distance(targets[which], targets, which.roll(1)) > 1


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
    return Learner(make_model(str(TINY)), processor, TELLING, tmp_path_factory.mktemp("learner"))


def test_queries_are_read_as_they_are_embedded(learner):
    texts = ["a red star on the left and the word KATZE", "eine Zahl"]
    states, mask, places = learner.read([Query(frozenset(), "en", text) for text in texts])
    inputs = dict(prepare(learner.processor, texts, "query"))
    with torch.no_grad():
        expected = learner.base(**inputs, use_cache=False).last_hidden_state
    assert mask.equal(inputs["attention_mask"].bool())
    assert (states - expected)[mask].abs().max() < 0.05 * expected.abs().max()  # bfloat16
    words = [texts[0][max(0, begin) : end] for begin, end in places[0].tolist() if end > 0]
    assert "".join(words) == texts[0]


def test_pages_are_read_as_they_are_embedded(learner):
    """Those of one length together, among others."""
    images = [draw_page(Searches(1, ("shapes",), first_seed=seed)[0][0]["page"]) for seed in range(3)]
    images[1] = images[1].resize((800, 400))
    tower = make_model(str(TINY)).get_base_model().model
    each = [dict(prepare(learner.processor, [image], "document", max_tiles=4)) for image in images]
    assert [len(inputs["pixel_values"]) > 2 for inputs in each] == [False, True, False]
    with torch.no_grad():
        features = torch.cat([tower.vision_model(inputs["pixel_values"]).last_hidden_state for inputs in each])
        states = learner.read_pages(
            features, [inputs["tile_positions"] for inputs in each], [inputs["input_ids"][0] for inputs in each]
        )
        for index, inputs in enumerate(each):
            expected = tower(**inputs, use_cache=False).last_hidden_state[0]
            assert states[index].shape == expected.shape
            assert (states[index] - expected).abs().max() < 0.05 * expected.abs().max()  # bfloat16


def test_tokens_of_queries_are_told_what_is_said_up_to_them(learner):
    rng = random.Random(0)
    pages = [Searches(1, (task,), first_seed=seed)[0][0]["page"] for task in TASKS for seed in range(4)]
    asked = Asked.about(pages, rng)
    _, _, places = learner.read(asked.queries)
    wholes = {
        (number, tuple(sorted(attributes(fact)))) for number, query in enumerate(asked.queries) for fact in query.facts
    }
    for number, token, said in told(asked, places):
        end, query = places[number, token, 1].item(), asked.queries[number]
        text = query.text[:end]
        if (number, tuple(sorted(said))) in wholes:
            matching = [fact for fact in query.facts if say(fact, query.language) in text]
            assert any(text.endswith(say(fact, query.language)) for fact in matching)
            wholes.discard((number, tuple(sorted(said))))
        else:
            assert any(text.endswith(fact.text[: len(said)]) for fact in query.facts if fact.text)
    assert not wholes


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
