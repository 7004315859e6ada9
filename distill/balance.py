"""
梯度平衡：一步之中有几个领域时，各领域的梯度以多大的比重进入参数更新。
Gradient balancing: how much each domain's gradient contributes to a step that holds several.

  gradients  {domain: (P,) mean gradient over its tokens, flat, fp32, averaged over the processes}
  shares     {domain: its part of the step's tokens}; they sum to 1, and may be 0
"""

from typing import NamedTuple

import torch

BALANCES = ("none", "norm", "pcgrad")                 # none: sum_d shares[d] * g_d
TINY = torch.finfo(torch.float32).tiny                # as a divisor it turns 0 / 0 into 0


class Balanced(NamedTuple):
    gradient: torch.Tensor              # (P,) for the optimizer
    before: dict[str, torch.Tensor]     # norm of each contribution without balancing, ()
    after: dict[str, torch.Tensor]      # and with it


def norms_of(gradients):
    return {domain: torch.linalg.vector_norm(gradient) for domain, gradient in gradients.items()}


def equal_norms(gradients: dict[str, torch.Tensor], shares: dict[str, float],
                wanted: dict[str, float] | None = None) -> Balanced:
    """sum_d wanted[d] * N * g_d / ||g_d||,  N = sum_d shares[d] * ||g_d||: each domain counts by
    its wanted share alone. The share of a domain with gradient 0 goes to the others.

    wanted  such as the numbers of samples, where one domain has longer answers; default: shares
    """
    norms, wanted = norms_of(gradients), wanted or shares
    before = {domain: shares[domain] * norm for domain, norm in norms.items()}
    used = sum(wanted[domain] * (norm > 0) for domain, norm in norms.items())
    target = sum(before.values()) / used.clamp_min(TINY)
    scales = {domain: torch.where(norm > 0, target / norm, 0.0) for domain, norm in norms.items()}
    total = sum(wanted[domain] * scales[domain] * g for domain, g in gradients.items())
    return Balanced(total, before, {domain: scales[domain] * (wanted[domain] * norms[domain])
                                    for domain in gradients})


def without_conflict(gradients: dict[str, torch.Tensor], shares: dict[str, float]) -> Balanced:
    """PCGrad: a contribution against another domain's gradient loses its component along it.

        c_i  = shares[i] * g_i
        c_i <- c_i - (c_i . g_j) / (g_j . g_j) g_j     for every j != i, where c_i . g_j < 0

    Yu et al. 2020, https://arxiv.org/abs/2001.06782, Alg. 1. With three or more domains the order
    matters: the paper shuffles it, here it is that of `gradients`, the same on all processes.
    """
    contributions = {domain: shares[domain] * gradient for domain, gradient in gradients.items()}
    before = {domain: shares[domain] * norm for domain, norm in norms_of(gradients).items()}
    for domain, kept in contributions.items():
        for other, against in gradients.items():
            if other != domain and shares[other] > 0:
                conflict = (kept @ against).clamp_max(0)
                kept -= conflict / (against @ against).clamp_min(TINY) * against
    return Balanced(sum(contributions.values()), before, norms_of(contributions))
