"""
生成：带键值缓存的逐词元采样；写完的行离开，新的提示进来（连续批处理）。
Generation: sampling token by token with a KV cache, for any number of prompts of different lengths.
Continuous batching: a finished sequence is replaced by the next prompt.
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
    """On a CPU, store matrices with more outputs than inputs by columns, in place. Do not train it.

    A product with one row then adds up columns, which a CPU does faster than summing up rows (AVX2:
    512 -> 6,400 in 0.49 ms instead of 0.95; 512 -> 1,408 in 0.15 instead of 0.21). With many rows
    it makes no difference, and for 1,408 -> 512 it does not help.
    """
    for linear in model.modules():
        if isinstance(linear, nn.Linear) and linear.out_features > linear.in_features:
            if linear.weight.device.type == "cpu":
                linear.weight.data = linear.weight.data.T.contiguous().T
    return model


def choose(logits, temperature=0.0, top_k=0, top_p=1.0, generator=None):  # (B, V) -> (B,)
    """One token per row.

    temperature     0 is greedy decoding; 1 samples from the model's distribution
    top_k           keep the k most likely tokens; 0 keeps all
    top_p           keep the smallest set of tokens whose probabilities reach p; 1 keeps all.
                    Holtzman et al. 2019, https://arxiv.org/abs/1904.09751
    """
    if temperature == 0.0:
        return logits.max(dim=-1).indices       # argmax does the same in three times the time
    logits, V, order = logits.float() / temperature, logits.shape[-1], None
    if top_k or top_p < 1.0:
        logits, order = logits.topk(min(top_k or V, V))                     # (B, k), decreasing
    p = logits.softmax(dim=-1)
    if top_p < 1.0:
        before = p.cumsum(dim=-1) - p                       # probability of all more likely tokens
        p = p.masked_fill(before >= top_p, 0.0)
    # The tokens divide [0, sum of p) into intervals of length p. A uniform number per row lies in
    # one of them. multinomial draws V of them: 8 ms for 64 rows of 6,400 tokens instead of 0.3.
    ends = p.cumsum(dim=-1)
    point = torch.rand(len(p), 1, device=p.device, generator=generator) * ends[:, -1:]
    chosen = torch.searchsorted(ends, point, right=True)                    # (B, 1)
    return (chosen if order is None else order.gather(1, chosen)).squeeze(1)


class Guide(NamedTuple):
    """A second model with prompts of its own. Tokens are sampled from the mixture
    share * guide + (1 - share) * model, the teacher-mixed sampling of Gu et al. 2023 (MiniLLM),
    https://arxiv.org/abs/2306.08543, Sec. 2.2."""

    model: Transformer              # or model.lora.WithoutAdapters
    prompts: list[list[int]]
    share: float


class Step(NamedTuple):
    """One more token for each of n sequences."""

    indices: list[int]                  # n, index of the prompt
    tokens: list[int]                   # n
    done: list[bool]                    # n, whether this was the sequence's last token
    logits: list[torch.Tensor]          # (n, V) of the model, then of the guide, if any


