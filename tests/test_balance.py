"""
梯度平衡的规律：各领域只按份额说话，冲突的部分被去掉，慢的领域得到更多。
Laws of distill/balance.py: by hand in two dimensions, and what each balance promises about the
lengths.
"""

import json
import math

import pytest
import torch

from distill.balance import BALANCES, GradNorm, equal_norms, plain, without_conflict

HALVES = {"general": 0.5, "specialist": 0.5}
LOSSES = {"general": 2.0, "specialist": 2.0}


def step(general, specialist) -> dict[str, torch.Tensor]:
    return {"general": torch.tensor(general), "specialist": torch.tensor(specialist)}


def random_step(seed=0, size=20) -> dict[str, torch.Tensor]:
    general, specialist = torch.randn(2, size, generator=torch.Generator().manual_seed(seed))
    return {"general": general, "specialist": 10 * specialist}


def numbers(by_domain) -> list[float]:
    return [float(value) for value in by_domain.values()]


def balance(name, gradients, shares):
    """One step of the balance of that name, GradNorm's with fresh weights."""
    gradnorm = GradNorm(list(gradients))
    return {"none": plain, "norm": equal_norms, "pcgrad": without_conflict,
            "gradnorm": lambda g, s: gradnorm(g, s, dict.fromkeys(g, 2.0))}[name](gradients, shares)


each_balance = pytest.mark.parametrize("name", BALANCES)


# -- what holds for all of them ------------------------------------------------------------------

@each_balance
def test_before_is_the_length_of_share_times_gradient(name):
    balanced = balance(name, step([3.0, 4.0], [-1.0, 0.0]), {"general": 0.2, "specialist": 0.8})
    assert numbers(balanced.before) == pytest.approx([0.2 * 5, 0.8 * 1])
    assert list(balanced.before) == list(balanced.after) == ["general", "specialist"]


@each_balance
def test_a_gradient_of_zero_gives_no_nan_and_leaves_the_other_domain_as_it_was(name):
    balanced = balance(name, step([3.0, 4.0], [0.0, 0.0]), HALVES)
    assert balanced.gradient.tolist() == pytest.approx([1.5, 2.0])
    assert numbers(balanced.after) == pytest.approx([2.5, 0.0])
    nothing = balance(name, step([0.0, 0.0], [0.0, 0.0]), HALVES)
    assert nothing.gradient.tolist() == [0.0, 0.0] and numbers(nothing.after) == [0.0, 0.0]


@each_balance
def test_a_domain_without_a_share_changes_nothing_whatever_its_gradient_is(name):
    alone = {"general": 1.0, "specialist": 0.0}
    for specialist in ([0.0, 0.0], [-7.0, 1.0]):
        balanced = balance(name, step([3.0, 4.0], specialist), alone)
        assert balanced.gradient.tolist() == pytest.approx([3.0, 4.0])
        assert numbers(balanced.after) == pytest.approx([5.0, 0.0])


@each_balance
def test_the_gradients_that_are_given_stay_as_they_are(name):
    gradients = step([1.0, 0.0], [-1.0, 2.0])
    balance(name, gradients, HALVES)
    assert gradients["general"].tolist() == [1.0, 0.0]
    assert gradients["specialist"].tolist() == [-1.0, 2.0]


@each_balance
def test_no_tensor_is_asked_for_its_number_so_a_gpu_is_never_waited_for(name):
    balanced = balance(name, {domain: torch.empty(5, device="meta") for domain in HALVES}, HALVES)
    # .item() raises there
    assert balanced.gradient.shape == (5,) and balanced.gradient.device.type == "meta"


# -- none and norm -------------------------------------------------------------------------------

def test_plain_is_the_sum_by_shares():
    balanced = plain(step([4.0, 0.0], [0.0, 8.0]), {"general": 0.25, "specialist": 0.75})
    assert balanced.gradient.tolist() == [1.0, 6.0]
    assert numbers(balanced.before) == numbers(balanced.after) == [1.0, 6.0]


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
    assert torch.allclose(equal_norms(gradients, HALVES).gradient,
                          plain(gradients, HALVES).gradient)


