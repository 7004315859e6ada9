"""
蒸馏损失的规律：与手算公式相同，梯度与差分相同，被遮住的位置毫无影响。
Laws of distill/losses.py and runtime/schedules.py: the formula by hand, the gradient by finite
differences, and nothing from masked positions.
"""

import math
from functools import partial

import numpy as np
import pytest
import torch

from dataset.lm_dataset import packed_batch
from distill.losses import (DIVERGENCES, akl, distillation_loss_fn, forward_kl, jsd,
                            gold, pick_divergence, reverse_kl, skew_kl, skew_reverse_kl, tvd)
from runtime.schedules import get_lr, get_temperature


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kl_by_hand(student, teacher, temperature):
    """T^2 sum p (log p - log q) of one token, its logits as plain lists, in Python's float64."""
    p, q = ([math.exp(z / temperature) for z in logits] for logits in (teacher, student))
    p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
    return temperature ** 2 * sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q))


# -- every divergence, by hand -------------------------------------------------------------------

def kl(a, b):
    return sum(x * (math.log(x) - math.log(y)) for x, y in zip(a, b))


def mix(a, b, weight):
    return [weight * x + (1 - weight) * y for x, y in zip(a, b)]


def jsd_by_hand(p, q, beta):
    m = mix(p, q, beta)
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def head_by_hand(p, q, head_mass=0.5):
    """AKL's weight of the forward KL: how much of the gaps |p - q| lies in the teacher's head."""
    gaps, mass, at_head = [abs(x - y) for x, y in zip(p, q)], 0.0, 0.0
    for v in sorted(range(len(p)), key=lambda v: -p[v]):
        if mass < head_mass:
            at_head += gaps[v]
        mass += p[v]
    return at_head / sum(gaps)


def akl_by_hand(p, q):
    of_head = head_by_hand(p, q)
    return of_head * kl(p, q) + (1 - of_head) * kl(q, p)


CASES = {   # name: (ours on log-probabilities, the formula on plain lists)
    "forward_kl": (forward_kl, kl),
    "reverse_kl": (reverse_kl, lambda p, q: kl(q, p)),
    **{f"jsd {beta}": (partial(jsd, beta=beta), partial(jsd_by_hand, beta=beta))
       for beta in (0.1, 0.5, 0.9)},
    "jsd 0": (partial(jsd, beta=0.0), kl),
    "jsd 1": (partial(jsd, beta=1.0), lambda p, q: kl(q, p)),
    "jsd 0.2, normalised": (partial(jsd, beta=0.2, normalised=True), lambda p,
                            q: jsd_by_hand(p, q, 0.2) / (0.2 * 0.8)),
    "skew_kl": (skew_kl, lambda p, q: kl(p, mix(p, q, 0.1))),
    "skew_kl 0.3": (partial(skew_kl, skew=0.3), lambda p, q: kl(p, mix(p, q, 0.3))),
    "skew_reverse_kl": (skew_reverse_kl, lambda p, q: kl(q, mix(p, q, 0.9))),
    "skew_reverse_kl 0.3": (partial(skew_reverse_kl, skew=0.3), lambda p, q: kl(q, mix(p, q, 0.7))),
    "tvd": (tvd, lambda p, q: sum(abs(x - y) for x, y in zip(p, q)) / 2),
    "akl": (akl, akl_by_hand),
    "gold": (gold, kl),
}


def test_every_choice_has_a_formula_in_plain_python():
    assert all(any(case.startswith(name) for case in CASES) for name in DIVERGENCES)


each_divergence = pytest.mark.parametrize("ours, by_hand", CASES.values(), ids=CASES)


def log_softmax(logits):
    return logits.double().log_softmax(dim=-1)


def log_of(*probabilities):
    return torch.tensor([probabilities], dtype=torch.float64).log()


