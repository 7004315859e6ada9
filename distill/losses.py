"""
蒸馏损失：教师与学生的词分布相差多少。
The distillation losses: how far the student's next-token distribution is from the teacher's.

p is the teacher, q the student, both tempered: softmax(logits / temperature). Everything in fp32 log space:
a log-softmax in bf16 was seen to read a true divergence of 5e-5 as 3e-3.

Every divergence is a function of two tensors of log-probabilities, (N, V), (N, V) -> (N,) nats per token. It is 0 where
the two agree and positive where they differ. Write one of your own, and `distillation_loss_fn` and `distill/fused.py`
take it as it is.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F


def forward_kl(log_p, log_q):  # (N, V), (N, V) -> (N,)
    """KL(p || q) = sum_v p (log p - log q). Mean-seeking: the student pays wherever the teacher has mass that it lacks.

    Hinton, Vinyals & Dean 2015, https://arxiv.org/abs/1503.02531, Sec. 2.
    """
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1)


def reverse_kl(log_p, log_q):  # (N, V), (N, V) -> (N,)
    """KL(q || p). Mode-seeking: the student pays wherever it has mass that the teacher lacks.

    Gu et al. 2023 (MiniLLM), https://arxiv.org/abs/2306.08543, Eq. 1.
    """
    return forward_kl(log_q, log_p)


def mixture(log_a, log_b, weight):  # (N, V), (N, V) -> (N, V)
    """log(weight * a + (1 - weight) * b)"""
    return torch.logaddexp(log_a + math.log(weight), log_b + math.log1p(-weight))


def jsd(log_p, log_q, beta=0.5, normalised=False):  # (N, V), (N, V) -> (N,)
    """Generalised Jensen-Shannon: beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q; 0 and 1 are the
    forward and the reverse KL.

    Agarwal et al. 2023 (GKD), https://arxiv.org/abs/2306.13649, Eq. 1. Trap: between its ends the formula falls to 0 at
    both of them, so that beta = 0.99 is a hundredth of the reverse KL. `normalised` divides by beta (1 - beta), which
    makes the ends its limits.
    """
    if beta == 0.0:
        return forward_kl(log_p, log_q)
    if beta == 1.0:
        return reverse_kl(log_p, log_q)
    log_m = mixture(log_p, log_q, beta)
    value = beta * forward_kl(log_p, log_m) + (1 - beta) * forward_kl(log_q, log_m)
    return value / (beta * (1 - beta)) if normalised else value


def skew_kl(log_p, log_q, skew=0.1):  # (N, V), (N, V) -> (N,)
    """KL(p || skew p + (1 - skew) q): forward KL that stays finite, at most -log(skew), where the student has nothing.

    Ko et al. 2024 (DistiLLM), https://arxiv.org/abs/2402.03898, Sec. 3.1.
    """
    return forward_kl(log_p, mixture(log_p, log_q, skew))


def skew_reverse_kl(log_p, log_q, skew=0.1):  # (N, V), (N, V) -> (N,)
    """KL(q || (1 - skew) p + skew q): the same of the reverse KL. Ko et al. 2024, Sec. 3.1."""
    return forward_kl(log_q, mixture(log_q, log_p, skew))


def tvd(log_p, log_q):  # (N, V), (N, V) -> (N,)
    """Total variation 1/2 sum_v |p - q|, between 0 and 1: the mass that would have to move.

    Wen et al. 2023, https://arxiv.org/abs/2307.15190, Eq. 7.
    """
    return (log_p.exp() - log_q.exp()).abs().sum(dim=-1) / 2


def akl(log_p, log_q, head_mass=0.5):  # (N, V), (N, V) -> (N,)
    """Adaptive KL: forward KL where the two differ over the teacher's head, reverse KL where they differ over its tail.

    The head is the fewest words with `head_mass` of the teacher's probability; the gaps sum |p - q| over head and tail
    weigh the two KLs, and are constants to the gradient. Wu et al. 2024, https://arxiv.org/abs/2404.02657, Eq. 9.
    """
    with torch.no_grad():
        p, order = log_p.exp().sort(dim=-1, descending=True)
        gap = (p - log_q.exp().gather(-1, order)).abs()
        is_head = p.cumsum(dim=-1) - p < head_mass
        of_head = (gap * is_head).sum(dim=-1) / gap.sum(dim=-1).clamp_min(torch.finfo(gap.dtype).tiny)
    return of_head * forward_kl(log_p, log_q) + (1 - of_head) * reverse_kl(log_p, log_q)


def uld(log_p, log_q):  # (N, V of the teacher), (N, V of the student) -> (N,)
    """Universal logit distance: sum |p - q| between the sorted distributions, the shorter one filled up with zeros.

    Only how sure the two are is compared, not of what: so their vocabularies may differ.
    Boizard et al. 2024, https://arxiv.org/abs/2402.12030, Eq. 6.
    """
    p, q = (log.exp().sort(dim=-1, descending=True).values for log in (log_p, log_q))
    widest = max(p.shape[-1], q.shape[-1])
    return (F.pad(p, (0, widest - p.shape[-1])) - F.pad(q, (0, widest - q.shape[-1]))).abs().sum(dim=-1)


DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd", "akl", "uld")


def pick_divergence(name, beta=0.5, skew=0.1, jsd_normalised=False):
    """One of DIVERGENCES: (the function with its settings, how a run prints it)."""
    rest = 1 - skew
    return {
        "forward_kl": (forward_kl, "KL(teacher || student)"),
        "reverse_kl": (reverse_kl, "KL(student || teacher)"),
        "jsd": (partial(jsd, beta=beta, normalised=jsd_normalised),
                f"JSD_{beta:g}(teacher, student)" + (f" / {beta * (1 - beta):g}" if jsd_normalised else "")),
        "skew_kl": (partial(skew_kl, skew=skew), f"KL(teacher || {skew:g} teacher + {rest:g} student)"),
        "skew_reverse_kl": (partial(skew_reverse_kl, skew=skew), f"KL(student || {rest:g} teacher + {skew:g} student)"),
        "tvd": (tvd, "TV(teacher, student)"),
        "akl": (akl, "AKL(teacher, student)"),
        "uld": (uld, "ULD(teacher, student)"),
    }[name]


def distillation_loss_fn(student_logits, teacher_logits, temperature=1.0, reduction="batchmean", divergence=forward_kl):
    """The soft-label loss  T^2 * D(teacher_T, student_T), by default with D the forward KL.

    Hinton, Vinyals & Dean 2015, https://arxiv.org/abs/1503.02531, Sec. 2. The gradient of a tempered KL, JSD or AKL
    shrinks like 1 / T^2; the factor keeps its size beside the cross-entropy. (That of tvd and uld, which are no smooth
    valley but a funnel, shrinks like 1 / T, and so grows with T here.)

    student_logits  (..., V), gradients flow
    teacher_logits  (..., V), none do
    reduction       'batchmean': nats per token, over all leading dimensions (in the PyTorch function of that name a
                    (B, T, V) input is divided by B alone); 'sum': nats; 'none': (...,)
    divergence      any of the functions above, or functools.partial of one: partial(jsd, beta=0.9)

    Raises ValueError when the shapes differ: two vocabularies cannot be compared column by column. Only `uld` takes them.
    """
    if student_logits.shape != teacher_logits.shape and divergence is not uld:
        raise ValueError(f"student logits {tuple(student_logits.shape)} and teacher logits {tuple(teacher_logits.shape)} "
                         "differ; both models must share one vocabulary and look at the same tokens")
    log_q = F.log_softmax(student_logits.float() / temperature, dim=-1)
    log_p = F.log_softmax(teacher_logits.detach().float() / temperature, dim=-1)
    loss = divergence(log_p, log_q) * temperature ** 2
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if reduction == "batchmean":
        return loss.mean() if loss.numel() else loss.sum()          # no token, no loss: 0, not NaN
    raise ValueError(f"reduction={reduction!r} is none of 'batchmean', 'sum', 'none'")
