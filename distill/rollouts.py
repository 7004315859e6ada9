"""
学生自己写的回答：奖励、特权提示、策略梯度的权重，以及学生是否在退化的指标。
Rollouts, the student's own answers: rewards, privileged prompts, the weights of the policy
gradients, and statistics that show a collapse.
"""

import runpy
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dataset.formats import check_exists, is_right
from dataset.lm_dataset import Batch, batch_of_answers
from distill.fused import token_log_probs
from runtime.log import Logger
from runtime.precision import sum_dtype
from runtime.processes import World, sum_over_processes

COIN = 1 << 20          # the coin's random stream, beside those of the ranks 0, 1, ...


class Rollout(NamedTuple):
    prompt: list[int]
    teacher_prompt: list[int]       # with privileged context it differs from the student's
    answer: Any                     # model.generate.Sampled
    gold: tuple | list = ()         # the data's answer, as ids
    reward: float = np.nan
    advantage: float = 0.0          # the reward, normalised over the answers to the prompt
    kd_weight: float = 1.0          # of the teacher
    route: int | None = None        # number of its teacher, if each prompt has its own


class WeightedBatch(NamedTuple):
    """A micro-batch, and what the loss needs at each of its S tokens."""

    batch: Batch
    kd_weight: torch.Tensor | None = None       # (S,) of the divergence; None: 1
    ce_weight: torch.Tensor | None = None       # (S,) of -log q in MiniLLM; None: 0
    log_q: torch.Tensor | None = None           # (S,) of each token when it was sampled
    advantage: torch.Tensor | None = None       # (S,) of the reward


def rounds(steps: range, sample_every: int) -> list[range]:
    """The steps in groups that end at multiples of sample_every: (2 ... 8, 4) -> 2 3 | 4 5 6 7 |
    8"""
    firsts = [step for step in steps if step == steps[0] or step % sample_every == 0]
    return [range(first, end) for first, end in zip(firsts, [*firsts[1:], steps.stop])]


def is_on_policy(step: int, seed: int, fraction: float) -> bool:
    """A biased coin that shows the same side on all processes."""
    return np.random.default_rng([seed, step, COIN]).random() < fraction


def rollout_batches(rollouts: list[Rollout], n_batches: int, device, data=None,
                    teacher_share: float | None = None) -> list[WeightedBatch]:
    """A step's rollouts as micro-batches of similar lengths. teacher_share: with MiniLLM's policy
    gradient. data: of the prompts; it knows the teacher's tokenizer if that is another."""
    rollouts = sorted(rollouts, key=lambda each: (each.route or 0,
                                                  len(each.prompt) + len(each.answer.tokens)))
    ones = [torch.ones(len(each.answer.tokens)) for each in rollouts]
    kd_weights = ce_weights = None
    if teacher_share is not None:
        kd_weights, ce_weights = policy_gradient([each.answer for each in rollouts], teacher_share)
    elif any(each.kd_weight != 1 for each in rollouts):
        kd_weights = [each.kd_weight * one for each, one in zip(rollouts, ones)]
    of_tokens = (kd_weights, ce_weights, [torch.tensor(each.answer.log_q) for each in rollouts],
                 [each.advantage * one for each, one in zip(rollouts, ones)])
    batches = []
    for part in np.array_split(np.arange(len(rollouts)), n_batches):
        prompts, teacher_prompts, sampled, *_, routes = zip(*(rollouts[i] for i in part))
        answers = [answer.tokens for answer in sampled]
        batch = batch_of_answers(prompts, answers, routes)
        if data and data.shared:
            answers = [*map(data.retold, teacher_prompts, answers)]
        its = batch_of_answers(teacher_prompts, answers)
        batch = (data.matched(batch, its) if data else batch._replace(teacher=its)).to(device)
        batches.append(WeightedBatch(batch, *(
            each if each is None else torch.cat([each[i] for i in part]).to(device)
            for each in of_tokens)))
    return batches


def count_step(batches: list[WeightedBatch], world: World) -> list[WeightedBatch]:
    """The batches with the number of targets and samples of the whole optimizer step, over all
    processes."""
    n_targets = torch.tensor(sum(len(each.batch.targets) for each in batches), device=world.device)
    n_targets = sum_over_processes(n_targets).item()
    n_samples = world.size * sum(len(each.batch.lengths) for each in batches)
    return [each._replace(batch=each.batch._replace(step_targets=n_targets, step_samples=n_samples))
            for each in batches]


def load_reward(rule: str):
    """A function reward(question, answer, gold) of texts, and whether it is normalised. rule:
    "answer", or a Python file with `reward`, and with `normalise = False` if it is not."""
    if rule == "answer":
        return lambda question, answer, gold: is_right(answer, gold), True
    check_exists(Path(rule))
    names = runpy.run_path(rule)
    if "reward" not in names:
        raise ValueError(f"{rule} has no function reward(question, answer, gold)")
    return names["reward"], names.get("normalise", True)


