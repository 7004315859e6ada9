"""
蒸馏损失：学生的下一词元分布与教师的相差多少。
Distillation losses: how far the student's next-token distribution is from the teacher's.

    loss = T^2 * D(p, q)      p = softmax(teacher logits / T)      q = softmax(student logits / T)

The teacher's probabilities p are soft labels. They also say how likely each wrong token is: the
dark knowledge that a label lacks. A temperature T > 1 raises the small probabilities, so that they
weigh more in the loss.

A divergence D takes log-probabilities and gives nats per token. It is 0 where p = q and positive
elsewhere. Your own function of this kind works in `distillation_loss_fn` and in distill/fused.py
without further changes.

Compute divergences in fp32 log space: a log-softmax in bf16 turned a true KL of 5e-5 into 3e-3.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F


def forward_kl(log_p, log_q):  # (N, V), (N, V) -> (N,)
    """KL(p || q) = sum_v p (log p - log q); gradient for the logits at T = 1: q - p

    Mean-seeking: large where q misses what p has, so the student covers all likely tokens.
    use    first; the default. It also passes on the teacher's calibration
    trap   a student too small for all the modes puts mass between them
    paper  Hinton, Vinyals & Dean 2015, https://arxiv.org/abs/1503.02531, Sec. 2
    """
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1)


def reverse_kl(log_p, log_q):  # (N, V), (N, V) -> (N,)
    """KL(q || p) = sum_v q (log q - log p)

    Mode-seeking: large where q has what p lacks, so the student keeps to a few likely tokens.
    use    open-ended text and on-policy distillation
    trap   overconfident; learns slowly from random weights, where q is flat
    paper  Gu et al. 2023 (MiniLLM), https://arxiv.org/abs/2306.08543, Eq. 1
    """
    return forward_kl(log_q, log_p)


def mixture(log_a, log_b, weight):  # (N, V), (N, V) -> (N, V)
    """log(weight * a + (1 - weight) * b)"""
    return torch.logaddexp(log_a + math.log(weight), log_b + math.log1p(-weight))


def jsd(log_p, log_q, beta=0.5, normalised=False):  # (N, V), (N, V) -> (N,)
    """Generalised Jensen-Shannon divergence, with m = beta p + (1 - beta) q

        beta KL(p || m) + (1 - beta) KL(q || m)

    Bounded between its ends; symmetric at 0.5. beta = 0 is the forward KL, beta = 1 the reverse KL.
    use    on-policy, or to choose between mean- and mode-seeking
    trap   the formula tends to 0 at both ends: beta = 0.99 gives a hundredth of the reverse KL.
           `normalised` divides by beta (1 - beta), so that the limits are the two KLs
    paper  Agarwal et al. 2023 (GKD), https://arxiv.org/abs/2306.13649, Eq. 1
    """
    if beta == 0.0:
        return forward_kl(log_p, log_q)
    if beta == 1.0:
        return reverse_kl(log_p, log_q)
    log_m = mixture(log_p, log_q, beta)
    value = beta * forward_kl(log_p, log_m) + (1 - beta) * forward_kl(log_q, log_m)
    return value / (beta * (1 - beta)) if normalised else value


def skew_kl(log_p, log_q, skew=0.1):  # (N, V), (N, V) -> (N,)
    """KL(p || skew p + (1 - skew) q): the forward KL with an upper bound, -log(skew)

    use    where single tokens with q near 0 dominate the gradient
    trap   a large skew hides the difference that it should measure
    paper  Ko et al. 2024 (DistiLLM), https://arxiv.org/abs/2402.03898, Sec. 3.1
    """
    return forward_kl(log_p, mixture(log_p, log_q, skew))


def skew_reverse_kl(log_p, log_q, skew=0.1):  # (N, V), (N, V) -> (N,)
    """KL(q || (1 - skew) p + skew q): the bounded reverse KL. Ko et al. 2024, Sec. 3.1."""
    return forward_kl(log_q, mixture(log_q, log_p, skew))


def tvd(log_p, log_q):  # (N, V), (N, V) -> (N,)
    """Total variation distance: 1/2 sum_v |p - q|, between 0 and 1: the mass that differs

    use    where a few outliers dominate a KL
    trap   a token with q near 0 has almost no gradient, so a random student learns slowly
    paper  Wen et al. 2023, https://arxiv.org/abs/2307.15190, Eq. 7
    """
    return (log_p.exp() - log_q.exp()).abs().sum(dim=-1) / 2


def akl(log_p, log_q, head_mass=0.5):  # (N, V), (N, V) -> (N,)
    """Adaptive KL: w KL(p || q) + (1 - w) KL(q || p), w = the head's share of sum_v |p - q|

    The head is the fewest tokens that hold `head_mass` of p; the other tokens are the tail.
    use    to weigh the two KLs per token: forward KL fits the head first, reverse KL the tail
    trap   no gradient flows through w, so finite differences of the whole formula differ
    paper  Wu et al. 2024, https://arxiv.org/abs/2404.02657, Eq. 9
    """
    with torch.no_grad():
        p, order = log_p.exp().sort(dim=-1, descending=True)
        gap = (p - log_q.exp().gather(-1, order)).abs()
        is_head = p.cumsum(dim=-1) - p < head_mass
        tiny = torch.finfo(gap.dtype).tiny                          # p = q: 0 / tiny = 0
        w = (gap * is_head).sum(dim=-1) / gap.sum(dim=-1).clamp_min(tiny)
    return w * forward_kl(log_p, log_q) + (1 - w) * reverse_kl(log_p, log_q)


def gold(log_p, log_q):  # (N, V + 2), (N, V + 2) -> (N,)
    """KL(p || q) over tokens and spans of bytes that two tokenizers share (fused.py, in_spans)

    use    teacher and student with different tokenizers; with one it is the forward KL
    paper  Patiño et al. 2025, https://huggingface.co/spaces/HuggingFaceH4/on-policy-distillation
    """
    return forward_kl(log_p, log_q)


# The choices of --divergence: (the function, the formula that a run prints). Add your own here; the
# losses and all lessons take it as it is.
DIVERGENCES = {
    "forward_kl": (forward_kl, "KL(teacher || student)"),
    "reverse_kl": (reverse_kl, "KL(student || teacher)"),
    "jsd": (jsd, "JSD_{beta:g}(teacher, student)"),
    "skew_kl": (skew_kl, "KL(teacher || {skew:g} teacher + {rest:g} student)"),
    "skew_reverse_kl": (skew_reverse_kl, "KL(student || {rest:g} teacher + {skew:g} student)"),
    "tvd": (tvd, "TV(teacher, student)"),
    "akl": (akl, "AKL(teacher, student)"),
    "gold": (gold, "KL(teacher || student) over byte spans"),
}


def pick_divergence(name, beta=0.5, skew=0.1, jsd_normalised=False):
    """One of DIVERGENCES with its settings."""
    function, formula = DIVERGENCES[name]
    if function is jsd:
        function = partial(jsd, beta=beta, normalised=jsd_normalised)
        formula += f" / {beta * (1 - beta):g}" * jsd_normalised
    elif function in (skew_kl, skew_reverse_kl):
        function = partial(function, skew=skew)
    return function, formula.format(beta=beta, skew=skew, rest=1 - skew)


def distillation_loss_fn(student_logits, teacher_logits, temperature=1.0, reduction="batchmean",
                         divergence=forward_kl):
    """The soft-label loss  T^2 * D(p, q). Hinton et al. 2015, Sec. 2.

    Near p = q the gradient of a KL, JSD or AKL falls like 1 / T^2: the factor keeps its size beside
    the cross-entropy. Trap: that of tvd falls like 1 / T, so here it grows with T.

    student_logits  (..., V); gradients flow
    teacher_logits  (..., V); no gradient flows
    reduction       'batchmean': nats per token, a mean over all leading dimensions (PyTorch's
                    divides a (B, T, V) input by B alone); 'sum': nats; 'none': shape (...,)
    divergence      one of the functions above, partial(jsd, beta=0.9), or your own

    Raises ValueError where the shapes differ.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student logits {tuple(student_logits.shape)} and teacher logits "
            f"{tuple(teacher_logits.shape)} differ: one vocabulary and the same tokens for both")
    # A logit of -inf masks its token. Where both models mask it, -inf - -inf would be NaN.
    lowest = torch.finfo(torch.float32).min
    log_q = F.log_softmax(student_logits.float() / temperature, dim=-1).clamp_min(lowest)
    log_p = F.log_softmax(teacher_logits.detach().float() / temperature, dim=-1).clamp_min(lowest)
    loss = divergence(log_p, log_q) * temperature ** 2
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if reduction == "batchmean":
        return loss.mean() if loss.numel() else loss.sum()          # without tokens: 0, not NaN
    raise ValueError(f"reduction={reduction!r} is none of 'batchmean', 'sum', 'none'")