def test_a_loss_times_ten_turns_the_plain_step_but_not_that_of_equal_norms():
    gradients = random_step()
    louder = {"general": gradients["general"], "specialist": 10 * gradients["specialist"]}

    def cosine(balanced_by):
        return torch.cosine_similarity(balanced_by(gradients, HALVES).gradient,
                                       balanced_by(louder, HALVES).gradient, 0)

    # equally loud: plain has most to lose
    gradients["specialist"] = gradients["specialist"] / 10
    assert cosine(equal_norms) > 1 - 1e-6 and cosine(plain) < 0.9


# -- pcgrad --------------------------------------------------------------------------------------

def test_pcgrad_of_two_arrows_is_what_a_hand_finds():
    # (1, 0) . (-1, 1) = -1. Along (-1, 1) the first loses -1/2 (-1, 1), along (1, 0) the second
    # loses -1 (1, 0).
    balanced = without_conflict(step([1.0, 0.0], [-1.0, 1.0]), HALVES)
    assert balanced.gradient.tolist() == pytest.approx([0.5 * 0.5, 0.5 * (0.5 + 1.0)])
    assert numbers(balanced.after) == pytest.approx([0.5 * math.sqrt(0.5), 0.5])


def test_pcgrad_is_plain_where_nothing_conflicts():
    gradients = step([3.0, 4.0], [1.0, -0.5])
    ours, sum_by_share = without_conflict(gradients, HALVES), plain(gradients, HALVES)
    assert torch.equal(ours.gradient, sum_by_share.gradient)
    assert ours.before == ours.after == sum_by_share.after


@pytest.mark.parametrize("seed", range(10))
def test_after_pcgrad_the_step_of_two_domains_goes_against_neither(seed):
    gradients = random_step(seed, size=3)
    gradients["specialist"] = gradients["specialist"] - 20 * gradients["general"]
    shares = {"general": 0.1, "specialist": 0.9}
    assert plain(gradients, shares).gradient @ gradients["general"] < 0
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


# -- gradnorm ------------------------------------------------------------------------------------

def weights_after(gradnorm, n_steps, gradients, losses=LOSSES, shares=HALVES) -> list[float]:
    for _ in range(n_steps):
        gradnorm(gradients, shares, losses)
    return gradnorm.weights.tolist()


def test_the_first_step_of_gradnorm_is_plain_and_the_second_has_the_weights_of_a_hand():
    # Lengths 6 and 2: G = 1.5 and 0.5, their mean 1. The weights go down by 0.1 * 1.5 and up by 0.1
    # * 0.5, to 0.85 and 1.05; what they have above 0.01, that is 0.84 and 1.04, is divided by its
    # mean 0.94 and multiplied by 0.99.
    gradients, gradnorm = step([6.0, 0.0], [0.0, 2.0]), GradNorm(["general", "specialist"],
                                                                 rate=0.1)
    assert gradnorm(gradients, HALVES, LOSSES).gradient.tolist() == [3.0, 1.0]
    by_hand = [0.01 + 0.99 * 0.84 / 0.94, 0.01 + 0.99 * 1.04 / 0.94]
    assert gradnorm.weights.tolist() == pytest.approx(by_hand)
    balanced = gradnorm(gradients, HALVES, LOSSES)
    assert balanced.gradient.tolist() == numbers(balanced.after) == pytest.approx([3 * by_hand[0],
                                                                                   by_hand[1]])


def test_ten_times_the_gradient_ends_with_a_tenth_of_the_weight():
    gradnorm = GradNorm(["general", "specialist"], rate=0.005)
    general, specialist = weights_after(gradnorm, 500, step([1.0, 0.0], [0.0, 10.0]))
    # swings by rate * G
    assert [general, specialist] == pytest.approx([20 / 11, 2 / 11], abs=2 * 0.005 * 20 / 11)
    assert 10 * specialist == pytest.approx(general, rel=0.15)


def test_gradients_in_other_units_teach_the_weights_the_same():
    small = weights_after(GradNorm(["general", "specialist"]), 5, step([1.0, 0.0], [0.0, 3.0]))
    assert weights_after(GradNorm(["general", "specialist"]), 5,
                         step([1024.0, 0.0], [0.0, 3072.0])) == small


def test_of_two_equal_gradients_the_domain_that_learns_more_slowly_gets_more():
    gradnorm = GradNorm(["general", "specialist"], asymmetry=1.0, rate=0.01)
    gradients = step([1.0, 0.0], [0.0, 1.0])
    gradnorm(gradients, HALVES, {"general": 4.0, "specialist": 2.0})
    # Left over are 1/4 and 3/4 of the first losses, half and one and a half times their mean:
    # targets 0.5 and 1.5.
    weights = weights_after(gradnorm, 200, gradients, {"general": 1.0, "specialist": 1.5})
    assert weights == pytest.approx([0.5, 1.5], abs=0.03)