def grade(group, reward, tokenizer, privileged, max_length) -> list[Rollout]:
    """The Rollouts of one prompt with rewards, advantages, and the teacher's privileged prompts.

    reward          of load_reward, or None. Advantages have mean 0 and standard deviation 1 in the
                    group; those of equal rewards are 0. Shao et al. 2024 (GRPO),
                    https://arxiv.org/abs/2402.03300, Sec. 4.1.2
    privileged      the teacher's prompt shows the data's "answer", or the next right "sibling"
                    (reward above 0). Without one, or beyond max_length, the teacher has weight 0
    """
    def text(ids):
        return tokenizer.decode(token for token in ids if token != tokenizer.end_of_turn)

    if reward:
        function, normalise = reward
        header, end = tokenizer.chat.user.split("{content}")
        question = tokenizer.decode(group[0].prompt).rpartition(header)[2].partition(end)[0]
        rewards = np.array([float(function(question, text(each.answer.tokens), text(each.gold)))
                            for each in group])
        # Equal rewards may have a standard deviation, of rounding errors.
        spread = rewards.std() if rewards.min() < rewards.max() else np.inf
        advantages = (rewards - rewards.mean()) / spread if normalise else rewards
        group = [each._replace(reward=float(value), advantage=float(advantage))
                 for each, value, advantage in zip(group, rewards, advantages)]
    if privileged is None:
        return group
    graded = []
    for i, rollout in enumerate(group):
        answers = [rollout.gold] if privileged == "answer" else [
            each.answer.tokens for each in (*group[i + 1:], *group[:i])
            if each.reward > 0 and each.answer.finished]
        prompts = (asked_again(rollout.teacher_prompt, answer, tokenizer) for answer in answers)
        prompts = (prompt for prompt in prompts
                   if len(prompt) + len(rollout.answer.tokens) <= max_length)
        shown = next(prompts, None)
        graded.append(rollout._replace(kd_weight=0.0) if shown is None else
                      rollout._replace(teacher_prompt=shown))
    return graded


def asked_again(prompt: list[int], answer: list[int], tokenizer) -> list[int]:
    """The prompt after an earlier exchange in which it was answered."""
    end = tokenizer.encode(tokenizer.chat.assistant.split("{content}")[1], allow_special=True)
    again = prompt[1:] if prompt[0] == tokenizer.bos else prompt
    return [*prompt, *answer, *end[1:], *again]         # the answer has the end of turn, end[0]


def policy_loss(final, head, weighted: WeightedBatch, teacher, T, W):
    """Loss of a policy gradient, {"kd": estimate of KL(q || p)}; sums over S.

        advantage = (1 - W) (log p - log q when sampled) + W r       loss = -advantage log q

    final, head     (S, D), (V, D) of the student; gradients flow
    teacher         [Dense], several if they are routed, or [] where W = 1
    T, W            temperature of the sampling, weight of the reward
    """
    targets, advantage, terms = weighted.batch.targets, W * weighted.advantage, {}
    if teacher:
        with torch.no_grad():
            log_p = torch.cat([token_log_probs(one.states, one.head,
                                               targets[one.begin:one.begin + len(one.states)], T)
                               for one in teacher])
        gap = (log_p - weighted.log_q) * (1 if weighted.kd_weight is None else weighted.kd_weight)
        advantage, terms["kd"] = advantage + (1 - W) * gap, -gap.sum()
    return -(advantage * token_log_probs(final, head, targets, T)).sum(), terms


def policy_gradient(sampled: list, teacher_share: float):
    """MiniLLM's weights of the divergence and of -log q at each token of each answer, w and w (R -
    baseline): two lists of (T,).

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
    baselines = [(total - R.sum()) / max(1, n - len(R)) for R in returns]
    weights = [1 / (teacher_share * gap.exp() + 1 - teacher_share) for gap in gaps]
    return weights, [w * torch.cat([R - baseline, torch.zeros(1)])
                     for w, R, baseline in zip(weights, returns, baselines)]


# A student that learns from its own text may collapse: answers get shorter or never end, entropy
# falls, text repeats.
STATS = "length", "entropy", "repetition", "finished", "age", "reward"


def rollout_stats(rollouts: list[Rollout], age: int) -> Counter:
    """Sums over the answers of one step, on this process. age: by how many steps they are stale."""
    answers = [rollout.answer for rollout in rollouts]
    return Counter({"answers": len(answers), "age": age * len(answers),
                    "length": sum(len(answer.tokens) for answer in answers),
                    "entropy": sum(sum(answer.entropy) for answer in answers),
                    "repetition": sum(repetition(answer.tokens) for answer in answers),
                    "finished": sum(answer.finished for answer in answers),
                    "reward": sum(rollout.reward for rollout in rollouts)})


def mean_stats(stats: Counter, device) -> dict[str, float]:
    """Such sums over all processes as means: entropy in nats per token, length in tokens, age in
    steps, the others as fractions. Empty without rollouts, and without a reward if there is none.
    """
    sums = torch.tensor([stats[name] for name in ("answers", *STATS)], dtype=sum_dtype(device),
                        device=device)
    n, n_tokens, *sums = sum_over_processes(sums).tolist()
    means = {name: value / (n_tokens if name == "entropy" else n)
             for name, value in zip(STATS, [n_tokens, *sums]) if n}
    return {name: value for name, value in means.items() if not np.isnan(value)}


def warn_of_collapse(means: dict, memory: dict):
    """Once per run, when the entropy is near 0 and far below that of the first row of the log, in
    nats per token. memory: what a resume file keeps."""
    if means and means["entropy"] < min(
            0.05, 0.1 * memory.setdefault("entropy", means["entropy"])):
        memory["entropy"] = 0.0         # nothing is below it
        Logger(f"*** entropy of {means['entropy']:.2g} nats per token: the student samples hardly "
               "anything new. A higher --generation_temperature explores more ***")


def repetition(tokens: list[int], n: int = 4) -> float:
    """The fraction of an answer's n-grams that occurred in it before. Welleck et al. 2019,
    https://arxiv.org/abs/1908.04319, Sec. 6.1, seq-rep-n."""
    grams = [tuple(tokens[i:i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def as_line(rollout: Rollout, tokenizer) -> str:
    prompt, answer = tokenizer.decode(rollout.prompt), tokenizer.decode(rollout.answer.tokens)
    return f"{prompt[-200:]!r} -> {answer[:200]!r}"
