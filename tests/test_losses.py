"""
蒸馏损失的规律：与手算公式相同，梯度与差分相同，被遮住的位置毫无影响。
Laws of distill/losses.py, distill/schedules.py and the learning rate: the formula by hand, the gradient by differences,
and nothing from where nothing is asked.
"""

import math

import numpy as np
import pytest
import torch

from dataset.lm_dataset import flat_batch
from distill.losses import distillation_loss_fn, token_kl
from distill.schedules import get_temperature
from runtime import get_lr, lr_at


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kl_by_hand(student, teacher, temperature):
    """T^2 sum p (log p - log q) of one token, its logits as plain lists, in Python's float64."""
    p, q = ([math.exp(z / temperature) for z in logits] for logits in (teacher, student))
    p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
    return temperature ** 2 * sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q))


# -- the value -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 5.0])
def test_a_teacher_equal_to_the_student_teaches_nothing(temperature):
    logits = randn(6, 11).requires_grad_()
    loss = distillation_loss_fn(logits, logits.detach(), temperature)
    loss.backward()
    assert abs(loss.item()) < 1e-5 and logits.grad.abs().max() < 1e-5


def test_adding_a_number_to_all_logits_changes_nothing():
    student, teacher = randn(6, 11), randn(6, 11, seed=1)
    shifted = distillation_loss_fn(student + 3, teacher - 5, temperature=2.0)
    assert shifted.item() == pytest.approx(distillation_loss_fn(student, teacher, temperature=2.0).item(), rel=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_loss_is_positive_wherever_the_two_differ(temperature):
    assert (distillation_loss_fn(3 * randn(500, 7), 3 * randn(500, 7, seed=1), temperature, reduction="none") > 0).all()


def test_forward_kl_of_three_words_is_what_a_hand_finds():
    p, q = [0.5, 0.25, 0.25], [0.25, 0.5, 0.25]
    log_p, log_q = (torch.tensor([x], dtype=torch.float64).log() for x in (p, q))
    # .5 ln(.5/.25) + .25 ln(.25/.5) + .25 ln 1 = .5 ln 2 - .25 ln 2 = ln 2 / 4
    assert token_kl(log_p, log_q).tolist() == pytest.approx([math.log(2) / 4])
    assert distillation_loss_fn(log_q, log_p).item() == pytest.approx(math.log(2) / 4, rel=1e-6)


def test_forward_kl_is_not_symmetric_the_student_pays_where_the_teacher_has_mass():
    even, peaked = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.99, 0.01]]).log()
    missing = distillation_loss_fn(student_logits=peaked, teacher_logits=even).item()
    extra = distillation_loss_fn(student_logits=even, teacher_logits=peaked).item()
    assert missing == pytest.approx(0.5 * math.log(0.5 / 0.99) + 0.5 * math.log(0.5 / 0.01), rel=1e-4)     # 1.614
    assert extra == pytest.approx(0.99 * math.log(0.99 / 0.5) + 0.01 * math.log(0.01 / 0.5), rel=1e-4)     # 0.637


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 5.0])
def test_the_loss_equals_the_formula_in_plain_python(temperature):
    student, teacher = 2 * randn(5, 4), 2 * randn(5, 4, seed=1)
    by_hand = [kl_by_hand(q, p, temperature) for q, p in zip(student.tolist(), teacher.tolist())]
    loss = distillation_loss_fn(student, teacher, temperature, reduction="none")
    assert loss.tolist() == pytest.approx(by_hand, rel=1e-4)


# -- the gradient ----------------------------------------------------------------------------------------------

