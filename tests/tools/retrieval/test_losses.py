"""The losses of the retrieval's training, against sums written out."""

import math

import pytest
import torch

from jina_vlm_tools.retrieval.losses import agreement, cosent, info_nce, matryoshka
from jina_vlm_tools.retrieval.scores import cut


SCORES = torch.tensor([[0.9, 0.2, 0.5], [0.1, 0.4, 0.3]], dtype=torch.float64)


def test_each_query_is_told_its_own_page_from_all_that_are_not_relevant():
    own = torch.tensor([0, 2])
    relevant = torch.tensor([[True, False, False], [False, True, True]])
    first = -0.9 / 0.1 + math.log(sum(math.exp(score / 0.1) for score in (0.9, 0.2, 0.5)))
    second = -0.3 / 0.1 + math.log(sum(math.exp(score / 0.1) for score in (0.1, 0.3)))  # page 1 is relevant too
    assert info_nce(SCORES, own, relevant, 0.1).item() == pytest.approx((first + second) / 2, abs=1e-12)


def test_relevant_pages_are_neither_drawn_near_nor_pushed_away():
    scores = SCORES.clone().requires_grad_()
    info_nce(scores, torch.tensor([0, 2]), torch.tensor([[True, False, False], [False, True, True]]), 0.1).backward()
    assert scores.grad[1, 1] == 0 and scores.grad[1, 2] < 0 < scores.grad[1, 0]


def test_matryoshka_is_the_mean_over_widths():
    torch.manual_seed(0)
    queries, documents, own = torch.randn(2, 8), torch.randn(3, 8), torch.tensor([0, 2])
    relevant = torch.zeros(2, 3, dtype=torch.bool)
    each = [info_nce(cut(queries, dim) @ cut(documents, dim).T, own, relevant, 0.1) for dim in (2, 4, 8)]
    assert matryoshka(queries, documents, own, relevant, [2, 4, 8], 0.1) == pytest.approx(sum(each).item() / 3)


def test_dense_scores_learn_from_late_ones_and_not_the_other_way_round():
    dense, late = SCORES.clone().requires_grad_(), SCORES.flip(1).clone().requires_grad_()
    distance = agreement(dense, late, 0.1)
    distance.backward()
    student, teacher = (torch.softmax(one.detach() / 0.1, -1) for one in (dense, late))
    assert distance.item() == pytest.approx((teacher * (teacher / student).log()).sum().item() / 2)
    assert late.grad is None and dense.grad.abs().sum() > 0
    assert agreement(SCORES, SCORES, 0.1).item() == pytest.approx(0, abs=1e-12)


def test_cosent_is_low_where_pairs_are_in_order():
    truth = torch.tensor([0.0, 0.5, 1.0])
    right, wrong = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0.9, 0.5, 0.1])
    expected = math.log(1 + sum(math.exp(20 * gap) for gap in (0.4, 0.4, 0.8)))
    assert cosent(wrong, truth).item() == pytest.approx(expected, rel=1e-5)
    assert cosent(right, truth) < 0.01
    assert cosent(right, torch.ones(3)) == 0  # nothing to order
