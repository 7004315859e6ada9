"""
特征蒸馏的规律：相同则为零，投影矩阵也要学；注意力关系只看过去，对比损失与手算相同。
Laws of distill/features.py: equal features have loss 0 and the projections learn; attention
relations see only the past; InfoNCE is what a calculation by hand gives.
"""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from distill.features import (FeatureProjections, IntermediateLosses, attention_relation_loss,
                              contrastive_loss, feature_distillation_loss, layer_map)

SMALL, LARGE = SimpleNamespace(dim=4, n_layers=2), SimpleNamespace(dim=6, n_layers=4)


def hidden(config, tokens=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, config.dim, generator=generator) for _ in range(config.n_layers)]


# -- which layers --------------------------------------------------------------------------------

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


def test_last_matches_only_the_last_layer_with_the_last():
    assert layer_map(2, 4, "last") == [(1, 3)]
    assert layer_map(1, 1, "last") == [(0, 0)]


def test_layers_by_hand_are_counted_from_one():
    assert layer_map(2, 8, "1:3,2:7") == [(0, 2), (1, 6)]
    assert layer_map(2, 8, " 2:8 ") == [(1, 7)]
    assert layer_map(2, 8, "1:1, 1:8") == [(0, 0), (0, 7)]        # a layer may have two teachers


@pytest.mark.parametrize("how, piece", [
    ("1:3,3:4", "3:4"), ("1:9", "1:9"), ("0:1", "0:1"), ("1:0", "1:0"),     # no such layers
    ("1:3,", ""), ("", ""), ("first", "first"), ("1-3", "1-3"), ("1:2:3", "1:2:3"),
    ("1:-1", "1:-1"),                                                       # no pairs
])
def test_a_bad_pair_of_layers_stops_with_the_pair_and_both_layer_counts(how, piece):
    with pytest.raises(ValueError) as error:
        layer_map(2, 8, how)
    for part in (f"--layer_map {how}", f"{piece!r} is not a pair", "layers 1 to 2", "1 to 8"):
        assert part in str(error.value)


def test_only_matched_layers_have_a_projection():
    assert len(FeatureProjections(SMALL, LARGE, "last").maps) == 1
    projections = FeatureProjections(SMALL, LARGE, "2:1")
    student, teacher = hidden(SMALL), hidden(LARGE)
    projected, matched = projections(student, teacher)
    assert len(projected) == 1 and torch.equal(projected[0], projections.maps[0](student[1]))
    assert matched[0] is teacher[0]


# -- hidden states -------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_equal_features_have_loss_0(kind):
    features = hidden(SMALL)
    assert feature_distillation_loss(features, features, kind).item() == pytest.approx(0.0,
                                                                                       abs=1e-6)


def test_the_loss_is_a_mean_over_numbers_layers_and_positions_or_a_sum_over_positions():
    # Layer one: tokens (0, 2) and (1, 1) against 0: 4/2 and 2/2. Layer two: equal, 0.
    student = [torch.tensor([[0.0, 2.0], [1.0, 1.0]]), torch.ones(2, 2)]
    teacher = [torch.zeros(2, 2), torch.ones(2, 2)]
    assert feature_distillation_loss(student, teacher).item() == pytest.approx((2 + 1) / 2 / 2)
    assert feature_distillation_loss(student, teacher, reduction="sum").item() == pytest.approx(1.5)


def test_cosine_is_0_along_1_across_and_2_against_for_vectors_of_any_length():
    # Layer one: (2, 0) against (0, 3), (-5, 0), (7, 0): 1 + 2 + 0. Layer two: 0.
    student = [torch.tensor([[2.0, 0.0]]).repeat(3, 1), torch.ones(3, 2)]
    teacher = [torch.tensor([[0.0, 3.0], [-5.0, 0.0], [7.0, 0.0]]), 4 * torch.ones(3, 2)]
    assert feature_distillation_loss(student, teacher, "cosine", "sum").item() == pytest.approx(1.5)
    assert feature_distillation_loss(student, teacher, "cosine").item() == pytest.approx(0.5)


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_the_sum_of_features_in_two_parts_is_that_of_the_whole(kind):
    student, teacher = hidden(SMALL), hidden(SMALL, seed=1)
    parts = [feature_distillation_loss([x[rows] for x in student], [x[rows] for x in teacher], kind,
                                       "sum").item() for rows in (slice(0, 2), slice(2, 5))]
    whole = feature_distillation_loss(student, teacher, kind, "sum").item()
    assert sum(parts) == pytest.approx(whole, rel=1e-6)
    mean = feature_distillation_loss(student, teacher, kind).item()
    assert mean == pytest.approx(whole / 5, rel=1e-6)


