"""
特征蒸馏的规律：相同则为零，投影矩阵也要学。
Laws of distill/features.py: equal features cost nothing, and the projections learn.
"""

import itertools
from types import SimpleNamespace

import pytest
import torch

from distill.features import FeatureProjections, feature_distillation_loss, layer_map

SMALL, LARGE = SimpleNamespace(dim=4, n_layers=2), SimpleNamespace(dim=6, n_layers=4)


def hidden(config, tokens=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, config.dim, generator=generator) for _ in range(config.n_layers)]


@pytest.mark.parametrize("n_student, n_teacher, pairs", [
    (2, 4, [(0, 1), (1, 3)]),
    (1, 3, [(0, 2)]),
    (3, 3, [(0, 0), (1, 1), (2, 2)]),
    (8, 16, [(s, 2 * s + 1) for s in range(8)]),        # the document's pair: every second layer
])
def test_layers_are_matched_evenly_and_the_last_with_the_last(n_student, n_teacher, pairs):
    assert layer_map(n_student, n_teacher) == pairs


def test_every_student_layer_has_a_teacher_layer_in_rising_order_even_if_the_student_is_deeper():
    for n_student, n_teacher in itertools.product(range(1, 9), repeat=2):
        student, teacher = zip(*layer_map(n_student, n_teacher))
        assert list(student) == list(range(n_student)) and list(teacher) == sorted(teacher)
        assert teacher[0] >= 0 and teacher[-1] == n_teacher - 1


def test_equal_features_cost_nothing():
    features = hidden(SMALL)
    assert feature_distillation_loss(features, features).item() == 0.0


def test_the_loss_is_a_mean_over_numbers_and_layers_and_a_sum_over_tokens():
    # Layer one: tokens (0, 2) and (1, 1) against 0: 4/2 + 2/2 = 3. Layer two: the same numbers, 0. Mean: 1.5.
    student = [torch.tensor([[0.0, 2.0], [1.0, 1.0]]), torch.ones(2, 2)]
    teacher = [torch.zeros(2, 2), torch.ones(2, 2)]
    assert feature_distillation_loss(student, teacher).item() == pytest.approx(1.5)


def test_projections_are_parameters_one_per_student_layer_of_both_widths():
    shapes = [tuple(weight.shape) for weight in FeatureProjections(SMALL, LARGE).parameters()]
    assert shapes == [(6, 4), (6, 4)]


def test_projections_and_student_learn_and_the_teacher_does_not():
    projections = FeatureProjections(SMALL, LARGE)
    student, teacher = hidden(SMALL), hidden(LARGE, seed=1)
    for layer in student + teacher:
        layer.requires_grad_()
    feature_distillation_loss(*projections(student, teacher)).backward()
    assert all(weight.grad.abs().sum() > 0 for weight in projections.parameters())
    assert all(layer.grad.abs().sum() > 0 for layer in student) and all(layer.grad is None for layer in teacher)


def test_each_student_layer_is_drawn_to_its_own_teacher_layer():
    teacher = hidden(LARGE)
    _, matched = FeatureProjections(SMALL, LARGE)(hidden(SMALL), teacher)
    assert matched[0] is teacher[1] and matched[1] is teacher[3]


def test_a_trained_projection_finds_the_map_from_student_to_teacher():
    torch.manual_seed(0)
    projections = FeatureProjections(SMALL, LARGE)
    student, true = hidden(SMALL, tokens=50), torch.randn(2, 6, 4)
    teacher = [None, student[0] @ true[0].T, None, student[1] @ true[1].T]
    optimizer = torch.optim.Adam(projections.parameters(), lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        loss = feature_distillation_loss(*projections(student, teacher))
        loss.backward()
        optimizer.step()
    assert loss.item() / 50 < 1e-3


def test_features_of_two_widths_or_two_token_counts_stop_with_both_shapes():
    with pytest.raises(ValueError, match=r"\(5, 4\) and \(5, 6\) differ; project them first"):
        feature_distillation_loss([torch.zeros(5, 4)], [torch.zeros(5, 6)])
    with pytest.raises(ValueError, match=r"\(5, 4\) and \(1, 4\)"):
        feature_distillation_loss([torch.zeros(5, 4)], [torch.zeros(1, 4)])
