"""
打分：模型认为一段给定的回答有多可能。准确率、选择题、困惑度都由它而来。
Scoring: the probability of a given answer. Accuracy, multiple choice and perplexity derive from it.
"""

from typing import NamedTuple

import numpy as np
import torch

from dataset.lm_dataset import by_length, packed_batch
from distill.losses import forward_kl

LOGIT_BYTES = 256 << 20     # of a block of logits; a whole batch of 150,000 columns takes gigabytes


class Score(NamedTuple):
    """Of one sample's targets: the assistant's tokens and ends of turn, or a text's tokens."""
    log_p: float            # log-probability of all targets, nats
    n_tokens: int
    exact: bool             # all are top-1: greedy decoding would generate exactly them
    agree: int              # at how many the reference model has the same top-1 token
    kl: float               # sum over all of KL(reference || model), nats
    accepted: float         # sum over all, and over v, of min(p, q): drafts the reference accepts
    top_p: list[float]      # probability of the top-1 token at each
    right: list[bool]       # whether that is the target


def score(model, tokenizer, conversations, reference=None,
          tokens_per_batch: int = 4096) -> list[Score]:
    """One Score per conversation, in order, by teacher forcing: some 50 times faster than greedy
    decoding, which generates the same answer if each target is top-1 after the gold prefix.

    reference   a model with the same vocabulary, for `agree`, `kl`, `accepted`; None leaves them 0
    """
    return score_samples(model, tokenizer.encode_chats(conversations), reference, tokens_per_batch)


def score_answers(model, tokenizer, questions, per_token=False) -> list[list[float] | None]:
    """Nats per candidate answer, or per token of it: [(messages, [answer, ...]), ...] -> a list per
    question, or None where the question with its longest answer exceeds the model's max_seq_len."""
    samples = [tokenizer.encode_chats([*messages, {"role": "assistant", "content": answer}]
                                      for answer in answers) for messages, answers in questions]
    limit = model.config.max_seq_len + 1                    # the last token is not read
    fits = [max(len(ids) for ids, _ in answers) <= limit for answers in samples]
    scores = iter(score.log_p / score.n_tokens if per_token else score.log_p
                  for score in score_samples(model, [sample for answers, fit in zip(samples, fits)
                                                     if fit for sample in answers]))
    return [[next(scores) for _ in answers] if fit else None
            for answers, fit in zip(samples, fits)]


@torch.inference_mode()
def score_samples(model, samples, reference=None, tokens_per_batch: int = 4096) -> list[Score]:
    """The same for tokenised samples: [(ids, which of them are targets), ...]."""
    sizes = np.array([len(ids) for ids, _ in samples])
    limit = model.config.max_seq_len
    if len(sizes) and sizes.max() - 1 > limit:
        raise ValueError(f"sample {sizes.argmax() + 1} has {sizes.max() - 1} tokens, more than the "
                         f"model's max_seq_len={limit}")
    device = next(model.parameters()).device
    scores = [None] * len(samples)
    rows = max(1, LOGIT_BYTES // (4 * model.config.vocab_size))
    for chosen in by_length(sizes, tokens_per_batch):
        ids, is_target = (np.concatenate(part) for part in zip(*(samples[i] for i in chosen)))
        batch = packed_batch(ids, is_target, sizes[chosen]).to(device)
        inputs = dict(tokens=batch.tokens, lengths=batch.lengths, at=batch.at, with_logits=False)
        states = other = model(**inputs).final                                      # (S, D)
        if reference not in (None, model):
            other = reference(**inputs).final
        blocks = zip(states.split(rows), other.split(rows), batch.targets.split(rows))
        values = torch.cat([score_block(model, reference, *block) for block in blocks], dim=1).cpu()
        n_targets = [int(sum(samples[i][1][1:])) for i in chosen]
        for i, part in zip(chosen, values.split(n_targets, dim=1)):                 # (6, targets)
            log_p, top_p, hit, same, kl, accepted = part
            scores[i] = Score(float(log_p.sum()), len(hit), bool(hit.all()), int(same.sum()),
                              float(kl.sum()), float(accepted.sum()), top_p.tolist(),
                              hit.bool().tolist())
    return scores


def score_block(model, reference, states, other, targets):  # (S, D), (S, D'), (S,) -> (6, S)
    """At each position: log-probability of the target, probability of the top-1 token, whether that
    is the target, agreement, KL, sum over v of min(p, q)."""
    logits = model.logits(states).float()                                   # (S, V)
    log_q, best = logits.log_softmax(dim=-1), logits.argmax(dim=-1)
    found = [log_q.gather(1, targets[:, None]).squeeze(1), log_q.amax(dim=-1).exp(),
             (best == targets).float()]
    if reference is None:
        return torch.stack(found + 3 * [torch.zeros_like(found[0])])
    theirs, n = reference.logits(other).float(), min(model.n_tokens, reference.n_tokens)
    if n < max(model.n_tokens, reference.n_tokens):         # one has more special tokens
        theirs, logits = theirs[:, :n], logits[:, :n]
        log_q, best = logits.log_softmax(dim=-1), logits.argmax(dim=-1)
    log_p = theirs.log_softmax(dim=-1)
    return torch.stack(found + [(theirs.argmax(dim=-1) == best).float(), forward_kl(log_p, log_q),
                                torch.minimum(log_p, log_q).exp().sum(dim=-1)])