def test_the_gradient_of_token_kl_equals_finite_differences_in_float64():
    log_p = randn(3, 4, seed=1).double().log_softmax(dim=-1)
    student = randn(3, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: token_kl(log_p, z.log_softmax(dim=-1)), student)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_the_gradient_of_the_loss_equals_finite_differences_and_the_closed_form(temperature):
    student, teacher = randn(2, 3).requires_grad_(), randn(2, 3, seed=1)
    distillation_loss_fn(student, teacher, temperature, reduction="sum").backward()

    step, z, p = 1e-4, student.tolist(), teacher.tolist()
    for n in range(2):
        for v in range(3):
            higher, lower = ([x + s * (v == i) for i, x in enumerate(z[n])] for s in (step, -step))
            slope = (kl_by_hand(higher, p[n], temperature) - kl_by_hand(lower, p[n], temperature)) / (2 * step)
            assert student.grad[n, v].item() == pytest.approx(slope, abs=1e-5)

    # Hinton et al. 2015, Eq. 2: (q - p) / T, here times T^2.
    q_minus_p = (student / temperature).softmax(dim=-1) - (teacher / temperature).softmax(dim=-1)
    assert torch.allclose(student.grad, temperature * q_minus_p, atol=1e-6)


def test_temperature_squared_keeps_the_size_of_the_gradient():
    # For small logits softmax(z / T) is 1/V + z / (T V), so (q - p) / T falls like 1 / T^2.
    size = {}
    for temperature in (1.0, 2.0, 4.0):
        student = (0.1 * randn(8, 10)).requires_grad_()
        distillation_loss_fn(student, 0.1 * randn(8, 10, seed=1), temperature).backward()
        size[temperature] = student.grad.norm().item()
    assert size[2.0] == pytest.approx(size[1.0], rel=0.02)
    assert size[4.0] == pytest.approx(size[1.0], rel=0.02)


def test_no_gradient_reaches_the_teacher():
    student, teacher = randn(4, 5).requires_grad_(), randn(4, 5, seed=1).requires_grad_()
    distillation_loss_fn(student, teacher).backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None


# -- reductions ------------------------------------------------------------------------------------------------

def test_none_is_a_loss_per_token_sum_adds_them_and_batchmean_divides_by_all_tokens():
    student, teacher = randn(6, 5), randn(6, 5, seed=1)
    each = distillation_loss_fn(student, teacher, 2.0, "none")
    assert each.shape == (6,)
    assert distillation_loss_fn(student, teacher, 2.0, "sum").item() == pytest.approx(each.sum().item())
    assert distillation_loss_fn(student, teacher, 2.0, "batchmean").item() == pytest.approx(each.sum().item() / 6)


@pytest.mark.parametrize("reduction", ["none", "sum", "batchmean"])
def test_a_batch_of_2_by_3_tokens_has_the_loss_of_6_tokens_in_a_row(reduction):
    student, teacher = randn(6, 5), randn(6, 5, seed=1)
    row = distillation_loss_fn(student, teacher, 2.0, reduction)
    grid = distillation_loss_fn(student.view(2, 3, 5), teacher.view(2, 3, 5), 2.0, reduction)
    assert grid.shape == ((2, 3) if reduction == "none" else ())
    assert torch.allclose(grid.flatten(), row.flatten())


@pytest.mark.parametrize("reduction", ["sum", "batchmean"])
def test_no_token_gives_0_and_a_gradient_of_0_not_nan(reduction):
    student = torch.empty(0, 5, requires_grad=True)
    loss = distillation_loss_fn(student, torch.empty(0, 5), reduction=reduction)
    loss.backward()
    assert loss.item() == 0.0 and student.grad.shape == (0, 5)


def test_logits_of_two_vocabularies_stop_with_both_shapes():
    with pytest.raises(ValueError, match=r"\(4, 5\).*\(4, 6\)"):
        distillation_loss_fn(randn(4, 5), randn(4, 6))


def test_one_token_too_few_stops_though_it_would_broadcast():
    with pytest.raises(ValueError, match=r"\(4, 5\).*\(1, 5\)"):
        distillation_loss_fn(randn(4, 5), randn(1, 5))


