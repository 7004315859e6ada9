"""
生成：带键值缓存的逐词采样；写完的行离开，新的提示进来。
Generation: sampling token by token with a key/value cache, for prompts of unequal length, in any number: a row that is
done leaves, and a new prompt takes its place.

    column_major       a model made ready for it
    generate         prompts -> answers
    sample           the same one by one, as they are done, with what the model thought of each token
    generate_steps   what both are made of, token by token, for who wants to look on
"""

import math
from collections import deque
from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import nn


from model.transformer import KVCache, Transformer


def column_major(model: Transformer) -> Transformer:
    """The same model, on a CPU its matrices with more outputs than inputs laid column by column in memory. Not for training.

    A product with one row then adds up columns, which a CPU reads faster than it sums up rows (AVX2: 512 -> 6,400 in
    0.49 ms instead of 0.95; 512 -> 1,408 in 0.15 instead of 0.21). With many rows it makes no difference, and the other way
    round, 1,408 -> 512, it does not pay.
    """
    for linear in model.modules():
        if isinstance(linear, nn.Linear) and linear.out_features > linear.in_features and linear.weight.device.type == "cpu":
            linear.weight.data = linear.weight.data.T.contiguous().T
    return model


def choose(logits, temperature=0.0, top_k=0, top_p=1.0, generator=None):  # (B, V) -> (B,)
    """One token a row. temperature 0 is greedy; then top_k keeps the k likeliest (0: all), and top_p the smallest
    set whose probabilities reach p (Holtzman et al. 2019, https://arxiv.org/abs/1904.09751; 1.0: all)."""
    if temperature == 0.0:
        return logits.argmax(dim=-1)
    log_p = (logits.float() / temperature).log_softmax(dim=-1)
    if top_k:
        kth = log_p.topk(min(top_k, log_p.shape[-1])).values[:, -1:]
        log_p = log_p.masked_fill(log_p < kth, -torch.inf)
    if top_p < 1.0:
        p, order = log_p.softmax(dim=-1).sort(descending=True)
        before = p.cumsum(dim=-1) - p                       # what the likelier ones hold already; 0 for the first
        log_p = log_p.masked_fill((before >= top_p).scatter(1, order, before >= top_p), -torch.inf)
    return log_p.softmax(dim=-1).multinomial(1, generator=generator).squeeze(-1)


class Guide(NamedTuple):
    """A second model that has a say in what is drawn, under prompts of its own: share * its distribution + (1 - share) *
    the first one's. Gu et al. 2023 (MiniLLM), https://arxiv.org/abs/2306.08543, Sec. 2.2, teacher-mixed sampling."""

    model: Transformer              # or distill.teachers.Base
    prompts: list[list[int]]
    share: float


class Step(NamedTuple):
    """One more token of each of n rows."""

    indices: list[int]                  # n, which prompts they answer
    tokens: list[int]                   # n
    done: list[bool]                    # n, whether this was the row's last
    logits: list[torch.Tensor]          # (n, V) of the model, and (n, V) of the guide, if there is one


