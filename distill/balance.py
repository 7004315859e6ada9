"""
梯度平衡：一步之中有几个领域时，各领域的梯度以多大的分量进入参数更新。
Balancing gradients: where a step holds several domains, how much of each one's gradient enters the update.

Two dicts describe such a step, domain by domain:
  gradients  (P,) the mean gradient over the domain's own tokens, flat, fp32, averaged over the processes
  shares     the domain's part of the step's tokens; together 1, and 0 for a domain that the step lacks

A domain's contribution is what it adds to the gradient of the step. Without balance that is share * gradient, and the
domain with the steepest loss leads, however few its tokens are. Every function here says how long the contributions
were and how long they became, and asks no tensor for its number: a GPU is never waited for.
"""

import math
from typing import NamedTuple

import torch

BALANCES = ("none", "norm", "gradnorm", "pcgrad")     # plain, equal_norms, GradNorm, without_conflict
TINY = torch.finfo(torch.float32).tiny                # a divisor that turns 0 / 0 into 0 and changes nothing else


class Balanced(NamedTuple):
    gradient: torch.Tensor              # (P,) what the optimizer gets
    before: dict[str, torch.Tensor]     # 0-dim, the length of each contribution to the plain sum
    after: dict[str, torch.Tensor]      # 0-dim, the length of what entered in its place


def lengths(gradients):
    return {domain: torch.linalg.vector_norm(gradient) for domain, gradient in gradients.items()}


def scaled(gradients, shares, norms, scales) -> Balanced:
    """sum_d shares[d] * scales[d] * gradients[d]"""
    total = torch.zeros_like(next(iter(gradients.values())))
    for domain, gradient in gradients.items():
        total += shares[domain] * scales[domain] * gradient
    return Balanced(total,
                    before={domain: shares[domain] * norms[domain] for domain in gradients},
                    after={domain: shares[domain] * scales[domain] * norms[domain] for domain in gradients})


def plain(gradients: dict[str, torch.Tensor], shares: dict[str, float]) -> Balanced:
    """sum_d shares[d] * g_d: the gradient of the mean loss over all tokens of the step."""
    return scaled(gradients, shares, lengths(gradients), dict.fromkeys(gradients, 1.0))


def equal_norms(gradients: dict[str, torch.Tensor], shares: dict[str, float]) -> Balanced:
    """sum_d shares[d] * N * g_d / ||g_d||,  N = sum_d shares[d] * ||g_d||: every domain counts by its share alone.

    The contributions are together as long as they were, so that the learning rate keeps its meaning. A domain whose
    gradient is 0 has no direction to give; the others then take over its share.
    """
    norms = lengths(gradients)
    whole = sum(shares[domain] * norm for domain, norm in norms.items())
    heard = sum(shares[domain] * (norm > 0) for domain, norm in norms.items())      # 1, unless a gradient is 0
    length = whole / heard.clamp_min(TINY)
    return scaled(gradients, shares, norms, {domain: torch.where(norm > 0, length / norm, 0.0)
                                             for domain, norm in norms.items()})