def test_a_student_of_another_width_is_pooled_to_the_teachers():
    # (1, 3 | 5, 7) -> (2, 6), 0 from the teacher. A narrower one repeats: (2, 6) -> (2, 2, 6, 6).
    wide, narrow = torch.tensor([[1.0, 3.0, 5.0, 7.0]]), torch.tensor([[2.0, 6.0]])
    assert feature_distillation_loss([wide], [narrow]).item() == 0.0
    assert feature_distillation_loss([narrow], [wide]).item() == pytest.approx(1.0)
    assert feature_distillation_loss([wide], [narrow + 1], reduction="sum").item() == 1.0
    student = wide.clone().requires_grad_()
    feature_distillation_loss([student], [narrow + 1]).backward()
    assert student.grad.abs().min() > 0


def test_projections_are_parameters_one_per_student_layer_of_both_widths():
    shapes = [tuple(weight.shape) for weight in FeatureProjections(SMALL, LARGE).parameters()]
    assert shapes == [(6, 4), (6, 4)]


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_projections_and_student_learn_and_the_teacher_does_not(kind):
    projections = FeatureProjections(SMALL, LARGE)
    student, teacher = hidden(SMALL), hidden(LARGE, seed=1)
    for layer in student + teacher:
        layer.requires_grad_()
    feature_distillation_loss(*projections(student, teacher), kind).backward()
    assert all(weight.grad.abs().sum() > 0 for weight in projections.parameters())
    assert all(layer.grad.abs().sum() > 0 for layer in student)
    assert all(layer.grad is None for layer in teacher)


def test_each_student_layer_is_compared_with_its_own_teacher_layer():
    teacher = hidden(LARGE)
    _, matched = FeatureProjections(SMALL, LARGE)(hidden(SMALL), teacher)
    assert matched[0] is teacher[1] and matched[1] is teacher[3]


def test_a_trained_projection_finds_the_map_from_student_to_teacher():
    torch.manual_seed(0)
    projections = FeatureProjections(SMALL, LARGE)
    student, true = hidden(SMALL, tokens=50), torch.randn(2, 6, 4)
    teacher = [None, student[0] @ true[0].T, None, student[1] @ true[1].T]
    optimizer = torch.optim.Adam(projections.parameters(), lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        loss = feature_distillation_loss(*projections(student, teacher))
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-3


def test_features_of_two_token_counts_are_refused():
    with pytest.raises(AssertionError):
        feature_distillation_loss([torch.zeros(5, 4)], [torch.zeros(1, 4)])


# -- attention relations -------------------------------------------------------------------------

# 11 tokens: a sample alone, two neighbours of one length
LENGTHS = [1, 3, 3, 4]
AT = torch.tensor([0, 2, 3, 5, 6, 8, 10])
# grouped-query attention: keys and values are narrower
STUDENT_WIDTHS, TEACHER_WIDTHS = (8, 4, 4), (12, 6, 6)


def qkv(widths, tokens=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(1.5 * torch.randn(tokens, width, generator=generator) for width in widths)


def relations_by_hand(student_qkv, teacher_qkv, lengths, at, n_heads):
    """Head by head, position by position, in float64."""
    def relation(x, start, position, head):
        K = x.shape[1] // n_heads
        x = x[:, head * K:(head + 1) * K].double()
        weights = [torch.exp((x[position] * x[past]).sum() / math.sqrt(K))
                   for past in range(start, position + 1)]
        return [weight / sum(weights) for weight in weights]

    begins = itertools.accumulate([0] + lengths)
    starts = [start for start, length in zip(begins, lengths) for _ in range(length)]
    total = 0.0
    for student, teacher in zip(student_qkv, teacher_qkv):
        for position, head in itertools.product(at.tolist(), range(n_heads)):
            q, p = (relation(x, starts[position], position, head) for x in (student, teacher))
            total = total + sum(a * (a.log() - b.log()) for a, b in zip(p, q)) / n_heads / 3
    return total


def test_the_relation_of_two_tokens_is_what_a_hand_finds():
    # Token two scores (0, ln 3) in the teacher, hence (1/4, 3/4), and (0, 0) in the student, hence
    # (1/2, 1/2): KL = 1/4 ln 1/2 + 3/4 ln 3/2. Token one sees itself alone: 0. A second softmax
    # would find 0.03 instead of 0.13.
    student, teacher = torch.zeros(2, 1), torch.tensor([[0.0], [math.sqrt(math.log(3))]])
    kl = 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)
    at = torch.tensor([0, 1])
    assert attention_relation_loss((student,) * 3, (teacher,) * 3, [2], at,
                                   1).item() == pytest.approx(kl, rel=1e-5)
    # Only the keys differ: one relation of three.
    one = attention_relation_loss((student,) * 3, (student, teacher, student), [2], at, 1).item()
    assert one == pytest.approx(kl / 3, rel=1e-5)


@pytest.mark.parametrize("n_heads", [1, 2])
def test_relations_equal_loops_in_float64_value_and_gradient(n_heads):
    student, teacher = qkv(STUDENT_WIDTHS), qkv(TEACHER_WIDTHS, seed=1)
    for x in student:
        x.requires_grad_()
    loss = attention_relation_loss(student, teacher, LENGTHS, AT, n_heads)
    by_hand = relations_by_hand(student, teacher, LENGTHS, AT, n_heads)
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)
    for fast, slow in zip(torch.autograd.grad(loss, student),
                          torch.autograd.grad(by_hand, student)):
        assert torch.allclose(fast, slow, atol=1e-5)


