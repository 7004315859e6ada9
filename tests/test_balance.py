"""
梯度平衡的规律：各领域只按份额说话，冲突的部分被去掉。
Laws of distill/balance.py: by hand in two dimensions, and what each balance promises about the
lengths.
"""

import math

import pytest
import torch

from distill.balance import equal_norms, without_conflict

HALVES = {"general": 0.5, "specialist": 0.5}


def step(general, specialist) -> dict[str, torch.Tensor]:
    return {"general": torch.tensor(general), "specialist": torch.tensor(specialist)}


def random_step(seed=0, size=20) -> dict[str, torch.Tensor]:
    general, specialist = torch.randn(2, size, generator=torch.Generator().manual_seed(seed))
    return {"general": general, "specialist": 10 * specialist}


def numbers(by_domain) -> list[float]:
    return [float(value) for value in by_domain.values()]


def plain(gradients, shares):
    return sum(shares[domain] * gradient for domain, gradient in gradients.items())


each_balance = pytest.mark.parametrize("balance", [equal_norms, without_conflict])


# -- what holds for all of them ------------------------------------------------------------------

@each_balance
def test_before_is_the_length_of_share_times_gradient(balance):
    balanced = balance(step([3.0, 4.0], [-1.0, 0.0]), {"general": 0.2, "specialist": 0.8})
    assert numbers(balanced.before) == pytest.approx([0.2 * 5, 0.8 * 1])
    assert list(balanced.before) == list(balanced.after) == ["general", "specialist"]


@each_balance
def test_a_gradient_of_zero_gives_no_nan_and_leaves_the_other_domain_as_it_was(balance):
    balanced = balance(step([3.0, 4.0], [0.0, 0.0]), HALVES)
    assert balanced.gradient.tolist() == pytest.approx([1.5, 2.0])
    assert numbers(balanced.after) == pytest.approx([2.5, 0.0])
    nothing = balance(step([0.0, 0.0], [0.0, 0.0]), HALVES)
    assert nothing.gradient.tolist() == [0.0, 0.0] and numbers(nothing.after) == [0.0, 0.0]


@each_balance
def test_a_domain_without_a_share_changes_nothing_whatever_its_gradient_is(balance):
    alone = {"general": 1.0, "specialist": 0.0}
    for specialist in ([0.0, 0.0], [-7.0, 1.0]):
        balanced = balance(step([3.0, 4.0], specialist), alone)
        assert balanced.gradient.tolist() == pytest.approx([3.0, 4.0])
        assert numbers(balanced.after) == pytest.approx([5.0, 0.0])


@each_balance
def test_the_gradients_that_are_given_stay_as_they_are(balance):
    gradients = step([1.0, 0.0], [-1.0, 2.0])
    balance(gradients, HALVES)
    assert gradients["general"].tolist() == [1.0, 0.0]
    assert gradients["specialist"].tolist() == [-1.0, 2.0]


@each_balance
def test_no_tensor_is_asked_for_its_number_so_a_gpu_is_never_waited_for(balance):
    balanced = balance({domain: torch.empty(5, device="meta") for domain in HALVES}, HALVES)
    # .item() raises there
    assert balanced.gradient.shape == (5,) and balanced.gradient.device.type == "meta"


# -- norm ------------------------------------------------------------------------------------

def test_equal_norms_of_two_arrows_is_what_a_hand_finds():
    # Lengths 5 and 1: N = 1/4 * 5 + 3/4 * 1 = 2, so 1/4 * 2 * (0.6, 0.8) + 3/4 * 2 * (1, 0).
    balanced = equal_norms(step([3.0, 4.0], [1.0, 0.0]), {"general": 0.25, "specialist": 0.75})
    assert balanced.gradient.tolist() == pytest.approx([0.3 + 1.5, 0.4])
    assert numbers(balanced.after) == pytest.approx([0.5, 1.5])


def test_equal_norms_keeps_the_sum_of_the_lengths_and_divides_it_by_share():
    shares = {"general": 0.3, "specialist": 0.7}
    balanced = equal_norms(random_step(), shares)
    whole = sum(numbers(balanced.before))
    assert numbers(balanced.after) == pytest.approx([0.3 * whole, 0.7 * whole], rel=1e-5)