def test_more_asymmetry_pulls_harder_and_none_not_at_all():
    gradients, lagging = step([1.0, 0.0], [0.0, 1.0]), {"general": 1.0, "specialist": 1.5}

    def weight(asymmetry):
        gradnorm = GradNorm(["general", "specialist"], asymmetry, rate=0.01)
        gradnorm(gradients, HALVES, LOSSES)
        return weights_after(gradnorm, 200, gradients, lagging)[1]

    # Left over: 1/2 and 3/4, so r = 0.8 and 1.2. The targets add up to 2 at 0 and 1, and nearly at
    # 2: 0.64 + 1.44.
    assert weight(0.0) == 1.0
    assert weight(1.0) == pytest.approx(1.2, abs=0.03)
    assert weight(2.0) == pytest.approx(2 * 1.44 / 2.08, abs=0.08)


def test_the_weights_have_a_mean_of_1_and_none_falls_below_the_floor():
    gradnorm, gradients = GradNorm(["general", "specialist"], rate=0.1), step([1.0, 0.0],
                                                                              [0.0, 10000.0])
    for _ in range(50):
        general, specialist = weights_after(gradnorm, 1, gradients)
        assert (general + specialist) / 2 == pytest.approx(1.0)
        assert specialist >= GradNorm.FLOOR - 1e-8
    assert specialist == pytest.approx(GradNorm.FLOOR)


def test_a_step_of_one_domain_teaches_no_weight_and_its_absent_loss_need_not_be_known():
    gradnorm = GradNorm(["general", "specialist"])
    learned = weights_after(gradnorm, 5, step([1.0, 0.0], [0.0, 3.0]))
    alone = {"general": 1.0, "specialist": 0.0}
    assert weights_after(gradnorm, 5, step([9.0, 0.0], [0.0, 0.0]), {"general": 1.0},
                         alone) == pytest.approx(learned)
    assert weights_after(gradnorm, 5, {"general": torch.ones(2)}, {"general": 1.0},
                         alone) == pytest.approx(learned)


def test_means_are_over_the_domains_of_the_step_not_over_all_that_may_come():
    # As by hand above, 0.85 and 1.05; the third stays at 1 until the three are rescaled.
    gradnorm = GradNorm(["general", "specialist", "math"], rate=0.1)
    weights = weights_after(gradnorm, 1, step([6.0, 0.0], [0.0, 2.0]))
    assert weights == pytest.approx([0.01 + 0.99 * above / (2.87 / 3)
                                     for above in (0.84, 1.04, 0.99)])


def test_a_gradient_that_overflowed_teaches_no_weight():
    gradnorm = GradNorm(["general", "specialist"])
    learned = weights_after(gradnorm, 5, step([1.0, 0.0], [0.0, 3.0]))
    for broken in (math.inf, math.nan):
        assert weights_after(gradnorm, 1, step([broken, 0.0], [0.0, 3.0])) == learned


def test_a_run_that_stops_and_resumes_continues_identically():
    gradients, losses = step([1.0, 0.0], [0.0, 1.2]), {"general": 1.5, "specialist": 1.9}
    straight = GradNorm(["general", "specialist"])
    weights_after(straight, 7, gradients)
    resumed = GradNorm(["general", "specialist"])
    resumed.load_state_dict(json.loads(json.dumps(straight.state_dict())))
    assert weights_after(resumed, 7, gradients, losses) == weights_after(straight, 7, gradients,
                                                                         losses)
    assert resumed.state_dict() == straight.state_dict()


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_changes_no_weight(loss):
    gradnorm = GradNorm(["general", "specialist"])
    gradnorm(random_step(), HALVES, {"general": 1.0, "specialist": loss})
    assert gradnorm.state_dict() == GradNorm(["general", "specialist"]).state_dict()


@pytest.mark.parametrize("loss", [0.0, -1.0])
def test_a_loss_that_is_not_positive_is_named_with_its_domain(loss):
    with pytest.raises(ValueError, match=f"'specialist' is {loss}"):
        GradNorm(["general", "specialist"])(random_step(), HALVES,
                                            {"general": 1.0, "specialist": loss})