@torch.no_grad()
def generate_steps(model: Transformer, prompts: list[list[int]], max_new_tokens: int | list[int], stop: int | None = None,
                   rows: int = 64, dtype: torch.dtype | None = None, guide: Guide | None = None, vocab_size: int | None = None,
                   any_busy=bool, **sampling) -> Iterator[Step]:
    """Every pass through the model gives one token: the first of prompts that enter, or one more of all rows under way.

    prompts         token ids, at least one each, of any lengths
    max_new_tokens  at most, for all prompts or for each; prompt and answer together must fit into max_seq_len
    stop            the token that ends an answer
    rows            how many are under way at once, at most
    dtype           of the keys and values, which is that of the matrix products; None: of the weights
    vocab_size      only ids below this are sampled; those beyond are padding of the vocabulary. None: all
    any_busy        where a model is sharded over processes, all of them must pass through it together: told whether this
                    one has something to do, it says whether any has; one that has not passes through for company
    sampling        temperature, top_k, top_p, generator: see `choose`

    Raises ValueError for an empty prompt, one that leaves no room for an answer, and an answer without tokens.
    """
    models = [model] if guide is None else [model, guide.model]
    sides = [prompts] if guide is None else [prompts, guide.prompts]
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    for each, texts in zip(models, sides):
        sizes = [len(text) for text in texts]
        if texts and not 0 < min(sizes) <= max(sizes) < each.config.max_seq_len:
            raise ValueError(f"prompts of {min(sizes)} to {max(sizes)} tokens: each needs at least one token, and room for an "
                             f"answer within max_seq_len={each.config.max_seq_len}")
        limits = [min(limit, each.config.max_seq_len - size) for limit, size in zip(limits, sizes)]
    if min([rows, *limits]) < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} and rows={rows} must be 1 or more")

    device = next(model.parameters()).device
    rows = min(rows, len(prompts))
    dtype = dtype or model.norm.weight.dtype
    caches = [KVCache(each.config, rows, max((len(text) + limit for text, limit in zip(texts, limits)), default=0), device,
                      dtype) for each, texts in zip(models, sides)]
    waiting = deque(sorted(range(len(prompts)), key=lambda i: len(prompts[i])))     # neighbours of one length: one call
    active, newest = [], []                         # by row of the cache: which prompt it answers, and its last token
    left = dict(enumerate(limits))
    while any_busy(bool(waiting or active)):
        first, free = len(active), rows - len(active)
        if waiting and free >= min(len(waiting), -(-rows // 4)):                    # not for each row that has left alone
            active += [waiting.popleft() for _ in range(min(free, len(waiting)))]
            newest += [None] * (len(active) - first)
            inputs = [[texts[i] for i in active[first:]] for texts in sides]
        elif active:
            first, inputs = 0, [[[token] for token in newest]] * len(sides)
        else:
            for each in models:
                each(torch.zeros(1, dtype=torch.long, device=device), [1])
            continue
        logits = []
        for each, cache, texts in zip(models, caches, inputs):
            lengths = [len(text) for text in texts]
            tokens = torch.tensor([token for text in texts for token in text], device=device)
            ends = [end - 1 for end in accumulate(lengths)]                         # each text's last token
            at = torch.tensor(ends, device=device) if len(tokens) > len(texts) else None
            out = each(tokens, lengths, at=at, cache=cache.rows(first, len(active)))
            logits.append(out.logits[:, :vocab_size])                                    # (n, V)
        drawn_from = logits[0]
        if guide is not None:
            log_q, log_p = (one.float().log_softmax(dim=-1) for one in logits)
            drawn_from = torch.logaddexp(log_p + math.log(guide.share), log_q + math.log1p(-guide.share))
        newest[first:] = choose(drawn_from, **sampling).tolist()

        moved = active[first:]
        for i in moved:
            left[i] -= 1
        done = [token == stop or left[i] == 0 for i, token in zip(moved, newest[first:])]
        yield Step(moved, newest[first:], done, logits)
        for row in reversed([first + n for n, is_done in enumerate(done) if is_done]):
            for cache in caches:
                cache.drop(row, len(active))        # the last row takes its place
            active[row], newest[row] = active[-1], newest[-1]
            del active[-1], newest[-1]


class Sampled(NamedTuple):
    """An answer, and for each of its tokens what was thought of it when it was drawn."""

    tokens: list[int]           # the stop token is the last, if it was met
    finished: bool              # it was
    entropy: list[float]        # of the model's distribution there, in nats
    log_q: list[float]          # log-probability under the model as it is: temperature 1, nothing cut off
    log_p: list[float]          # log-probability under the guide, if there is one


def sample(model: Transformer, prompts: list[list[int]], max_new_tokens: int | list[int], stop: int | None = None,
           **how) -> Iterator[tuple[int, Sampled]]:
    """(index of the prompt, its answer) one by one, as they are done. Arguments as in `generate_steps`."""
    answers = [Sampled([], False, [], [], []) for _ in prompts]
    for step in generate_steps(model, prompts, max_new_tokens, stop, **how):
        log_q, *log_p = (logits.float().log_softmax(dim=-1) for logits in step.logits)
        at = torch.tensor(step.tokens, device=log_q.device)[:, None]
        thought = torch.stack([-torch.linalg.vecdot(log_q.exp(), log_q),
                               *(log.gather(1, at).squeeze(1) for log in (log_q, *log_p))])
        for i, token, done, *values in zip(step.indices, step.tokens, step.done, *thought.tolist()):
            answer = answers[i]
            answer.tokens.append(token)
            for each, value in zip((answer.entropy, answer.log_q, answer.log_p), values):
                each.append(value)
            if done:
                yield i, answer._replace(finished=token == stop)


def generate(model: Transformer, prompts: list[list[int]], max_new_tokens: int | list[int], stop: int | None = None,
             **how) -> list[list[int]]:
    """The answers' ids, without the stop token. Arguments as in `generate_steps`."""
    answers = [[] for _ in prompts]
    for step in generate_steps(model, prompts, max_new_tokens, stop, **how):
        for i, token in zip(step.indices, step.tokens):
            if token != stop:
                answers[i].append(token)
    return answers