def test_equal_norms_by_other_shares_keeps_the_sum_of_the_lengths():
    """A domain of a third of the samples has 96 % of the tokens: it counts for a third."""
    balanced = equal_norms(random_step(), {"general": 0.04, "specialist": 0.96},
                           {"general": 8, "specialist": 4})
    general, specialist = numbers(balanced.after)
    assert general == pytest.approx(2 * specialist, rel=1e-5)
    assert general + specialist == pytest.approx(sum(numbers(balanced.before)), rel=1e-5)


def test_equal_norms_of_equal_lengths_changes_nothing():
    gradients = step([3.0, 4.0], [0.0, -5.0])
    assert torch.allclose(equal_norms(gradients, HALVES).gradient, plain(gradients, HALVES))


def test_a_loss_times_ten_turns_the_plain_step_but_not_that_of_equal_norms():
    gradients = random_step()
    louder = {"general": gradients["general"], "specialist": 10 * gradients["specialist"]}

    def cosine(step_by):
        return torch.cosine_similarity(step_by(gradients, HALVES), step_by(louder, HALVES), 0)

    # equally loud: plain has most to lose
    gradients["specialist"] = gradients["specialist"] / 10
    assert cosine(lambda *step: equal_norms(*step).gradient) > 1 - 1e-6 and cosine(plain) < 0.9


# -- pcgrad --------------------------------------------------------------------------------------

def test_pcgrad_of_two_arrows_is_what_a_hand_finds():
    # (1, 0) . (-1, 1) = -1. Along (-1, 1) the first loses -1/2 (-1, 1), along (1, 0) the second
    # loses -1 (1, 0).
    balanced = without_conflict(step([1.0, 0.0], [-1.0, 1.0]), HALVES)
    assert balanced.gradient.tolist() == pytest.approx([0.5 * 0.5, 0.5 * (0.5 + 1.0)])
    assert numbers(balanced.after) == pytest.approx([0.5 * math.sqrt(0.5), 0.5])


def test_pcgrad_is_plain_where_nothing_conflicts():
    gradients = step([3.0, 4.0], [1.0, -0.5])
    ours = without_conflict(gradients, HALVES)
    assert torch.equal(ours.gradient, plain(gradients, HALVES)) and ours.before == ours.after


@pytest.mark.parametrize("seed", range(10))
def test_after_pcgrad_the_step_of_two_domains_goes_against_neither(seed):
    gradients = random_step(seed, size=3)
    gradients["specialist"] = gradients["specialist"] - 20 * gradients["general"]
    shares = {"general": 0.1, "specialist": 0.9}
    assert plain(gradients, shares) @ gradients["general"] < 0
    for gradient in gradients.values():
        assert torch.cosine_similarity(without_conflict(gradients, shares).gradient, gradient,
                                       0) > -1e-5


def test_after_pcgrad_what_entered_of_either_domain_does_not_conflict_with_the_other():
    # |a + b|^2 = |a|^2 + |b|^2 + 2 a.b: the step is at least as long as two that stand at right
    # angles.
    balanced = without_conflict(step([1.0, 0.0], [-3.0, 1.0]), HALVES)
    general, specialist = numbers(balanced.after)
    assert balanced.gradient.norm() ** 2 >= general ** 2 + specialist ** 2


def test_each_domain_meets_the_original_of_the_other_so_their_order_does_not_count():
    gradients = step([1.0, 0.0], [-1.0, 1.0])
    backwards = dict(reversed(gradients.items()))
    assert torch.allclose(without_conflict(gradients, HALVES).gradient,
                          without_conflict(backwards, HALVES).gradient)


def test_what_one_domain_left_of_a_gradient_is_what_the_next_one_meets():
    # c = (-2, -1) loses -2 a and is (0, -1), whose product with b is -1, not -3: it loses -1/2 b
    # and is (1/2, -1/2). a and b agree with one another; with c they lose -2/5 c and -3/5 c, and
    # are (0.2, -0.4) and (-0.2, 0.4).
    gradients = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([1.0, 1.0]),
                 "c": torch.tensor([-2.0, -1.0])}
    balanced = without_conflict(gradients, {"a": 0.25, "b": 0.25, "c": 0.5})
    lengths = [math.sqrt(0.2), math.sqrt(0.2), math.sqrt(0.5)]
    assert numbers(balanced.after) == pytest.approx([0.25 * lengths[0], 0.25 * lengths[1],
                                                     0.5 * lengths[2]])
    assert balanced.gradient.tolist() == pytest.approx([0.25, -0.25])


def test_opposite_gradients_leave_nothing():
    assert without_conflict(step([1.0, 2.0], [-2.0, -4.0]), HALVES).gradient.abs().max() < 1e-6