def test_equal_relations_have_loss_0_also_after_a_rotation():
    student = qkv((4, 4, 4))
    # a quarter turn of each head of width 2
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    teacher = tuple(x.view(-1, 2, 2).matmul(turn).flatten(1) for x in student)
    assert attention_relation_loss(student, student, LENGTHS, AT, 2).item() == 0.0
    assert attention_relation_loss(student, teacher, LENGTHS, AT,
                                   2).item() == pytest.approx(0.0, abs=1e-6)


def test_a_later_token_another_sample_and_the_future_of_a_row_change_nothing():
    def loss(changed=None):
        student, teacher = qkv(STUDENT_WIDTHS), qkv(TEACHER_WIDTHS, seed=1)
        if changed is not None:
            for x in student + teacher:
                x[changed] = 100.0
        return attention_relation_loss(student, teacher, LENGTHS, at=torch.tensor([5]),
                                       n_relation_heads=2).item()

    # Position 5 is the second of the sample that is 4, 5, 6: it sees 4 and 5.
    assert [changed for changed in range(11) if loss(changed) != loss()] == [4, 5]


def test_relations_of_positions_not_asked_for_have_loss_0_and_none_at_all_costs_0():
    student, teacher = qkv(STUDENT_WIDTHS), qkv(TEACHER_WIDTHS, seed=1)
    each = [attention_relation_loss(student, teacher, LENGTHS, torch.tensor([i]), 2).item()
            for i in range(11)]
    whole = attention_relation_loss(student, teacher, LENGTHS, AT, 2).item()
    assert whole == pytest.approx(sum(each[i] for i in AT), rel=1e-5)
    # the first of a sample sees itself alone
    assert [i for i in range(11) if each[i] < 1e-6] == [0, 1, 4, 7]
    assert attention_relation_loss(student, teacher, LENGTHS, AT[:0], 2).item() == 0.0


def test_relations_in_two_parts_cost_what_they_cost_in_one():
    student, teacher = qkv(STUDENT_WIDTHS), qkv(TEACHER_WIDTHS, seed=1)
    # behind the first sample of three tokens
    cut = 4
    first = attention_relation_loss([x[:cut] for x in student], [x[:cut] for x in teacher],
                                    LENGTHS[:2], AT[AT < cut], 2)
    second = attention_relation_loss([x[cut:] for x in student], [x[cut:] for x in teacher],
                                     LENGTHS[2:], AT[AT >= cut] - cut, 2)
    whole = attention_relation_loss(student, teacher, LENGTHS, AT, 2)
    assert (first + second).item() == pytest.approx(whole.item(), rel=1e-6)