def without_conflict(gradients: dict[str, torch.Tensor], shares: dict[str, float]) -> Balanced:
    """PCGrad: a contribution that points against another domain's gradient loses its component along it.

        c_i  = shares[i] * g_i
        c_i <- c_i - (c_i . g_j) / (g_j . g_j) g_j     for every j != i, where c_i . g_j < 0

    Yu et al. 2020, https://arxiv.org/abs/2001.06782, Alg. 1. g_j is always the original, so of two domains neither is
    favoured. Of three or more the order counts, and a conflict may come back: the paper draws the order anew each
    time, here it is that of `gradients`, so that all processes agree. Two opposite gradients leave nothing.
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
    return Balanced(total, {domain: shares[domain] * norm for domain, norm in lengths(gradients).items()}, after)


class GradNorm:
    """sum_d shares[d] * w_d * g_d, with weights that learn until every domain trains at the same pace.

        G_d    = ||g_d|| / mean ||g||                       how steep the domain is
        r_d    = (L_d / first L_d) / mean of the same       1 is the common pace; above it the domain lags
        target = mean(w G) * r_d^asymmetry                  a constant to the gradient
        loss   = sum_d |w_d G_d - target_d|                 so that d loss / d w_d = sign(w_d G_d - target_d) G_d
        w_d   <- w_d - rate * d loss / d w_d,               then rescaled to a mean of 1

    Chen et al. 2018, https://arxiv.org/abs/1711.02257, Alg. 1. Ours, not the paper's: G is divided by its mean, which
    makes `rate` free of units; weights move by plain SGD; what they have above FLOOR is what is rescaled, so that
    none falls below it. Means are over the domains of the step.

    domains    all that will ever come
    asymmetry  >= 0; 0 makes all w G equal, more pulls harder at the domain that lags
    rate       above 0, at most 0.5. Trap: the sign knows no distance, so an arrived weight goes on swinging by
               rate * G_d; where one gradient is 10 times the other that is a quarter of its weight at 0.025

    Raises ValueError for an asymmetry or a rate out of range.
    """

    FLOOR = 0.01    # a domain at weight 0 could be told apart from the others no longer, and would be lost to the run

    def __init__(self, domains: list[str], asymmetry: float = 1.5, rate: float = 0.025):
        if not asymmetry >= 0:
            raise ValueError(f"asymmetry={asymmetry} must be at least 0, which asks for equal gradients; 1.5 is usual")
        if not 0 < rate <= 0.5:
            raise ValueError(f"rate={rate} must be above 0 and at most 0.5: a weight of 1 moves by about that per step")
        self.domains, self.asymmetry, self.rate = list(domains), asymmetry, rate
        self.weights = torch.ones(len(self.domains))        # follows the gradients to their device
        self.first_losses: dict[str, float] = {}

    def __call__(self, gradients: dict[str, torch.Tensor], shares: dict[str, float],
                 losses: dict[str, float]) -> Balanced:
        """The step with the present weights; then the weights learn from it.

        losses  the mean loss of every domain with a share, the same number on all processes, or their weights part

        Raises ValueError where a loss is not a positive number: its ratio to the first one would mean nothing.
        """
        norms = lengths(gradients)
        self.weights = self.weights.to(next(iter(norms.values())).device)
        balanced = scaled(gradients, shares, norms, dict(zip(self.domains, self.weights)))
        self.learn(norms, self.lag([domain for domain in gradients if shares[domain] > 0], losses))
        return balanced

    def lag(self, present, losses) -> dict[str, float]:
        """r of every domain that is present"""
        for domain in present:
            if not 0 < losses[domain] < math.inf:
                raise ValueError(f"the loss of domain {domain!r} is {losses[domain]}; gradnorm compares losses with "
                                 "their first values and needs positive ones. Balance by norm or pcgrad instead")
            self.first_losses.setdefault(domain, losses[domain])
        left = {domain: losses[domain] / self.first_losses[domain] for domain in present}
        mean = sum(left.values()) / len(left)
        return {domain: left[domain] / mean for domain in present}

    def learn(self, norms, lag):
        mean_norm = sum(norms[domain] for domain in lag) / len(lag)
        steep = {domain: norms[domain] / mean_norm.clamp_min(TINY) for domain in lag}
        pulls = {domain: weight * steep[domain] for domain, weight in zip(self.domains, self.weights) if domain in lag}
        mean_pull = sum(pulls.values()) / len(pulls)
        slopes = {domain: torch.sign(pulls[domain] - mean_pull * lag[domain] ** self.asymmetry) * steep[domain]
                  for domain in lag}

        absent = torch.zeros_like(mean_norm)                # a domain that the step lacks teaches its weight nothing
        above = self.weights - self.rate * torch.stack([slopes.get(domain, absent) for domain in self.domains])
        above = (above - self.FLOOR).clamp_min(0)
        weights = self.FLOOR + (1 - self.FLOOR) * above / above.mean()
        # One gradient that overflowed would make every weight NaN for the rest of the run.
        self.weights = torch.where(weights.isfinite().all(), weights, self.weights)

    def state_dict(self) -> dict:
        return {"weights": dict(zip(self.domains, self.weights.tolist())), "first_losses": dict(self.first_losses)}

    def load_state_dict(self, state: dict):
        """Raises ValueError where the state is of other domains."""
        if set(state["weights"]) != set(self.domains):
            raise ValueError(f"the state has weights of the domains {sorted(state['weights'])}, this run has "
                             f"{sorted(self.domains)}; resume with the same domains, or start afresh")
        self.weights = torch.tensor([state["weights"][domain] for domain in self.domains])
        self.first_losses = dict(state["first_losses"])