@torch.no_grad()
def generate_steps(model: Transformer, prompts: list[list[int]], max_new_tokens: int | list[int],
                   stop: int | None = None, rows: int = 64, dtype: torch.dtype | None = None,
                   guide: Guide | None = None, any_busy=bool, **sampling) -> Iterator[Step]:
    """Each forward pass gives one token: the first of new prompts, or the next of all active rows.

    prompts         token ids, at least one each
    max_new_tokens  maximum length of an answer, one for all or one for each; prompt and answer
                    together must fit into max_seq_len
    stop            token that ends an answer
    rows            maximum number of sequences generated at a time
    dtype           of the KV cache, that of the matrix products; None: of the weights
    any_busy        bool, or for a sharded model, whose processes must run each forward pass
                    together: called with whether this process has work, returns whether any process
                    has. A process without work runs the pass on a dummy token
    sampling        temperature, top_k, top_p, generator: see `choose`

    Raises ValueError for a prompt without tokens or without room for an answer.
    """
    models = [model] if guide is None else [model, guide.model]
    sides = [prompts] if guide is None else [prompts, guide.prompts]
    single = isinstance(max_new_tokens, int)
    limits = [max_new_tokens] * len(prompts) if single else list(max_new_tokens)
    for each, texts in zip(models, sides):
        room = [each.config.max_seq_len - len(text) for text in texts]
        if not all(texts) or min(room, default=1) < 1:
            raise ValueError("each prompt needs at least one token, and room for an answer within "
                             f"max_seq_len={each.config.max_seq_len}")
        limits = [*map(min, limits, room)]

    capacities = [max((len(text) + limit for text, limit in zip(texts, limits)), default=0)
                  for texts in sides]
    # Sorted, because prompts of the same length share an attention call.
    waiting = deque(sorted(range(len(prompts)), key=lambda i: len(prompts[i])))
    rows = min(rows, len(prompts))
    active, left = ActiveRows(models, rows, capacities, dtype), dict(enumerate(limits))
    # Inference mode saves a sixth of the time of small steps. But a sharded model may keep what it
    # gathers for the next training step, whose backward pass refuses inference tensors.
    without_gradients = torch.inference_mode if any_busy is bool else torch.no_grad
    while any_busy(bool(waiting or active.owners)):
        # 1. Forward passes: fill free rows with new prompts, a quarter of the rows at a time; or
        #    continue all rows
        free = rows - len(active.owners)
        with without_gradients():
            if waiting and free >= min(len(waiting), -(-rows // 4)):
                new = [waiting.popleft() for _ in range(min(free, len(waiting)))]
                first, logits = active.begin(new, [[texts[i] for i in new] for texts in sides])
            elif active.owners:
                first, logits = active.advance()
            else:
                for each in models:
                    each(torch.zeros(1, dtype=torch.long, device=active.device), [1])
                continue

        # 2. Sample
        mixture = logits[0]
        if guide is not None:
            log_q, log_p = (one.float().log_softmax(dim=-1) for one in logits)
            mixture = torch.logaddexp(log_p + math.log(guide.share),
                                      log_q + math.log1p(-guide.share))
        tokens = active.newest[first:] = choose(mixture, **sampling).tolist()

        # 3. Remove finished rows
        indices = active.owners[first:]
        for i in indices:
            left[i] -= 1
        done = [token == stop or left[i] < 1 for i, token in zip(indices, tokens)]
        yield Step(indices, tokens, done, logits)
        active.remove([first + n for n, is_done in enumerate(done) if is_done])


class ActiveRows:
    """The sequences that are being generated, a row each in the KV cache of each model.

    owners      whose sequence each row is: anything, such as the index of a prompt
    newest      the last token of each row; whoever samples it writes it here
    """

    def __init__(self, models, n_rows: int, capacities: list[int], dtype=None):
        self.models, self.device = models, next(models[0].parameters()).device
        dtype = dtype or models[0].norm.weight.dtype
        self.caches = [KVCache(model.config, n_rows, capacity, self.device, dtype)
                       for model, capacity in zip(models, capacities)]
        self.owners, self.newest = [], []

    def begin(self, owners: list, sides: list[list[list[int]]]):
        """New rows at the end, with the prompts that each model reads. Returns the first of them,
        and each model's logits of what comes next."""
        first = len(self.owners)
        self.owners += owners
        self.newest += [None] * len(owners)
        return first, self._forward(first, sides)

    def advance(self):
        """The same for the newest token of all rows."""
        return 0, self._forward(0, [[[token] for token in self.newest]] * len(self.models))

    def _forward(self, first, sides) -> list[torch.Tensor]:     # (n, V) of each model
        logits = []
        for model, cache, texts in zip(self.models, self.caches, sides):
            lengths = [len(text) for text in texts]
            tokens = torch.tensor([token for text in texts for token in text], device=self.device)
            ends = [end - 1 for end in accumulate(lengths)]         # last token of each text
            at = torch.tensor(ends, device=self.device) if len(tokens) > len(texts) else None
            rows = cache.rows(first, len(self.owners))
            logits.append(model(tokens, lengths, at=at, cache=rows).logits)
        return logits

    def remove(self, rows: list[int]):
        for row in sorted(rows, reverse=True):
            for cache in self.caches:
                cache.drop(row, len(self.owners))       # the last row moves here
            self.owners[row], self.newest[row] = self.owners[-1], self.newest[-1]
            del self.owners[-1], self.newest[-1]


class Sampled(NamedTuple):
    """An answer, with the model's distribution at each of its tokens."""

    tokens: list[int]           # ends with the stop token if it was sampled
    finished: bool              # whether it was
    entropy: list[float]        # of the model's distribution, in nats
    log_q: list[float]          # log-probability under the model, at log_q_temperature, untruncated
    log_p: list[float]          # log-probability under the guide; empty without one


def sample(model: Transformer, prompts: list[list[int]], max_new_tokens: int | list[int],
           stop: int | None = None, log_q_temperature: float = 1.0,
           **options) -> Iterator[tuple[int, Sampled]]:
    """(index of the prompt, its answer), in the order in which they finish. Other arguments as in
    `generate_steps`."""
    answers = [Sampled([], False, [], [], []) for _ in prompts]
    for step in generate_steps(model, prompts, max_new_tokens, stop, **options):
        log_q, *log_p = (logits.float().log_softmax(dim=-1) for logits in step.logits)
        at = torch.tensor(step.tokens, device=log_q.device)[:, None]
        entropy = -torch.linalg.vecdot(log_q.exp(), log_q)
        if log_q_temperature != 1.0:
            log_q = (log_q / log_q_temperature).log_softmax(dim=-1)
        stats = torch.stack([entropy, *(log.gather(1, at).squeeze(1) for log in (log_q, *log_p))])
        for i, token, done, *values in zip(step.indices, step.tokens, step.done, *stats.tolist()):
            answer = answers[i]
            answer.tokens.append(token)
            for each, value in zip((answer.entropy, answer.log_q, answer.log_p), values):
                each.append(value)
            if done:
                yield i, answer._replace(finished=token == stop)


def generate(model: Transformer, prompts: list[list[int]], max_new_tokens: int | list[int],
             stop: int | None = None, **options) -> list[list[int]]:
    """The answers' ids, without the stop token. Arguments as in `generate_steps`."""
    answers = [[] for _ in prompts]
    for step in generate_steps(model, prompts, max_new_tokens, stop, **options):
        for i, token in zip(step.indices, step.tokens):
            if token != stop:
                answers[i].append(token)
    return answers
