"""
学生自己写的回答：策略梯度的权重，以及学生是否在退化的指标。
Rollouts, the student's own answers: the weights of the policy gradient, and statistics that show a
collapse.
"""

from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import torch

from dataset.lm_dataset import Batch, batch_of_answers
from runtime.precision import sum_dtype
from runtime.processes import World, sum_over_processes

COIN = 1 << 20          # the coin's random stream, beside those of the ranks 0, 1, ...


class Rollout(NamedTuple):
    prompt: list[int]
    teacher_prompt: list[int]       # with privileged context it differs from the student's
    answer: Any                     # model.generate.Sampled
    route: int | None = None        # number of its teacher, if each prompt has its own


class WeightedBatch(NamedTuple):
    """A micro-batch, and the weight of each of its S tokens in the loss."""

    batch: Batch
    kd_weight: torch.Tensor | None = None       # (S,) of the divergence; None: 1
    ce_weight: torch.Tensor | None = None       # (S,) of -log q, the policy gradient; None: 0


def rounds(steps: range, sample_every: int) -> list[range]:
    """The steps in groups that end at multiples of sample_every: (2 ... 8, 4) -> 2 3 | 4 5 6 7 |
    8"""
    firsts = [step for step in steps if step == steps[0] or step % sample_every == 0]
    return [range(first, end) for first, end in zip(firsts, [*firsts[1:], steps.stop])]


def is_on_policy(step: int, seed: int, fraction: float) -> bool:
    """A biased coin that shows the same side on all processes."""
    return np.random.default_rng([seed, step, COIN]).random() < fraction


def rollout_batches(rollouts: list[Rollout], n_batches: int, device,
                    teacher_share: float | None) -> list[WeightedBatch]:
    """A step's rollouts as micro-batches of similar lengths. teacher_share: with MiniLLM's policy
    gradient."""
    rollouts = sorted(rollouts, key=lambda each: (each.route or 0,
                                                    len(each.prompt) + len(each.answer.tokens)))
    weights = [()] * len(rollouts)
    if teacher_share is not None:
        weights = policy_gradient([rollout.answer for rollout in rollouts], teacher_share)
    batches = []
    for part in np.array_split(np.arange(len(rollouts)), n_batches):
        prompts, teacher_prompts, sampled, routes = zip(*(rollouts[i] for i in part))
        answers = [answer.tokens for answer in sampled]
        batch = batch_of_answers(prompts, answers, routes)
        batch = batch._replace(teacher=batch_of_answers(teacher_prompts, answers)).to(device)
        token_weights = (torch.cat(each).to(device) for each in zip(*(weights[i] for i in part)))
        batches.append(WeightedBatch(batch, *token_weights))
    return batches


def count_step(batches: list[WeightedBatch], world: World) -> list[WeightedBatch]:
    """The batches with the number of targets and samples of the whole optimizer step, over all
    processes."""
    n_targets = torch.tensor(sum(len(each.batch.targets) for each in batches), device=world.device)
    n_targets = sum_over_processes(n_targets).item()
    n_samples = world.size * sum(len(each.batch.lengths) for each in batches)
    return [each._replace(batch=each.batch._replace(step_targets=n_targets, step_samples=n_samples))
            for each in batches]


def policy_gradient(sampled: list, teacher_share: float) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """MiniLLM's weights of the divergence and of -log q at each token of each answer, w and w (R -
    baseline): (T,), (T,).

    w[t] = q / (share p + (1 - share) q) of the sampled token: the importance weight for the
    teacher's share in the sampling mixture. R[t] is the mean of log p - log q over the tokens after
    t, 0 for the last. The baseline is the mean R of the other answers: it leaves the expected
    gradient unchanged and reduces its variance.

    Gu et al. 2023 (MiniLLM), https://arxiv.org/abs/2306.08543, Sec. 2.2.
    """
    gaps = [torch.tensor(answer.log_p) - torch.tensor(answer.log_q) for answer in sampled]
    returns = [(gap.flip(0).cumsum(0).flip(0) - gap)[:-1] / torch.arange(len(gap) - 1, 0, -1)
               for gap in gaps]                                                     # (T - 1,)
    total, n = sum(R.sum() for R in returns), sum(map(len, returns))
    weights = []
    for gap, R in zip(gaps, returns):
        weight = 1 / (teacher_share * gap.exp() + 1 - teacher_share)
        baseline = (total - R.sum()) / max(1, n - len(R))
        weights.append((weight, weight * torch.cat([R - baseline, torch.zeros(1)])))
    return weights


# A student that learns from its own text may collapse: answers get shorter or never end, entropy
# falls, text repeats.


def rollout_stats(rollouts: list[Rollout], age: int) -> Counter:
    """Sums over the answers of one step, on this process. age: by how many steps they are stale."""
    answers = [rollout.answer for rollout in rollouts]
    return Counter({"answers": len(answers), "age": age * len(answers),
                    "tokens": sum(len(answer.tokens) for answer in answers),
                    "entropy": sum(sum(answer.entropy) for answer in answers),
                    "repetition": sum(repetition(answer.tokens) for answer in answers),
                    "finished": sum(answer.finished for answer in answers)})


def mean_stats(stats: Counter, device) -> dict[str, float]:
    """Such sums over all processes as means: entropy in nats per token, length in tokens, age in
    steps, the others as fractions. Empty without rollouts."""
    names = ("answers", "tokens", "entropy", "repetition", "finished", "age")
    sums = torch.tensor([stats[name] for name in names], dtype=sum_dtype(device), device=device)
    n, n_tokens, entropy, repeated, finished, age = sum_over_processes(sums).tolist()
    return {} if n == 0 else {"length": n_tokens / n, "entropy": entropy / n_tokens,
                              "repetition": repeated / n, "finished": finished / n, "age": age / n}


def repetition(tokens: list[int], n: int = 4) -> float:
    """The fraction of an answer's n-grams that occurred in it before. Welleck et al. 2019,
    https://arxiv.org/abs/1908.04319, Sec. 6.1, seq-rep-n."""
    grams = [tuple(tokens[i:i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def as_line(rollout: Rollout, tokenizer) -> str:
    prompt, answer = tokenizer.decode(rollout.prompt), tokenizer.decode(rollout.answer.tokens)
    return f"    {prompt[-200:]!r} -> {answer[:200]!r}"
