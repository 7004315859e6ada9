"""
打分：模型认为一段给定的回答有多可能。准确率、选择题、困惑度都由它而来。
Scoring: how likely a model finds a given answer. Accuracy, multiple choice and perplexity all come from this.
"""

from typing import NamedTuple

import numpy as np
import torch

from dataset.lm_dataset import packed_batch
from distill.losses import forward_kl


LOGIT_BYTES = 256 << 20     # of one block of logits; whole batches of 150,000 words would take gigabytes


class Score(NamedTuple):
    """Of the targets in one sample: the assistant's tokens, their ends of turn among them; in a text all but the first."""

    log_p: float            # log-probability of them all, in nats
    n_tokens: int
    exact: bool             # each is the likeliest one: greedy decoding would write just this
    agree: int              # at how many of them the reference model has the same likeliest token
    kl: list[float]         # KL(reference || model) at each of them, in nats
    positions: list[int]    # where each stands in its turn: 1, 2, ..., and from 1 again in the next turn


def score(model, tokenizer, conversations, reference=None, tokens_per_batch: int = 4096) -> list[Score]:
    """One Score per conversation, in their order. Answers are forced, not generated: if every arg-max is right after
    the right words before it, greedy decoding gives the same answer, and this way is some 50 times cheaper.

    conversations   message lists; each must fit into the model's max_seq_len, or ValueError names the first that does not
    reference       a model of the same vocabulary, for `agree` and `kl`; None leaves them 0
    """
    return score_samples(model, tokenizer.encode_chats(conversations), reference, tokens_per_batch)


def score_answers(model, tokenizer, questions) -> list[list[float]]:
    """Log-probability of each candidate answer: [(question, [answer, ...]), ...] -> one list of nats a question."""
    conversations = [[{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                     for question, answers in questions for answer in answers]
    log_p = iter([s.log_p for s in score(model, tokenizer, conversations)])
    return [[next(log_p) for _ in answers] for _, answers in questions]


@torch.inference_mode()
def score_samples(model, samples, reference=None, tokens_per_batch: int = 4096) -> list[Score]:
    """The same for samples that are tokens already: [(ids, which of them are targets), ...]."""
    sizes = np.array([len(ids) for ids, _ in samples])
    limit = model.config.max_seq_len
    if len(sizes) and sizes.max() - 1 > limit:
        raise ValueError(f"sample {sizes.argmax() + 1} has {sizes.max() - 1} tokens, more than the model's "
                         f"max_seq_len={limit}")
    device = next(model.parameters()).device
    order, scores, start = np.argsort(sizes, kind="stable"), [None] * len(samples), 0
    for end in range(1, len(order) + 1):
        if end < len(order) and sizes[order[start:end + 1]].sum() <= tokens_per_batch:
            continue
        chosen, start = order[start:end], end
        batch = packed_batch(np.concatenate([samples[i][0] for i in chosen]),
                           np.concatenate([samples[i][1] for i in chosen]), sizes[chosen]).to(device)
        states = model(batch.tokens, batch.lengths, at=batch.at, with_logits=False).final            # (S, D)
        taught = states if reference in (None, model) else reference(batch.tokens, batch.lengths, at=batch.at, with_logits=False).final
        rows = max(1, LOGIT_BYTES // (4 * model.config.vocab_size))
        blocks = zip(states.split(rows), taught.split(rows), batch.targets.split(rows))
        per_token = torch.cat([score_block(model, reference, *block) for block in blocks], dim=1).cpu()     # (4, S)
        positions = [positions_in_turns(samples[i][1][1:]) for i in chosen]
        for i, at, (p, hit, same, gap) in zip(chosen, positions, per_token.split([len(at) for at in positions], dim=1)):
            scores[i] = Score(float(p.sum()), len(at), bool(hit.all()), int(same.sum()), gap.tolist(), at)
    return scores


def score_block(model, reference, states, taught, targets):  # (S, D), (S, D'), (S,) -> (4, S)
    """At each position: log-probability of the target, whether it is the likeliest, agreement and KL."""
    logits = model.output(states).float()
    log_p, best = logits.log_softmax(dim=-1), logits.argmax(dim=-1)
    right = log_p.gather(1, targets[:, None]).squeeze(1)
    agree, kl = torch.zeros_like(right), torch.zeros_like(right)
    if reference is not None:
        logits = reference.output(taught).float()
        agree, kl = (logits.argmax(dim=-1) == best).float(), forward_kl(logits.log_softmax(dim=-1), log_p)
    return torch.stack([right, (best == targets).float(), agree, kl])


def positions_in_turns(targets: list[bool]) -> list[int]:
    """The position of each target among those it follows without a break: . x x . x -> 1 2 1"""
    positions, position = [], 0
    for is_target in targets:
        position = position + 1 if is_target else 0
        if is_target:
            positions.append(position)
    return positions
