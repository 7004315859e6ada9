"""
融合损失的规律：数值和梯度与普通写法相同，却从不存下整张词元乘词表的张量。
Laws of distill/fused.py: value and gradients of the plain form, never a tokens x vocabulary tensor.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from distill.fused import (BINS, CHUNK_BYTES, TOP, Dense, TopK, calibration_gaps, compare,
                           fused_distillation_loss, log_softmax_, token_log_probs)
from distill.losses import (DIVERGENCES, distillation_loss_fn, forward_kl, pick_divergence,
                            reverse_kl)

S, D, V = 7, 4, 11
ROWS = 4 * V        # chunk_bytes of one row: 4 bytes for each of V numbers


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def a_student(tokens=S, vocab=V, dim=D):
    """Final hidden states, head and targets."""
    targets = torch.randint(vocab, (tokens,), generator=torch.Generator().manual_seed(2))
    return randn(tokens, dim).requires_grad_(), randn(vocab, dim, seed=1).requires_grad_(), targets


def a_teacher(tokens=S, vocab=V, dim=6, seed=3, weight=1.0):
    return Dense(randn(tokens, dim, seed=seed), randn(vocab, dim, seed=seed + 1), weight)


def plain(hidden, head, targets, teacher, alpha=0.0, temperature=1.0, divergence=forward_kl,
          kd_weight=1.0,
          ce_weight=1.0):
    """The same mathematics with all logits at once: (loss, ce, kd)."""
    logits = hidden @ head.T                                                            # (S, V)
    mixed = sum(one.weight * (one.states @ one.head.T / temperature).softmax(dim=-1)
                for one in teacher)
    teacher_logits = mixed.log() * temperature
    if len(teacher) == 1:
        teacher_logits = teacher[0].states @ teacher[0].head.T
    ce = (F.cross_entropy(logits.float(), targets, reduction="none") * ce_weight).sum()
    kd = (distillation_loss_fn(logits, teacher_logits, temperature, "none",
                               divergence) * kd_weight).sum()
    return alpha * ce + (1 - alpha) * kd, ce, kd


def with_gradients(form, student, *more, factor=1.0, **settings) -> list[torch.Tensor]:
    """loss, ce, kd and the gradients of `factor` * loss for hidden and head."""
    hidden, head, targets = student
    hidden.grad = head.grad = None
    found = form(hidden, head, targets, *more, **settings)
    (factor * found[0]).backward()
    return [*(value.detach() for value in found), hidden.grad, head.grad]


def assert_same(found, expected, rtol=2e-5):
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and (a - b).abs().max() <= rtol * max(1.0, b.abs().max())


# -- as the plain form ---------------------------------------------------------------------------

@pytest.mark.parametrize("alpha, chunk_bytes", [(0.0, ROWS), (0.3, 3 * ROWS), (1.0, CHUNK_BYTES)],
                         ids=["KD, 1 row", "both, 3, 3, 1 rows", "CE, all at once"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_value_and_gradients_are_those_of_the_plain_form(name, temperature, alpha, chunk_bytes):
    student, settings = a_student(), dict(alpha=alpha, temperature=temperature,
                                          divergence=pick_divergence(name)[0])
    fused = with_gradients(fused_distillation_loss, student, [a_teacher()],
                           chunk_bytes=chunk_bytes, **settings)
    assert_same(fused, with_gradients(plain, student, [a_teacher()], **settings))


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_several_teachers_act_as_one_whose_probabilities_are_the_weighted_mean(divergence,
                                                                               temperature):
    teachers = [a_teacher(weight=0.2), a_teacher(dim=3, seed=5, weight=0.3),
                a_teacher(seed=7, weight=0.5)]
    settings = dict(alpha=0.3, temperature=temperature, divergence=divergence)
    fused = with_gradients(fused_distillation_loss, a_student(), teachers, chunk_bytes=3 * ROWS,
                           **settings)
    assert_same(fused, with_gradients(plain, a_student(), teachers, **settings))


def test_one_teacher_of_weight_1_equals_two_of_weight_one_half():
    halves = [a_teacher(weight=0.5), a_teacher(weight=0.5)]
    whole = with_gradients(fused_distillation_loss, a_student(), [a_teacher()], temperature=2.0)
    assert_same(with_gradients(fused_distillation_loss, a_student(), halves, temperature=2.0),
                whole)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_teacher_equal_to_the_student_gives_no_loss_and_no_gradient(name):
    hidden, head, targets = a_student()
    itself = [Dense(hidden.detach(), head.detach())]
    _, ce, kd, *gradients = with_gradients(fused_distillation_loss, (hidden, head, targets),
                                           itself, temperature=2.0,
                                           divergence=pick_divergence(name)[0],
                                           chunk_bytes=3 * ROWS)
    assert ce > 1 and abs(kd) < 1e-5
    # it has a kink at 0, and rounding decides which way its slope points
    if name != "tvd":
        assert all(gradient.abs().max() < 1e-4 for gradient in gradients)


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl])
def test_where_the_teacher_is_masked_only_the_labels_count(divergence):
    matched = torch.tensor([True, False, True, True, False, False, True])
    settings = dict(alpha=0.3, temperature=2.0, divergence=divergence, kd_weight=matched)
    fused = with_gradients(fused_distillation_loss, a_student(), [a_teacher()],
                           chunk_bytes=3 * ROWS, **settings)
    assert_same(fused, with_gradients(plain, a_student(), [a_teacher()], **settings))

    noisy = a_teacher()
    noisy.states[~matched] += 10.0
    assert_same(with_gradients(fused_distillation_loss, a_student(), [noisy], **settings), fused)


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl])
def test_each_position_may_have_its_own_weights_in_both_parts(divergence):
    weights = {"kd_weight": torch.rand(S, generator=torch.Generator().manual_seed(0)),
               "ce_weight": randn(S, seed=1)}
    for chosen in (weights, {"ce_weight": weights["ce_weight"]}):
        settings = dict(alpha=0.5, divergence=divergence, **chosen)
        fused = with_gradients(fused_distillation_loss, a_student(), [a_teacher()],
                               chunk_bytes=3 * ROWS, **settings)
        assert_same(fused, with_gradients(plain, a_student(), [a_teacher()], **settings))


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl])
def test_no_supervised_token_gives_0_and_gradients_of_0_not_nan(divergence):
    student, teacher = a_student(tokens=0), [a_teacher(tokens=0)]
    loss, ce, kd, of_hidden, of_head = with_gradients(
        fused_distillation_loss, student, teacher, alpha=0.5, divergence=divergence)
    assert loss == ce == kd == 0.0
    assert of_hidden.shape == (0, D) and of_head.shape == (V, D) and of_head.abs().sum() == 0


def test_a_divergence_of_your_own_works_like_ours():
    def squared(log_p, log_q):
        return (log_p - log_q).square().sum(dim=-1)

    settings = dict(alpha=0.2, temperature=2.0, divergence=squared)
    fused = with_gradients(fused_distillation_loss, a_student(), [a_teacher()],
                           chunk_bytes=3 * ROWS, **settings)
    assert_same(fused, with_gradients(plain, a_student(), [a_teacher()], **settings))


# -- the top k of a teacher ----------------------------------------------------------------------

def top_of(teacher, k, temperature):
    log_p = (teacher.states.double() @ teacher.head.double().T / temperature).log_softmax(dim=-1)
    tail = log_p.sort(descending=True).values[:, k:].logsumexp(dim=-1)      # of nothing: -inf
    log_p, ids = log_p.topk(k)
    return TopK(ids, log_p.float(), tail.float())


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_top_v_tokens_are_the_whole_teacher(name, temperature):
    settings = dict(alpha=0.3, temperature=temperature, divergence=pick_divergence(name)[0])
    top = top_of(a_teacher(), V, temperature)
    found = with_gradients(fused_distillation_loss, a_student(), top, chunk_bytes=3 * ROWS,
                           **settings)
    assert_same(found, with_gradients(fused_distillation_loss, a_student(), [a_teacher()],
                                      **settings), rtol=1e-4)


@pytest.mark.parametrize("k", [1, 4, V - 1])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_top_k_tokens_and_one_bucket_for_the_tail(name, temperature, k):
    divergence, top = pick_divergence(name)[0], top_of(a_teacher(), k, temperature)

    def buckets(hidden, head, targets):
        """The same in float64, on probabilities."""
        logits = hidden.double() @ head.double().T
        top_q = (logits / temperature).softmax(dim=-1).gather(1, top.ids)
        p = torch.cat([top.log_p, top.tail[:, None]], dim=1).double().exp()         # (S, k + 1)
        q = torch.cat([top_q, 1 - top_q.sum(dim=1, keepdim=True)], dim=1)
        ce = F.cross_entropy(logits, targets, reduction="sum")
        kd = temperature ** 2 * divergence(p.log(), q.log()).sum()
        return 0.3 * ce + 0.7 * kd, ce, kd

    fused = with_gradients(fused_distillation_loss, a_student(), top, alpha=0.3,
                           temperature=temperature,
                           divergence=divergence, chunk_bytes=3 * ROWS)
    assert_same(fused, with_gradients(buckets, a_student()), rtol=1e-4)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_the_tail_of_a_sharp_teacher_keeps_its_digits(name):
    """1 - sum(p) in fp32 knows a tail of 2e-7 to one digit; the reverse KL was off by a fifth."""
    sharp, divergence = torch.tensor([[0.0, -16.0, -16.5, -17.0]]), pick_divergence(name)[0]
    log_p, head = sharp.double().log_softmax(dim=-1), torch.eye(4)
    top = TopK(torch.tensor([[0]]), log_p[:, :1].float(), log_p[:, 1:].logsumexp(1).float())
    hidden = torch.tensor([[0.0, -3.0, -3.0, -3.0]])
    log_q = hidden.double().log_softmax(dim=-1)
    p, q = (torch.stack([x[0, 0], x[0, 1:].logsumexp(0)])[None] for x in (log_p, log_q))
    found = fused_distillation_loss(hidden, head, torch.tensor([0]), top, divergence=divergence)
    assert found.kd.item() == pytest.approx(divergence(p, q).item(), rel=1e-5)


def test_mass_outside_of_the_top_k_has_a_loss():
    # Four tokens; the teacher has .5 .25 | .25, the student .05 .025 | .925: in the same ratio
    # within the top two.
    head = torch.eye(4).requires_grad_()
    hidden = torch.tensor([[0.05, 0.025, 0.9, 0.025]]).log().requires_grad_()
    top = TopK(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.25]]).log(),
               torch.tensor([0.25]).log())
    found = fused_distillation_loss(hidden, head, torch.tensor([0]), top)
    # .5 ln 10 + .25 ln 10 + .25 ln(.25 / .925)
    assert found.kd.item() == pytest.approx(0.75 * math.log(10) + 0.25 * math.log(0.25 / 0.925),
                                            rel=1e-5)


def test_where_a_top_k_is_masked_only_the_labels_count():
    matched = torch.tensor([True, False, True, True, False, False, True])
    settings, student = dict(alpha=0.3, temperature=2.0), a_student()
    top = top_of(a_teacher(), 3, 2.0)
    found = with_gradients(fused_distillation_loss, student, top, kd_weight=matched, **settings)
    kept = TopK(*(each[matched] for each in top))
    hidden, head, targets = student
    kd = fused_distillation_loss(hidden[matched], head, targets[matched], kept, **settings).kd
    assert found[2].item() == pytest.approx(kd.item(), rel=1e-5)
    assert found[1].item() == pytest.approx(F.cross_entropy(hidden @ head.T, targets,
                                                            reduction="sum").item(), rel=1e-5)


# -- the backward pass ---------------------------------------------------------------------------

@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl])
def test_a_factor_on_the_loss_is_a_factor_on_the_gradients(divergence):
    settings = dict(alpha=0.3, divergence=divergence)
    *_, of_hidden, of_head = with_gradients(fused_distillation_loss, a_student(), [a_teacher()],
                                            **settings)
    *_, by_4, head_by_4 = with_gradients(fused_distillation_loss, a_student(), [a_teacher()],
                                         factor=0.25, **settings)
    assert torch.equal(by_4, of_hidden / 4) and torch.equal(head_by_4, of_head / 4)


def test_two_micro_batches_add_up_to_the_whole():
    hidden, head, targets = a_student()
    teacher = a_teacher()
    whole = with_gradients(fused_distillation_loss, (hidden, head, targets), [teacher], alpha=0.3)
    hidden.grad = head.grad = None
    for part in (slice(0, 3), slice(3, S)):
        its = [teacher._replace(states=teacher.states[part])]
        fused_distillation_loss(hidden[part], head, targets[part], its, alpha=0.3).loss.backward()
    assert_same([hidden.grad, head.grad], whole[3:])


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl])
def test_a_head_that_is_also_the_embedding_learns_from_both_its_uses(divergence):
    tokens, (_, _, targets) = torch.tensor([1, 5, 5, 2, 0, 3, 9]), a_student()
    gradients = []
    for form in (fused_distillation_loss, plain):
        tied = randn(V, D, seed=1).requires_grad_()
        form(tied[tokens].tanh(), tied, targets, [a_teacher()], alpha=0.3,
             divergence=divergence)[0].backward()
        gradients.append(tied.grad)
    assert_same(gradients[:1], gradients[1:])


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl])
def test_a_frozen_head_gets_no_gradient_and_the_hidden_states_theirs(divergence):
    """As under LoRA. It saves one of the loss's three products of size tokens x vocabulary x
    width."""
    teacher, (hidden, head, targets) = [a_teacher()], a_student()
    expected = with_gradients(fused_distillation_loss, (hidden, head, targets), teacher,
                              divergence=divergence)
    hidden.grad = None
    fused_distillation_loss(hidden, head.detach(), targets, teacher,
                            divergence=divergence).loss.backward()
    assert_same([hidden.grad], [expected[3]], rtol=0)


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl])
def test_no_gradient_reaches_the_teacher_nor_flows_from_the_figures(divergence):
    teacher = a_teacher()
    teacher.states.requires_grad_(), teacher.head.requires_grad_()
    found = fused_distillation_loss(*a_student(), [teacher], alpha=0.5, divergence=divergence)
    found.loss.backward()
    assert teacher.states.grad is None and teacher.head.grad is None
    assert not found.ce.requires_grad and not found.kd.requires_grad


# -- precision -----------------------------------------------------------------------------------

@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl])
def test_under_bf16_autocast_it_is_the_plain_form_under_bf16_autocast(divergence):
    student, teacher = a_student(tokens=40, dim=16), [a_teacher(tokens=40, dim=24)]
    settings = dict(alpha=0.3, temperature=2.0, divergence=divergence)
    with torch.autocast("cpu", torch.bfloat16):
        fused = with_gradients(fused_distillation_loss, student, teacher, chunk_bytes=9 * ROWS,
                               **settings)
        expected = with_gradients(plain, student, teacher, **settings)
    assert all(value.dtype == torch.float32 for value in fused)
    assert_same(fused[:3], expected[:3], rtol=1e-5)     # the same logits, rounded in the same place
    assert_same(fused[3:], expected[3:], rtol=1e-2)     # bf16 has 8 bits: one part in 256

    exact = with_gradients(plain, student, teacher, **settings)
    assert (fused[0] - exact[0]).abs() > 1e-3           # the products did run in bf16


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl])
def test_under_fp16_autocast_the_slope_of_a_rare_token_does_not_underflow(divergence):
    # Logits (0, -20) against the teacher's (0, -19): for the second token q - p is -3.5e-9, and
    # fp16 ends at 6e-8.
    hidden, head = torch.ones(1,
                              1).requires_grad_(), torch.tensor([[0.0], [-20.0]]).requires_grad_()
    teacher = [Dense(torch.ones(1, 1), torch.tensor([[0.0], [-19.0]]))]
    with torch.autocast("cpu", torch.float16):
        found = fused_distillation_loss(hidden, head, torch.tensor([0]), teacher,
                                        divergence=divergence)
    found.loss.backward()
    slope = {forward_kl: math.exp(-20) - math.exp(-19), reverse_kl: -math.exp(-20)}[divergence]
    assert head.grad[1].item() == pytest.approx(slope, rel=0.01)
    assert hidden.grad.item() == pytest.approx(-20 * slope, rel=0.01)


@pytest.mark.parametrize("width", [5, 1000, 50257])
def test_a_log_softmax_may_overwrite_what_it_reads(width):
    logits = 5 * randn(3, width)
    expected, buffer = logits.log_softmax(dim=-1), logits.clone()
    assert log_softmax_(buffer) is buffer and torch.equal(buffer, expected)


# -- memory --------------------------------------------------------------------------------------

class Watch(TorchDispatchMode):
    """Remembers the most numbers that any tensor held."""

    most = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        found = operation(*args, **(kwargs or {}))
        for value in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(value, torch.Tensor):
                self.most = max(self.most, value.numel())
        return found


@pytest.mark.parametrize("kind", ["dense", "two teachers", "top k"])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_no_tensor_of_tokens_times_vocabulary_ever_exists(name, kind):
    tokens, vocab = 60, 500
    student, settings = a_student(tokens, vocab), dict(alpha=0.5, temperature=2.0,
                                                       divergence=pick_divergence(name)[0])
    teacher = {"dense": [a_teacher(tokens, vocab)],
              "two teachers": [a_teacher(tokens, vocab, weight=0.5),
                               a_teacher(tokens, vocab, seed=5, weight=0.5)],
              "top k": top_of(a_teacher(tokens, vocab), 8, 2.0)}[kind]
    with Watch() as watch:
        with_gradients(fused_distillation_loss, student, teacher, chunk_bytes=32 * 4 * vocab,
                       **settings)
    closed_form = name == "forward_kl" and kind != "top k"
    # autograd keeps many buffers more, of fewer rows
    assert watch.most == (32 if closed_form else 8) * vocab
    if kind == "dense":
        with Watch() as watch:
            with_gradients(plain, student, teacher, **settings)
        assert watch.most >= tokens * vocab


# -- what a run looks at -------------------------------------------------------------------------

def probabilities(states, head, temperature=1.0):
    logits = states.detach().double() @ head.detach().double().T
    return (logits / temperature).softmax(dim=-1).numpy()


def np_kl(p, q):
    return (p * (np.log(p) - np.log(q))).sum()


def entropy(p):
    return -(p * np.log(p)).sum()


@pytest.mark.parametrize("teacher",
                         [[a_teacher()], [a_teacher(weight=0.3), a_teacher(seed=5, weight=0.7)]],
                         ids=["one teacher", "two teachers"])
def test_compare_adds_up_what_numpy_adds_up(teacher):
    hidden, head, targets = a_student()
    p, q = sum(one.weight * probabilities(one.states, one.head)
               for one in teacher), probabilities(hidden, head)
    found = compare(hidden, head, targets, teacher, temperature=3.0)     # ignored by dense teachers
    gaps = {name: found.pop(name) for name in ("ece", "teacher_ece")}
    assert {name: value.item() for name, value in found.items()} == pytest.approx({
        "ce": -np.log(q[np.arange(S), targets]).sum(), "kl": np_kl(p, q), "entropy": entropy(p),
        "student_entropy": entropy(q), "overlap": overlap(p, q),
        "acceptance": np.minimum(p, q).sum(),
        "teacher_ce": -np.log(p[np.arange(S), targets]).sum(),
        "teacher_accuracy": (p.argmax(axis=1) == targets.numpy()).sum(),
        "agreement": (p.argmax(axis=1) == q.argmax(axis=1)).sum()}, rel=1e-4)
    for own, name in ((q, "ece"), (p, "teacher_ece")):
        assert gaps[name].abs().sum().item() / S == pytest.approx(ece(own, targets.numpy()))


def overlap(p, q):
    """By position: tokens among the TOP of both, as a share of TOP."""
    ranked = [np.argsort(-each, axis=1)[:, :TOP] for each in (p, q)]
    return sum(len({*a} & {*b}) / TOP for a, b in zip(*ranked))


def ece(p, labels):
    """Sum over bins of n_bin / n * |accuracy - confidence|: Guo et al. 2017, Eq. 3."""
    confidence, right = p.max(axis=1), p.argmax(axis=1) == labels
    bins = [np.floor(confidence * BINS) == i for i in range(BINS)]
    return sum(chosen.mean() * abs(right[chosen].mean() - confidence[chosen].mean())
               for chosen in bins if chosen.any())


def test_a_model_that_is_right_as_often_as_it_says_has_a_calibration_error_of_0():
    """Four times 75 % and two times 50 %; then a model that is always sure and half the time
    right."""
    p, labels = torch.tensor([0.75] * 4 + [0.5] * 2), torch.tensor([[1], [1], [1], [0], [1], [0]])
    gaps = calibration_gaps(torch.stack([1 - p - 0.01, p], dim=1).log().topk(1), labels)
    assert gaps.shape == (BINS,) and gaps.abs().max() < 1e-6
    sure = calibration_gaps(torch.tensor([[-99.0, 0.0]] * 6).topk(1), labels)
    assert sure[-1].item() == 2 and sure.abs().sum() == 2


def test_a_student_equal_to_its_teacher_drafts_only_what_the_teacher_accepts():
    hidden, head, targets = a_student()
    found = compare(hidden, head, targets, [Dense(hidden.detach(), head.detach())])
    for name in ("acceptance", "overlap", "agreement"):
        assert found[name].item() == pytest.approx(S)
    assert found["kl"] == 0 and found["entropy"] == found["student_entropy"]
    assert torch.equal(found["ece"], found["teacher_ece"])


def test_parts_of_a_batch_add_up_to_the_whole():
    """600 positions are three chunks, and 250 and 350 are one and two."""
    (hidden, head, targets), (states, teacher_head, *_) = a_student(tokens=600), a_teacher(tokens=600)
    whole = compare(hidden, head, targets, [Dense(states, teacher_head)])
    parts = [compare(hidden[part], head, targets[part], [Dense(states[part], teacher_head)])
             for part in (slice(250), slice(250, 600))]
    for name, value in whole.items():
        assert torch.allclose(value, parts[0][name] + parts[1][name], rtol=1e-5, atol=1e-3)
    p, q = probabilities(states, teacher_head), probabilities(hidden, head)
    assert whole["overlap"].item() == pytest.approx(overlap(p, q), rel=1e-5)


def test_compare_with_a_top_k_takes_its_buckets_and_its_temperature():
    hidden, head, targets = a_student()
    teacher, q = a_teacher(), probabilities(hidden, head)
    top, q_warm = top_of(teacher, 3, 2.0), probabilities(hidden, head, 2.0)
    p = top.log_p.double().exp().numpy()
    top_q = np.take_along_axis(q_warm, top.ids.numpy(), axis=1)
    p, top_q = (np.concatenate([x, 1 - x.sum(axis=1, keepdims=True)], axis=1) for x in (p, top_q))
    likeliest = probabilities(teacher.states, teacher.head).argmax(axis=1)
    found = compare(hidden, head, targets, top, temperature=2.0)
    assert found.pop("ece").abs().sum().item() / S == pytest.approx(ece(q, targets.numpy()))
    assert {name: value.item() for name, value in found.items()} == pytest.approx({
        "ce": -np.log(q[np.arange(S), targets]).sum(), "kl": np_kl(p, top_q), "entropy": entropy(p),
        "student_entropy": entropy(q),
        "agreement": (likeliest == q.argmax(axis=1)).sum()}, rel=1e-4)


def test_compare_without_a_teacher_is_the_cross_entropy_alone():
    hidden, head, targets = a_student(tokens=600)                       # three chunks
    found = compare(hidden, head, targets)
    assert found.keys() == {"ce"}
    expected = F.cross_entropy(hidden @ head.T, targets, reduction="sum").item()
    assert found["ce"].item() == pytest.approx(expected, rel=1e-5)
    with_teacher = compare(hidden, head, targets, [a_teacher(tokens=600)])
    assert found["ce"].item() == pytest.approx(with_teacher["ce"].item(), rel=1e-6)


def test_compare_of_no_position_is_0():
    """With the names and shapes of a batch with positions: processes add them up."""
    found, other = (compare(*a_student(tokens=n), [a_teacher(tokens=n)]) for n in (0, S))
    assert [(name, value.shape) for name, value in found.items()] == [
        (name, value.shape) for name, value in other.items()]
    assert not any(value.any() for value in found.values())


def test_under_autocast_compare_adds_up_in_fp32():
    # States of a single one pick a column of the head, of numbers that bf16 has: no product is
    # rounded.
    states = torch.eye(D)
    student_head, teacher_head = (randn(V, D, seed=seed).bfloat16().float() for seed in (1, 2))
    targets, teacher = torch.arange(D), [Dense(states, teacher_head)]
    with torch.autocast("cpu", torch.bfloat16):
        found = compare(states, student_head, targets, teacher)
    exact = compare(states, student_head, targets, teacher)
    for name, value in exact.items():
        assert torch.allclose(found[name], value, rtol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_log_probs_of_the_targets_equal_the_plain_form_with_gradients(temperature):
    generator = torch.Generator().manual_seed(0)
    h, head = (torch.randn(n, 4, generator=generator, dtype=torch.float64, requires_grad=True) for n in (7, 9))
    targets, weight = torch.randint(9, (7,), generator=generator), torch.randn(7, generator=generator, dtype=torch.float64)
    plain = (h @ head.T / temperature).log_softmax(dim=-1)[range(7), targets]
    ours = token_log_probs(h, head, targets, temperature, chunk_bytes=2 * 4 * 9)        # two rows at a time
    assert torch.allclose(ours.double(), plain, atol=1e-6)
    for a, b in zip(torch.autograd.grad((ours * weight).sum(), (h, head)), torch.autograd.grad((plain * weight).sum(), (h, head))):
        assert torch.allclose(a, b, atol=1e-6)