@each_divergence
def test_each_divergence_equals_its_formula_in_plain_python(ours, by_hand):
    log_p, log_q = log_softmax(2 * randn(20, 6)), log_softmax(2 * randn(20, 6, seed=1))
    expected = [by_hand(p, q) for p, q in zip(log_p.exp().tolist(), log_q.exp().tolist())]
    assert ours(log_p, log_q).tolist() == pytest.approx(expected, rel=1e-9)


@each_divergence
def test_each_divergence_is_0_at_equality_and_positive_elsewhere(ours, by_hand):
    log_p, log_q = log_softmax(3 * randn(200, 7)), log_softmax(3 * randn(200, 7, seed=1))
    assert ours(log_p, log_p).abs().max() < 1e-14 and (ours(log_p, log_q) > 0).all()


@pytest.mark.parametrize("name", [name for name in CASES if name != "akl"])     # AKL's is below
def test_the_gradient_of_each_divergence_equals_finite_differences_in_float64(name):
    log_p, student = log_softmax(randn(4, 5, seed=1)), randn(4, 5).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: CASES[name][0](log_p, log_softmax(z)), student)


def test_the_gradient_of_akl_is_that_of_the_two_kls_mixed_by_weights_that_stand_still():
    log_p, student = log_softmax(randn(4, 5, seed=1)), randn(4, 5).double().requires_grad_()
    of_head = torch.tensor([head_by_hand(p, q)
                            for p, q in zip(log_p.exp().tolist(), student.softmax(-1).tolist())])

    def mixed(z):
        each = zip(of_head.tolist(), log_p.exp().tolist(), z.softmax(dim=-1).tolist())
        return sum(w * kl(p, q) + (1 - w) * kl(q, p) for w, p, q in each)

    slope, = torch.autograd.grad(akl(log_p, log_softmax(student)).sum(), student)
    nudges = 1e-6 * torch.eye(20, dtype=torch.float64).view(20, 4, 5)
    by_differences = [(mixed(student + nudge) - mixed(student - nudge)) / 2e-6 for nudge in nudges]
    assert slope.flatten().tolist() == pytest.approx(by_differences, abs=1e-8)


def test_akl_of_three_tokens_is_what_a_hand_finds():
    # Head of (.5, .3, .2): the first token, which alone has half of the mass. Gaps .2 and .1 + .1:
    # half and half.
    p, q = (0.5, 0.3, 0.2), (0.3, 0.4, 0.3)
    assert akl(log_of(*p), log_of(*q)).item() == pytest.approx((kl(p, q) + kl(q, p)) / 2)


def test_jsd_at_one_half_is_symmetric():
    log_p, log_q = log_softmax(randn(20, 6)), log_softmax(randn(20, 6, seed=1))
    assert torch.allclose(jsd(log_p, log_q), jsd(log_q, log_p), rtol=1e-12)
    assert torch.allclose(jsd(log_p, log_q, 0.2), jsd(log_q, log_p, 0.8), rtol=1e-12)
    assert not torch.allclose(jsd(log_p, log_q, 0.2), jsd(log_q, log_p, 0.2), rtol=1e-2)


def test_jsd_falls_to_0_at_both_ends_and_normalised_it_tends_to_the_kls():
    log_p, log_q = log_softmax(3 * randn(1, 50)), log_softmax(3 * randn(1, 50, seed=1))
    forward, reverse = forward_kl(log_p, log_q).item(), reverse_kl(log_p, log_q).item()
    for beta, end in ((1e-6, forward), (1 - 1e-6, reverse)):
        assert jsd(log_p, log_q, beta).item() / 1e-6 == pytest.approx(end, rel=0.01)
        assert jsd(log_p, log_q, beta, normalised=True).item() == pytest.approx(end, rel=0.01)

    # Between the ends it first rises, then falls: 0.99 is no 99 % of the way from one KL to the
    # other.
    low, middle, high, higher = (jsd(log_p, log_q, beta).item() for beta in (0.001, 0.5, 0.9, 0.99))
    assert low < 0.02 * middle and higher < high < middle < min(forward, reverse)
    assert higher < 0.01 * reverse