def test_an_unknown_reduction_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="'mean'.*'batchmean', 'sum', 'none'"):
        distillation_loss_fn(randn(4, 5), randn(4, 5), reduction="mean")


# -- precision -------------------------------------------------------------------------------------------------

def test_bf16_logits_are_read_in_fp32_for_a_log_softmax_in_bf16_reads_a_small_kl_wrongly():
    teacher = randn(32, 1000).bfloat16()
    student = (teacher.float() + 0.01 * randn(32, 1000, seed=1)).bfloat16()
    true = token_kl(teacher.double().log_softmax(dim=-1), student.double().log_softmax(dim=-1)).mean().item()
    in_bf16 = token_kl(teacher.log_softmax(dim=-1).float(), student.log_softmax(dim=-1).float()).mean().item()
    assert 4e-5 < true < 6e-5
    assert distillation_loss_fn(student, teacher).item() == pytest.approx(true, rel=0.01)
    assert abs(in_bf16 - true) > 5 * true


def test_the_loss_of_bf16_logits_is_fp32():
    assert distillation_loss_fn(randn(2, 3).bfloat16(), randn(2, 3).bfloat16()).dtype == torch.float32


# -- the mask --------------------------------------------------------------------------------------------------

def test_positions_that_are_no_target_change_nothing():
    # Two samples; x marks the targets:      a b x x      a x b x
    is_target = np.array([False, False, True, True, False, True, False, True])
    batch = flat_batch(np.arange(8), is_target, np.array([4, 4]))
    assert batch.at.tolist() == [1, 2, 3, 5]                    # of the stream of 2 x 3 tokens that are read
    student, teacher = randn(6, 5).requires_grad_(), randn(6, 5, seed=1)
    loss = distillation_loss_fn(student[batch.at], teacher[batch.at])
    loss.backward()
    assert student.grad[[0, 4]].abs().sum() == 0 and (student.grad[batch.at].abs().sum(dim=1) > 0).all()

    noise = torch.zeros(6, 1)
    noise[[0, 4]] = 100.0
    noisy = distillation_loss_fn((student + noise * randn(6, 5))[batch.at], (teacher - noise)[batch.at])
    assert noisy.item() == loss.item()


# -- what changes with the step --------------------------------------------------------------------------------

def test_temperature_falls_in_a_straight_line_from_5_to_1():
    assert [get_temperature(step, 4) for step in range(5)] == [5.0, 4.0, 3.0, 2.0, 1.0]
    assert get_temperature(9, 4) == 1.0
    assert get_temperature(1, 2, initial_temp=2.0, final_temp=8.0) == 5.0


def test_the_learning_rate_is_a_cosine_from_eleven_tenths_to_one_tenth():
    # lr/10 + lr/2 (1 + cos): cos is 1, 0 and -1 at the beginning, the middle and the end.
    assert [get_lr(step, 10, lr=1.0) for step in (0, 5, 10)] == pytest.approx([1.1, 0.6, 0.1])
    assert get_lr(10 / 3, 10, lr=2.0) == pytest.approx(0.2 + 1.0 * 1.5)         # cos(pi / 3) = 1/2


def test_warm_up_is_a_straight_line_to_where_the_cosine_begins():
    rates = [lr_at(step, total_steps=14, lr=1.0, warmup_iters=4) for step in range(14)]
    assert rates[:4] == pytest.approx([1.1 * 1 / 4, 1.1 * 2 / 4, 1.1 * 3 / 4, 1.1])
    assert rates[4:] == pytest.approx([get_lr(step, 10, 1.0) for step in range(10)])
    assert [lr_at(step, 10, 1.0, warmup_iters=0) for step in range(10)] == [get_lr(step, 10, 1.0) for step in range(10)]


def test_a_warm_up_longer_than_the_run_is_only_its_line():
    assert [lr_at(step, 3, 1.0, warmup_iters=10) for step in range(3)] == pytest.approx([0.11, 0.22, 0.33])
