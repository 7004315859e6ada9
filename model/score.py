"""
打分：模型认为一段给定的回答有多可能。准确率、选择题、困惑度都由它而来。
Scoring: how likely a model finds a given answer. Accuracy, multiple choice and perplexity all come from this.
"""

from typing import NamedTuple

import numpy as np
import torch

from dataset.lm_dataset import flat_batch
from distill.losses import forward_kl


class Score(NamedTuple):
    """Of the assistant's tokens in one conversation, their ends of turn among them."""

    log_p: float            # log-probability of them all, in nats
    n_tokens: int
    exact: bool             # each is the likeliest one: greedy decoding would write just this
    agree: int              # at how many of them the reference model has the same likeliest token
    kl: list[float]         # KL(reference || model) at each of them, in nats
    positions: list[int]       # where each stands in its turn: 1, 2, ..., and from 1 again in the next turn


@torch.inference_mode()
def score(model, tokenizer, conversations, reference=None, tokens_per_batch: int = 4096) -> list[Score]:
    """One Score per conversation, in their order. Answers are forced, not generated: if every arg-max is right after
    the right words before it, greedy decoding gives the same answer, and this way is some 50 times cheaper.

    conversations   message lists; each must fit into the model's max_seq_len, or ValueError names the first that does not
    reference       a model of the same vocabulary, for `agree` and `kl`; None leaves them 0
    """
    samples = tokenizer.encode_chats(conversations)
    sizes = np.array([len(ids) for ids, _ in samples])
    limit = model.config.max_seq_len
    if len(sizes) and sizes.max() - 1 > limit:
        raise ValueError(f"conversation {sizes.argmax() + 1} has {sizes.max() - 1} tokens, more than the model's "
                         f"max_seq_len={limit}")
    device = next(model.parameters()).device
    order, scores, start = np.argsort(sizes, kind="stable"), [None] * len(samples), 0
    for end in range(1, len(order) + 1):
        if end < len(order) and sizes[order[start:end + 1]].sum() <= tokens_per_batch:
            continue
        chosen, start = order[start:end], end
        batch = flat_batch(np.concatenate([samples[i][0] for i in chosen]),
                           np.concatenate([samples[i][1] for i in chosen]), sizes[chosen]).to(device)
        logits = model(batch.tokens, batch.lengths, at=batch.at).logits.float()             # (S, V)
        log_p = logits.log_softmax(dim=-1)
        best, right = logits.argmax(dim=-1), log_p.gather(1, batch.targets[:, None]).squeeze(1)
        agree, kl = torch.zeros_like(right), torch.zeros_like(right)
        if reference is not None:
            taught = reference(batch.tokens, batch.lengths, at=batch.at).logits.float()
            agree = (taught.argmax(dim=-1) == best).float()
            kl = forward_kl(taught.log_softmax(dim=-1), log_p)
        positions = [positions_in_turns(samples[i][1][1:]) for i in chosen]
        per_token = torch.stack([right, (best == batch.targets).float(), agree, kl]).cpu()  # (4, S)
        for i, at, (p, hit, same, gap) in zip(chosen, positions, per_token.split([len(at) for at in positions], dim=1)):
            scores[i] = Score(float(p.sum()), len(at), bool(hit.all()), int(same.sum()), gap.tolist(), at)
    return scores


def positions_in_turns(targets: list[bool]) -> list[int]:
    """The position of each target among those it follows without a break: . x x . x -> 1 2 1"""
    positions, position = [], 0
    for is_target in targets:
        position = position + 1 if is_target else 0
        if is_target:
            positions.append(position)
    return positions