def test_skewing_keeps_the_kl_finite_where_the_other_has_nothing():
    # p = (1, 0), q = (0, 1), all but 1e-30: KL(p || .1 p + .9 q) = log(1 / .1).
    one, other = log_of(1.0, 1e-30), log_of(1e-30, 1.0)
    assert forward_kl(one, other).item() > 69
    for skewed in (skew_kl, skew_reverse_kl):
        assert skewed(one, other).item() == pytest.approx(-math.log(0.1))
        each = skewed(log_softmax(30 * randn(200, 7)), log_softmax(30 * randn(200, 7, seed=1)),
                      skew=0.3)
        assert (each <= -math.log(0.3) + 1e-12).all()


def test_total_variation_is_the_mass_to_be_moved_and_at_most_all_of_it():
    assert tvd(log_of(0.5, 0.3, 0.2), log_of(0.2, 0.3, 0.5)).item() == pytest.approx(0.3)
    assert tvd(log_of(1.0, 1e-30), log_of(1e-30, 1.0)).item() == pytest.approx(1.0)
    assert (tvd(log_softmax(30 * randn(200, 7)), log_softmax(30 * randn(200, 7, seed=1))) <= 1
            + 1e-12).all()


@pytest.mark.parametrize("name, settings, case, formula", [
    ("forward_kl", {}, "forward_kl", "KL(teacher || student)"),
    ("reverse_kl", {}, "reverse_kl", "KL(student || teacher)"),
    ("jsd", {}, "jsd 0.5", "JSD_0.5(teacher, student)"),
    ("jsd", {"beta": 0.9}, "jsd 0.9", "JSD_0.9(teacher, student)"),
    ("jsd", {"beta": 0.2, "jsd_normalised": True}, "jsd 0.2, normalised",
     "JSD_0.2(teacher, student) / 0.16"),
    ("skew_kl", {}, "skew_kl", "KL(teacher || 0.1 teacher + 0.9 student)"),
    ("skew_kl", {"skew": 0.3}, "skew_kl 0.3", "KL(teacher || 0.3 teacher + 0.7 student)"),
    ("skew_reverse_kl", {}, "skew_reverse_kl", "KL(student || 0.9 teacher + 0.1 student)"),
    ("skew_reverse_kl", {"skew": 0.3}, "skew_reverse_kl 0.3",
     "KL(student || 0.7 teacher + 0.3 student)"),
    ("tvd", {}, "tvd", "TV(teacher, student)"),
    ("akl", {}, "akl", "AKL(teacher, student)"),
    ("gold", {}, "gold", "KL(teacher || student) over byte spans"),
])
def test_a_name_and_its_settings_give_the_divergence_and_its_printed_formula(
        name, settings, case, formula):
    log_p, log_q = log_softmax(randn(20, 6)), log_softmax(randn(20, 6, seed=1))
    chosen, printed = pick_divergence(name, **settings)
    assert torch.equal(chosen(log_p, log_q), CASES[case][0](log_p, log_q)) and printed == formula
    assert name in DIVERGENCES


def test_a_divergence_of_your_own_works_like_ours():
    student, teacher = randn(6, 5).requires_grad_(), randn(6, 5, seed=1)
    loss = distillation_loss_fn(student, teacher, 2.0, divergence=lambda log_p,
                                log_q: (log_p - log_q).square().sum(-1))
    p, q = (logits.double().div(2).log_softmax(dim=-1) for logits in (teacher, student))
    assert loss.item() == pytest.approx(4 * (p - q).square().sum().item() / 6, rel=1e-5)
    loss.backward()
    assert student.grad.abs().sum() > 0


# -- the value -----------------------------------------------------------------------------------