def test_relations_teach_the_student_alone_and_no_gradient_is_nan():
    student, teacher = qkv(STUDENT_WIDTHS), qkv(TEACHER_WIDTHS, seed=1)
    for x in student + teacher:
        x.requires_grad_()
    attention_relation_loss(student, teacher, LENGTHS, AT, 2).backward()
    assert all(x.grad.isfinite().all() and x.grad.abs().sum() > 0 for x in student)
    assert all(x.grad is None for x in teacher)


def test_a_sample_of_one_token_has_nothing_to_relate_and_gives_0_not_nan():
    student, teacher = qkv((2, 2, 2), tokens=2), qkv((4, 4, 4), tokens=2, seed=1)
    for x in student:
        x.requires_grad_()
    loss = attention_relation_loss(student, teacher, [1, 1], torch.tensor([0, 1]), 2)
    loss.backward()
    assert loss.item() == 0.0 and all((x.grad == 0).all() for x in student)


def test_relations_too_sure_for_fp32_are_still_finite():
    # Scores of tens of thousands: the likeliest has all the mass, and the logarithms of the others
    # are huge.
    student, teacher = tuple(200 * x for x in qkv((4, 4, 4))), tuple(200 * x
                                                                     for x in qkv((4, 4, 4),
                                                                                  seed=1))
    for x in student:
        x.requires_grad_()
    loss = attention_relation_loss(student, teacher, LENGTHS, AT, 2)
    loss.backward()
    assert loss.isfinite() and all(x.grad.isfinite().all() for x in student)


def test_relations_and_infonce_stay_in_fp32_under_autocast():
    def losses():
        student, teacher = qkv((4, 4, 4)), qkv((4, 4, 4), seed=1)
        return (attention_relation_loss(student, teacher, LENGTHS, AT, 2).item(),
                contrastive_loss(student[0][AT], teacher[0][AT], LENGTHS, AT).item())

    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = losses()
    assert under_autocast == losses()


# -- InfoNCE -------------------------------------------------------------------------------------

def infonce_by_hand(student, teacher, lengths, at, temperature):
    """Sample by sample, in float64."""
    ends = list(itertools.accumulate(lengths))
    rows = [[row for row, position in enumerate(at.tolist()) if end - length <= position < end]
            for end, length in zip(ends, lengths)]
    s, t = ([x[of_sample].double().mean(dim=0) for of_sample in rows] for x in (student, teacher))
    total = 0.0
    for i in range(len(lengths)):
        scores = [(s[i] @ t[j]) / (s[i].norm() * t[j].norm()) / temperature
                  for j in range(len(lengths))]
        total = total - scores[i] + sum(score.exp() for score in scores).log()
    return total


def test_infonce_of_two_samples_is_what_a_hand_finds():
    # Cosines 1 with itself and 0 with the other, temperature 1: ln((e + 1) / e) = 0.313 each. All
    # alike: ln 2 each.
    apart, at = torch.tensor([[3.0, 0.0], [0.0, 5.0]]), torch.tensor([0, 1])
    found = contrastive_loss(apart, 2 * apart, [1, 1], at, temperature=1.0).item()
    assert found == pytest.approx(2 * math.log((math.e + 1) / math.e), rel=1e-6)
    assert contrastive_loss(torch.ones(2, 2), apart, [1, 1],
                            at).item() == pytest.approx(2 * math.log(2), rel=1e-6)


def test_infonce_equals_loops_in_float64_value_and_gradient():
    student, teacher = (qkv((6,), tokens=len(AT), seed=seed)[0] for seed in (0, 1))
    student.requires_grad_()
    loss = contrastive_loss(student, teacher, LENGTHS, AT, temperature=0.2)
    by_hand = infonce_by_hand(student, teacher, LENGTHS, AT, temperature=0.2)
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)
    fast, slow = (torch.autograd.grad(value, student)[0] for value in (loss, by_hand))
    assert torch.allclose(fast, slow, atol=1e-5)


def test_a_sample_is_the_mean_of_its_positions_wherever_the_samples_end():
    # Positions 1, 2 | 3 | 6 of samples 0..2, 3..5, 6: the means are (1, 1), (1, 0), (0, 1).
    student, at = torch.tensor([[2.0, 0.0], [0.0, 2.0], [1.0, 0.0],
                                [0.0, 1.0]]), torch.tensor([1, 2, 3, 6])
    pooled = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    found = contrastive_loss(student, student, [3, 3, 1], at).item()
    assert found == pytest.approx(contrastive_loss(pooled, pooled, [1, 1, 1],
                                                   torch.arange(3)).item(), rel=1e-6)


