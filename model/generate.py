"""
生成：带键值缓存的逐词采样，一批提示可以长短不一。
Generation: sampling token by token with a key/value cache, for a batch of prompts of unequal length.
"""

from collections.abc import Iterator

import torch

from model.transformer import KVCache, Transformer


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


@torch.inference_mode()
def generate_steps(model: Transformer, prompts: list[list[int]], max_new_tokens: int, stop: int | None = None,
                   **sampling) -> Iterator[list[int | None]]:
    """Yields one list a step: the new token of each row, or None once that row has met `stop`.

    prompts         token ids, at least one each, of any lengths
    max_new_tokens  at most; prompt and answer together must fit into the model's max_seq_len
    sampling        temperature, top_k, top_p, generator: see `choose`

    Raises ValueError for an empty prompt, or one that leaves no room for an answer.
    """
    room = model.config.max_seq_len - max(map(len, prompts))
    if room < 1 or not all(prompts):
        raise ValueError(f"prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens: each needs at least "
                         f"one token, and room for an answer within max_seq_len={model.config.max_seq_len}")
    max_new_tokens = min(max_new_tokens, room)
    device = next(model.parameters()).device
    dtype = model.norm.weight.dtype
    lengths = [len(prompt) for prompt in prompts]
    cache = KVCache(model.config, len(prompts), max(lengths) + max_new_tokens, device, dtype)

    tokens = torch.tensor([token for prompt in prompts for token in prompt], device=device)
    ends = torch.tensor(lengths, device=device).cumsum(0) - 1               # each prompt's last token
    running = [True] * len(prompts)
    for _ in range(max_new_tokens):
        logits = model(tokens, lengths, at=ends, cache=cache).logits        # (B, V)
        tokens = choose(logits, **sampling)
        lengths, ends = [1] * len(prompts), None
        new = tokens.tolist()
        yield [token if alive and token != stop else None for token, alive in zip(new, running)]
        running = [alive and token != stop for token, alive in zip(new, running)]
        if not any(running):
            return


def generate(model: Transformer, prompts: list[list[int]], max_new_tokens: int, stop: int | None = None,
             **sampling) -> list[list[int]]:
    """The answers' ids, without the stop token. Arguments as in `generate_steps`."""
    answers = [[] for _ in prompts]
    for step in generate_steps(model, prompts, max_new_tokens, stop, **sampling):
        for answer, token in zip(answers, step):
            if token is not None:
                answer.append(token)
    return answers
