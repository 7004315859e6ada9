"""
梯度平衡：一步之中有几个领域时，各领域的梯度以多大的比重进入参数更新。
Gradient balancing: how much each domain's gradient contributes to a step that holds several.

  gradients  {domain: (P,) mean gradient over its tokens, flat, fp32, averaged over the processes}
  shares     {domain: its part of the step's tokens}; they sum to 1, and may be 0
"""

import math
from typing import NamedTuple

import torch

BALANCES = ("none", "norm", "gradnorm", "pcgrad")   # plain, equal_norms, GradNorm, without_conflict
TINY = torch.finfo(torch.float32).tiny                # as a divisor it turns 0 / 0 into 0


class Balanced(NamedTuple):
    gradient: torch.Tensor              # (P,) for the optimizer
    before: dict[str, torch.Tensor]     # norm of each contribution without balancing, ()
    after: dict[str, torch.Tensor]      # and with it


def norms_of(gradients):
    return {domain: torch.linalg.vector_norm(gradient) for domain, gradient in gradients.items()}


def scaled(gradients, shares, norms, scales) -> Balanced:
    """sum_d shares[d] * scales[d] * gradients[d]"""
    total = torch.zeros_like(next(iter(gradients.values())))
    for domain, gradient in gradients.items():
        total += shares[domain] * scales[domain] * gradient
    before = {domain: shares[domain] * norms[domain] for domain in gradients}
    after = {domain: scales[domain] * before[domain] for domain in gradients}
    return Balanced(total, before, after)


def plain(gradients: dict[str, torch.Tensor], shares: dict[str, float]) -> Balanced:
    """sum_d shares[d] * g_d: the gradient of the mean loss over all tokens of the step."""
    return scaled(gradients, shares, norms_of(gradients), dict.fromkeys(gradients, 1.0))


def equal_norms(gradients: dict[str, torch.Tensor], shares: dict[str, float],
                wanted: dict[str, float] | None = None) -> Balanced:
    """sum_d wanted[d] * N * g_d / ||g_d||,  N = sum_d shares[d] * ||g_d||: each domain counts by
    its wanted share alone. The share of a domain with gradient 0 goes to the others.

    wanted  such as the numbers of samples, where one domain has longer answers; default: shares
    """
    norms, before, wanted = norms_of(gradients), plain(gradients, shares).before, wanted or shares
    used = sum(wanted[domain] * (norm > 0) for domain, norm in norms.items())
    target = sum(before.values()) / used.clamp_min(TINY)
    scales = {domain: torch.where(norm > 0, target / norm, 0.0) for domain, norm in norms.items()}
    return scaled(gradients, wanted, norms, scales)._replace(before=before)


def without_conflict(gradients: dict[str, torch.Tensor], shares: dict[str, float]) -> Balanced:
    """PCGrad: a contribution against another domain's gradient loses its component along it.

        c_i  = shares[i] * g_i
        c_i <- c_i - (c_i . g_j) / (g_j . g_j) g_j     for every j != i, where c_i . g_j < 0

    Yu et al. 2020, https://arxiv.org/abs/2001.06782, Alg. 1. With three or more domains the order
    matters: the paper shuffles it, here it is that of `gradients`, the same on all processes.
    """
    total, after = torch.zeros_like(next(iter(gradients.values()))), {}
    for domain, gradient in gradients.items():
        kept = shares[domain] * gradient
        for other, against in gradients.items():
            if other != domain and shares[other] > 0:
                conflict = (kept @ against).clamp_max(0)
                kept -= conflict / (against @ against).clamp_min(TINY) * against
        total += kept
        after[domain] = torch.linalg.vector_norm(kept)
    return Balanced(total, plain(gradients, shares).before, after)


class GradNorm:
    """sum_d shares[d] * w_d * g_d, with weights that adapt until all domains train at one pace.

        G_d    = ||g_d|| / mean ||g||                       how steep the domain is
        r_d    = (L_d / first L_d) / mean of these          above 1 the domain lags behind
        target = mean(w G) * r_d^asymmetry                  no gradient flows through it
        loss   = sum_d |w_d G_d - target_d|                 d loss / d w_d = sign(...) * G_d
        w_d   <- w_d - rate * d loss / d w_d                then rescaled to a mean of 1

    Chen et al. 2018, https://arxiv.org/abs/1711.02257, Alg. 1. Unlike the paper, G is divided by
    its mean, so `rate` has no unit; the weights use plain SGD; rescaling keeps them above FLOOR.
    Means are over the domains of the step.

    asymmetry  >= 0; 0 makes all w G equal, more favours a domain that lags
    rate       in (0, 0.5]
    """

    FLOOR = 0.01    # a domain with weight 0 would never recover

    def __init__(self, domains: list[str], asymmetry: float = 1.5, rate: float = 0.025):
        self.domains, self.asymmetry, self.rate = list(domains), asymmetry, rate
        self.weights = torch.ones(len(self.domains))        # moves to the gradients' device
        self.first_losses: dict[str, float] = {}

    def __call__(self, gradients: dict[str, torch.Tensor], shares: dict[str, float],
                 losses: dict[str, float]) -> Balanced:
        """Balance a step by the present weights, then update these by the mean loss of each domain
        with a share; the same on all processes."""
        norms = norms_of(gradients)
        self.weights = self.weights.to(next(iter(norms.values())).device)
        balanced = scaled(gradients, shares, norms, dict(zip(self.domains, self.weights)))
        present = [name for name in gradients if shares[name] > 0]
        if all(math.isfinite(losses[name]) for name in present):    # else the step is skipped
            self.update(norms, self.lag(present, losses))
        return balanced

    def lag(self, present, losses) -> dict[str, float]:
        for domain in present:
            if losses[domain] <= 0:
                raise ValueError(f"the loss of domain {domain!r} is {losses[domain]}; gradnorm "
                                 "needs positive losses. Balance by norm or pcgrad instead")
            self.first_losses.setdefault(domain, losses[domain])
        left = {domain: losses[domain] / self.first_losses[domain] for domain in present}
        mean = sum(left.values()) / len(left)
        return {domain: left[domain] / mean for domain in present}

    def update(self, norms, lag):
        weights = dict(zip(self.domains, self.weights))
        mean_norm = sum(norms[domain] for domain in lag) / len(lag)
        steep = {domain: norms[domain] / mean_norm.clamp_min(TINY) for domain in lag}           # G
        mean = sum(weights[domain] * steep[domain] for domain in lag) / len(lag)
        slopes = dict.fromkeys(self.domains, torch.zeros_like(mean_norm))   # of an absent domain: 0
        for domain in lag:
            distance = weights[domain] * steep[domain] - mean * lag[domain] ** self.asymmetry
            slopes[domain] = torch.sign(distance) * steep[domain]

        moved = self.weights - self.rate * torch.stack(list(slopes.values()))
        above = (moved - self.FLOOR).clamp_min(0)
        moved = self.FLOOR + (1 - self.FLOOR) * above / above.mean()
        # A gradient that overflowed would make every weight NaN for the rest of the run.
        self.weights = torch.where(moved.isfinite().all(), moved, self.weights)

    def state_dict(self) -> dict:
        return {"weights": dict(zip(self.domains, self.weights.tolist())),
                "first_losses": dict(self.first_losses)}

    def load_state_dict(self, state: dict):
        self.weights = torch.tensor([state["weights"][domain] for domain in self.domains])
        self.first_losses = dict(state["first_losses"])