@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 5.0])
def test_a_teacher_equal_to_the_student_gives_no_loss_and_no_gradient(temperature):
    logits = randn(6, 11).requires_grad_()
    loss = distillation_loss_fn(logits, logits.detach(), temperature)
    loss.backward()
    assert abs(loss.item()) < 1e-5 and logits.grad.abs().max() < 1e-5


def test_adding_a_number_to_all_logits_changes_nothing():
    student, teacher = randn(6, 11), randn(6, 11, seed=1)
    shifted = distillation_loss_fn(student + 3, teacher - 5, temperature=2.0)
    assert shifted.item() == pytest.approx(distillation_loss_fn(student, teacher,
                                                                temperature=2.0).item(), rel=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_loss_is_positive_wherever_the_two_differ(temperature):
    assert (distillation_loss_fn(3 * randn(500, 7), 3 * randn(500, 7, seed=1), temperature,
                                 reduction="none") > 0).all()


def test_forward_kl_of_three_tokens_is_what_a_hand_finds():
    p, q = [0.5, 0.25, 0.25], [0.25, 0.5, 0.25]
    log_p, log_q = (torch.tensor([x], dtype=torch.float64).log() for x in (p, q))
    # .5 ln(.5/.25) + .25 ln(.25/.5) + .25 ln 1 = .5 ln 2 - .25 ln 2 = ln 2 / 4
    assert forward_kl(log_p, log_q).tolist() == pytest.approx([math.log(2) / 4])
    assert distillation_loss_fn(log_q, log_p).item() == pytest.approx(math.log(2) / 4, rel=1e-6)


def test_forward_kl_is_not_symmetric_the_student_pays_where_the_teacher_has_mass():
    even, peaked = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.99, 0.01]]).log()
    missing = distillation_loss_fn(student_logits=peaked, teacher_logits=even).item()
    extra = distillation_loss_fn(student_logits=even, teacher_logits=peaked).item()
    # 1.614
    assert missing == pytest.approx(0.5 * math.log(0.5 / 0.99) + 0.5 * math.log(0.5 / 0.01),
                                    rel=1e-4)
    # 0.637
    assert extra == pytest.approx(0.99 * math.log(0.99 / 0.5) + 0.01 * math.log(0.01 / 0.5),
                                  rel=1e-4)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 5.0])
def test_the_loss_equals_the_formula_in_plain_python(temperature):
    student, teacher = 2 * randn(5, 4), 2 * randn(5, 4, seed=1)
    by_hand = [kl_by_hand(q, p, temperature) for q, p in zip(student.tolist(), teacher.tolist())]
    loss = distillation_loss_fn(student, teacher, temperature, reduction="none")
    assert loss.tolist() == pytest.approx(by_hand, rel=1e-4)


# -- the gradient --------------------------------------------------------------------------------

@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_the_gradient_of_the_loss_equals_finite_differences_and_the_closed_form(temperature):
    student, teacher = randn(2, 3).requires_grad_(), randn(2, 3, seed=1)
    distillation_loss_fn(student, teacher, temperature, reduction="sum").backward()

    step, z, p = 1e-4, student.tolist(), teacher.tolist()
    for n in range(2):
        for v in range(3):
            higher, lower = ([x + s * (v == i) for i, x in enumerate(z[n])] for s in (step, -step))
            slope = (kl_by_hand(higher, p[n], temperature) - kl_by_hand(lower, p[n],
                                                                        temperature)) / (2 * step)
            assert student.grad[n, v].item() == pytest.approx(slope, abs=1e-5)

    # Hinton et al. 2015, Eq. 2: (q - p) / T, here times T^2.
    q_minus_p = (student / temperature).softmax(dim=-1) - (teacher / temperature).softmax(dim=-1)
    assert torch.allclose(student.grad, temperature * q_minus_p, atol=1e-6)