def test_a_sample_that_is_alone_teaches_nothing():
    student, teacher = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    loss = contrastive_loss(student, teacher, [5], torch.tensor([1, 2, 4]))
    loss.backward()
    assert loss.item() == 0.0 and student.grad.abs().max() < 1e-6


def test_the_samples_of_a_micro_batch_are_each_others_negatives_so_infonce_depends_on_the_split():
    student, teacher = (qkv((6,), tokens=4, seed=seed)[0] for seed in (0, 1))
    halves = sum(contrastive_loss(student[rows], teacher[rows], [1, 1], torch.arange(2)).item()
                 for rows in (slice(0, 2), slice(2, 4)))
    assert contrastive_loss(student, teacher, [1] * 4, torch.arange(4)).item() > halves


def test_infonce_teaches_student_and_projection_and_not_the_teacher():
    projection = nn.Linear(4, 6, bias=False)
    student = torch.randn(len(AT), 4, requires_grad=True)
    teacher = torch.randn(len(AT), 6, requires_grad=True)
    contrastive_loss(projection(student), teacher, LENGTHS, AT).backward()
    assert student.grad.abs().sum() > 0 and projection.weight.grad.abs().sum() > 0
    assert teacher.grad is None


# -- all three -----------------------------------------------------------------------------------

def config(**sizes):
    return SimpleNamespace(n_heads=2, n_kv_heads=1, head_dim=2, **sizes)


CONFIGS = config(dim=4, n_layers=2), config(dim=6, n_layers=4)


def outputs(of, tokens=11, seed=0):
    widths = [n * of.head_dim for n in (of.n_heads, of.n_kv_heads, of.n_kv_heads)]
    states = hidden(of, len(AT), seed)
    return SimpleNamespace(hidden=states, final=states[-1], qkv=qkv(widths, tokens, seed))


BATCH = SimpleNamespace(lengths=LENGTHS, at=AT, step_targets=20, step_samples=8)


def test_the_losses_of_a_run_are_each_divided_by_what_the_whole_step_holds():
    student, teacher = outputs(CONFIGS[0]), outputs(CONFIGS[1], seed=1)
    losses = IntermediateLosses(*CONFIGS, feature=1.0, attention=0.5, contrastive=2.0,
                                relation_heads=2)
    weighted, found = losses(BATCH, student, teacher)
    features = losses.projections(student.hidden, teacher.hidden)
    expected = {
        "feature": feature_distillation_loss(*features, "mse", "sum") / 20,
        "attention": attention_relation_loss(student.qkv, teacher.qkv, LENGTHS, AT, 2) / 20,
        "contrastive": contrastive_loss(losses.contrast(student.final), teacher.final, LENGTHS,
                                        AT) / 8}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    by_hand = expected["feature"] + 0.5 * expected["attention"] + 2 * expected["contrastive"]
    assert weighted.item() == pytest.approx(by_hand.item(), rel=1e-6)


def test_a_loss_of_weight_0_is_not_computed_and_has_no_parameters():
    losses = IntermediateLosses(*CONFIGS, attention=0.5, relation_heads=2)
    assert losses.weights == {"attention": 0.5} and not list(losses.parameters())
    teacher = outputs(CONFIGS[1], seed=1)
    weighted, found = losses(BATCH, outputs(CONFIGS[0]), teacher)
    assert found.keys() == {"attention"} and weighted == 0.5 * found["attention"]
    assert IntermediateLosses(*CONFIGS)(BATCH, None, None) == (0, {})
    sizes = [p.numel() for p in IntermediateLosses(*CONFIGS, feature=1, contrastive=1).parameters()]
    assert sizes == [24, 24, 24]


def test_layers_and_heads_that_do_not_fit_are_refused_before_the_run():
    with pytest.raises(ValueError, match="'3:1' is not a pair"):
        IntermediateLosses(*CONFIGS, feature=1.0, layer_map="3:1")
    for n_heads in (0, 3, 4):           # queries 4 wide, keys and values 2
        with pytest.raises(ValueError, match=f"n_relation_heads={n_heads} does not divide all .*"
                           r"\[4, 2, .*Counts that do: \[1, 2\]$"):
            IntermediateLosses(*CONFIGS, attention=1.0, relation_heads=n_heads)