def sizes_of_the_gradient(divergence) -> list[float]:
    """At T = 1, 2, 4, for logits so small that softmax(z / T) is 1/V + z / (T V)."""
    sizes = []
    for temperature in (1.0, 2.0, 4.0):
        student = (0.1 * randn(8, 10)).requires_grad_()
        distillation_loss_fn(student, 0.1 * randn(8, 10, seed=1), temperature,
                             divergence=divergence).backward()
        sizes.append(student.grad.norm().item())
    return sizes


@pytest.mark.parametrize("name",
                         ["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "akl", "gold"])
def test_temperature_squared_keeps_the_size_of_the_gradient(name):
    # A smooth divergence is quadratic near its 0: its slope falls once with q - p, and once with
    # dq/dz.
    at_1, at_2, at_4 = sizes_of_the_gradient(pick_divergence(name)[0])
    assert at_2 == pytest.approx(at_1, rel=0.05) and at_4 == pytest.approx(at_1, rel=0.05)


def test_of_a_distance_with_a_kink_the_gradient_grows_with_the_temperature():
    # |p - q| has the slope of dq/dz however near the two are: 1 / T is all it falls by, and T^2 / T
    # is left.
    at_1, at_2, at_4 = sizes_of_the_gradient(tvd)
    assert at_2 == pytest.approx(2 * at_1, rel=0.05) and at_4 == pytest.approx(4 * at_1, rel=0.05)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_no_gradient_reaches_the_teacher(name):
    student, teacher = randn(4, 5).requires_grad_(), randn(4, 5, seed=1).requires_grad_()
    distillation_loss_fn(student, teacher, divergence=pick_divergence(name)[0]).backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None


# -- reductions ----------------------------------------------------------------------------------

def test_none_is_a_loss_per_token_sum_adds_them_and_batchmean_divides_by_all_tokens():
    student, teacher = randn(6, 5), randn(6, 5, seed=1)
    each = distillation_loss_fn(student, teacher, 2.0, "none")
    assert each.shape == (6,)
    for reduction, expected in (("none", each), ("sum", each.sum()), ("batchmean", each.sum() / 6)):
        row = distillation_loss_fn(student, teacher, 2.0, reduction)
        assert torch.allclose(row, expected)
        # 2 x 3 tokens have the loss of 6 tokens in a row.
        grid = distillation_loss_fn(student.view(2, 3, 5), teacher.view(2, 3, 5), 2.0, reduction)
        assert grid.shape == ((2, 3) if reduction == "none" else ())
        assert torch.allclose(grid.flatten(), row.flatten())


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_token_that_both_models_mask_changes_nothing(name):
    """Its logits are -inf; -inf - -inf would be NaN."""
    divergence = pick_divergence(name)[0]
    student = torch.tensor([[1.0, 0.5, -1.0], [0.0, 0.2, 0.1]], requires_grad=True)
    teacher = torch.tensor([[0.3, 0.9, 0.0], [2.0, 0.0, 0.5]])
    masked = torch.full((2, 1), -torch.inf)
    plain = distillation_loss_fn(student, teacher, 2.0, divergence=divergence)
    found = distillation_loss_fn(torch.cat([student, masked], 1), torch.cat([teacher, masked], 1),
                                 2.0, divergence=divergence)
    assert found.item() == pytest.approx(plain.item(), rel=1e-6)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (plain, found)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("reduction", ["sum", "batchmean"])
def test_no_token_gives_0_and_a_gradient_of_0_not_nan(reduction):
    student = torch.empty(0, 5, requires_grad=True)
    loss = distillation_loss_fn(student, torch.empty(0, 5), reduction=reduction)
    loss.backward()
    assert loss.item() == 0.0 and student.grad.shape == (0, 5)


@pytest.mark.parametrize("shape", [(4, 6), (1, 5)], ids=["vocabularies", "one that broadcasts"])
def test_logits_of_two_shapes_stop_with_both(shape):
    with pytest.raises(ValueError, match=rf"\(4, 5\).*\({shape[0]}, {shape[1]}\)"):
        distillation_loss_fn(randn(4, 5), randn(*shape))


def test_an_unknown_reduction_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="'mean'.*'batchmean', 'sum', 'none'"):
        distillation_loss_fn(randn(4, 5), randn(4, 5), reduction="mean")


# -- precision -----------------------------------------------------------------------------------

def test_bf16_logits_are_read_in_fp32_for_a_log_softmax_in_bf16_reads_a_small_kl_wrongly():
    teacher = randn(32, 1000).bfloat16()
    student = (teacher.float() + 0.01 * randn(32, 1000, seed=1)).bfloat16()
    true = forward_kl(teacher.double().log_softmax(dim=-1),
                      student.double().log_softmax(dim=-1)).mean().item()
    in_bf16 = forward_kl(teacher.log_softmax(dim=-1).float(),
                         student.log_softmax(dim=-1).float()).mean().item()
    assert 4e-5 < true < 6e-5
    loss = distillation_loss_fn(student, teacher)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(true, rel=0.01)
    assert abs(in_bf16 - true) > 5 * true


# -- the mask ------------------------------------------------------------------------------------

def test_positions_that_are_no_target_change_nothing():
    # Two samples; x marks the targets:      a b x x      a x b x
    is_target = np.array([False, False, True, True, False, True, False, True])
    batch = packed_batch(np.arange(8), is_target, np.array([4, 4]))
    # of the stream of 2 x 3 tokens that are read
    assert batch.at.tolist() == [1, 2, 3, 5]
    student, teacher = randn(6, 5).requires_grad_(), randn(6, 5, seed=1)
    loss = distillation_loss_fn(student[batch.at], teacher[batch.at])
    loss.backward()
    assert student.grad[[0, 4]].abs().sum() == 0
    assert (student.grad[batch.at].abs().sum(dim=1) > 0).all()

    noise = torch.zeros(6, 1)
    noise[[0, 4]] = 100.0
    noisy = distillation_loss_fn((student + noise * randn(6, 5))[batch.at],
                                 (teacher - noise)[batch.at])
    assert noisy.item() == loss.item()


# -- what changes with the step ------------------------------------------------------------------

def test_temperature_falls_in_a_straight_line_from_5_to_1():
    assert [get_temperature(step, 4) for step in range(5)] == [5.0, 4.0, 3.0, 2.0, 1.0]
    assert get_temperature(9, 4) == 1.0
    assert get_temperature(1, 2, initial_temp=2.0, final_temp=8.0) == 5.0


def test_the_learning_rate_is_a_cosine_from_eleven_tenths_to_one_tenth():
    # lr/10 + lr/2 (1 + cos): cos is 1, 0 and -1 at the beginning, the middle and the end.
    assert [get_lr(step, 10, lr=1.0) for step in (0, 5, 10)] == pytest.approx([1.1, 0.6, 0.1])
    assert get_lr(10 / 3, 10, lr=2.0) == pytest.approx(0.2 + 1.0 * 1.5)         # cos(pi / 3) = 1/2


def test_warm_up_is_a_straight_line_to_where_the_cosine_begins():
    rates = [get_lr(step, total_steps=14, lr=1.0, warmup_steps=4) for step in range(14)]
    assert rates[:4] == pytest.approx([1.1 * 1 / 4, 1.1 * 2 / 4, 1.1 * 3 / 4, 1.1])
    assert rates[4:] == pytest.approx([get_lr(step, 10, 1.0) for step in range(10)])
    assert rates == [get_lr(step, 14, 1.0, warmup_steps=0.3) for step in range(14)]    # 0.3 of 14: 4
    assert [get_lr(step, 10, 1.0, warmup_steps=0) for step in range(10)] == [get_lr(step, 10, 1.0)
                                                                             for step in range(10)]


def test_a_warm_up_longer_than_the_run_is_only_its_line():
    assert [get_lr(step, 3, 1.0, warmup_steps=10)
            for step in range(3)] == pytest.approx([0.11, 0.22, 0.33])
